"""Log loss and expected calibration error against scikit-learn and the definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn import metrics

from hf_hyperflow.benchmark.evaluation import judge
from hf_hyperflow.benchmark.methods import Predictions
from hf_hyperflow.benchmark.scores import N_BINS, compute_ece, measure_scores


def draw(n: int, n_way: int, scale: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of the true logits times a scale, and labels drawn by the true ones."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(n, n_way, generator=generator, dtype=torch.float64)
    labels = torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(1)
    return (scale * logits).log_softmax(-1), labels


def plain_ece(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Guo et al. (2017), equations 2 to 5, written out."""
    confidence, is_right = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    error = 0.0
    for m in range(10):
        inside = (confidence > m / 10) & (confidence <= (m + 1) / 10)
        if inside.any():
            error += inside.sum() / len(labels) * abs(is_right[inside].mean() - confidence[inside].mean())
    return error


@pytest.mark.parametrize("n_way", [2, 5, 40])
def test_they_are_those_of_the_definitions(n_way):
    log_probabilities, labels = draw(300, n_way, scale=1.7)
    quality = measure_scores(log_probabilities, log_probabilities.argmax(-1), labels)
    probabilities = log_probabilities.exp().numpy()
    expected = metrics.log_loss(labels.numpy(), probabilities, labels=range(n_way))
    assert quality.log_loss == pytest.approx(expected)
    assert compute_ece([quality.confidence_gaps]) == pytest.approx(plain_ece(probabilities, labels.numpy()))


def test_episodes_are_pooled():
    """The error of the queries of all episodes together, and not the mean of the episodes' errors."""
    log_probabilities, labels = draw(400, 5, scale=1.0)
    gaps = []
    for part in range(8):
        rows = slice(50 * part, 50 * (part + 1))
        predicted = log_probabilities[rows].argmax(-1)
        gaps.append(measure_scores(log_probabilities[rows], predicted, labels[rows]).confidence_gaps)
    expected = plain_ece(log_probabilities.exp().numpy(), labels.numpy())
    assert compute_ece(gaps) == pytest.approx(expected)
    assert np.mean([compute_ece([gap]) for gap in gaps]) > 1.2 * expected


def test_true_probabilities_are_calibrated_and_others_are_not():
    errors = {}
    for scale in (0.3, 1.0, 3.0):
        log_probabilities, labels = draw(20_000, 5, scale)
        quality = measure_scores(log_probabilities, log_probabilities.argmax(-1), labels)
        errors[scale] = (compute_ece([quality.confidence_gaps]), quality.log_loss)
    assert errors[1.0][0] < 0.015
    assert min(errors[0.3][0], errors[3.0][0]) > 0.1
    assert errors[1.0][1] < min(errors[0.3][1], errors[3.0][1])


def test_certain_and_wrong():
    log_probabilities = torch.tensor([[0.0, -800.0], [0.0, -800.0]], dtype=torch.float64)
    quality = measure_scores(log_probabilities, torch.tensor([0, 0]), torch.tensor([0, 1]))
    assert quality.log_loss == 400
    assert quality.confidence_gaps == (*[0.0] * (N_BINS - 1), 0.5)


def test_not_a_number_is_undecided():
    quality = measure_scores(torch.full((3, 5), torch.nan), torch.tensor([0, 0, 0]), torch.tensor([0, 1, 2]))
    assert quality.log_loss == pytest.approx(np.log(5))
    assert quality.confidence_gaps[1] == pytest.approx(1 / 5 - 1 / 3)


def test_without_probabilities_there_is_an_accuracy_only():
    outcome = judge(Predictions(torch.tensor([0, 1])), torch.tensor([0, 0]))
    assert (outcome.accuracy, outcome.log_loss, outcome.confidence_gaps) == (50, None, None)
