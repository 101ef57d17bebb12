from __future__ import annotations

import pytest
import torch

from hf_hyperflow.modeling.backbones import SplitBackbone
from hf_hyperflow.modeling.parameter_space import ParameterSpace
from hf_hyperflow.modeling.peft_configs import bias_config
from hf_hyperflow.modeling.prototypes import PrototypeClassifier
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
