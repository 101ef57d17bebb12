"""Synthetic domains and trajectories."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from hf_hyperflow import HyperFlowAdapter
from hf_hyperflow.data.domains import Domain
from hf_hyperflow.data.tasks import TrainingTask, draw_task
from hf_hyperflow.finetuning.teacher import Recording, Teacher
from hf_hyperflow.finetuning.trajectories import Trajectories
from hf_hyperflow.modeling.parameter_space import ParameterSpace
from tests.helpers.tiny import SIZE

TIMES = torch.tensor([0.0, 0.25, 0.5, 1.0])
TEACHER = Teacher(steps=6, n_points=3)
FINGERPRINT = [0.1, 0.2]


@dataclass
class Collected:
    """A folder of three groups of two tasks each, and what was put into it; the fourth row diverged.

    Attributes:
        deltas: `(6, 3, n_tokens, token_dim)`.
        description: `collection.json`.
    """

    folder: Path
    tasks: list[TrainingTask]
    deltas: torch.Tensor
    description: dict


def colours(name: str, *, n_classes: int = 6, per_class: int = 20, seed: int = 0) -> Domain:
    """Noisy colours, one per class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n_classes).repeat_interleave(per_class)
    colour = torch.randint(40, 216, (n_classes, 3, 1, 1), generator=generator)[labels]
    images = colour + torch.randint(-40, 40, (len(labels), 3, SIZE, SIZE), generator=generator)
    return Domain(name, images.byte(), labels, [f"c{c}" for c in range(n_classes)])


def noise(name: str, n_classes: int, per_class: int, class_names: list[str] | None = None) -> Domain:
    """Noise of 8 pixels a side, with labels in a shuffled order."""
    generator = torch.Generator().manual_seed(len(name))
    order = torch.randperm(n_classes * per_class, generator=generator)
    labels = torch.arange(n_classes).repeat_interleave(per_class)[order]
    images = torch.randint(0, 256, (len(labels), 3, 8, 8), dtype=torch.uint8, generator=generator)
    return Domain(name, images, labels, class_names or [f"c{c}" for c in range(n_classes)])


def straight(velocity: torch.Tensor) -> Callable[[int, float], torch.Tensor]:
    """The same straight line for every task."""
    return lambda row, time: time * velocity


def made_trajectories(
    adapter: HyperFlowAdapter,
    domains: list[Domain],
    n_rows: int,
    *,
    place: Callable[[int, float], torch.Tensor] | None = None,
    times: torch.Tensor = TIMES,
    seed: int = 0,
) -> Trajectories:
    """Trajectories of drawn tasks whose theta minus start is `place(row, time)`, random walks by default."""
    mask = adapter.space.mask
    if place is None:
        generator = torch.Generator().manual_seed(seed)
        steps = 0.05 * torch.randn(n_rows, len(times), *mask.shape, generator=generator)
        deltas = steps.cumsum(dim=1)
    else:
        deltas = torch.stack([torch.stack([place(row, t) for t in times.tolist()]) for row in range(n_rows)])
    tasks = [draw_task(domains, index, seed=seed, randomize_prob=0.5) for index in range(n_rows)]
    return Trajectories(tasks, times, (deltas * mask).half(), mask, 0, {})


def random_recording(space: ParameterSpace, n: int, seed: int) -> Recording:
    """What `TEACHER` might have recorded of `n` tasks."""
    generator = torch.Generator().manual_seed(seed)
    deltas = 0.01 * torch.randn(n, 3, *space.mask.shape, generator=generator) * space.mask
    accuracies = 100 * torch.rand(2, n, 3, generator=generator)
    losses = torch.rand(n, 7, generator=generator)
    return Recording(deltas, losses, *accuracies, diverged=torch.zeros(n, dtype=torch.bool))
