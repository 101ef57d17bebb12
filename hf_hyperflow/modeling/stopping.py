"""Early stopping of the flow, by leave-one-out accuracy on the support set."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from .backbones import Hidden, SplitBackbone
from .injection import Injection
from .lda import RegularisedLDA
from .prototypes import Head, PrototypeClassifier, leave_one_out_means, unit_means

#: With fewer images than this part of the features' width, n small LDAs cost less than one eigendecomposition.
SMALL = 20


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


def leave_one_out_logits(
    features: torch.Tensor,
    labels: torch.Tensor,
    scale: torch.Tensor | float,
    head: Head = unit_means,
) -> torch.Tensor:
    """Logits `(n, n_way)` of each support image, from the classifier that all the others make.

    Without an image that is alone in its class that class has no prototype, so the row of such an image is NaN. The
    class means of all images take one matrix product, and a `RegularisedLDA` of all images takes one factorisation.

    Args:
        features: `(n, width)`.
        labels: `(n,)` in 0..n_way-1.
        scale: the inverse temperature of the logits.
        head: turns support features into prototypes.
    """
    if head is unit_means:
        return scale * _leave_one_out_cosines(features, labels)
    if isinstance(head, RegularisedLDA) and len(features) * SMALL >= features.shape[1]:
        return scale * head.leave_one_out(features, labels)
    is_alone = torch.bincount(labels)[labels] == 1
    logits = features.new_full((len(features), int(labels.max()) + 1), float("nan"))
    rows = torch.arange(len(features), device=features.device)
    for i in torch.nonzero(~is_alone).flatten().tolist():
        others = rows != i
        classifier = PrototypeClassifier.from_support(features[others], labels[others], scale, head)
        logits[i] = classifier(features[i : i + 1])[0]
    return logits


def _leave_one_out_cosines(features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cosines `(n, n_way)` of each support image with the class means of all the others; NaN for one alone."""
    units = F.normalize(features, dim=-1)
    cosines = units @ unit_means(features, labels).T
    own_means = F.normalize(leave_one_out_means(features, labels), dim=-1)
    cosines.scatter_(1, labels.unsqueeze(1), (units * own_means).sum(dim=1, keepdim=True))
    is_alone = torch.bincount(labels)[labels] == 1
    return cosines.masked_fill(is_alone.unsqueeze(1), float("nan"))
