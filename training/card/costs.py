"""Time, memory and operations of getting ready for a task: HyperFlow against fine-tuning by gradients.

    python training/benchmark_cost.py --backbone model_cards/vit-s14-focus-70 \
        --adapter model_cards/hyperflow-vit-s14-70 --output cost.json

5 ways, 5 shots (25 images), fine-tuning in 50 steps of Adam of which ten are run and timed; every measurement on a CPU
in a process of its own, HyperFlow and direct transfer timed as the median of ten calls after a first one. `integrate`
is task encoder and drift network alone, what the paper counts, on images that the support encoder has read already
(direct transfer runs the blocks of a shared one, too); `adapt` begins with the images, `ready` includes prototypes.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import AutoModel

from hf_hyperflow import HyperFlowAdapter
from hf_hyperflow.arguments import parse
from hf_hyperflow.benchmark.cost import count_flops, measure_cost, run_in_fresh_process
from hf_hyperflow.benchmark.task_cost import device_name
from hf_hyperflow.data.domains import normalise
from hf_hyperflow.finetuning.finetune import FineTuningConfig, fine_tune
from hf_hyperflow.modeling.backbones import SplitBackbone
from hf_hyperflow.modeling.prototypes import unit_means

METHODS = (
    *("direct", "hyperflow integrate", "hyperflow adapt", "hyperflow ready"),
    *("bias fine-tuning", "full fine-tuning"),
)


@dataclass
class Arguments:
    backbone: str = field(metadata={"help": "the target: Hub id or folder"})
    adapter: str = field(metadata={"help": "the HyperFlow adapter: Hub id or folder"})
    output: str = field(metadata={"help": "JSON file to write"})
    resolution: list[int] = field(default_factory=lambda: [70, 224], metadata={"help": "image sides in pixels"})
    steps: int = field(default=50, metadata={"help": "gradient steps of fine-tuning"})
    timed_steps: int = field(default=10, metadata={"help": "so many of them are run, at least 2; all are alike"})

    def __post_init__(self) -> None:
        if min(self.steps, self.timed_steps) < 2:
            raise SystemExit("error: --steps and --timed_steps must be at least 2.")


def work(
    method: str, backbone: torch.nn.Module, adapter: HyperFlowAdapter, side: int, recipe: FineTuningConfig, only: int
) -> Callable:
    """A function that gets ready for a 5-way 5-shot task of random images, with the first steps only of a recipe."""
    device = next(backbone.parameters()).device
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (25, 3, side, side), generator=generator, dtype=torch.uint8).to(device)
    labels = torch.arange(5).repeat_interleave(5).to(device)
    pixels = normalise(images, adapter.processor)
    whole = SplitBackbone(backbone, 0, adapter.config.pooling)

    @torch.no_grad()
    def prototypes() -> torch.Tensor:
        return unit_means(whole.forward_features(pixels), labels)

    @torch.no_grad()
    def integrate(features: torch.Tensor) -> object:
        return adapter.flow(adapter.task_encoder(features, labels))

    def hyperflow() -> object:
        task = adapter.adapt(backbone, (pixels, labels))
        if method == "hyperflow ready":
            _ = task.prototypes
        task.reset()
        return task

    def gradients() -> torch.Tensor:
        if method == "bias fine-tuning":
            parameters = adapter.space.inject(backbone).parameters
            split = SplitBackbone(backbone, adapter.split(backbone).start, adapter.config.pooling)
        else:
            parameters, split = list(backbone.parameters()), whole
        fine_tune(split, parameters, images, labels, adapter.processor, recipe, run_steps=only)
        return prototypes()

    if method == "direct":
        return prototypes
    if method == "hyperflow integrate":
        with torch.no_grad():  # of one image, so that memory which is free again does not hide what is taken later
            features, _ = adapter.encode_images(adapter.split(backbone), pixels[:1])
        return lambda: integrate(features.repeat(len(labels), 1))
    return hyperflow if method.startswith("hyperflow") else gradients


def measure(
    method: str, backbone_name: str, adapter_name: str, side: int, steps: int, timed_steps: int
) -> dict[str, float]:
    """Seconds, MiB and operations of one method at one resolution; fine-tuning from 1 and `timed_steps` steps."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    backbone = AutoModel.from_pretrained(backbone_name).float().eval().to(device)
    adapter = HyperFlowAdapter.from_pretrained(adapter_name).eval().to(device)
    recipe = FineTuningConfig(steps=steps)
    get_ready = work(method, backbone, adapter, side, recipe, timed_steps)
    with torch.no_grad():
        backbone(torch.zeros(1, 3, side, side, device=device))
    _, cost = measure_cost(get_ready, device)
    seconds, operations = cost.seconds, count_flops(get_ready)
    if "fine-tuning" in method:  # what comes once, and as many more steps
        one_step = work(method, backbone, adapter, side, recipe, 1)
        more = (steps - 1) / (timed_steps - 1)
        once = {"seconds": measure_cost(one_step, device)[1].seconds, "flops": count_flops(one_step)}
        seconds = once["seconds"] + more * (seconds - once["seconds"])
        operations = once["flops"] + more * (operations - once["flops"])
    else:
        seconds = statistics.median(measure_cost(get_ready, device)[1].seconds for _ in range(10))
    return {"seconds": seconds, "peak_memory_mb": round(cost.peak_memory_mb, 1), "flops": operations}


def main() -> None:
    arguments = parse(Arguments)
    models = (arguments.backbone, arguments.adapter)
    result = {"hardware": device_name("cuda" if torch.cuda.is_available() else "cpu")}
    for side in arguments.resolution:
        rows = {}
        for method in METHODS:
            row = run_in_fresh_process(measure, method, *models, side, arguments.steps, arguments.timed_steps)
            rows[method] = row
            print(f"{side} px  {method:18} {json.dumps(rows[method])}", flush=True)
        full = rows["full fine-tuning"]
        for row in rows.values():
            row["time_share_of_full"] = row["seconds"] / full["seconds"]
            row["memory_share_of_full"] = row["peak_memory_mb"] / full["peak_memory_mb"]
        result[f"{side} px"] = rows
    Path(arguments.output).write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
