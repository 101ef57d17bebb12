"""Trajectories per second of the batched teacher against a plain loop of PEFT fine-tuning: same tasks, same run.

    python training/benchmark_teacher.py --config training/configs/trajectories-vit-s14-70.yaml \
        --dataset FILE_OR_HUB_ID [...] --n_trajectories 48 --group_size 8 --output_dir outputs/teacher

The plain loop is what a user of PEFT would write: `get_peft_model`, `torch.optim.Adam`, one task after the other, a
forward pass of the whole model on fresh augmentations at every step; in float32 and under bfloat16 autocast. It records
the same things at the same steps. `teacher.json` in the folder holds the figures.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from arguments import parse
from collect_trajectories import Arguments, Collector, teacher_generator
from offline_cost import hardware, versions
from peft import PeftModel, get_peft_model
from tqdm.auto import tqdm

from hf_hyperflow.augmentation import random_views
from hf_hyperflow.domains import normalise
from hf_hyperflow.prototypes import PrototypeClassifier
from hf_hyperflow.saving import write_json
from hf_hyperflow.training_tasks import TrainingTask, task_images


class PlainLoop:
    """Fine-tunes tasks one by one; `__call__` returns the query accuracy in % at the recorded steps of each."""

    def __init__(self, collector: Collector):
        self.collector = collector
        backbone = copy.deepcopy(collector.backbone)
        self.model: PeftModel = get_peft_model(backbone, collector.arguments.peft_config(backbone))
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.start = [p.detach().clone() for p in self.parameters]

    def __call__(self, tasks: list[TrainingTask]) -> list[list[float]]:
        return [self.one(task) for task in tasks]

    def one(self, task: TrainingTask) -> list[float]:
        collector, teacher, episode = self.collector, self.collector.teacher, task.episode
        device = collector.accelerator.device
        generator = teacher_generator(collector.arguments.seed, episode.index)
        images = task_images(task, collector.by_name[episode.domain], device)
        n_support = len(episode.support)
        labels, query_labels = episode.support_labels.to(device), episode.query_labels.to(device)
        clean = normalise(images, collector.processor)
        with torch.no_grad():
            for parameter, start in zip(self.parameters, self.start, strict=True):
                parameter.copy_(start + teacher.noise * torch.randn(start.shape, generator=generator).to(device))
        optimizer = torch.optim.Adam(self.parameters, lr=teacher.learning_rate)
        recorded, accuracies = [], []
        for step in range(teacher.steps + 1):
            views = normalise(random_views(images[:n_support], generator), collector.processor)
            features = self.features(torch.cat([clean[:n_support], views]))
            classifier = PrototypeClassifier.from_support(features[:n_support], labels, teacher.scale)
            loss = F.cross_entropy(classifier(features[n_support:]), labels)
            if step in teacher.recorded:
                with torch.no_grad():
                    right = classifier(self.features(clean[n_support:])).argmax(-1) == query_labels
                accuracies.append(100 * right.float().mean().item())
                recorded.append([parameter.detach().half().cpu() for parameter in self.parameters])
            if step < teacher.steps:
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        return accuracies

    def features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.model(pixel_values).last_hidden_state[:, 0].float()


def timed(function: Callable, device: torch.device) -> tuple[object, float]:
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    result = function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return result, time.perf_counter() - started


def main() -> None:
    arguments = parse(Arguments)
    accelerator = Accelerator(cpu=arguments.cpu)
    device = accelerator.device
    collector = Collector(arguments, accelerator)
    loop = PlainLoop(collector)

    def batched(tasks: list[TrainingTask]) -> list[list[float]]:
        return collector.fine_tune(tasks).query_accuracy.tolist()

    methods = {
        f"{name}_{bits}": (run, bits == "bf16")
        for name, run in (("batched", batched), ("loop", loop))
        for bits in ("fp32", "bf16")
    }
    groups = [collector.tasks(group) for group in range(-(-arguments.n_trajectories // arguments.group_size))]
    results = {name: {"trajectories": 0, "seconds": 0.0, "start": 0.0, "end": 0.0} for name in methods}
    for number, tasks in enumerate(tqdm([groups[0][:2], *groups])):
        for name, (run, half) in methods.items():
            with torch.autocast(device.type, torch.bfloat16, enabled=half):
                accuracies, seconds = timed(lambda run=run, tasks=tasks: run(tasks), device)
            if number == 0:  # to warm up
                continue
            entry = results[name]
            entry["trajectories"] += len(tasks)
            entry["seconds"] += seconds
            entry["start"] += sum(row[0] for row in accuracies)
            entry["end"] += sum(row[-1] for row in accuracies)
    for entry in results.values():
        n = entry["trajectories"]
        entry["per_second"] = round(n / entry["seconds"], 4)
        entry["seconds"] = round(entry["seconds"], 2)
        entry["query_accuracy"] = {"start": round(entry.pop("start") / n, 2), "end": round(entry.pop("end") / n, 2)}
    rate = {name: entry["per_second"] for name, entry in results.items()}
    report = {
        "methods": results,
        "speedup": {
            "batched_bf16 / loop_fp32": round(rate["batched_bf16"] / rate["loop_fp32"], 2),
            "batched_bf16 / loop_bf16": round(rate["batched_bf16"] / rate["loop_bf16"], 2),
            "batched_fp32 / loop_fp32": round(rate["batched_fp32"] / rate["loop_fp32"], 2),
        },
        "parameters": arguments.parameters,
        "group_size": arguments.group_size,
        "images_per_pass": arguments.images_per_pass,
        "hardware": hardware(accelerator),
        "versions": versions(),
    }
    write_json(Path(arguments.output_dir) / "teacher.json", report)
    for name, entry in results.items():
        print(f"{name}: {entry['per_second']} trajectories/s, queries {entry['query_accuracy']}")
    print(report["speedup"])


if __name__ == "__main__":
    main()
