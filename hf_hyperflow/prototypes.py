"""Classification by cosine to class prototypes."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

#: Prototypes `(n_way, width)` from features `(n, width)` and labels `(n,)`, see `unit_means`.
Prototypes = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def unit_means(features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Prototypes `(n_way, width)` of direct transfer: class means of length 1."""
    return F.normalize(class_means(features, labels), dim=-1)


class PrototypeClassifier:
    """Scores images by the cosine of their features to one mean feature per class (Snell et al. 2017; cosine as in
    Chen et al. 2021, Meta-Baseline), or by that in another metric.

    Args:
        prototypes: `(n_way, width)`, what the features of an image, of length 1, are multiplied with.
        scale: the inverse temperature that turns cosines into logits; learned with the flow, so that the softmax of
            the logits is calibrated.
    """

    def __init__(self, prototypes: torch.Tensor, scale: torch.Tensor | float = 10.0):
        self.prototypes = prototypes
        self.scale = scale

    @classmethod
    def from_support(
        cls,
        features: torch.Tensor,
        labels: torch.Tensor,
        scale: torch.Tensor | float = 10.0,
        prototypes: Prototypes = unit_means,
    ) -> PrototypeClassifier:
        """Prototypes of the classes 0..labels.max() from features `(n, width)`; every class needs an image.

        Classes may have different numbers of images; differentiable in `features` and `scale`. `prototypes` makes
        them, cosines to class means if nothing else is said.
        """
        return cls(prototypes(features, labels), scale)

    def __call__(self, features: torch.Tensor) -> torch.Tensor:
        """Logits `(n, n_way)` of features `(n, width)`."""
        with exact(features):
            return self.scale * F.normalize(features, dim=-1) @ self.prototypes.T


def class_means(features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """`(n_way, width)` means of features `(n, width)` over labels 0..n_way-1; invariant to the order of images."""
    one_hot = F.one_hot(labels).to(features.dtype)
    with exact(features):
        return (one_hot.T @ features) / one_hot.sum(dim=0).unsqueeze(1)


def exact(features: torch.Tensor) -> torch.autocast:
    """No autocast within: bfloat16 cosines of like classes are full of ties."""
    return torch.autocast(features.device.type, enabled=False)


def leave_one_out_logits(
    features: torch.Tensor,
    labels: torch.Tensor,
    scale: torch.Tensor | float,
    prototypes: Prototypes = unit_means,
) -> torch.Tensor:
    """Logits `(n, n_way)` of each support image, by the classifier of all the others.

    An image that is alone in its class has no prototype of its own left: its row is NaN.
    """
    alone = torch.bincount(labels)[labels] == 1
    logits = features.new_full((len(features), int(labels.max()) + 1), float("nan"))
    for i in torch.nonzero(~alone).flatten().tolist():
        others = torch.arange(len(features), device=features.device) != i
        classifier = PrototypeClassifier.from_support(features[others], labels[others], scale, prototypes)
        logits[i] = classifier(features[i : i + 1])[0]
    return logits
