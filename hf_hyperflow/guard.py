"""How far to follow the flow: leave-one-out accuracy on the support set."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from .backbones import Hidden, SplitBackbone
from .parameter_space import Injection
from .prototypes import Prototypes, leave_one_out_logits, unit_means


@dataclass(frozen=True)
class Choice:
    """Where the flow was stopped, and why.

    Attributes:
        time: the chosen t.
        accuracies: leave-one-out accuracy at each time that was tried; empty without a guard, or when every class
            has a single image, so that nothing can be left out.
    """

    time: float
    accuracies: dict[float, float] = field(default_factory=dict)


@torch.no_grad()
def choose_time(
    split: SplitBackbone,
    injection: Injection,
    hidden: Hidden,
    labels: torch.Tensor,
    times: list[float],
    thetas: list[torch.Tensor],
    prototypes: Prototypes = unit_means,
) -> Choice:
    """The earliest time with the best leave-one-out accuracy on the support set; forward passes only.

    Args:
        hidden: what the frozen blocks computed of the support images.
        labels: `(n,)` in 0..n_way-1.
        times, thetas: the points of the flow to try, t = 0 among them.
        prototypes: makes them of support features, see `hf_hyperflow.prototypes`.
    """
    counted = torch.bincount(labels)[labels] > 1
    if not counted.any():
        return Choice(time=times[-1])
    accuracies = {}
    for time, theta in zip(times, thetas, strict=True):
        injection.write(theta)
        logits = leave_one_out_logits(split(hidden).float(), labels, 1.0, prototypes)[counted]
        accuracies[time] = (logits.argmax(-1) == labels[counted]).float().mean().item()
    injection.owner = None  # whose weights these were no longer holds
    best = max(accuracies.values())
    return Choice(time=min(t for t, a in accuracies.items() if a == best), accuracies=accuracies)
