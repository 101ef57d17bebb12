from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from hf_hyperflow import HyperFlowAdapter
from hf_hyperflow.benchmark.domain_features import ViewFeatures
from hf_hyperflow.benchmark.evaluation import Comparison, compare_flow, label_accuracy, mean_ci95
from hf_hyperflow.benchmark.methods import Target
from hf_hyperflow.data.domains import Domain, normalise, resize_images
from hf_hyperflow.data.episodes import cdfsl_episode
from hf_hyperflow.modeling.peft_configs import bias_config
from hf_hyperflow.modeling.prototypes import PrototypeClassifier
from tests.helpers.tiny import Snapshot, picture, tiny_adapter, tiny_resnet


@pytest.fixture
def domain(processor):
    """Six noisy colours, 12 images of each."""
    colours = [(110 + 40 * (c % 2), 110 + 40 * (c // 2 % 2), 110 + 40 * (c // 4)) for c in range(6)]
    images = [picture(100 * c + i, colour=colour) for c, colour in enumerate(colours) for i in range(12)]
    return Domain(
        "colours", resize_images(images, processor), torch.arange(6).repeat_interleave(12), [f"c{i}" for i in range(6)]
    )


def test_mean_and_interval_are_those_of_numpy_and_scipy():
    values = np.random.default_rng(0).normal(60, 10, 600)
    mean, half = mean_ci95(values)
    assert mean == pytest.approx(np.mean(values))
    assert half == pytest.approx(1.96 * np.std(values, ddof=1) / np.sqrt(600))
    low, high = stats.norm.interval(0.95, loc=mean, scale=stats.sem(values))
    assert (mean - half, mean + half) == pytest.approx((low, high), abs=1e-3)


def test_interval_covers_the_mean_in_95_of_100_experiments():
    generator = np.random.default_rng(1)
    covered = 0
    for _ in range(2000):
        mean, half = mean_ci95(generator.uniform(0, 1, 200))
        covered += abs(mean - 0.5) <= half
    assert covered / 2000 == pytest.approx(0.95, abs=0.02)


def test_interval_of_few_values():
    assert mean_ci95(np.array([3.0, 3.0])) == (3.0, 0.0)
    mean, half = mean_ci95(np.array([3.0]))
    assert mean == 3.0
    assert math.isnan(half)


def test_the_difference_is_paired():
    direct = np.array([20.0, 50.0, 80.0, 40.0])
    summary = Comparison("x", 5, 1, direct, direct + 0.5, direct + np.array([1.0, 2.0, 1.0, 2.0])).summary()
    assert summary["difference"] == 1.5
    assert summary["difference_ci95"] == pytest.approx(1.96 * np.std([1, 2, 1, 2], ddof=1) / 2, abs=0.01)
    assert summary["direct_ci95"] > 10 * summary["difference_ci95"]
    assert summary["hyperflow"] == summary["direct"] + 1.5
    assert summary["flow"] == 1.0


def test_accuracy_of_labels():
    assert label_accuracy(torch.tensor([0, 1, 2, 2]), torch.tensor([0, 1, 2, 0])) == 75


def untrained(backbone, processor) -> HyperFlowAdapter:
    return HyperFlowAdapter.from_backbone(
        backbone,
        bias_config(backbone, 2),
        last_blocks=2,
        processor=processor,
        drift_width=16,
        drift_depth=1,
        drift_heads=2,
    )


def test_an_untrained_flow_makes_no_difference_at_all(backbone, processor, domain):
    adapter = untrained(backbone, processor)
    comparison = compare_flow(adapter, backbone, domain, n_episodes=5, n_shot=2, n_way=4, n_query=5)
    assert np.array_equal(comparison.direct, comparison.adapted)
    assert comparison.summary()["difference"] == comparison.summary()["difference_ci95"] == 0
    assert (comparison.domain, comparison.n_way, comparison.n_shot) == ("colours", 4, 2)
    assert comparison.direct.shape == (5,)


@pytest.mark.parametrize("shared", [True, False], ids=["shared encoder", "own encoder"])
def test_accuracies_are_those_of_adapting_and_predicting(backbone, processor, domain, shared):
    """The fast path over cached hidden states against `adapt` and `logits`, episode by episode."""
    direct = untrained(backbone, processor)
    adapter = tiny_adapter(backbone, processor=processor, encoder=None if shared else tiny_resnet())
    settings = {"n_way": 4, "n_shot": 2, "n_query": 5, "seed": 3}
    comparison = compare_flow(adapter, backbone, domain, n_episodes=4, n_steps=3, **settings)
    for index in range(4):
        episode = cdfsl_episode(domain, index, **settings)
        support, query = (normalise(domain.images[rows], processor) for rows in (episode.support, episode.query))
        for method, found in ((direct, comparison.direct), (adapter, comparison.adapted)):
            task = method.adapt(backbone, (support, episode.support_labels), n_steps=3)
            hits = task.logits(query).argmax(-1) == episode.query_labels
            task.reset()
            assert 100 * hits.float().mean().item() == pytest.approx(found[index], abs=5.1)  # hidden states are halves
    assert not np.array_equal(comparison.direct, comparison.adapted)
    assert np.array_equal(comparison.no_flow, comparison.direct)  # the adapter has no head of its own


def test_accuracies_in_the_adapter_s_head_without_the_flow(backbone, processor, domain):
    adapter = tiny_adapter(backbone, processor=processor, lda=True, intermediate_weight=0.5)
    adapter.head.set_prior(torch.diag(torch.linspace(0.01, 2, 64)), spread=100.0, count=1.0)
    comparison = compare_flow(adapter, backbone, domain, n_episodes=4, n_shot=2, n_way=4, n_query=5)
    episode = cdfsl_episode(domain, 0, n_shot=2, n_way=4, n_query=5)
    features = ViewFeatures(Target(backbone, adapter), domain).features(torch.cat([episode.support, episode.query]))
    n_support = len(episode.support)
    classifier = PrototypeClassifier.from_support(features[:n_support], episode.support_labels, head=adapter.head)
    expected = label_accuracy(classifier(features[n_support:]).argmax(-1), episode.query_labels)
    assert comparison.no_flow[0] == pytest.approx(expected, abs=5.1)
    assert not np.array_equal(comparison.no_flow, comparison.direct)


def test_the_backbone_computes_the_same_before_and_after(backbone, processor, domain, pixels):
    adapter = tiny_adapter(backbone, processor=processor)
    backbone.train()
    before, features = Snapshot(backbone), backbone(pixels).last_hidden_state
    compare_flow(adapter, backbone, domain, n_episodes=2, n_shot=2, n_way=3, n_query=2)
    before.assert_unchanged()
    assert torch.equal(backbone(pixels).last_hidden_state, features)


def test_fewer_classes_than_ways(backbone, processor, domain):
    adapter = tiny_adapter(backbone, processor=processor)
    comparison = compare_flow(adapter, backbone, domain, n_episodes=2, n_shot=2, n_way=20, n_query=2)
    assert comparison.n_way == 6


def test_no_episodes(backbone, processor, domain):
    adapter = tiny_adapter(backbone, processor=processor)
    with pytest.raises(ValueError, match="n_episodes must be at least 1, not 0"):
        compare_flow(adapter, backbone, domain, n_episodes=0, n_shot=2)
