"""Regularised linear discriminant analysis: the closed-form head that compares images with classes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .prototypes import class_means, means_by_class, no_autocast

#: Of the mean squared length of class means, at least this part is taken for signal.
MIN_SIGNAL = 0.05


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

    The mean of few images is longer than the mean of many, because it has more noise in it: on average |m|_C^2 =
    signal + noise / n for a class of n images. Signal is the squared length of the mean that more and more images
    approach, and noise is the mean squared Mahalanobis distance of an image from it. An image of the class has with
    that mean the expected cosine signal / |m|_C, up to a factor that all classes share, and with other means it has
    about the same small cosine. So where classes have different numbers of images, large classes win undecided
    images. The threshold between two classes belongs in the middle between the two expectations, as in any linear
    discriminant analysis. To first order that is what dividing each cosine by the square root of its expectation
    does, see `weigh_classes`. Classes of the same number of images are compared as they are.

    Args:
        width: length of the features.
        power: how fast the ridge grows with the spread; 0 means a ridge of 1 for all tasks.

    Attributes:
        directions: `(width, width)`, the eigenvectors of C_0 in its columns. No attribute is trained by gradients.
        variances: `(width,)`, the eigenvalues of C_0 times the count. They start equal and large, so that the
            prototypes have the directions of the class means until `set_prior` is called.
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

    def forward(
        self, features: torch.Tensor, labels: torch.Tensor, one_hot: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Prototypes `(n_way, width)` from features `(n, width)` and labels `(n,)` of at least two classes.

        The product of a prototype with an image of length 1 is their Mahalanobis cosine, if the Mahalanobis length of
        the image is the mean one of the support images. Differentiable in the features. The order of the images does
        not matter. A graph that is traced for any number of classes needs the labels as one-hot rows `(n, n_way)`, too.
        """
        is_traced = one_hot is not None
        if one_hot is None:
            one_hot = F.one_hot(labels)
        with no_autocast(features):
            whitening = self._get_whitening(features, one_hot)
            whitened = features @ whitening
            means = means_by_class(whitened, one_hot)
            residuals = whitened - means[labels]
            # In these coordinates C is I + R^T R. By Woodbury's identity its inverse is I - R^T (I + R R^T)^-1 R,
            # which takes as many equations as there are images.
            gram = (
                torch.eye(residuals.shape[0], device=residuals.device, dtype=residuals.dtype) + residuals @ residuals.T
            )
            solved = torch.linalg.solve(gram, residuals)

            def apply_inverse(rows: torch.Tensor) -> torch.Tensor:
                return rows - (rows @ residuals.T) @ solved

            units = F.normalize(features, dim=1) @ whitening
            image_length = _mahalanobis_lengths(units, apply_inverse(units)).mean()
            directions = apply_inverse(means)
            lengths = _mahalanobis_lengths(means, directions)
            prototypes = directions @ whitening.T / (lengths * image_length)
            counts = one_hot.sum(dim=0)
            if is_traced or counts.min() < counts.max():
                leverages = (residuals * apply_inverse(residuals)).sum(dim=1)
                noise = measure_noise(leverages, counts[labels])
                signal = measure_signal(lengths.squeeze(1).square(), noise, counts)
                prototypes = prototypes * weigh_classes(counts, signal, noise).unsqueeze(1)
            return prototypes

    def _get_whitening(self, features: torch.Tensor, one_hot: torch.Tensor) -> torch.Tensor:
        """The map `(width, width)` to coordinates in which the prior's covariance, ridge included, is the identity."""
        ridge = self.get_ridge(spread_by_class(features, one_hot))
        return self.directions.to(features) * (self.variances.to(features) + ridge).rsqrt()

    def get_ridge(self, spread: torch.Tensor) -> torch.Tensor:
        """What the prior's variances are raised by, for each spread of a support set."""
        usual_spread = self.spread.to(spread.device).to(spread.dtype)
        variance = self.variances.to(spread.device).to(spread.dtype).mean()
        # C_0 can be singular, so the ridge is at least a thousandth. Features may be huge, so it is kept finite: at the
        # upper end C_0 has long ceased to matter.
        ridge = (spread / usual_spread).clamp_min(0).pow(self.power).clamp_min(1e-3) * variance
        return ridge.clamp_max(1e30)

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


def weigh_classes(counts: torch.Tensor, signal: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """What cosines with classes of different numbers of images are multiplied by, of the shape of `counts`.

    It is the square root of an expected cosine over another: that of an image with the mean of its class, if the class
    had as many images as the classes have on harmonic average, over the same with the images that it has.

    Args:
        counts: images of each class, `(..., n_way)`, at least 1.
        signal, noise: `(...)`, see `RegularisedLDA`.
    """
    typical = 1 / (1 / counts).mean(dim=-1, keepdim=True)
    signal, noise = signal.unsqueeze(-1), noise.unsqueeze(-1)
    return ((signal + noise / counts) / (signal + noise / typical)).pow(0.25)


def measure_noise(leverages: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """The mean squared Mahalanobis distance `(...)` of images from their class, in a C that they had no part in.

    Image i of a class of n is n / (n - 1) r_i away from the mean of the others. Its own part in C is undone by the
    Sherman-Morrison formula. Images that are alone in their class are not counted; if all are, the noise is 0.

    Args:
        leverages: `(..., n)`, r_i^T C^-1 r_i for the row r_i of R.
        counts: `(..., n)`, the number of images in the class of each.
    """
    is_counted = counts > 1
    own = leverages * counts / (counts - 1).clamp_min(1)
    distances = own / (1 - own).clamp_min(1e-6)
    return (distances * is_counted).sum(dim=-1) / is_counted.sum(dim=-1).clamp_min(1)


def measure_signal(squares: torch.Tensor, noise: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """The mean squared Mahalanobis length `(...)` of the classes, without the noise in their means.

    Args:
        squares: `(..., n_way)`, squared lengths of the class means.
        noise: `(...)`.
        counts: `(..., n_way)`, images of each class.
    """
    signal = (squares - noise.unsqueeze(-1) / counts).mean(dim=-1)
    return torch.maximum(signal, MIN_SIGNAL * squares.mean(dim=-1)).clamp_min(1e-24)


def _mahalanobis_lengths(rows: torch.Tensor, products: torch.Tensor) -> torch.Tensor:
    """Mahalanobis lengths `(n, 1)` of rows `(n, width)`, given their products with the inverse covariance."""
    return (rows * products).sum(dim=1, keepdim=True).clamp_min(1e-24).sqrt()


def within_covariance(features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Unbiased covariance `(width, width)` of features `(n, width)` around the means of their classes."""
    with no_autocast(features):
        residuals = features - class_means(features, labels)[labels]
        return residuals.T @ residuals / (len(features) - len(labels.unique()))


def spread_between(features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Half the mean squared distance of images of different classes, from features `(n, width)`.

    There are two classes or more. The estimate is unbiased: if classes are drawn at random, its expectation depends on
    neither the number of classes nor that of images.
    """
    return spread_by_class(features, F.one_hot(labels))


def spread_by_class(features: torch.Tensor, one_hot: torch.Tensor) -> torch.Tensor:
    """`spread_between` of labels as one-hot rows `(n, n_way)`."""
    with no_autocast(features):
        means = means_by_class(features, one_hot)
        products = means @ means.T
        n_way = means.shape[0]
        between = (products.sum() - products.diagonal().sum()) / (n_way * (n_way - 1))
        return means_by_class(features.square().sum(dim=1, keepdim=True), one_hot).mean() - between
