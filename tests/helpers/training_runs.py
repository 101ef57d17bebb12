"""The training scripts as the tests run them: a tiny backbone and image folders, and children that may be killed.

Children are forked from a server that has imported everything already, so that a run takes a second, not ten.
"""

from __future__ import annotations

import importlib
import io
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from accelerate.state import AcceleratorState
from transformers import BitImageProcessorPil, Dinov2Config, Dinov2Model

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "training"
SIDE = 28
#: What keeps each script on the CPU; calibration knows nothing else.
ON_CPU = {
    "pretrain_backbone": ("--cpu", "true"),
    "collect_trajectories": ("--cpu", "true"),
    "train_drift": ("--cpu", "true"),
    "calibrate": (),
}
#: Nearly everything that the scripts import.
PRELOADED = [
    "tests.helpers.training_runs",
    "accelerate",
    "datasets",
    "torch.optim.swa_utils",
    "torch.utils.flop_counter",
    "hf_hyperflow.training.trainer",
    "hf_hyperflow.training.collector",
    "hf_hyperflow.training.pretraining",
    "hf_hyperflow.benchmark.runner",
]


def make_ground(folder: Path) -> Path:
    """A tiny backbone and two image folders, `alpha` and `beta`, whose classes differ in colour."""
    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=24, num_attention_heads=2, num_hidden_layers=3, image_size=SIDE, patch_size=14)
    Dinov2Model(config).save_pretrained(folder / "backbone")
    processor = BitImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    processor.save_pretrained(folder / "backbone")
    for seed, name in enumerate(("alpha", "beta")):
        make_images(folder / name, n_classes=6, n_images=20, seed=seed)
    return folder


def make_images(folder: Path, *, n_classes: int, n_images: int, seed: int = 0) -> None:
    """An image folder of noisy colours, one per class."""
    generator = np.random.default_rng(seed)
    for c in range(n_classes):
        (folder / f"class{c}").mkdir(parents=True)
        colour = generator.integers(0, 256, 3)
        for i in range(n_images):
            pixels = (colour + generator.normal(0, 30, (SIDE, SIDE, 3))).clip(0, 255).astype(np.uint8)
            PIL.Image.fromarray(pixels).save(folder / f"class{c}" / f"{i}.png")


@dataclass(frozen=True)
class Finished:
    """A run that has ended: exit code (minus the signal that killed it), and what it printed."""

    exitcode: int | None
    output: str


def run_here(script: str, *arguments: object) -> Finished:
    """Run `training/<script>.py` in this process, on the CPU with one thread: the quickest way, for what ends well."""
    module = importlib.import_module(f"training.{script}")
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    AcceleratorState._reset_state(reset_partial_state=True)
    output, exitcode = io.StringIO(), 0
    try:
        with redirect_stdout(output), redirect_stderr(output):
            module.main([*(str(argument) for argument in arguments), *ON_CPU[script]])
    except SystemExit as stopped:
        exitcode = 1 if isinstance(stopped.code, str) else stopped.code or 0
        output.write(str(stopped.code))
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        torch.set_num_threads(n_threads)
    return Finished(exitcode, output.getvalue())


def run(script: str, *arguments: object, fault: Callable[[], None] | None = None, log: Path) -> Finished:
    """Run `training/<script>.py` in a child, on the CPU with one thread.

    Args:
        fault: called in the child before the script; a module-level function or a `partial` of one.
        log: file that gets what it prints.
    """
    flags = [str(argument) for argument in arguments]
    return run_in_child(partial(_run_script, script, flags), fault=fault, log=log)


def run_in_child(action: Callable[[], object], *, fault: Callable[[], None] | None = None, log: Path) -> Finished:
    """Do something in a child with one thread.

    Args:
        action, fault: module-level functions or `partial`s of some; the fault comes first.
        log: file that gets what it prints.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    child = context.Process(target=_act, args=(action, fault, str(log)))
    child.start()
    child.join(900)
    if child.is_alive():
        child.kill()
        child.join()
    return Finished(child.exitcode, log.read_text())


def _act(action: Callable[[], object], fault: Callable[[], None] | None, log: str) -> None:
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    if fault is not None:
        fault()
    action()


def _run_script(script: str, arguments: list[str]) -> None:
    sys.argv = [f"{script}.py", *arguments, *ON_CPU[script]]
    importlib.import_module(f"training.{script}").main()


def run_command(
    script: str, *arguments: object, launcher: tuple[str, ...] = (), **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run `training/<script>.py` as it is typed, in a Python of its own.

    Args:
        launcher: arguments of Python before the script, see `TWO_PROCESSES`.
        environment: variables to set.
    """
    command = [sys.executable, *launcher, SCRIPTS / f"{script}.py", *arguments]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(
        [str(part) for part in command], env=variables, capture_output=True, text=True, check=False, timeout=600
    )


TWO_PROCESSES = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")


# Faults


def die_after(seconds: float) -> None:
    """SIGKILL after so many seconds, wherever the process is then, unless it has ended."""
    timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL))
    timer.daemon = True  # or the process would wait for its death
    timer.start()


def die_in_step(step: int) -> None:
    """SIGKILL in the optimiser's step number `step` (1 for the first of this run)."""
    from torch.optim import AdamW

    AdamW.step = _make_deadly(AdamW.step, step)


def die_while_saving(checkpoint: int) -> None:
    """SIGKILL when checkpoint number `checkpoint` of this run has most of its files."""
    from accelerate import Accelerator

    Accelerator.save_state = _make_deadly(Accelerator.save_state, checkpoint)


def die_writing_shard(number: int) -> None:
    """SIGKILL with half of a shard of trajectories in the draft."""
    import pyarrow.parquet

    write_table = pyarrow.parquet.write_table

    def write_half(table: pyarrow.Table, path: Path) -> None:
        write_table(table, path)
        if f"shard-{number:05d}" in path.name:
            os.truncate(path, path.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    pyarrow.parquet.write_table = write_half


def die_before_checksum(number: int) -> None:
    """SIGKILL with a shard of trajectories in place, but not its checksum."""
    replace = os.replace

    def replace_all_but_checksum(source: Path, target: Path) -> None:
        if str(target).endswith(f"shard-{number:05d}.parquet.sha256"):
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)

    os.replace = replace_all_but_checksum


def infinite_gradient(step: int) -> None:
    """A gradient that overflows in step number `step`, of a loss that does not."""
    from accelerate import Accelerator

    backward, calls = Accelerator.backward, 0

    def overflow(self: Accelerator, loss: torch.Tensor) -> None:
        nonlocal calls
        calls += 1
        backward(self, loss if calls < step else loss + (loss - loss.detach()) * float("inf"))

    Accelerator.backward = overflow


def offline() -> None:
    """No Hub, known at once: where there is no network, every file that is asked for is waited for."""
    from huggingface_hub import constants

    constants.HF_HUB_OFFLINE = True


def files_of_at_most(n_bytes: int) -> None:
    """A disk that is full: no file can grow beyond `n_bytes`."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, n_bytes))


def _make_deadly(function: Callable, call: int) -> Callable:
    """The function, followed by a SIGKILL of this process after its call number `call`."""
    calls = 0

    def deadly(*args: object, **kwargs: object) -> object:
        nonlocal calls
        calls += 1
        result = function(*args, **kwargs)
        if calls == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    return deadly
