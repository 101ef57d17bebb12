from __future__ import annotations

import time

import pytest
import torch

from hf_hyperflow.modeling.backbones import SplitBackbone
from hf_hyperflow.modeling.lda import RegularisedLDA
from hf_hyperflow.modeling.leave_one_out import SMALL, leave_one_out_lda, leave_one_out_logits
from hf_hyperflow.modeling.parameter_space import ParameterSpace
from hf_hyperflow.modeling.peft_configs import bias_config
from hf_hyperflow.modeling.prototypes import PrototypeClassifier, unit_means
from hf_hyperflow.modeling.stopping import choose_stopping_point
from tests.helpers.tiny import tiny_dinov2

LABELS = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2])
TIMES = [0.0, 0.25, 0.5, 0.75, 1.0]


@pytest.fixture
def setting():
    """A split backbone with an adapter in it, hidden states of 8 images and weights along a random flow."""
    backbone = tiny_dinov2()
    space = ParameterSpace.from_backbone(backbone, bias_config(backbone, 2))
    split, injection = SplitBackbone(backbone, 2), space.inject(backbone)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        patterns = torch.randn(3, 3, 28, 28, generator=generator)[LABELS]
        hidden = split.forward_prefix(patterns + 2 * torch.randn(8, 3, 28, 28, generator=generator))
    moves = torch.randn(len(TIMES), space.n_tokens, 32, generator=generator) * space.mask
    return split, injection, hidden, [injection.start + t * m for t, m in zip(TIMES, moves, strict=True)]


def accuracy(split, injection, hidden, labels, theta) -> float:
    """Leave-one-out accuracy, one image at a time; images alone in their class do not count."""
    injection.write(theta)
    with torch.no_grad():
        features = split.forward_suffix(hidden)
    hits = []
    for i in range(len(labels)):
        kept = torch.arange(len(labels)) != i
        if labels[i] in labels[kept]:
            classes, compact = labels[kept].unique(return_inverse=True)
            classifier = PrototypeClassifier.from_support(features[kept], compact)
            hits.append(classes[classifier(features[i : i + 1]).argmax()] == labels[i])
    return sum(map(int, hits)) / len(hits)


@pytest.mark.parametrize("labels", [LABELS, torch.tensor([0, 0, 0, 0, 1, 1, 1, 2])], ids=["all", "one alone"])
def test_the_earliest_of_the_best(setting, labels):
    split, injection, hidden, thetas = setting
    point = choose_stopping_point(split, injection, hidden, labels, TIMES, thetas)
    expected = {t: accuracy(split, injection, hidden, labels, th) for t, th in zip(TIMES, thetas, strict=True)}
    assert point.accuracies == pytest.approx(expected)
    best = max(expected.values())
    assert point.time == min(t for t in TIMES if expected[t] == pytest.approx(best))
    assert len(set(expected.values())) > 1


def test_a_tie_goes_to_direct_transfer(setting):
    split, injection, hidden, thetas = setting
    point = choose_stopping_point(split, injection, hidden, LABELS, TIMES, [thetas[0]] * 5)
    assert point.time == 0.0
    assert len(point.accuracies) == 5


def test_nothing_to_leave_out(setting):
    split, injection, hidden, thetas = setting
    point = choose_stopping_point(split, injection, hidden, torch.arange(8), TIMES, thetas)
    assert point.time == 1.0
    assert point.accuracies == {}


def test_the_last_weights_stay_until_others_are_used(setting):
    split, injection, hidden, thetas = setting
    choose_stopping_point(split, injection, hidden, LABELS, TIMES, thetas)
    assert torch.equal(injection.read(), thetas[-1])
    with injection.using(thetas[1]):
        assert torch.equal(injection.read(), thetas[1])


# Leave-one-out by one factorisation, against one classifier for each image that is left out


def brute_force(features: torch.Tensor, labels: torch.Tensor, head) -> torch.Tensor:
    """The classifier that all the others make, made anew for each image; NaN for an image alone in its class."""
    rows = []
    for i in range(len(labels)):
        kept = torch.arange(len(labels)) != i
        row = torch.full((int(labels.max()) + 1,), float("nan"), dtype=features.dtype)
        if labels[i] in labels[kept]:
            row = PrototypeClassifier.from_support(features[kept], labels[kept], 1.0, head)(features[i : i + 1])[0]
        rows.append(row)
    return torch.stack(rows)


