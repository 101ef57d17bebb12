"""Classification by the products of features with class prototypes."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

#: A head turns support features `(n, width)` and labels `(n,)` into prototypes `(n_way, width)`.
Head = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def unit_means(features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The head of direct transfer: class means of length 1, `(n_way, width)`."""
    return F.normalize(class_means(features, labels), dim=-1)


class PrototypeClassifier:
    """Classifies images by the product of their features with one prototype per class.

    With the head `unit_means` that is the cosine with the class means (Snell et al. 2017; cosines as in Chen et al.
    2021, Meta-Baseline).

    Args:
        prototypes: `(n_way, width)`. They are multiplied with features of length 1.
        scale: the inverse temperature that turns these products into logits. It is learned with the flow, so that the
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
        """A classifier of the classes 0..labels.max(), differentiable in `features` and `scale`.

        Args:
            features: `(n, width)`.
            labels: `(n,)`. Every class has an image; they need not have the same number.
            scale: see the class.
            head: turns the features into prototypes.
        """
        return cls(head(features, labels), scale)

    def __call__(self, features: torch.Tensor) -> torch.Tensor:
        """Logits `(n, n_way)` of features `(n, width)`."""
        with no_autocast(features):
            return self.scale * F.normalize(features, dim=-1) @ self.prototypes.T


def class_means(features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Means `(n_way, width)` of the features `(n, width)` of each label in 0..n_way-1, in whatever order they come."""
    return means_by_class(features, F.one_hot(labels))


def means_by_class(features: torch.Tensor, one_hot: torch.Tensor) -> torch.Tensor:
    """`class_means` of labels as one-hot rows `(n, n_way)`. A traced graph knows how many classes these have."""
    one_hot = one_hot.to(features.dtype)
    with no_autocast(features):
        return (one_hot.T @ features) / one_hot.sum(dim=0).unsqueeze(1)


def leave_one_out_means(features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """For each of the features `(n, width)`, the mean of the others of its label; NaN where there are no others.

    The others are added up, not subtracted from the sum: where they cancel out, a difference would be all rounding.
    """
    is_other = (labels.unsqueeze(1) == labels).fill_diagonal_(False).to(features.dtype)
    with no_autocast(features):
        return (is_other @ features) / is_other.sum(dim=1, keepdim=True)


def no_autocast(features: torch.Tensor) -> torch.autocast:
    """A context of full precision: in bfloat16 the cosines of similar classes are full of ties."""
    return torch.autocast(features.device.type, enabled=False)
