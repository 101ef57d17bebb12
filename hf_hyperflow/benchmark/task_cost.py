"""What a task costs with a method of the benchmark: time, peak memory and operations until it can classify."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel
from transformers.utils.logging import disable_progress_bar

from ..modeling.adapter import HyperFlowAdapter
from ..modeling.atomic_file import write_json
from ..modeling.saving import CheckpointError
from .cost import count_flops, device_name, measure_cost, run_in_fresh_process
from .methods import Classifier, Method, Support, Target

#: What an entry of the file of costs has.
ENTRY = {"method", "n_way", "n_support", "device", "cost"}

#: How often a method that is not slow is run for its median time.
REPETITIONS = 10


@dataclass(frozen=True)
class CostSetting:
    """What a cost is measured on.

    Attributes:
        backbone, adapter: folders or Hub ids.
        device: "cpu" or "cuda".
        bf16: under bfloat16 autocast.
        size: height and width of the images.
        views, query_views: over how many views of a support image and of a query its features are combined.
    """

    backbone: str
    adapter: str
    device: str
    bf16: bool
    size: tuple[int, int]
    views: int = 1
    query_views: int = 1


@dataclass(frozen=True)
class TaskCost:
    """Cost of one task, from support images in memory to a classifier.

    Attributes:
        seconds_per_task: of a slow method (fine-tuning) that of one run, of others the median of ten after the first.
        peak_memory_mb: of the first run, beyond the loaded models, in MiB (see `Cost`).
        flops_per_task: operations of the networks; those of a logistic regression are not counted.
        flops_per_prediction: the same to classify one image, when the task is ready.
    """

    seconds_per_task: float
    peak_memory_mb: float
    flops_per_task: int
    flops_per_prediction: int


@dataclass(frozen=True)
class CostKey:
    """What a cost depends on beside its `CostSetting`: a method's name, ways, and the number of support images."""

    method: str
    n_way: int
    n_support: int


class CostFile:
    """The costs measured so far, in a JSON file, of any device.

    Attributes:
        costs: those that were measured on this device.

    Raises:
        CheckpointError: the file is damaged or of something else; it is named.
    """

    def __init__(self, path: Path, device: str):
        self.path = path
        self.device = device_name(device)
        self._entries = _read_entries(path)
        self.costs: dict[CostKey, TaskCost] = {}
        for entry in self._entries:
            if entry["device"] == self.device:
                key = CostKey(entry["method"], entry["n_way"], entry["n_support"])
                self.costs[key] = TaskCost(**entry["cost"])

    def add(self, key: CostKey, cost: TaskCost) -> None:
        """Add a cost, in memory and in the file."""
        self.costs[key] = cost
        entry = asdict(key)
        entry["device"] = self.device
        entry["cost"] = asdict(cost)
        self._entries.append(entry)
        write_json(self.path, self._entries)


def _read_entries(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    try:
        entries = json.loads(path.read_text())
        names = {field.name for field in fields(TaskCost)}
        is_complete = all(ENTRY.issubset(entry) and names == set(entry["cost"]) for entry in entries)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged ({error}): remove it to measure again.") from error
    if not is_complete:
        raise CheckpointError(f"{path} is not the costs of a benchmark of this version: remove it to measure again.")
    return entries


def measure_task_cost(method: Method, setting: CostSetting, n_way: int, n_support: int) -> TaskCost:
    """Measure a task of `n_support` random images in a process of its own."""
    return run_in_fresh_process(_measure, method, setting, n_way, n_support, torch.get_num_threads())


def _measure(method: Method, setting: CostSetting, n_way: int, n_support: int, n_threads: int) -> TaskCost:
    torch.set_num_threads(n_threads)
    disable_progress_bar()
    device = setting.device
    backbone = AutoModel.from_pretrained(setting.backbone).float().eval().to(device)
    adapter = HyperFlowAdapter.from_pretrained(setting.adapter).eval().to(device)
    target = Target(backbone, adapter)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (n_support, 3, *setting.size), generator=generator, dtype=torch.uint8).to(device)
    labels = (torch.arange(n_support) % n_way).to(device)

    def run() -> Classifier:
        return prepare_task(method, target, images, labels, views=setting.views)

    def count(fit: Callable[[Support], Classifier]) -> int:
        return count_flops(lambda: prepare_task(method, target, images, labels, fit, setting.views))

    with torch.autocast(device, torch.bfloat16, enabled=setting.bf16):
        # Importing and warming up the libraries is not part of any method's cost.
        method.require_packages()
        with torch.no_grad():
            backbone(torch.zeros(1, 3, *setting.size, device=device))
        classifier, cost = measure_cost(run, device)
        seconds = cost.seconds
        if not method.is_slow:
            repeated = []
            for _ in range(REPETITIONS):
                _, repetition = measure_cost(run, device)
                repeated.append(repetition.seconds)
            seconds = statistics.median(repeated)
        operations = method.count_operations(count)
        query = target.images(images[:1], setting.query_views)
        prediction = count_flops(lambda: classifier.classify(query))
    return TaskCost(seconds, round(cost.peak_memory_mb, 2), operations, prediction)


def prepare_task(
    method: Method,
    target: Target,
    images: torch.Tensor,
    labels: torch.Tensor,
    fit: Callable[[Support], Classifier] | None = None,
    views: int = 1,
) -> Classifier:
    """Do all the work between holding a support set and being able to classify. Nothing is taken from a cache.

    A method that does its work in `predict` is given the support set itself to classify.

    Args:
        images: `(n, 3, height, width)` uint8 on the backbone's device.
        labels: `(n,)` there.
        fit: what is run in place of `method.fit`, such as the first gradient steps of fine-tuning.
        views: over how many views of an image its features are combined.
    """
    support = target.support(images, labels, views=views)
    classifier = (fit or method.fit)(support)
    if method.works_in_predict:
        classifier.predict(support.images)
    target.unload()
    return classifier
