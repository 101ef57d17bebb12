"""The metric in which images are compared with the classes: measured on many domains, completed by the support set."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .prototypes import class_means, exact


class SupportMetric(nn.Module):
    """Class prototypes in the metric of the covariance within classes.

    Directions in which images of one class differ should count less. A few images tell little of them, so the
    covariance of a support set is completed by one of the training domains: C = R^T R + (W^T W)^-1, where the rows of R
    are the support features minus the means of their classes. An image x has the cosine x^T C^-1 m / |m|_C with the
    mean m of a class, up to a factor of its own. That is linear discriminant analysis with cosines and an inverse
    Wishart prior, near the Mahalanobis distance of Simple CNAPS (Bateni et al. 2020), and needs n_support equations to
    be solved. With one image of each class R is zero, and what was measured is left.

    Args:
        width: of the features.

    Attributes:
        map: W, `(width, width)`, measured and not trained. It starts as a small multiple of the identity, with which
            the prototypes are the class means as in plain direct transfer; see `set_prior`.
    """

    def __init__(self, width: int):
        super().__init__()
        self.register_buffer("map", 1e-3 * torch.eye(width))

    def forward(self, features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Prototypes `(n_way, width)` from features `(n, width)` and labels `(n,)`.

        They are as long as makes their products with images of length 1 cosines in the metric, if these are of the
        mean length in it of the support images. Differentiable in the features; the order of images does not matter,
        that of the classes permutes the rows.
        """
        with exact(features):
            map_ = self.map.to(features)
            mapped = features @ map_.T
            means = class_means(mapped, labels)
            spread = mapped - means[labels]
            # (I + R^T R)^-1 = I - R^T (I + R R^T)^-1 R: as many equations as images (Woodbury).
            gram = torch.eye(len(spread), device=spread.device, dtype=spread.dtype) + spread @ spread.T
            solved = torch.linalg.solve(gram, spread)

            def inverse(rows: torch.Tensor) -> torch.Tensor:
                return rows - (rows @ spread.T) @ solved

            units = F.normalize(features, dim=1) @ map_.T
            image_length = _lengths(units, inverse(units)).mean()
            directions = inverse(means)
            return directions @ map_ / (_lengths(means, directions) * image_length)

    @torch.no_grad()
    def set_prior(self, covariance: torch.Tensor, *, count: float = 200.0, ridge: float = 0.3) -> None:
        """Take a covariance within classes that was measured on the training domains.

        The defaults were chosen on training domains, each with the covariance of the others, among counts from 30 to
        1,000 and ridges from 0.1 to 1: 100 to 300 images were the best at 5 and 20 shots; of ridges 0.1 to 0.3 were
        there, and 0.3 to 1 at 1 shot.

        Args:
            covariance: `(width, width)`.
            count: how many images the prior weighs.
            ridge: added to the diagonal, in units of its mean.

        Raises:
            ValueError: the covariance is not finite or zero.
        """
        width, variance = len(covariance), covariance.diagonal().mean()
        if not (covariance.isfinite().all() and variance > 0):
            raise ValueError("the covariance within classes is zero or not finite: nothing can be measured in it.")
        prior = count * (covariance + ridge * variance * torch.eye(width).to(covariance))
        values, vectors = torch.linalg.eigh(prior.double())
        self.map.copy_((vectors * values.rsqrt()) @ vectors.T)


def _lengths(rows: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    """Lengths in the metric `(n, 1)` of rows `(n, width)`, given the inverse covariance times each; above zero."""
    return (rows * inverse).sum(dim=1, keepdim=True).clamp_min(1e-24).sqrt()


def within_covariance(features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Covariance `(width, width)` of features `(n, width)` around the means of their classes, unbiased."""
    with exact(features):
        spread = features - class_means(features, labels)[labels]
        return spread.T @ spread / (len(features) - len(labels.unique()))
