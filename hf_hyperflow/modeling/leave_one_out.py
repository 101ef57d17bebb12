"""Leave-one-out: how each support image is classified by the classifier that all the others make."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .lda import RegularisedLDA, measure_noise, measure_signal, weigh_classes
from .prototypes import Head, PrototypeClassifier, class_means, leave_one_out_means, unit_means

#: With fewer images than this part of the features' width, n small LDAs cost less than one eigendecomposition.
SMALL = 20


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
        return scale * leave_one_out_lda(features, labels, head)
    is_alone = torch.bincount(labels)[labels] == 1
    logits = features.new_full((len(features), int(labels.max()) + 1), float("nan"))
    rows = torch.arange(len(features), device=features.device)
    for i in torch.nonzero(~is_alone).flatten().tolist():
        others = rows != i
        classifier = PrototypeClassifier.from_support(features[others], labels[others], scale, head)
        logits[i] = classifier(features[i : i + 1])[0]
    return logits


@torch.no_grad()
def leave_one_out_lda(features: torch.Tensor, labels: torch.Tensor, head: RegularisedLDA) -> torch.Tensor:
    """Products `(n, n_way)` of each image, at length 1, with the prototypes of all the others.

    All images share one eigendecomposition of S = R^T R + count C_0. Without image i of a class of n_c images, C is
    S + ridge_i I - n_c / (n_c - 1) r_i r_i^T, where r_i is the row of R. The ridge moves the eigenvalues, and the
    last term is undone by the Sherman-Morrison formula. An image alone in its class has a row of NaN.
    """
    # The differences need double precision, which not every accelerator has.
    rows, labels = features.cpu().double(), labels.cpu()
    counts = torch.bincount(labels)
    count = counts[labels].double().unsqueeze(1)
    ridge = head.get_ridge(_leave_one_out_spreads(rows, labels)).unsqueeze(1)
    units = F.normalize(rows, dim=1)
    rotation = head.directions.cpu().to(rows)
    residuals = rows @ rotation - class_means(rows @ rotation, labels)[labels]
    eigenvalues, eigenvectors = torch.linalg.eigh(residuals.T @ residuals + head.variances.cpu().to(rows).diag())
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

    def multiply_all(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        """For the C of each row, the products of that row of `left` with all of `right`."""
        on_residuals = (weighted * left).sum(dim=1, keepdim=True) * (weighted @ right.T)
        return (weights * left) @ right.T + gain * on_residuals

    def square(vectors: torch.Tensor) -> torch.Tensor:
        """For the C of each row, the squared Mahalanobis lengths of the same vectors."""
        return weights @ vectors.square().T + gain * (weighted @ vectors.T).square()

    products = multiply_all(units, means)
    lengths = square(means)
    products.scatter_(1, labels.unsqueeze(1), multiply(units, own_means))
    lengths.scatter_(1, labels.unsqueeze(1), multiply(own_means, own_means))
    unit_lengths = square(units).clamp_min(1e-24).sqrt().fill_diagonal_(0)
    image_length = unit_lengths.sum(dim=1, keepdim=True) / (len(rows) - 1)
    cosines = products / (lengths.clamp_min(1e-24).sqrt() * image_length)
    # Without image i the mean of its class moves by r_i / (n_c - 1), and the residuals of the class with it.
    is_same = labels.unsqueeze(1) == labels
    moved = 2 / (count - 1) * multiply_all(residuals, residuals) + multiply(residuals, residuals) / (count - 1).square()
    leverages = square(residuals) + torch.where(is_same, moved, 0.0)
    noise = measure_noise(leverages, (count.T - is_same.double()).fill_diagonal_(1))
    counts_without = (counts - F.one_hot(labels, len(counts))).clamp_min(1)
    cosines *= weigh_classes(counts_without, measure_signal(lengths, noise, counts_without), noise)
    return cosines.masked_fill(count == 1, float("nan")).to(features)


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


def _leave_one_out_cosines(features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cosines `(n, n_way)` of each support image with the class means of all the others; NaN for one alone."""
    units = F.normalize(features, dim=-1)
    cosines = units @ unit_means(features, labels).T
    own_means = F.normalize(leave_one_out_means(features, labels), dim=-1)
    cosines.scatter_(1, labels.unsqueeze(1), (units * own_means).sum(dim=1, keepdim=True))
    is_alone = torch.bincount(labels)[labels] == 1
    return cosines.masked_fill(is_alone.unsqueeze(1), float("nan"))
