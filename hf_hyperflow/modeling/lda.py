"""The metric in which images are compared with the classes: measured on many domains, completed by the support set."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .prototypes import class_means, no_autocast


class RegularisedLDA(nn.Module):
    """Class prototypes in the metric of the covariance within classes.

    Directions in which images of one class differ should count less. A few images tell little of them, so the
    covariance of a support set is completed by one of the training domains: C = R^T R + count (C_0 + ridge v_0 I).
    The rows of R are the support features minus the means of their classes, C_0 was measured and v_0 is the mean of
    its diagonal. An image x has the cosine x^T C^-1 m / |m|_C with the mean m of a class, up to a factor of its own.
    That is linear discriminant analysis with cosines and an inverse Wishart prior, near the Mahalanobis distance of
    Simple CNAPS (Bateni et al. 2020), and needs n_support equations to be solved. With one image of each class R is
    zero, and what was measured is left.

    How far C_0 is to be trusted depends on the task. What sets images of a foreign domain apart is small beside what
    they share, and C_0 finds it; classes like those the backbone was trained for stand far apart already, along the
    very directions that C_0 makes little of. So the ridge is (spread / spread_0)^power, where the spread is half the
    mean squared distance of images of different classes and spread_0 that of the training tasks.

    Args:
        width: of the features.
        power: how fast the ridge grows with the spread; 0 is the same ridge, 1, for all tasks.

    Attributes:
        directions: `(width, width)`, the eigenvectors of C_0 in its columns. None of the three is trained.
        variances: `(width,)`, its eigenvalues times the count. They start as equal and large, with which the
            prototypes are the class means as in plain direct transfer; see `set_prior`.
        spread: a number, spread_0.
    """

    def __init__(self, width: int, power: float = 4.0):
        super().__init__()
        self.power = power
        self.register_buffer("directions", torch.eye(width))
        self.register_buffer("variances", torch.full((width,), 1e6))
        self.register_buffer("spread", torch.ones(()))

    def forward(self, features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Prototypes `(n_way, width)` from features `(n, width)` and labels `(n,)`, of two classes or more.

        They are as long as makes their products with images of length 1 cosines in the metric, if these are of the
        mean length in it of the support images. Differentiable in the features; the order of images does not matter,
        that of the classes permutes the rows.
        """
        with no_autocast(features):
            ratio = spread_between(features, labels) / self.spread.to(features)
            variances = self.variances.to(features)
            # At least a thousandth: C_0 can be singular.
            ridge = ratio.clamp_min(0).pow(self.power).clamp_min(1e-3) * variances.mean()
            map_ = self.directions.to(features) * (variances + ridge).rsqrt()
            mapped = features @ map_
            means = class_means(mapped, labels)
            spread = mapped - means[labels]
            # (I + R^T R)^-1 = I - R^T (I + R R^T)^-1 R: as many equations as images (Woodbury).
            gram = torch.eye(len(spread), device=spread.device, dtype=spread.dtype) + spread @ spread.T
            solved = torch.linalg.solve(gram, spread)

            def inverse(rows: torch.Tensor) -> torch.Tensor:
                return rows - (rows @ spread.T) @ solved

            units = F.normalize(features, dim=1) @ map_
            image_length = _lengths(units, inverse(units)).mean()
            directions = inverse(means)
            return directions @ map_.T / (_lengths(means, directions) * image_length)

    @torch.no_grad()
    def set_prior(self, covariance: torch.Tensor, spread: float, *, count: float = 100.0) -> None:
        """Take what was measured on the training domains.

        The defaults of count and power were chosen by `training/choose_metric.py` on training domains, each with what
        was measured on the others.

        Args:
            covariance: within classes, `(width, width)`, see `within_covariance`.
            spread: mean over tasks of `spread_between`.
            count: how many images the prior weighs.

        Raises:
            ValueError: the covariance or the spread is not finite or zero.
        """
        if not (covariance.isfinite().all() and covariance.diagonal().mean() > 0 and 0 < spread < float("inf")):
            raise ValueError("the covariance within classes is zero or not finite: nothing can be measured in it.")
        values, vectors = torch.linalg.eigh(covariance.double())
        self.directions.copy_(vectors)
        self.variances.copy_(count * values.clamp_min(0))
        self.spread.fill_(float(spread))


def _lengths(rows: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    """Lengths in the metric `(n, 1)` of rows `(n, width)`, given the inverse covariance times each; above zero."""
    return (rows * inverse).sum(dim=1, keepdim=True).clamp_min(1e-24).sqrt()


def within_covariance(features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Covariance `(width, width)` of features `(n, width)` around the means of their classes, unbiased."""
    with no_autocast(features):
        spread = features - class_means(features, labels)[labels]
        return spread.T @ spread / (len(features) - len(labels.unique()))


def spread_between(features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Half the mean squared distance of images of different classes, from features `(n, width)` of two classes or more.

    Without bias: its expectation depends on neither ways nor shots, if classes are drawn at random.
    """
    with no_autocast(features):
        means = class_means(features, labels)
        products = means @ means.T
        n_way = len(means)
        between = (products.sum() - products.diagonal().sum()) / (n_way * (n_way - 1))
        return class_means(features.square().sum(dim=1, keepdim=True), labels).mean() - between
