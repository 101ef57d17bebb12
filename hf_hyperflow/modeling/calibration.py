"""Calibration: the scale that turns the cosines of a task into logits whose softmax can be read as probabilities."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .finite import NotFiniteError
from .lda import spread_between

#: Spreads below this are taken for it. No domain that the released adapter was calibrated on has a smaller one: where
#: images hardly differ, a scale made for it would make noise look certain.
MIN_SPREAD = 0.1

#: Scales beyond these make one class certain, or all classes equal.
MIN_SCALE, MAX_SCALE = 1e-6, 1e6

#: The scale of plain cosines where nothing has measured a better one (Meta-Baseline, Chen et al. 2021).
COSINE_SCALE = 10.0


@dataclass(frozen=True)
class Calibration:
    """How the scale of a task's logits follows from its support set.

        log scale = constant + ways log(n_way / 5) + shots log(n) + spread log(s)

    Here n is the harmonic mean of the numbers of images of the classes. The spread s is half the mean squared distance
    of two images of different classes, of features of length 1. Temperature scaling (Guo et al. 2017) has one scale for
    all inputs. The tasks of a few-shot learner differ too much for one: with more images, prototypes are surer. Classes
    that are far apart have larger cosines. The coefficients are fitted to the log loss on training domains.

    Attributes:
        constant, ways, shots, spread: the coefficients. With the constant alone, all tasks have one scale.
    """

    constant: float
    ways: float = 0.0
    shots: float = 0.0
    spread: float = 0.0

    def compute_scale(self, features: torch.Tensor, labels: torch.Tensor) -> float:
        """The scale for support features `(n, width)` with labels `(n,)` of at least two classes.

        Raises:
            NotFiniteError: it is not between `MIN_SCALE` and `MAX_SCALE`.
        """
        return self.scale_of(measure_task(features, labels))

    def scale_of(self, measures: TaskMeasures) -> float:
        """The scale for a support set of these measures; errors as in `compute_scale`."""
        log_scale = self.constant + self.ways * measures.ways + self.shots * measures.shots
        log_scale += self.spread * measures.spread
        try:
            scale = math.exp(log_scale)
        except OverflowError:
            scale = math.inf
        if not MIN_SCALE <= scale <= MAX_SCALE:
            raise NotFiniteError(f"the adapter's calibration makes a scale of {scale:g}, far beyond use.")
        return scale


@dataclass(frozen=True)
class TaskMeasures:
    """What the scale of a task is computed from: log(n_way / 5), log(n) and log(s), see `Calibration`."""

    ways: float
    shots: float
    spread: float


@torch.no_grad()
def measure_task(features: torch.Tensor, labels: torch.Tensor) -> TaskMeasures:
    """Measure a support set of features `(n, width)` with labels `(n,)`."""
    counts = torch.bincount(labels.cpu()).double()  # not every accelerator has double precision
    n_shot = 1 / (1 / counts).mean().item()
    spread = spread_between(F.normalize(features.float(), dim=-1), labels).item()
    return TaskMeasures(math.log(len(counts) / 5), math.log(n_shot), math.log(max(spread, MIN_SPREAD)))
