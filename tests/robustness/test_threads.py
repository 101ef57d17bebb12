"""Threads that use tasks on one backbone: each gets what it would get alone, and the backbone ends as it began.

How many rounds the slow tests have can be set: `ROUNDS=200 pytest tests/robustness/test_threads.py -m slow -s`.
"""

from __future__ import annotations

import copy
import io
import multiprocessing
import os
import pickle
import random
import sys
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, PreTrainedModel

from hf_hyperflow import AdaptedTask, HyperFlowAdapter
from hf_hyperflow.modeling.backbones import SplitBackbone
from hf_hyperflow.modeling.locks import get_lock
from hf_hyperflow.modeling.peft_configs import lora_config
from tests.helpers.tiny import Snapshot, pictures, same_bits, tiny_adapter, tiny_dinov2

ROOT = Path(__file__).resolve().parents[2]
N_TASKS = 4

#: Predictions of each thread in the slow tests. What takes longer than a prediction, it does a tenth as often.
ROUNDS = int(os.environ.get("ROUNDS", "20"))
FEW_ROUNDS = ROUNDS // 10

#: Threads and processes of which none gets anything done for so many seconds wait for each other.
DEADLINE = 120


@pytest.fixture(autouse=True)
def restless():
    """Python changes threads 500 times as often as it does by itself."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


# What one thread gets


@dataclass(frozen=True)
class Expected:
    """What one thread alone gets from a support set."""

    theta: torch.Tensor
    prototypes: torch.Tensor
    logits: torch.Tensor
    direct_logits: torch.Tensor
    merged_logits: torch.Tensor


class World:
    """A backbone with its adapter, a few support sets, and what each leads to in one thread."""

    def __init__(self, backbone: PreTrainedModel, adapter: HyperFlowAdapter, folder: Path, n_queries: int = 3):
        self.backbone = backbone
        self.adapter = adapter
        self.folder = folder
        # Two support sets have single images: their flow is followed to its end. The others are stopped early.
        self.supports = [pictures(n_way=2 + i % 3, n_shot=1 + i % 2, seed=i) for i in range(N_TASKS)]
        queries = [images[0] for images in pictures(n_way=n_queries, n_shot=1, seed=9).values()]
        self.queries = adapter.processor(queries, return_tensors="pt")["pixel_values"]
        self.before = Snapshot(backbone)
        self.expected = [self._compute(i) for i in range(N_TASKS)]
        self.before.assert_unchanged()

    def adapt(self, i: int) -> AdaptedTask:
        return self.adapter.adapt(self.backbone, self.supports[i], early_stopping=True)

    def transfer(self, i: int) -> AdaptedTask:
        return self.adapter.direct_transfer(self.backbone, self.supports[i])

    def saved(self, i: int) -> Path:
        """The folder of a saved task."""
        return self.folder / f"task-{i}"

    def _compute(self, i: int) -> Expected:
        task = self.adapt(i)
        task.save_pretrained(self.saved(i))
        logits, direct_logits = task.logits(self.queries), self.transfer(i).logits(self.queries)
        task.merge()
        merged_logits = task.logits(self.queries)
        task.reset()
        return Expected(task.theta, task.prototypes, logits, direct_logits, merged_logits)

    def judge_logits(self, task: AdaptedTask, i: int) -> str:
        return judge(task.logits(self.queries), self.expected[i].logits)


def tiny_world(folder: Path, kind: str = "biases") -> World:
    """With dropout and in training mode: whoever forgets, or ends, another's evaluation mode gets other results."""
    backbone = tiny_dinov2(hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5)
    config, frozen = None, ()
    if kind == "lora":
        config, frozen = lora_config(backbone, 2, r=2), ("lora_A",)
    adapter = tiny_adapter(backbone, config, frozen_tensors=frozen, intermediate_weight=0.5)
    return World(backbone.train(), adapter, folder)


