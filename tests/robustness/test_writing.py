"""Adapters, tasks and checkpoints whose writers are killed at every moment, or meet readers and other writers.

How many random kills of whole runs there are can be set: `KILLS=200 pytest tests/robustness/test_writing.py -s`.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from hf_hyperflow import AdaptedTask, HyperFlowAdapter
from hf_hyperflow.benchmark import runner
from hf_hyperflow.modeling.saving import DRAFT
from hf_hyperflow.training.checkpoints import load_checkpoint, save_checkpoint
from tests.benchmark import test_runner as benchmarks
from tests.helpers.benchmark_runs import with_known_costs
from tests.helpers.kills import ends_when_killed_before
from tests.helpers.tiny import tiny_adapter, tiny_processor
from tests.helpers.training_runs import Finished, die_after, make_ground, run, run_in_child
from tests.modeling.test_model_card import training_record
from tests.training import test_collector as collections
from tests.training import test_trainer as trainings

pytestmark = pytest.mark.slow

KILLS = int(os.environ.get("KILLS", "9"))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As in the children of these tests: a benchmark notes the number, and measures its costs for each anew."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


@pytest.fixture
def quick_path(tmp_path) -> Iterator[Path]:
    """A folder in memory if there is such: many saves take long on a disk, because each waits for it."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield Path(folder)


def kill_at_every_operation(
    folder: Path, save_old: Callable[[Path], Any], save_new: Callable[[Path], Any], see: Callable[[Path], Any]
) -> tuple[int, int]:
    """Save an old version, kill the saving of a new one before operation k, look what is there; for all k.

    Returns:
        How many readers saw the old and the new version. Nobody saw anything else.
    """
    for name in ("old", "new"):
        save_old(folder / name)
    save_new(folder / "new")
    old, new = see(folder / "old"), see(folder / "new")
    assert old != new
    seen = []
    while True:
        target, k = folder / "x", len(seen) + 1
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(folder / "old", target)
        if ends_when_killed_before(k, target, partial(save_new, target)):
            break
        if k % 3 == 0:  # whoever comes next may also be a writer
            shutil.copytree(target, folder / "copy")
            save_new(folder / "copy")
            assert see(folder / "copy") == new
            assert not (folder / "copy" / DRAFT).exists()
            shutil.rmtree(folder / "copy")
        seen.append(see(target))
        assert seen[-1] in (old, new), f"killed before operation {k}"
        assert not (target / DRAFT).exists()
    assert seen == sorted(seen, key=lambda version: version == new), "it never goes back"
    return seen.count(old), seen.count(new)


def freeze(state: dict[str, torch.Tensor]) -> dict[str, bytes]:
    return {name: tensor.detach().numpy().tobytes() for name, tensor in state.items()}


def see_adapter(folder: Path) -> tuple:
    adapter = HyperFlowAdapter.from_pretrained(folder)
    processor = adapter.processor and adapter.processor.to_dict()
    return freeze(adapter.state_dict()), adapter.training_record, processor, adapter.config.n_steps


def test_an_adapter_killed_before_every_operation(backbone, quick_path):
    """The new version has other weights, another config, and neither a training record nor a processor."""
    old, new = tiny_adapter(backbone), tiny_adapter(backbone, n_steps=7, processor=None)
    old.training_record = training_record()
    torch.nn.init.constant_(new.logit_scale, 2.0)
    counts = kill_at_every_operation(quick_path, old.save_pretrained, new.save_pretrained, see_adapter)
    print(f"adapter: {sum(counts)} kills, {counts[0]} old, {counts[1]} new")
    assert min(counts) > 20


def test_a_task_killed_before_every_operation(adapter, backbone, support, pixels, quick_path):
    old = adapter.adapt(backbone, support)
    new = adapter.adapt(backbone, {f"new {name}": images[:1] for name, images in support.items()})
    new.processor = None
    for task in (old, new):
        task.logits(pixels)

    def see(folder: Path) -> tuple:
        task = AdaptedTask.from_pretrained(folder, backbone)
        processor = task.processor and task.processor.to_dict()
        return task.theta.numpy().tobytes(), task.prototypes.numpy().tobytes(), task.class_names, processor

    counts = kill_at_every_operation(quick_path, old.save_pretrained, new.save_pretrained, see)
    print(f"task: {sum(counts)} kills, {counts[0]} old, {counts[1]} new")
    assert min(counts) > 10


