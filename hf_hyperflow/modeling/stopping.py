"""Early stopping of the flow, by leave-one-out accuracy on the support set."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from .backbones import Hidden, SplitBackbone
from .injection import Injection
from .leave_one_out import leave_one_out_logits
from .prototypes import Head, unit_means


@dataclass(frozen=True)
class StoppingPoint:
    """Where the flow was stopped, and why.

    Attributes:
        time: the chosen t.
        accuracies: leave-one-out accuracy, 0 to 1, at each time that was tried. It is empty without early stopping, and
            where every class has a single image, so that no image can be left out.
    """

    time: float
    accuracies: dict[float, float] = field(default_factory=dict)


@torch.no_grad()
def choose_stopping_point(
    split: SplitBackbone,
    injection: Injection,
    hidden: Hidden,
    labels: torch.Tensor,
    times: list[float],
    thetas: list[torch.Tensor],
    head: Head = unit_means,
) -> StoppingPoint:
    """Choose the earliest time with the best leave-one-out accuracy on the support set, by forward passes only.

    Images that are alone in their class are not counted. A time at which features are not finite counts as 0.

    Args:
        split: the backbone in two halves.
        injection: the adapter inside it. Afterwards it has the weights of one of the points.
        hidden: what the first half computed of the support images.
        labels: `(n,)` in 0..n_way-1.
        times, thetas: the points of the flow to try, t = 0 among them.
        head: turns support features into prototypes.
    """
    is_counted = torch.bincount(labels)[labels] > 1
    if not is_counted.any():
        return StoppingPoint(time=times[-1])
    accuracies = {}
    for time, theta in zip(times, thetas, strict=True):
        with injection.using(theta):
            features = split.forward_suffix(hidden).float()
        # Where the flow has left the finite numbers, it is not stopped.
        accuracies[time] = 0.0
        if features.isfinite().all():
            predicted = leave_one_out_logits(features, labels, 1.0, head).argmax(-1)
            accuracies[time] = (predicted == labels)[is_counted].float().mean().item()
    best = max(accuracies.values())
    earliest = min(time for time, accuracy in accuracies.items() if accuracy == best)
    return StoppingPoint(time=earliest, accuracies=accuracies)
