"""Rejection: the probability that an image is of one of the classes of a task, and not of something else."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from .calibration import measure_task

#: What `AdaptedTask.predict` answers for an image of none of the classes.
NONE_OF_THESE = "none of these"

#: Log-odds of the best class beyond this say no more.
MAX_LOG_ODDS = 10.0


@dataclass(frozen=True)
class Rejection:
    """How sure a task is that an image is of one of its classes.

        log-odds = offset + odds log(p / (1 - p)) + cosine c

    Here p is the highest score of the image, and c is the cosine of the class that has it. An image of another class
    is often undecided between the classes (p is low), or far from all of them (c is low). The maximum softmax is the
    usual baseline (Hendrycks & Gimpel 2017); it knows the first kind only.

    Attributes:
        offset, odds, cosine: the coefficients.
    """

    offset: float
    odds: float
    cosine: float

    def compute_known(self, logits: torch.Tensor, scale: float) -> torch.Tensor:
        """Probabilities `(n,)` that images are of one of the classes, from their logits `(n, n_way)` of this scale."""
        best = logits.max(dim=-1).values / scale
        return torch.sigmoid(self.offset + self.odds * compute_log_odds(logits) + self.cosine * best)


@dataclass(frozen=True)
class RejectionCalibration:
    """How the `Rejection` of a task follows from its support set. Its terms are those of a `Calibration`.

        log-odds = constant + ways log(n_way / 5) + shots log(n) + spread log(s) + odds log(p / (1 - p))
                   + distance (1 - c) / s

    The last term is the distance of the image from its best class, as a part of what images of different classes are
    apart. The coefficients are fitted by logistic regression on training domains, where queries of classes that the
    task does not have count half.

    Attributes:
        constant, ways, shots, spread, odds, distance: the coefficients.
    """

    constant: float
    ways: float
    shots: float
    spread: float
    odds: float
    distance: float

    def fit_task(self, features: torch.Tensor, labels: torch.Tensor) -> Rejection:
        """The rejection of a task with support features `(n, width)` and labels `(n,)`."""
        measured = measure_task(features, labels)
        offset = self.constant + self.ways * measured.ways + self.shots * measured.shots + self.spread * measured.spread
        nearness = -self.distance * math.exp(-measured.spread)
        return Rejection(offset - nearness, self.odds, nearness)


def compute_log_odds(logits: torch.Tensor) -> torch.Tensor:
    """Log-odds `(n,)` of the best class against all others, from logits `(n, n_way)` of at least two classes."""
    best, index = logits.max(dim=-1)
    others = logits.scatter(1, index.unsqueeze(1), -torch.inf)
    return (best - others.logsumexp(dim=-1)).clamp(-MAX_LOG_ODDS, MAX_LOG_ODDS)