def lda_with_prior(width: int, *, count: float = 100.0, spread: float = 5.0, rank: int | None = None) -> RegularisedLDA:
    root = torch.randn(width, rank or width, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    lda = RegularisedLDA(width).double()
    lda.set_prior(root @ root.T / width, spread=spread, count=count)
    return lda


def support_features(labels: torch.Tensor, width: int, seed: int) -> torch.Tensor:
    """Features of length 5 or so, around a mean of their class."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(int(labels.max()) + 1, width, generator=generator, dtype=torch.float64)
    noise = torch.randn(len(labels), width, generator=generator, dtype=torch.float64)
    return (2 * centres[labels] + noise) / width**0.5 * 3


HEADS = {
    "cosines": lambda width: unit_means,
    "lda": lda_with_prior,
    "lda as made": lambda width: RegularisedLDA(width).double(),
    "lda, weak prior": lambda width: lda_with_prior(width, count=1e-3),
    "lda, singular prior": lambda width: lda_with_prior(width, rank=2),
    "lda, wide spread": lambda width: lda_with_prior(width, spread=0.05),
    "lda, narrow spread": lambda width: lda_with_prior(width, spread=500.0),
}
UNEVEN = torch.tensor([0] * 2 + [1] * 11 + [2] * 5 + [3] * 2)[
    torch.randperm(20, generator=torch.Generator().manual_seed(0))
]


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("seed", range(3))
def test_one_factorisation_equals_one_classifier_for_each_image(head, seed):
    for width, labels in ((48, UNEVEN), (8, UNEVEN), (48, torch.arange(3).repeat_interleave(2))):
        features, made = support_features(labels, width, seed), HEADS[head](width)
        found, expected = leave_one_out_logits(features, labels, 1.0, made), brute_force(features, labels, made)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        single = made.float() if isinstance(made, RegularisedLDA) else made
        found = leave_one_out_logits(features.float(), labels, 1.0, single)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected.float(), rtol=1e-4, atol=1e-4)


def degenerate_supports() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    labels = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2])
    usual = support_features(labels, 24, 3)
    twins = usual.clone()
    twins[1] = twins[0]
    opposite = usual.clone()
    opposite[1] = -opposite[0]
    one_zero = usual.clone()
    one_zero[4] = 0
    alone = torch.tensor([0, 0, 0, 1, 1, 1, 1, 2])
    return {
        "zeros": (torch.zeros_like(usual), labels),
        "all the same": (usual[:1].expand(8, -1).contiguous(), labels),
        "each class the same image": (usual[[0, 0, 0, 3, 3, 3, 6, 6]], labels),
        "twins": (twins, labels),
        "two cancel out": (opposite, labels),
        "one is zero": (one_zero, labels),
        "one is alone": (usual, alone),
        "on a line": (usual[:1] * torch.arange(1.0, 9).double().unsqueeze(1), labels),
        "long": (1e3 * usual, labels),
        "short": (1e-3 * usual, labels),
    }


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("case", degenerate_supports())
def test_degenerate_support_sets(head, case):
    features, labels = degenerate_supports()[case]
    made = HEADS[head](features.shape[1])
    found, expected = leave_one_out_logits(features, labels, 1.0, made), brute_force(features, labels, made)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4, equal_nan=True)
    assert found[torch.bincount(labels)[labels] > 1].isfinite().all()


def test_few_images_of_a_large_width():
    """They take a classifier each, which costs less than the factorisation; the results are the same."""
    labels = torch.arange(3).repeat_interleave(2)
    features, lda = support_features(labels, 6 * SMALL + 1, 0), lda_with_prior(6 * SMALL + 1)
    found = leave_one_out_logits(features, labels, 1.0, lda)
    torch.testing.assert_close(found, leave_one_out_lda(features, labels, lda), rtol=1e-4, atol=1e-4)


def test_points_that_are_not_finite_are_not_chosen(setting):
    split, injection, hidden, thetas = setting
    thetas = [*thetas[:4], torch.full_like(thetas[4], float("nan"))]
    point = choose_stopping_point(split, injection, hidden, LABELS, TIMES, thetas)
    assert point.accuracies[1.0] == 0
    assert point.time < 1


@pytest.mark.slow
def test_time_of_leave_one_out():
    """Ten times as many images take less than thirty times as long; one LDA for each took a thousand times."""
    labels = torch.arange(5).repeat(80)
    lda = lda_with_prior(768).float()
    features = support_features(labels, 768, 0).float()
    seconds = {}
    for n in (40, 400):
        start = time.perf_counter()
        for _ in range(3):
            leave_one_out_logits(features[:n], labels[:n], 1.0, lda)
        seconds[n] = time.perf_counter() - start
    assert seconds[400] < 30 * seconds[40]