def test_a_checkpoint_killed_before_every_operation(quick_path):
    """It takes the place of one of the same step, and an older and a later one are removed."""
    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(torch.nn.Linear(4, 4))

    def save(value: float, steps: tuple[int, ...], folder: Path) -> None:
        for step in steps:
            torch.nn.init.constant_(model.weight, value + step)
            save_checkpoint(accelerator, folder, step, {"value": value}, total_limit=3)

    def see(folder: Path) -> tuple:
        progress = load_checkpoint(accelerator, folder, "latest")
        names = sorted(path.name for path in folder.iterdir())
        return progress, model.weight.detach().numpy().tobytes(), names

    # Old ones are of steps 1, 2 and 3. The new run went on from step 1.
    counts = kill_at_every_operation(quick_path, partial(save, 0.0, (1, 2, 3)), partial(save, 0.5, (2,)), see)
    print(f"checkpoint: {sum(counts)} kills, {counts[0]} old, {counts[1]} new")
    assert min(counts) > 10


# Several at once

WRITER = """
import sys, torch
from hf_hyperflow import CheckpointError, HyperFlowAdapter
folder, first, last = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
adapter = HyperFlowAdapter.from_pretrained(folder)
print("ready", flush=True)
sys.stdin.readline()
saved = refused = 0
for number in range(first, last):
    torch.nn.init.constant_(adapter.logit_scale, number)
    adapter.training_record["number"] = number
    adapter.processor.size["shortest_edge"] = 1 + number
    try:
        adapter.save_pretrained(folder)
        saved += 1
    except CheckpointError as error:
        assert "another command is writing" in str(error), error
        refused += 1
print(saved, refused, flush=True)
"""


def start_writer(folder: Path, first: int, last: int, **environment: str) -> subprocess.Popen:
    """A process that saves versions first..last - 1 of an adapter, once it is told to."""
    command = [sys.executable, "-c", WRITER, str(folder), str(first), str(last)]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    variables = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    process = subprocess.Popen(command, text=True, env=variables, **pipes)
    assert process.stdout.readline() == "ready\n"
    return process


def see_number(folder: Path) -> int:
    """The version of an adapter, which all its files must agree on."""
    adapter = HyperFlowAdapter.from_pretrained(folder)
    numbers = {
        int(adapter.logit_scale.item()),
        adapter.training_record["number"],
        adapter.processor.size["shortest_edge"] - 1,
    }
    assert len(numbers) == 1, numbers
    return numbers.pop()


@pytest.fixture
def version_0(adapter, quick_path) -> Path:
    adapter.processor = tiny_processor()
    adapter.processor.size["shortest_edge"] = 1
    adapter.training_record = training_record() | {"number": 0}
    torch.nn.init.constant_(adapter.logit_scale, 0)
    adapter.save_pretrained(quick_path / "adapter")
    return quick_path / "adapter"


def test_a_reader_beside_150_saves(version_0):
    writer = start_writer(version_0, 1, 151)
    writer.stdin.write("go\n")
    writer.stdin.flush()
    numbers = []
    while writer.poll() is None:
        numbers.append(see_number(version_0))
    assert writer.stdout.read() == "150 0\n"
    numbers.append(see_number(version_0))
    print(f"{len(numbers)} loads beside 150 saves, {len(set(numbers))} versions seen")
    assert numbers == sorted(numbers)
    assert numbers[-1] == 150
    assert len(set(numbers)) > 10


def test_two_writers_with_different_folders_for_temporary_files(version_0, tmp_path):
    """Each save succeeds or is refused in clear words, and a reader never sees a mixture."""
    writers = []
    for number in (1, 2):
        (tmp_path / f"tmp{number}").mkdir()
        writers.append(
            start_writer(version_0, 1000 * number, 1000 * number + 40, TMPDIR=str(tmp_path / f"tmp{number}"))
        )
    for writer in writers:
        writer.stdin.write("go\n")
        writer.stdin.flush()
    n_loads = 0
    while any(writer.poll() is None for writer in writers):
        see_number(version_0)
        n_loads += 1
    counts = [tuple(map(int, writer.stdout.read().split())) for writer in writers]
    print(f"saved and refused: {counts}; {n_loads} loads beside them")
    assert all(saved + refused == 40 for saved, refused in counts)
    assert all(saved > 0 for saved, _ in counts)
    assert see_number(version_0) >= 1000
    assert not (version_0 / DRAFT).exists()


