"""Time, memory and operations until a task is ready: HyperFlow against fine-tuning by gradients.

    python -m training.card.costs --backbone model_cards/vit-s14-focus-70 \
        --adapter model_cards/hyperflow-vit-s14-70 --output_file cost.json

A task has 5 classes of 5 images. Fine-tuning takes 50 steps of Adam, of which ten are run and timed. Every measurement
on a CPU has a process of its own. HyperFlow and direct transfer are timed as the median of ten calls after a first one.

`flow` is the task encoder and the drift network alone, which is what the paper counts: the support encoder has read the
images already (direct transfer runs the blocks of a shared encoder, too). `adapt` begins with the images, and
`hyperflow` includes the prototypes.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoModel

from hf_hyperflow import HyperFlowAdapter
from hf_hyperflow.arguments import parse
from hf_hyperflow.benchmark.cost import Cost, count_flops, device_name, measure_cost, run_in_fresh_process
from hf_hyperflow.benchmark.methods import (
    BiasTuning,
    DirectTransfer,
    FineTuning,
    FullFineTuning,
    HyperFlow,
    Target,
)
from hf_hyperflow.modeling.atomic_file import write_json

N_WAY, N_SHOT = 5, 5
FLOW, ADAPT = "flow", "adapt"
DIRECT, READY, BIAS, FULL = DirectTransfer.name, HyperFlow().name, BiasTuning.name, FullFineTuning.name
#: What is measured, and the words for it in tables.
COST_LABELS = {
    DIRECT: DirectTransfer.label,
    FLOW: "HyperFlow, the flow alone, of images that are encoded",
    ADAPT: "HyperFlow, the adaptation alone",
    READY: "**HyperFlow, ready to predict**",
    BIAS: BiasTuning.label,
    FULL: FullFineTuning.label,
}


@dataclass
class Arguments:
    backbone: str = field(metadata={"help": "the target: Hub id or folder"})
    adapter: str = field(metadata={"help": "the HyperFlow adapter: Hub id or folder"})
    output_file: str = field(metadata={"help": "JSON file to write"})
    resolution: list[int] = field(default_factory=lambda: [70, 224], metadata={"help": "image sides in pixels"})
    steps: int = field(default=50, metadata={"help": "gradient steps of fine-tuning"})
    timed_steps: int = field(default=10, metadata={"help": "how many of them are run, at least 2; all are alike"})

    def __post_init__(self) -> None:
        if min(self.steps, self.timed_steps) < 2:
            raise SystemExit("error: --steps and --timed_steps must be at least 2.")


@dataclass(frozen=True)
class Task:
    """A support set of random images.

    Attributes:
        target: the backbone with its adapter.
        images: `(n, 3, side, side)` uint8.
        labels: `(n,)`.
    """

    target: Target
    images: torch.Tensor
    labels: torch.Tensor

    @classmethod
    def draw(cls, target: Target, side: int) -> Task:
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(0, 256, (N_WAY * N_SHOT, 3, side, side), generator=generator, dtype=torch.uint8)
        labels = torch.arange(N_WAY).repeat_interleave(N_SHOT)
        return cls(target, images.to(target.device), labels.to(target.device))

    def transfer_directly(self) -> object:
        return DirectTransfer().fit(self.target.support(self.images, self.labels))

    def adapt(self) -> None:
        """What `HyperFlowAdapter.adapt` does before the first prediction."""
        pixel_values = self.target.images(self.images).pixel_values
        self.target.adapter.adapt(self.target.backbone, (pixel_values, self.labels)).reset()

    def adapt_with_prototypes(self) -> object:
        pixel_values = self.target.images(self.images).pixel_values
        task = self.target.adapter.adapt(self.target.backbone, (pixel_values, self.labels))
        prototypes = task.prototypes
        task.reset()
        return prototypes

    @torch.no_grad()
    def encode_images(self) -> torch.Tensor:
        """What the support encoder makes of the images.

        It reads one of them: memory that was taken for many and is free again would hide what is taken later.
        """
        adapter, target = self.target.adapter, self.target
        features, _ = adapter.encode_images(target.split, target.images(self.images[:1]).pixel_values)
        return features.repeat(len(self.labels), 1)

    @torch.no_grad()
    def integrate(self, features: torch.Tensor) -> object:
        adapter = self.target.adapter
        return adapter.flow(adapter.task_encoder(features, self.labels))

    def fine_tune(self, method: FineTuning, only: int) -> object:
        """The first steps of a method."""
        return method.fit_after(self.target.support(self.images, self.labels), [only])


def measure(
    name: str, backbone_name: str, adapter_name: str, side: int, steps: int, timed_steps: int
) -> dict[str, float]:
    """Seconds, MiB and operations of one of `COST_LABELS` at one resolution."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    backbone = AutoModel.from_pretrained(backbone_name).float().eval().to(device)
    adapter = HyperFlowAdapter.from_pretrained(adapter_name).eval().to(device)
    with torch.no_grad():  # the libraries' own start is not to be measured
        backbone(torch.zeros(1, 3, side, side, device=device))
    task = Task.draw(Target(backbone, adapter), side)
    if name == BIAS:
        return _measure_fine_tuning(task, BiasTuning(steps=steps), timed_steps)
    if name == FULL:
        return _measure_fine_tuning(task, FullFineTuning(steps=steps), timed_steps)
    work: dict[str, Callable[[], object]] = {
        DIRECT: task.transfer_directly,
        ADAPT: task.adapt,
        READY: task.adapt_with_prototypes,
    }
    if name == FLOW:
        features = task.encode_images()
        work[FLOW] = lambda: task.integrate(features)
    _, first = measure_cost(work[name], device)
    seconds = statistics.median(measure_cost(work[name], device)[1].seconds for _ in range(10))
    return _make_row(seconds, first, count_flops(work[name]))


def _measure_fine_tuning(task: Task, method: FineTuning, timed_steps: int) -> dict[str, float]:
    """The cost of all steps, from that of one step and of `timed_steps`: all steps are alike."""
    device = task.target.device
    _, several = measure_cost(lambda: task.fine_tune(method, timed_steps), device)
    _, one = measure_cost(lambda: task.fine_tune(method, 1), device)
    several_flops = count_flops(lambda: task.fine_tune(method, timed_steps))
    one_flops = count_flops(lambda: task.fine_tune(method, 1))
    factor = (method.steps - 1) / (timed_steps - 1)
    seconds = one.seconds + factor * (several.seconds - one.seconds)
    return _make_row(seconds, several, one_flops + factor * (several_flops - one_flops))


def _make_row(seconds: float, cost: Cost, flops: float) -> dict[str, float]:
    return {"seconds": seconds, "peak_memory_mb": round(cost.peak_memory_mb, 1), "flops": flops}


def main(argv: list[str] | None = None) -> None:
    arguments = parse(Arguments, argv)
    models = (arguments.backbone, arguments.adapter)
    content: dict[str, Any] = {"hardware": device_name("cuda" if torch.cuda.is_available() else "cpu")}
    for side in arguments.resolution:
        rows = {}
        for name in COST_LABELS:
            row = run_in_fresh_process(measure, name, *models, side, arguments.steps, arguments.timed_steps)
            rows[name] = row
            print(f"{side} px  {name:10} {json.dumps(row)}", flush=True)
        for row in rows.values():
            row["time_share_of_full"] = row["seconds"] / rows[FULL]["seconds"]
            row["memory_share_of_full"] = row["peak_memory_mb"] / rows[FULL]["peak_memory_mb"]
        content[f"{side} px"] = rows
    write_json(arguments.output_file, content)


if __name__ == "__main__":
    main()
