"""Classification by cosine to class prototypes."""

from __future__ import annotations

import torch
import torch.nn.functional as F


class PrototypeClassifier:
    """Scores images by the cosine of their features to one mean feature per class (Snell et al. 2017; cosine as in
    Chen et al. 2021, Meta-Baseline).

    Args:
        prototypes: `(n_way, width)` mean features of each class's support images.
        scale: the inverse temperature that turns cosines into logits; learned with the flow, so that the softmax of
            the logits is calibrated.
    """

    def __init__(self, prototypes: torch.Tensor, scale: torch.Tensor | float = 10.0):
        self.prototypes = prototypes
        self.scale = scale

    @classmethod
    def from_support(
        cls, features: torch.Tensor, labels: torch.Tensor, scale: torch.Tensor | float = 10.0
    ) -> PrototypeClassifier:
        """Prototypes of the classes 0..labels.max() from features `(n, width)`; every class needs an image.

        Classes may have different numbers of images; differentiable in `features` and `scale`.
        """
        return cls(class_means(features, labels), scale)

    def __call__(self, features: torch.Tensor) -> torch.Tensor:
        """Logits `(n, n_way)` of features `(n, width)`."""
        with exact(features):
            return self.scale * F.normalize(features, dim=-1) @ F.normalize(self.prototypes, dim=-1).T


def class_means(features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """`(n_way, width)` means of features `(n, width)` over labels 0..n_way-1; invariant to the order of images."""
    one_hot = F.one_hot(labels).to(features.dtype)
    with exact(features):
        return (one_hot.T @ features) / one_hot.sum(dim=0).unsqueeze(1)


def exact(features: torch.Tensor) -> torch.autocast:
    """No autocast within: bfloat16 cosines of like classes are full of ties."""
    return torch.autocast(features.device.type, enabled=False)


def leave_one_out_logits(features: torch.Tensor, labels: torch.Tensor, scale: torch.Tensor | float) -> torch.Tensor:
    """Logits `(n, n_way)` of each support image, its own class's prototype computed without it.

    An image that is alone in its class has no prototype of its own left: its row is NaN.
    """
    one_hot = F.one_hot(labels).to(features.dtype)
    with exact(features):
        sums, counts = one_hot.T @ features, one_hot.sum(dim=0)
        prototypes = (sums / counts.unsqueeze(1)).expand(len(features), -1, -1).clone()
        rows = torch.arange(len(features))
        prototypes[rows, labels] = (sums[labels] - features) / (counts[labels] - 1).unsqueeze(1)
        cosines = torch.einsum("nd,ncd->nc", F.normalize(features, dim=-1), F.normalize(prototypes, dim=-1))
    alone = counts[labels] == 1
    return (scale * cosines).masked_fill(alone.unsqueeze(1), float("nan"))
