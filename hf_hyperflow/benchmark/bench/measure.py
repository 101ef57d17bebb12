"""Measures what a task costs, in processes of their own."""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from ...modeling.task import AdaptedTask
from ...modeling.trunks import IncompatibleBackboneError
from ..cost import Cost, Work, count_flops, measure_cost, measure_in_turn, run_in_fresh_process
from ..methods import Classifier, FineTuning, Method, Support
from .task import CostSetting, CostTask, Piece, draw_images

K = TypeVar("K", bound=Hashable)

#: So many gradient steps of fine-tuning are timed. All steps are alike.
TIMED_STEPS = 3

#: How many images are predicted at once.
BATCH_SIZES = (1, 32)
#: What predicts them: the backbone alone, a task on it, and a task merged into it.
PLAIN, TASK, MERGED = "plain", "task", "merged"


@dataclass(frozen=True)
class Measured:
    """What a piece of work costs.

    Attributes:
        seconds: the median of several runs.
        flops: floating-point operations of the networks; see `count_flops`.
        peak_memory_mb: of the first run, beyond the loaded models, in MiB (see `Cost`); None if it was not measured.
    """

    seconds: float
    flops: int
    peak_memory_mb: float | None = None


@dataclass(frozen=True)
class TaskCost:
    """Cost of one task with a method, from support images in memory to a classifier.

    Attributes:
        seconds_per_task: the median of several runs; of fine-tuning it is that of all gradient steps, of which a few
            were timed.
        peak_memory_mb: of the first run, beyond the loaded models, in MiB (see `Cost`).
        flops_per_task: operations of the networks; those of a logistic regression are not counted.
        flops_per_prediction: the same to classify one image, when the task is ready.
    """

    seconds_per_task: float
    peak_memory_mb: float
    flops_per_task: int
    flops_per_prediction: int


@dataclass(frozen=True)
class Prediction:
    """A prediction: what predicts (`PLAIN`, `TASK` or `MERGED`), and how many images at once."""

    by: str
    n_images: int


def measure_pieces(setting: CostSetting, pieces: Sequence[Piece]) -> dict[Piece, Measured]:
    """Time pieces of work in turn, in a process of its own, and count their operations.

    The peak memory is measured on CUDA only. On a CPU `measure_memory` does it.
    """
    return run_in_fresh_process(_measure_pieces, setting, pieces, torch.get_num_threads())


def measure_memory(setting: CostSetting, piece: Piece) -> float:
    """The peak memory of a piece of work in MiB, see `Cost`, in a process of its own."""
    return run_in_fresh_process(_measure_memory, setting, piece, torch.get_num_threads())


def measure_method(setting: CostSetting, method: Method) -> TaskCost:
    """Measure a task with a method of the benchmark in a process of its own."""
    return run_in_fresh_process(_measure_method, setting, method, torch.get_num_threads())


def measure_predictions(setting: CostSetting) -> dict[Prediction, Measured]:
    """Time predictions in turn, in a process of its own. Those of a merged task are missing if PEFT cannot merge it."""
    return run_in_fresh_process(_measure_predictions, setting, torch.get_num_threads())


def _measure_pieces(setting: CostSetting, pieces: Sequence[Piece], n_threads: int) -> dict[Piece, Measured]:
    torch.set_num_threads(n_threads)
    task = CostTask(setting)
    works = {piece: task.build(piece) for piece in pieces}
    is_cuda = setting.device == "cuda"
    return _measure_works(works, setting.device, has_memory=is_cuda)


def _measure_works(works: Mapping[K, Work], device: str, *, has_memory: bool) -> dict[K, Measured]:
    costs = measure_in_turn(works, device)
    measured = {}
    for key, work in works.items():
        work.prepare()
        peak = costs[key].peak_memory_mb if has_memory else None
        measured[key] = Measured(costs[key].seconds, count_flops(work.run), peak)
    return measured


def _measure_memory(setting: CostSetting, piece: Piece, n_threads: int) -> float:
    torch.set_num_threads(n_threads)
    work = CostTask(setting).build(piece)
    work.prepare()
    _, cost = measure_cost(work.run, setting.device)
    return cost.peak_memory_mb


def _measure_method(setting: CostSetting, method: Method, n_threads: int) -> TaskCost:
    torch.set_num_threads(n_threads)
    device = setting.device
    method.require_packages()  # importing the libraries is not part of any method's cost
    task = CostTask(setting)
    with torch.autocast(device, torch.bfloat16, enabled=setting.is_autocast):
        if isinstance(method, FineTuning):
            cost = _measure_fine_tuning(task, method, device)
        else:
            cost = measure_in_turn({method: Work(lambda: task.prepare(method))}, device)[method]
        operations = method.count_operations(lambda fit: count_flops(lambda: task.prepare(method, fit)))
        classifier = task.prepare(method, _first_steps(method, 1))
        query = task.target.images(task.images[:1], setting.query_views)
        prediction = count_flops(lambda: classifier.classify(query))
    return TaskCost(cost.seconds, round(cost.peak_memory_mb, 2), operations, prediction)


def _measure_fine_tuning(task: CostTask, method: FineTuning, device: str) -> Cost:
    """The cost of all gradient steps, from that of the first and of a few more.

    The optimiser has all its memory in the second step.
    """
    _, first = measure_cost(lambda: task.prepare(method, _first_steps(method, 2)), device)
    _, one = measure_cost(lambda: task.prepare(method, _first_steps(method, 1)), device)
    n_timed = max(1, min(TIMED_STEPS, method.steps - 1))
    _, several = measure_cost(lambda: task.prepare(method, _first_steps(method, 1 + n_timed)), device)
    # On a busy machine the run of one step can be the longer one.
    seconds_per_step = max(0.0, several.seconds - one.seconds) / n_timed
    return Cost(one.seconds + (method.steps - 1) * seconds_per_step, first.peak_memory_mb)


def _first_steps(method: Method, n_steps: int) -> Callable[[Support], Classifier]:
    """The `fit` of a method that stops after so many gradient steps, if it makes any."""
    if not isinstance(method, FineTuning):
        return method.fit
    return lambda support: method.fit_after(support, [min(n_steps, method.steps)])[0]


def _measure_predictions(setting: CostSetting, n_threads: int) -> dict[Prediction, Measured]:
    torch.set_num_threads(n_threads)
    loaded = CostTask(setting)
    task = loaded.target.adapter.adapt(loaded.target.backbone, (loaded.pixel_values, loaded.labels))
    _ = task.prototypes  # both copies have them
    plain, merged = copy.deepcopy(task), copy.deepcopy(task)
    plain.reset()
    try:
        merged.merge()
        has_merged = True
    except IncompatibleBackboneError:
        has_merged = False
    works: dict[Prediction, Work] = {}
    for n_images in BATCH_SIZES:
        pixel_values = loaded.target.images(draw_images(n_images, setting.size)).pixel_values
        works[Prediction(PLAIN, n_images)] = _predict_plainly(plain.backbone, pixel_values)
        works[Prediction(TASK, n_images)] = _predict(task, pixel_values)
        if has_merged:
            works[Prediction(MERGED, n_images)] = _predict(merged, pixel_values)
    return _measure_works(works, setting.device, has_memory=False)


def _predict(task: AdaptedTask, pixel_values: torch.Tensor) -> Work:
    return Work(lambda: task.logits(pixel_values))


def _predict_plainly(backbone: torch.nn.Module, pixel_values: torch.Tensor) -> Work:
    @torch.no_grad()
    def run() -> object:
        return backbone(pixel_values)

    return Work(run)
