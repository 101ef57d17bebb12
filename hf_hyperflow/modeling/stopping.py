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

    Images that are alone in their class are not counted.

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
        predicted = leave_one_out_logits(features, labels, 1.0, head).argmax(-1)
        correct = (predicted == labels)[is_counted]
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
    """Logits `(n, n_way)` of each support image, from the classifier that all the others make.

    Without an image that is alone in its class that class has no prototype, so the row of such an image is NaN.

    Args:
        features: `(n, width)`.
        labels: `(n,)` in 0..n_way-1.
        scale: the inverse temperature of the logits.
        head: turns support features into prototypes.
    """
    is_alone = torch.bincount(labels)[labels] == 1
    logits = features.new_full((len(features), int(labels.max()) + 1), float("nan"))
    rows = torch.arange(len(features), device=features.device)
    for i in torch.nonzero(~is_alone).flatten().tolist():
        others = rows != i
        classifier = PrototypeClassifier.from_support(features[others], labels[others], scale, head)
        logits[i] = classifier(features[i : i + 1])[0]
    return logits
