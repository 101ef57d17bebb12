"""How good the scores of a classifier are as probabilities: log loss and expected calibration error.

Both are of the queries of episodes. The log loss is that of scikit-learn without its clipping, in nats. The expected
calibration error is that of Guo et al. (2017), with ten bins of equal width: how far, on average, the confidence of
predictions is from the share of them that is right. The confidence of a prediction is its probability.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

#: Bins of confidence: above 0 to 0.1, above 0.1 to 0.2, and so on.
N_BINS = 10


@dataclass(frozen=True)
class ScoreQuality:
    """What an episode tells of the scores of a classifier.

    Attributes:
        log_loss: mean over the queries of minus the logarithm of the probability of the true class.
        confidence_gaps: for each of `N_BINS` bins, the sum over its queries of their confidence minus 1 if the
            prediction is right or minus 0 if it is not, divided by the number of all queries.
    """

    log_loss: float
    confidence_gaps: tuple[float, ...]


def measure_scores(log_probabilities: torch.Tensor, predicted: torch.Tensor, labels: torch.Tensor) -> ScoreQuality:
    """The quality of log-probabilities `(n, n_way)` with predicted and true labels `(n,)`.

    Images whose log-probabilities are NaN, as fine-tuning gives where it diverges, count as undecided: all of their
    classes are equally probable.
    """
    undecided = -math.log(log_probabilities.shape[1])
    log_probabilities, labels = (
        log_probabilities.cpu().double().nan_to_num(nan=undecided, neginf=-torch.inf),
        labels.cpu(),
    )
    chosen = log_probabilities.gather(1, labels.unsqueeze(1))
    confidences = log_probabilities.amax(dim=1).exp()
    is_right = (predicted.cpu() == labels).double()
    bins = (confidences * N_BINS).ceil().long().sub(1).clamp(0, N_BINS - 1)
    gaps = torch.zeros(N_BINS, dtype=torch.float64).index_add(0, bins, confidences - is_right) / len(labels)
    return ScoreQuality(-chosen.mean().item(), tuple(gaps.tolist()))


def compute_ece(gaps: Sequence[Sequence[float]]) -> float:
    """Expected calibration error, 0 to 1, of the queries of all episodes together, every episode counting the same.

    Of few queries it is too large, for it counts what is chance in each bin.

    Args:
        gaps: `(n_episodes, N_BINS)`, see `ScoreQuality.confidence_gaps`.
    """
    return float(np.abs(np.mean(gaps, axis=0)).sum())
