"""Measures what many tasks on one backbone cost: time to adapt, to switch and to predict, and bytes."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from transformers import PreTrainedModel

from ..modeling.adapter import HyperFlowAdapter
from ..modeling.gate import find_blocks
from ..modeling.task import AdaptedTask
from ..modeling.trunks import find_trunk
from ..serving.mixed_batch import score_mixed
from ..serving.task_store import TaskStore

#: The loop of `adapt`, whose tasks do not know of each other, and one forward pass are timed over at most so many.
MAX_LOOP = 64

#: How many tasks a mixed batch and a store are made of.
MAX_STORED = 16

#: How often a prediction is run for its median time.
ROUNDS = 5

#: How many tasks are spoken of when the measurements are extended.
MILLION = 10**6


@dataclass(frozen=True)
class ManyTasksRecord:
    """What a number of tasks costs. Support sets are random pixel values in memory; a task ends with its prototypes.

    Attributes:
        n_tasks: how many tasks.
        n_way, n_shot: classes of a task, and images of a class.
        device: "cpu" or "cuda".
        seconds_adapt_many: of `adapt_many`, for all tasks.
        seconds_adapt: of `adapt` in a loop, for all tasks. It is measured on the first `MAX_LOOP`.
        seconds_forward: of one forward pass over the images of each task in turn, which is the limit; likewise.
        seconds_save, seconds_load: of a task, to a store and from it.
        seconds_predict: of one image by the task that predicted before.
        seconds_switch: the same by another task, in memory.
        seconds_one_by_one: of a batch of `MAX_STORED` images at most, each by its own task, one after the other.
        seconds_mixed: the same with `score_mixed`.
        n_mixed: the number of images of that batch.
        bytes_memory: of a task's tensors in a `TaskStore` of half precision.
        bytes_disk: of a task's files there.
    """

    n_tasks: int
    n_way: int
    n_shot: int
    device: str
    seconds_adapt_many: float
    seconds_adapt: float
    seconds_forward: float
    seconds_save: float
    seconds_load: float
    seconds_predict: float
    seconds_switch: float
    seconds_one_by_one: float
    seconds_mixed: float
    n_mixed: int
    bytes_memory: int
    bytes_disk: int

    @property
    def tasks_per_second(self) -> float:
        """Of `adapt_many`."""
        return self.n_tasks / self.seconds_adapt_many


class _Clock:
    """Times pieces of work, on CUDA until all of it is done."""

    def __init__(self, device: torch.device):
        self._is_cuda = device.type == "cuda"

    def time(self, run: Callable[[], object]) -> float:
        """Seconds of one run."""
        self._wait()
        started = time.perf_counter()
        run()
        self._wait()
        return time.perf_counter() - started

    def median(self, *runs: Callable[[], object]) -> list[float]:
        """Median seconds of several pieces of work, which are run in turn, after a first round that does not count."""
        seconds: list[list[float]] = [[] for _ in runs]
        for _ in range(ROUNDS + 1):
            for number, run in enumerate(runs):
                seconds[number].append(self.time(run))
        return [statistics.median(times[1:]) for times in seconds]

    def _wait(self) -> None:
        if self._is_cuda:
            torch.cuda.synchronize()


def measure_many_tasks(
    adapter: HyperFlowAdapter, backbone: PreTrainedModel, n_tasks: Sequence[int], *, n_way: int = 5, n_shot: int = 1
) -> list[ManyTasksRecord]:
    """Measure each number of tasks, on the backbone's device, at the size that the adapter was trained at.

    Raises:
        ValueError: a number is less than 1, or there are fewer than two classes.
    """
    if min(n_tasks, default=0) < 1 or n_way < 2 or n_shot < 1:
        raise ValueError("give at least one task, two classes and one image of each.")
    backbone = find_trunk(backbone)
    size = tuple(adapter.config.image_size or find_blocks(backbone).image_size)
    device = next(backbone.parameters()).device
    labels = torch.arange(n_way).repeat_interleave(n_shot)

    def draw(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A support set. It is drawn when it is read, because those of all tasks might not fit in memory."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(len(labels), 3, *size, generator=generator), labels

    adapter.adapt_many(backbone, [draw(0)])  # whose first call finds out what the backbone is
    records = []
    for number in n_tasks:
        records.append(_measure(adapter, backbone, number, draw, _Clock(device), (n_way, n_shot)))
    adapter.space.inject(backbone).remove()
    return records


def _measure(
    adapter: HyperFlowAdapter,
    backbone: PreTrainedModel,
    n_tasks: int,
    draw: Callable[[int], tuple[torch.Tensor, torch.Tensor]],
    clock: _Clock,
    shape: tuple[int, int],
) -> ManyTasksRecord:
    """Measure one number of tasks of `shape` (ways and shots)."""
    tasks: list[AdaptedTask] = []
    seconds = clock.time(lambda: tasks.extend(adapter.adapt_many(backbone, map(draw, range(n_tasks)))))
    device = next(backbone.parameters()).device
    n_loop = min(n_tasks, MAX_LOOP)

    def adapt_in_turn() -> None:
        for seed in range(n_loop):
            _ = adapter.adapt(backbone, draw(seed)).prototypes

    def run_backbone() -> None:
        adapter.space.inject(backbone).remove()
        with torch.no_grad():
            for seed in range(n_loop):
                backbone(draw(seed)[0].to(device))

    loop, forward = clock.time(adapt_in_turn), clock.time(run_backbone)
    chosen = tasks[:MAX_STORED]
    images = torch.cat([draw(number)[0][:1] for number in range(len(chosen))])
    predict, switch, one_by_one, mixed = clock.median(
        lambda: (chosen[0].scores(images[:1]), chosen[0].scores(images[:1])),
        lambda: (chosen[-1].scores(images[:1]), chosen[0].scores(images[:1])),
        lambda: [task.scores(images[row : row + 1]) for row, task in enumerate(chosen)],
        lambda: score_mixed(chosen, images),
    )
    stored = _measure_store(backbone, chosen, clock)
    return ManyTasksRecord(
        n_tasks=n_tasks,
        n_way=shape[0],
        n_shot=shape[1],
        device=device.type,
        seconds_adapt_many=seconds,
        seconds_adapt=loop / n_loop * n_tasks,
        seconds_forward=forward / n_loop * n_tasks,
        seconds_save=stored.seconds_save,
        seconds_load=stored.seconds_load,
        seconds_predict=predict / 2,
        seconds_switch=switch / 2,
        seconds_one_by_one=one_by_one,
        seconds_mixed=mixed,
        n_mixed=len(chosen),
        bytes_memory=stored.bytes_memory,
        bytes_disk=stored.bytes_disk,
    )


class _Stored(NamedTuple):
    """What it takes to store a task, see `ManyTasksRecord`."""

    seconds_save: float
    seconds_load: float
    bytes_memory: int
    bytes_disk: int


def _measure_store(backbone: PreTrainedModel, tasks: list[AdaptedTask], clock: _Clock) -> _Stored:
    """Save and load these tasks one by one."""
    names = [f"task{number}" for number in range(len(tasks))]
    with tempfile.TemporaryDirectory() as folder:
        store = TaskStore(folder, backbone, max_bytes=0, half=True)  # keeps one task in memory

        def save_all() -> None:
            for name, task in zip(names, tasks, strict=True):
                store.add(name, task)

        save = clock.time(save_all)
        load = clock.time(lambda: [store[name] for name in names])
        on_disk = sum(path.stat().st_size for path in Path(folder, names[0]).iterdir())
        return _Stored(save / len(tasks), load / len(tasks), store.n_bytes, on_disk)


def extend_to_a_million(record: ManyTasksRecord) -> str:
    """What a million tasks take if each costs what those of a record cost, in words."""
    hours = MILLION / record.tasks_per_second / 3600
    gigabytes = MILLION * record.bytes_disk / 1e9
    memory = MILLION * record.bytes_memory / 1e9
    return (
        f"On paper, a million such tasks take {hours:,.1f} hours of this {record.device}, {gigabytes:,.0f} GB on disk "
        f"and {memory:,.0f} GB in memory, if all of them are to be there at once."
    )


def draw_many_tasks(records: Sequence[ManyTasksRecord]) -> Figure:
    """The cost against the number of tasks: time on the left, bytes on the right; dashed lines extend it."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    time_axis, bytes_axis = figure.subplots(1, 2)
    numbers = [record.n_tasks for record in records]
    last = records[-1]
    for label, seconds in (
        ("adapt in a loop", [record.seconds_adapt for record in records]),
        ("adapt_many", [record.seconds_adapt_many for record in records]),
        ("one forward pass over the images", [record.seconds_forward for record in records]),
    ):
        _draw_line(time_axis, numbers, seconds, label)
    for label, n_bytes in (("on disk", last.bytes_disk), ("in memory", last.bytes_memory)):
        _draw_line(bytes_axis, numbers, [n_bytes * number / 2**20 for number in numbers], label)
    time_axis.set_ylabel("seconds")
    bytes_axis.set_ylabel("MiB")
    time_axis.set_title(f"tasks of {last.n_way} classes of {last.n_shot} image(s), {last.device}", fontsize=10)
    bytes_axis.set_title("generated weights, prototypes, labels", fontsize=10)
    for axis in (time_axis, bytes_axis):
        axis.set_xlabel("tasks")
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(fontsize=8)
    return figure


def _draw_line(axis: Axes, numbers: list[int], values: list[float], label: str) -> None:
    """A line through what was measured, and a dashed one from there to a million tasks."""
    (line,) = axis.plot(numbers, values, "o-", markersize=4, label=label)
    end = values[-1] / numbers[-1] * MILLION
    axis.plot([numbers[-1], MILLION], [values[-1], end], "--", color=line.get_color(), linewidth=1)
