"""Regularised linear discriminant analysis: the closed-form head that compares images with classes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .prototypes import class_means, leave_one_out_means, no_autocast


class RegularisedLDA(nn.Module):
    """Class prototypes for cosines in the Mahalanobis geometry of the covariance within classes.

    The *Mahalanobis product* of two vectors is x^T C^-1 y, where C is the covariance within classes. It defines the
    Mahalanobis length |x|_C = (x^T C^-1 x)^(1/2) and the cosine of two vectors, their product over their lengths.

    Directions in which images of one class differ should count less. A few images tell little about these directions,
    so the covariance of a support set is completed by that of the training domains:

        C = R^T R + count (C_0 + ridge v_0 I)

    The rows of R are the support features minus the means of their classes. C_0 is the covariance within classes on
    the training domains, and v_0 is the mean of its diagonal. An image x and the mean m of a class have the cosine
    x^T C^-1 m / |m|_C, up to a factor that depends on x alone. This is linear discriminant analysis with cosines and
    an inverse Wishart prior, close to the Mahalanobis distance of Simple CNAPS (Bateni et al. 2020). It solves as many
    linear equations as there are support images. With one image per class R is zero and only the prior is left.

    The ridge says how far C_0 is to be trusted. In a foreign domain the differences between images are small beside
    what they share, and C_0 finds them. Classes like those that the backbone was trained on are far apart already,
    along the very directions that C_0 plays down. So the ridge is (spread / spread_0)^power. The spread is half the
    mean squared distance of images of different classes, and spread_0 is that of the training tasks.

    Args:
        width: length of the features.
        power: how fast the ridge grows with the spread; 0 means a ridge of 1 for all tasks.

    Attributes:
        directions: `(width, width)`, the eigenvectors of C_0 in its columns. No attribute is trained by gradients.
        variances: `(width,)`, the eigenvalues of C_0 times the count. They start equal and large, so that the
            prototypes are those of direct transfer until `set_prior` is called.
        spread: a number, spread_0.
    """

    directions: torch.Tensor
    variances: torch.Tensor
    spread: torch.Tensor

    def __init__(self, width: int, power: float = 4.0):
        super().__init__()
        self.power = power
        self.register_buffer("directions", torch.eye(width))
        self.register_buffer("variances", torch.full((width,), 1e6))
        self.register_buffer("spread", torch.ones(()))

    def forward(self, features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Prototypes `(n_way, width)` from features `(n, width)` and labels `(n,)` of at least two classes.

        The product of a prototype with an image of length 1 is their Mahalanobis cosine, if the Mahalanobis length of
        the image is the mean one of the support images. Differentiable in the features. The order of the images does
        not matter.
        """
        with no_autocast(features):
            whitening = self._get_whitening(features, labels)
            whitened = features @ whitening
            means = class_means(whitened, labels)
            residuals = whitened - means[labels]
            # In these coordinates C is I + R^T R. By Woodbury's identity its inverse is I - R^T (I + R R^T)^-1 R,
            # which takes as many equations as there are images.
            gram = torch.eye(len(residuals), device=residuals.device, dtype=residuals.dtype) + residuals @ residuals.T
            solved = torch.linalg.solve(gram, residuals)

            def apply_inverse(rows: torch.Tensor) -> torch.Tensor:
                return rows - (rows @ residuals.T) @ solved

            units = F.normalize(features, dim=1) @ whitening
            image_length = _mahalanobis_lengths(units, apply_inverse(units)).mean()
            directions = apply_inverse(means)
            return directions @ whitening.T / (_mahalanobis_lengths(means, directions) * image_length)

    def _get_whitening(self, features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The map `(width, width)` to coordinates in which the prior's covariance, ridge included, is the identity."""
        ridge = self._get_ridge(spread_between(features, labels))
        return self.directions.to(features) * (self.variances.to(features) + ridge).rsqrt()

    def _get_ridge(self, spread: torch.Tensor) -> torch.Tensor:
        """What the prior's variances are raised by, for each spread of a support set."""
        ratio = spread / self.spread.to(spread)
        # C_0 can be singular, so the ridge is at least a thousandth. Features may be huge, so it is kept finite: at the
        # upper end C_0 has long ceased to matter.
        ridge = ratio.clamp_min(0).pow(self.power).clamp_min(1e-3) * self.variances.to(spread).mean()
        return ridge.clamp_max(1e30)

    @torch.no_grad()
    def leave_one_out(self, features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Products `(n, n_way)` of each support image, at length 1, with the prototypes that all the others make.

        All images share one eigendecomposition of S = R^T R + count C_0. Without image i of a class of n_c images, C is
        S + ridge_i I - n_c / (n_c - 1) r_i r_i^T, where r_i is the row of R. The ridge moves the eigenvalues, and the
        last term is undone by the Sherman-Morrison formula. An image alone in its class has a row of NaN.

        Args:
            features: `(n, width)`.
            labels: `(n,)` in 0..n_way-1, of at least two classes.
        """
        # The differences need double precision, which not every accelerator has.
        rows, labels = features.double().cpu(), labels.cpu()
        count = torch.bincount(labels)[labels].double().unsqueeze(1)
        ridge = self._get_ridge(_leave_one_out_spreads(rows, labels)).unsqueeze(1)
        units = F.normalize(rows, dim=1)
        rotation = self.directions.to(rows)
        residuals = rows @ rotation - class_means(rows @ rotation, labels)[labels]
        eigenvalues, eigenvectors = torch.linalg.eigh(residuals.T @ residuals + self.variances.to(rows).diag())
        # From here on all rows are in the coordinates of the eigenvectors, where S is diagonal.
        rotation = rotation @ eigenvectors
        units, residuals, means = units @ rotation, residuals @ eigenvectors, class_means(rows, labels) @ rotation
        own_means = leave_one_out_means(rows, labels) @ rotation
        weights = 1 / (eigenvalues + ridge)  # one diagonal for each image that is left out
        weighted = weights * residuals
        downdate = count / (count - 1) * residuals
        gain = count / (count - 1) / (1 - (weighted * downdate).sum(dim=1, keepdim=True))

        def multiply(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
            """Row by row, left^T C^-1 right, for the C of that row."""
            on_residuals = (weighted * left).sum(dim=1, keepdim=True) * (weighted * right).sum(dim=1, keepdim=True)
            return (weights * left * right).sum(dim=1, keepdim=True) + gain * on_residuals

        def square(vectors: torch.Tensor) -> torch.Tensor:
            """For the C of each row, the squared Mahalanobis lengths of the same vectors."""
            return weights @ vectors.square().T + gain * (weighted @ vectors.T).square()

        undone = gain * (weighted * units).sum(dim=1, keepdim=True)
        products = (weights * units) @ means.T + undone * (weighted @ means.T)
        lengths = square(means)
        products.scatter_(1, labels.unsqueeze(1), multiply(units, own_means))
        lengths.scatter_(1, labels.unsqueeze(1), multiply(own_means, own_means))
        unit_lengths = square(units).clamp_min(1e-24).sqrt().fill_diagonal_(0)
        image_length = unit_lengths.sum(dim=1, keepdim=True) / (len(rows) - 1)
        cosines = products / (lengths.clamp_min(1e-24).sqrt() * image_length)
        return cosines.masked_fill(count == 1, float("nan")).to(features)

    @torch.no_grad()
    def set_prior(self, covariance: torch.Tensor, spread: float, *, count: float = 100.0) -> None:
        """Set what the training domains tell.

        Args:
            covariance: covariance within classes, `(width, width)`, see `within_covariance`.
            spread: mean of `spread_between` over training tasks.
            count: the number of images that the prior weighs as much as.

        Raises:
            ValueError: the covariance or the spread is zero or not finite.
        """
        if not (covariance.isfinite().all() and covariance.diagonal().mean() > 0 and 0 < spread < float("inf")):
            raise ValueError("the covariance within classes is zero or not finite: nothing can be measured in it.")
        eigenvalues, eigenvectors = torch.linalg.eigh(covariance.double())
        self.directions.copy_(eigenvectors)
        self.variances.copy_(count * eigenvalues.clamp_min(0))
        self.spread.fill_(float(spread))


def _mahalanobis_lengths(rows: torch.Tensor, products: torch.Tensor) -> torch.Tensor:
    """Mahalanobis lengths `(n, 1)` of rows `(n, width)`, given their products with the inverse covariance."""
    return (rows * products).sum(dim=1, keepdim=True).clamp_min(1e-24).sqrt()


def within_covariance(features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Unbiased covariance `(width, width)` of features `(n, width)` around the means of their classes."""
    with no_autocast(features):
        residuals = features - class_means(features, labels)[labels]
        return residuals.T @ residuals / (len(features) - len(labels.unique()))


def _leave_one_out_spreads(features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """`spread_between` of the others for each image, `(n,)`; infinity for an image alone in its class."""
    count = torch.bincount(labels)[labels].to(features.dtype)
    means = class_means(features, labels)
    squares = features.square().sum(dim=1)
    mean_squares = class_means(squares.unsqueeze(1), labels).squeeze(1)
    n_way = len(means)
    own_means = leave_one_out_means(features, labels)
    own_squares = mean_squares[labels] - (squares - mean_squares[labels]) / (count - 1)
    totals = means.sum(dim=0) - means[labels] + own_means
    lengths = means.square().sum(dim=1)
    own_lengths = lengths.sum() - lengths[labels] + own_means.square().sum(dim=1)
    between = (totals.square().sum(dim=1) - own_lengths) / (n_way * (n_way - 1))
    within = (mean_squares.sum() - mean_squares[labels] + own_squares) / n_way
    return within - between


def spread_between(features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Half the mean squared distance of images of different classes, from features `(n, width)`.

    There are two classes or more. The estimate is unbiased: if classes are drawn at random, its expectation depends on
    neither the number of classes nor that of images.
    """
    with no_autocast(features):
        means = class_means(features, labels)
        products = means @ means.T
        n_way = len(means)
        between = (products.sum() - products.diagonal().sum()) / (n_way * (n_way - 1))
        return class_means(features.square().sum(dim=1, keepdim=True), labels).mean() - between