# Random kills of whole runs


def kill_and_resume(
    n_kills: int, start: Callable[[Path, Any], Finished], compare: Callable[[Path], None], folder: Path
) -> int:
    """Kill runs at random moments and resume them, until so many were killed and the last has come to its end.

    Args:
        start: begins or resumes a run in a folder, with a fault.
        compare: checks a run that has ended.

    Returns:
        How many runs came to their end; every one of them was compared.
    """
    generator, n_killed, n_ended = random.Random(0), 0, 0
    started = time.perf_counter()
    assert start(folder / "timed", None).exitcode == 0
    seconds = time.perf_counter() - started
    compare(folder / "timed")
    while n_killed < n_kills or (folder / f"run{n_ended}").exists():
        is_enough = n_killed >= n_kills
        fault = None if is_enough else partial(die_after, generator.uniform(0, seconds))
        done = start(folder / f"run{n_ended}", fault)
        if done.exitcode == -signal.SIGKILL:
            n_killed += 1
            continue
        assert done.exitcode == 0, done.output
        compare(folder / f"run{n_ended}")
        assert not list((folder / f"run{n_ended}").rglob(DRAFT))
        assert not list((folder / f"run{n_ended}").rglob(".*.new"))
        n_ended += 1
    return n_ended


@pytest.fixture(scope="module")
def ground(tmp_path_factory) -> Path:
    return make_ground(tmp_path_factory.mktemp("ground"))


def test_collections_killed_at_random_moments(ground, tmp_path):
    def start(output: Path, fault: Any) -> Finished:
        return run("collect_trajectories", *collections.flags(ground, output), fault=fault, log=tmp_path / "log")

    assert start(tmp_path / "whole", None).exitcode == 0
    compare = partial(collections.assert_same_collection, whole=tmp_path / "whole")
    n_kills = KILLS // 3
    n_ended = kill_and_resume(n_kills, start, compare, tmp_path)
    print(f"collect: {n_kills} kills, {n_ended} runs came to the undisturbed result")


def test_trainings_killed_at_random_moments(ground, tmp_path):
    def start(output: Path, fault: Any) -> Finished:
        flags = trainings.arguments(ground, output, "--steps", 4, "--resume_from_checkpoint", "latest")
        return run("train_drift", *flags, fault=fault, log=tmp_path / "log")

    assert start(tmp_path / "whole", None).exitcode == 0
    compare = partial(trainings.assert_same_run, whole=tmp_path / "whole")
    n_kills = KILLS // 3
    n_ended = kill_and_resume(n_kills, start, compare, tmp_path)
    print(f"train: {n_kills} kills, {n_ended} runs came to the undisturbed result")


def test_benchmarks_killed_at_random_moments(tmp_path, tmp_path_factory):
    ground = benchmarks.make_ground(tmp_path_factory.mktemp("benchmark"))

    def start(output: Path, fault: Any) -> Finished:
        with_known_costs(output)
        few = {"n_shot": [1], "n_episodes": 3, "flow_episodes": 0}
        action = partial(runner.run, benchmarks.arguments(ground, output, **few))
        return run_in_child(action, fault=fault, log=tmp_path / "log")

    assert start(tmp_path / "whole", None).exitcode == 0

    def compare(output: Path) -> None:
        assert benchmarks.episodes(output) == benchmarks.episodes(tmp_path / "whole")
        assert (output / "results.json").read_bytes() == (tmp_path / "whole" / "results.json").read_bytes()

    n_kills = KILLS - 2 * (KILLS // 3)
    n_ended = kill_and_resume(n_kills, start, compare, tmp_path)
    print(f"benchmark: {n_kills} kills, {n_ended} runs came to the undisturbed result")
