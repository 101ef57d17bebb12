"""Classification by products with class prototypes."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

#: What turns support features `(n, width)` and labels `(n,)` into prototypes `(n_way, width)`.
Head = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def unit_means(features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The head of direct transfer: class means of length 1, `(n_way, width)`."""
    return F.normalize(class_means(features, labels), dim=-1)


class PrototypeClassifier:
    """Scores images by the product of their features with one prototype per class.

    With `unit_means` that is the cosine to the class means (Snell et al. 2017; cosine as in Chen et al. 2021,
    Meta-Baseline).

    Args:
        prototypes: `(n_way, width)`; they are multiplied with the features of an image, brought to length 1.
        scale: the inverse temperature that turns these products into logits; learned with the flow, so that the
            softmax of the logits is calibrated.
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
        head: Head = unit_means,
    ) -> PrototypeClassifier:
        """A classifier of the classes 0..labels.max() from features `(n, width)`; every class needs an image.

        Classes may have different numbers of images; differentiable in `features` and `scale`.
        """
        return cls(head(features, labels), scale)

    def __call__(self, features: torch.Tensor) -> torch.Tensor:
        """Logits `(n, n_way)` of features `(n, width)`."""
        with no_autocast(features):
            return self.scale * F.normalize(features, dim=-1) @ self.prototypes.T


def class_means(features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """`(n_way, width)` means of features `(n, width)` over labels 0..n_way-1; invariant to the order of images."""
    one_hot = F.one_hot(labels).to(features.dtype)
    with no_autocast(features):
        return (one_hot.T @ features) / one_hot.sum(dim=0).unsqueeze(1)


def no_autocast(features: torch.Tensor) -> torch.autocast:
    """Full precision within: bfloat16 cosines of similar classes are full of ties."""
    return torch.autocast(features.device.type, enabled=False)