def released_world(folder: Path) -> World:
    backbone = AutoModel.from_pretrained(ROOT / "model_cards" / "vit-s14-focus-70")
    adapter = HyperFlowAdapter.from_pretrained(ROOT / "model_cards" / "hyperflow-vit-s14-70").eval()
    return World(backbone, adapter, folder, n_queries=1)


def judge(result: torch.Tensor, expected: torch.Tensor) -> str:
    return "right" if same_bits(result, expected) else "wrong"


def judge_files(folder: Path, expected: Path) -> str:
    """Compare two saved tasks. (The metadata of a safetensors file have no fixed order, so bytes can differ.)"""
    names = {path.name for path in expected.iterdir()}
    is_right = {path.name for path in folder.iterdir()} == names
    for name in names - {"checksums.json"}:
        if name.endswith(".safetensors"):
            tensors, others = load_file(folder / name), load_file(expected / name)
            is_right &= tensors.keys() == others.keys()
            is_right &= all(same_bits(tensors[key], other) for key, other in others.items())
        else:
            is_right &= (folder / name).read_bytes() == (expected / name).read_bytes()
    return "right" if is_right else "wrong"


def run_at_once(act: Callable[[int, random.Random], str], n_threads: int, n_rounds: int) -> Counter[str]:
    """Let threads that start together call `act(number of the thread, its generator)` and count what they return.

    An error counts as its message.
    """
    barrier = threading.Barrier(n_threads)
    verdicts: list[str] = []

    def work(number: int) -> None:
        generator = random.Random(number)
        barrier.wait()
        for _ in range(n_rounds):
            try:
                verdicts.append(act(number, generator))
            except Exception as error:
                verdicts.append(f"{type(error).__name__}: {error}")

    threads = [threading.Thread(target=work, args=(number,), daemon=True) for number in range(n_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        while thread.is_alive():
            n_before = len(verdicts)
            thread.join(DEADLINE)
            is_stuck = thread.is_alive() and len(verdicts) == n_before
            assert not is_stuck, "the threads wait for each other"
    return Counter(verdicts)


# Tasks that stay


def use_tasks(world: World, n_threads: int, n_rounds: int, n_tasks: int) -> Counter[str]:
    """Predict with tasks that all threads share."""
    tasks = [world.adapt(i) for i in range(n_tasks)]

    def act(number: int, generator: random.Random) -> str:
        i = generator.randrange(n_tasks)
        return world.judge_logits(tasks[i], i)

    counted = run_at_once(act, n_threads, n_rounds)
    for task in tasks:
        task.reset()
    return counted


@pytest.mark.parametrize("n_tasks", [1, N_TASKS])
def test_threads_predict_with_the_same_tasks(tmp_path, n_tasks):
    world = tiny_world(tmp_path)
    assert use_tasks(world, 4, 15, n_tasks) == {"right": 60}
    world.before.assert_unchanged()


# Tasks that come and go


def live(world: World, n_threads: int, n_rounds: int) -> Counter[str]:
    """Adapt, predict, save, load and reset, in an order that is drawn."""
    shared = [world.adapt(i) for i in range(N_TASKS)]

    def adapt_and_reset(i: int, folder: Path) -> str:
        task = world.adapt(i)
        verdicts = {judge(task.theta, world.expected[i].theta), world.judge_logits(task, i)}
        verdicts.add(judge(task.prototypes, world.expected[i].prototypes))
        task.reset()
        return "wrong" if "wrong" in verdicts else "right"

    def save(i: int, folder: Path) -> str:
        shared[i].save_pretrained(folder)
        return judge_files(folder, world.saved(i))

    def load(i: int, folder: Path) -> str:
        return world.judge_logits(AdaptedTask.from_pretrained(world.saved(i), world.backbone), i)

    def predict(i: int, folder: Path) -> str:
        return world.judge_logits(shared[i], i)

    def transfer(i: int, folder: Path) -> str:
        return judge(world.transfer(i).logits(world.queries), world.expected[i].direct_logits)

    def act(number: int, generator: random.Random) -> str:
        step = generator.choice([adapt_and_reset, save, load, predict, transfer])
        return step(generator.randrange(N_TASKS), world.folder / f"{number}-{generator.random()}")

    counted = run_at_once(act, n_threads, n_rounds)
    for task in shared:
        task.reset()
    return counted


@pytest.mark.parametrize("kind", ["biases", "lora"])
def test_threads_adapt_predict_save_load_and_reset(tmp_path, kind):
    world = tiny_world(tmp_path, kind)
    assert live(world, 8, 4) == {"right": 32}
    world.before.assert_unchanged()


def test_prototypes_that_threads_ask_for_at_once_are_computed_once(tmp_path):
    world = tiny_world(tmp_path)
    task, seen = world.adapt(0), []

    def act(number: int, generator: random.Random) -> str:
        seen.append(id(task.prototypes))
        return judge(task.prototypes, world.expected[0].prototypes)

    assert run_at_once(act, 8, 1) == {"right": 8}
    assert len(set(seen)) == 1


def test_threads_that_save_to_one_folder(tmp_path):
    """One writes, the others are told so; those that predict meanwhile do not wait for the folder."""
    world = tiny_world(tmp_path)
    tasks = [world.adapt(i) for i in range(N_TASKS)]

    def act(number: int, generator: random.Random) -> str:
        if number % 2:
            return world.judge_logits(tasks[number % N_TASKS], number % N_TASKS)
        tasks[0].save_pretrained(tmp_path / "all")
        return "right"

    counted = run_at_once(act, 8, 5)
    busy = [message for message in counted if message.startswith("CheckpointError: another command is writing to")]
    assert counted["right"] >= 21
    assert set(counted) == {"right", *busy}
    assert judge_files(tmp_path / "all", world.saved(0)) == "right"


# Merging


def merge(world: World, n_threads: int, n_rounds: int) -> Counter[str]:
    """Merge and reset tasks of one's own, and predict. All but one thread are refused while a task is merged."""

    def act(number: int, generator: random.Random) -> str:
        i = generator.randrange(N_TASKS)
        task = world.adapt(i)
        verdict = world.judge_logits(task, i)
        if generator.random() < 0.5:
            task.merge()
            try:
                verdict = judge(task.logits(world.queries), world.expected[i].merged_logits)
            finally:
                task.reset()
        return verdict

    counted = run_at_once(act, n_threads, n_rounds)
    world.adapt(0).reset()  # takes out what is there, be it of another task
    return counted


MERGED = "IncompatibleBackboneError: a task is merged into this Dinov2Model: reset that task first."


def test_threads_merge_tasks_of_their_own(tmp_path):
    world = tiny_world(tmp_path)
    counted = merge(world, 8, 5)
    assert set(counted) <= {"right", MERGED}
    assert counted["right"] >= 4
    world.before.assert_unchanged()


def share_a_merged_task(world: World, n_threads: int, n_rounds: int) -> Counter[str]:
    """Predict with one task that threads merge, and reset in the end."""
    task = world.adapt(0)
    resets = threading.Semaphore(n_threads * n_rounds // 4)

    def act(number: int, generator: random.Random) -> str:
        step = generator.choice(["predict", "merge", "reset"])
        if step == "merge":
            task.merge()
        elif step == "reset" and not resets.acquire(blocking=False):
            task.reset()
        logits = task.logits(world.queries)
        verdicts = {judge(logits, world.expected[0].logits), judge(logits, world.expected[0].merged_logits)}
        return "right" if "right" in verdicts else "wrong"

    counted = run_at_once(act, n_threads, n_rounds)
    task.reset()
    return counted


TASK_IS_MERGED = "RuntimeError: this task is merged into its backbone: reset it to get the adapter out again."
TASK_WAS_RESET = "RuntimeError: this task was reset and its backbone restored: adapt again, or load a saved task."


def test_threads_merge_and_reset_one_task(tmp_path):
    world = tiny_world(tmp_path)
    counted = share_a_merged_task(world, 8, 10)
    assert set(counted) == {"right", TASK_IS_MERGED, TASK_WAS_RESET}
    world.before.assert_unchanged()


# The backbone itself


def test_others_run_the_backbone_while_a_thread_runs_its_first_blocks(backbone, pixels):
    """They take no lock."""
    split = SplitBackbone(backbone, 2)
    with torch.no_grad():
        features, hidden = backbone(pixels).last_hidden_state, split.forward_prefix(pixels).states
        before = Snapshot(backbone)

        def act(number: int, generator: random.Random) -> str:
            with torch.no_grad():
                if number % 2:
                    return judge(backbone(pixels).last_hidden_state, features)
                return judge(split.forward_prefix(pixels).states, hidden)

        assert run_at_once(act, 8, 25) == {"right": 200}
    before.assert_unchanged()


# Copies


@pytest.fixture
def busy():
    """`with busy(lock):` another thread holds a lock."""

    class Busy:
        def __init__(self, lock: threading.RLock):
            self.lock, self.is_held, self.is_done = lock, threading.Event(), threading.Event()
            self.thread = threading.Thread(target=self.hold, daemon=True)

        def hold(self) -> None:
            with self.lock:
                self.is_held.set()
                self.is_done.wait(DEADLINE)

        def __enter__(self) -> None:
            self.thread.start()
            self.is_held.wait()

        def __exit__(self, *error: object) -> None:
            self.is_done.set()
            self.thread.join()

    return Busy


def through_pickle(task: AdaptedTask) -> AdaptedTask:
    return pickle.loads(pickle.dumps(task))


def through_torch(task: AdaptedTask) -> AdaptedTask:
    buffer = io.BytesIO()
    torch.save(task, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("copied_through", [through_pickle, through_torch])
def test_a_task_is_pickled_while_another_thread_holds_the_lock(tmp_path, busy, copied_through):
    world = tiny_world(tmp_path)
    task = world.adapt(1)
    with busy(get_lock(world.backbone)):
        copied = copied_through(task)
        assert world.judge_logits(copied, 1) == "right"  # nobody holds the lock of the copy
    copied.reset()
    assert world.judge_logits(task, 1) == "right"


def test_a_backbone_is_copied_while_another_thread_holds_the_lock(tmp_path, busy):
    world = tiny_world(tmp_path)
    world.adapt(1)
    with busy(get_lock(world.backbone)):
        copied = copy.deepcopy(world.backbone)
        task = world.adapter.adapt(copied, world.supports[0], early_stopping=True)
        assert world.judge_logits(task, 0) == "right"
        loaded = AdaptedTask.from_pretrained(world.saved(1), copied)
        assert world.judge_logits(loaded, 1) == "right"


def copy_tasks(world: World, n_threads: int, n_rounds: int) -> Counter[str]:
    """Copy tasks that others use and reset, and predict with the copies."""
    shared = [world.adapt(i) for i in range(N_TASKS)]

    def act(number: int, generator: random.Random) -> str:
        i = generator.randrange(N_TASKS)
        if number % 2:
            return world.judge_logits(copy.deepcopy(shared[i]), i)
        world.adapt(i).reset()
        return world.judge_logits(shared[i], i)

    counted = run_at_once(act, n_threads, n_rounds)
    for task in shared:
        task.reset()
    return counted


def test_tasks_are_copied_while_others_use_them(tmp_path):
    world = tiny_world(tmp_path)
    assert copy_tasks(world, 8, 3) == {"right": 24}
    world.before.assert_unchanged()


# Processes


def predict_in_a_process(task: AdaptedTask, queries: torch.Tensor, connection) -> None:
    torch.set_num_threads(1)
    try:
        connection.send(task.logits(queries).numpy())
    except Exception as error:
        connection.send(error)


def predict_elsewhere(method: str, task: AdaptedTask, queries: torch.Tensor) -> torch.Tensor:
    """The logits that a process gets; its errors are raised here."""
    context = multiprocessing.get_context(method)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=predict_in_a_process, args=(task, queries, sender), daemon=True)
    process.start()
    assert receiver.poll(DEADLINE), "the process waits"
    answer = receiver.recv()
    process.join()
    if isinstance(answer, Exception):
        raise answer
    return torch.from_numpy(answer)


METHODS = ["fork", pytest.param("spawn", marks=pytest.mark.slow)]


@pytest.mark.parametrize("method", METHODS)
def test_a_process_uses_a_task(tmp_path, method):
    world = tiny_world(tmp_path)
    task = world.adapt(1)
    expected = world.expected[1].logits
    assert judge(predict_elsewhere(method, task, world.queries), expected) == "right"
    assert judge(task.logits(world.queries), expected) == "right"


def test_a_process_is_forked_while_another_thread_uses_the_backbone(tmp_path, busy):
    """What that thread began is half done in the process, so that the backbone is refused there, and nothing waits."""
    world = tiny_world(tmp_path)
    task, independent = world.adapt(1), copy.deepcopy(world.adapt(2))
    with busy(get_lock(world.backbone)):
        with pytest.raises(RuntimeError, match="another thread was using this Dinov2Model when"):
            predict_elsewhere("fork", task, world.queries)
        logits = predict_elsewhere("fork", independent, world.queries)
    assert judge(logits, world.expected[2].logits) == "right"
    assert judge(predict_elsewhere("fork", task, world.queries), world.expected[1].logits) == "right"


def test_processes_are_forked_between_uses_while_threads_predict(tmp_path):
    """A thread that holds the lock forks when no other is in the middle of something."""
    world = tiny_world(tmp_path)
    tasks = [world.adapt(i) for i in range(N_TASKS)]

    def act(number: int, generator: random.Random) -> str:
        i = generator.randrange(N_TASKS)
        if number:
            return world.judge_logits(tasks[i], i)
        with get_lock(world.backbone):
            return judge(predict_elsewhere("fork", tasks[i], world.queries), world.expected[i].logits)

    assert run_at_once(act, 4, 4) == {"right": 16}


# Many rounds


@pytest.mark.slow
@pytest.mark.parametrize("n_threads", [8, 16])
@pytest.mark.parametrize("kind", ["biases", "lora"])
def test_many_rounds(tmp_path, n_threads, kind):
    world = tiny_world(tmp_path, kind)
    assert use_tasks(world, n_threads, ROUNDS, N_TASKS) == {"right": ROUNDS * n_threads}
    assert live(world, n_threads, FEW_ROUNDS) == {"right": FEW_ROUNDS * n_threads}
    assert copy_tasks(world, n_threads, FEW_ROUNDS) == {"right": FEW_ROUNDS * n_threads}
    world.before.assert_unchanged()
    counted = merge(world, n_threads, FEW_ROUNDS) + share_a_merged_task(world, n_threads, ROUNDS)
    assert counted["right"] > 0
    assert counted.keys() <= {"right", MERGED, TASK_IS_MERGED, TASK_WAS_RESET}
    print(f"{n_threads} threads, {kind}: all right, and where a task is merged {dict(counted)}")
    world.before.assert_unchanged()


@pytest.mark.slow
@pytest.mark.parametrize("n_threads", [8, 16])
def test_many_rounds_of_the_released_models(tmp_path, n_threads):
    world = released_world(tmp_path)
    assert use_tasks(world, n_threads, ROUNDS, N_TASKS) == {"right": ROUNDS * n_threads}
    few = max(1, FEW_ROUNDS // 5)
    assert live(world, n_threads, few) == {"right": few * n_threads}
    world.before.assert_unchanged()
