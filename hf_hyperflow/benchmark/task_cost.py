"""What a task costs with each method of the benchmark: time, peak memory and operations until it can classify."""

from __future__ import annotations

import platform
import statistics
from dataclasses import dataclass

import torch
from transformers import AutoModel
from transformers.utils.logging import disable_progress_bar

from ..modeling.adapter import HyperFlowAdapter
from .cost import count_flops, measure_cost, run_in_fresh_process
from .hyperparameters import Hyperparameters
from .methods import GRADIENT_METHODS, Target, get_ready


@dataclass(frozen=True)
class CostSetting:
    """What a cost is measured on.

    Attributes:
        backbone, adapter: folders or Hub ids.
        device: "cpu" or "cuda".
        bf16: under bfloat16 autocast.
        recipes: of the gradient methods.
        size: height and width of the images.
    """

    backbone: str
    adapter: str
    device: str
    bf16: bool
    recipes: Hyperparameters
    size: tuple[int, int]


def device_name(device: str) -> str:
    """The device in words, with the number of threads of a CPU."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{platform.processor() or platform.machine()} CPU, {torch.get_num_threads()} threads"


def task_cost(method: str, setting: CostSetting, n_way: int, n_support: int) -> dict[str, float]:
    """Cost of one task, from support images in memory to a classifier (`get_ready`), in a process of its own.

    Returns:
        seconds_per_task: of the gradient methods the one run, of the others the median of ten runs after the first.
        peak_memory_mb: of the first run, beyond the loaded models (see `hf_hyperflow.benchmark.cost.Cost`), MiB.
        flops_per_task: operations of the networks; the logistic regression's own are not counted.
    """
    return run_in_fresh_process(_measure, method, setting, n_way, n_support, torch.get_num_threads())


def _measure(method: str, setting: CostSetting, n_way: int, n_support: int, n_threads: int) -> dict[str, float]:
    torch.set_num_threads(n_threads)
    disable_progress_bar()
    backbone = AutoModel.from_pretrained(setting.backbone).float().eval().to(setting.device)
    adapter = HyperFlowAdapter.from_pretrained(setting.adapter).eval().to(setting.device)
    target = Target(backbone, adapter, setting.recipes)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (n_support, 3, *setting.size), generator=generator, dtype=torch.uint8)
    images, labels = images.to(setting.device), (torch.arange(n_support) % n_way).to(setting.device)

    def work(only: int | None = None) -> object:
        return get_ready(method, target, images, labels, only)

    with torch.autocast(setting.device, torch.bfloat16, enabled=setting.bf16):
        with torch.no_grad():
            backbone(torch.zeros(1, 3, *setting.size, device=setting.device))  # the libraries' own start
        _, cost = measure_cost(work, setting.device)
        seconds = cost.seconds
        if method in GRADIENT_METHODS:  # all steps are alike: two are enough to count
            one, two = count_flops(lambda: work(1)), count_flops(lambda: work(2))
            operations = one + (setting.recipes.steps[method] - 1) * (two - one)
        else:
            seconds = statistics.median(measure_cost(work, setting.device)[1].seconds for _ in range(10))
            operations = count_flops(work)
    return {
        "seconds_per_task": seconds,
        "peak_memory_mb": round(cost.peak_memory_mb, 2),
        "flops_per_task": operations,
    }
