"""Early stopping of the flow, by leave-one-out accuracy on the support set."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from .backbones import Hidden, SplitBackbone
from .injection import Injection
from .prototypes import Head, PrototypeClassifier, unit_means


@dataclass(frozen=True)
class StoppingPoint:
    """Where the flow was stopped, and why.

    Attributes:
        time: the chosen t.
        accuracies: leave-one-out accuracy, 0 to 1, at each time that was tried; empty without early stopping, or when
            every class has a single image, so that nothing can be left out.
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
    """The earliest time with the best leave-one-out accuracy on the support set; forward passes only.

    Args:
        hidden: what the frozen blocks computed of the support images.
        labels: `(n,)` in 0..n_way-1.
        times, thetas: the points of the flow to try, t = 0 among them.
        head: makes prototypes of support features.
    """
    has_company = torch.bincount(labels)[labels] > 1
    if not has_company.any():
        return StoppingPoint(time=times[-1])
    accuracies = {}
    for time, theta in zip(times, thetas, strict=True):
        with injection.using(theta):
            features = split.forward_suffix(hidden).float()
        predicted = leave_one_out_logits(features, labels, 1.0, head).argmax(-1)
        correct = (predicted == labels)[has_company]
        accuracies[time] = correct.float().mean().item()
    best = max(accuracies.values())
    earliest = min(time for time, accuracy in accuracies.items() if accuracy == best)
    return StoppingPoint(time=earliest, accuracies=accuracies)


def leave_one_out_logits(
    features: torch.Tensor,
    labels: torch.Tensor,
    scale: torch.Tensor | float,
    head: Head = unit_means,
) -> torch.Tensor:
    """Logits `(n, n_way)` of each support image, by the classifier of all the others.

    An image that is alone in its class has no prototype of its own left: its row is NaN.
    """
    alone = torch.bincount(labels)[labels] == 1
    logits = features.new_full((len(features), int(labels.max()) + 1), float("nan"))
    rows = torch.arange(len(features), device=features.device)
    for i in torch.nonzero(~alone).flatten().tolist():
        others = rows != i
        classifier = PrototypeClassifier.from_support(features[others], labels[others], scale, head)
        logits[i] = classifier(features[i : i + 1])[0]
    return logits
