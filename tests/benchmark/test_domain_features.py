from __future__ import annotations

import pytest
import torch

from hf_hyperflow.benchmark.domain_features import ViewFeatures
from hf_hyperflow.benchmark.methods import BiasTuning, Target
from hf_hyperflow.data.domains import Domain, normalise, resize_images
from hf_hyperflow.data.episodes import cdfsl_episode
from tests.helpers.tiny import picture, tiny_adapter


@pytest.fixture
def domain(processor) -> Domain:
    """72 noisy pictures, in blocks of 32, 32 and 8."""
    images = [picture(i) for i in range(72)]
    labels = torch.arange(6).repeat_interleave(12)
    return Domain("noise", resize_images(images, processor), labels, [f"c{i}" for i in range(6)])


def test_the_first_blocks_run_once_per_image(backbone, processor, domain):
    target = Target(backbone, tiny_adapter(backbone, processor=processor))
    n_read = []
    backbone.register_forward_pre_hook(lambda module, args: n_read.append(len(args[0])))
    features = ViewFeatures(target, domain)
    rows = torch.tensor([5, 1, 5, 40])
    hidden = features.hidden(rows)
    expected = target.split.forward_prefix(normalise(domain.images[rows], processor)).states
    n_read.pop()
    torch.testing.assert_close(hidden.states, expected, rtol=2e-3, atol=2e-3)
    features.hidden(torch.tensor([1, 2, 40]))
    assert n_read == [32, 32]
    features.hidden(torch.arange(72))
    assert n_read == [32, 32, 8]


def test_hidden_states_do_not_depend_on_what_was_asked_before(backbone, processor, domain):
    target = Target(backbone, tiny_adapter(backbone, processor=processor))
    forwards, backwards = (ViewFeatures(target, domain) for _ in range(2))
    one = torch.cat([forwards.hidden(torch.tensor([row])).states for row in range(72)])
    assert torch.equal(one, backwards.hidden(torch.arange(71, -1, -1)).states.flip(0))


def test_plain_features_are_those_of_the_backbone_each_image_once(backbone, processor, domain):
    target = Target(backbone, tiny_adapter(backbone, processor=processor))
    n_read = []
    backbone.register_forward_pre_hook(lambda module, args: n_read.append(len(args[0])))
    features = ViewFeatures(target, domain)
    rows = torch.tensor([70, 1, 70, 40])
    computed = features.features(rows)
    with torch.no_grad():
        expected = target.split.forward_features(normalise(domain.images[rows], processor))
    torch.testing.assert_close(computed, expected, rtol=2e-3, atol=2e-3)
    n_read.clear()
    assert torch.equal(features.features(rows.flip(0)), computed.flip(0))
    assert not n_read


def test_features_are_those_of_the_plain_backbone_whatever_is_in_it(backbone, processor, domain):
    target = Target(backbone, tiny_adapter(backbone, processor=processor))
    rows = torch.arange(40)
    expected = ViewFeatures(target, domain).features(rows)
    injection = BiasTuning().get_weights(target)
    injection.write(injection.start + 1)
    assert torch.equal(ViewFeatures(target, domain).features(rows), expected)


def test_support_and_queries_of_an_episode(target, features, colours):
    episode = cdfsl_episode(colours, 7, n_way=3, n_shot=2, n_query=4)
    support, queries = features.support(episode), features.queries(episode)
    assert support.seed == 7
    assert torch.equal(support.images.raw, colours.images[episode.support])
    assert torch.equal(support.labels, episode.support_labels)
    uncached = target.images(colours.images[episode.query])
    assert torch.equal(queries.pixel_values, uncached.pixel_values)
    for name in ("features", "final_features"):
        cached, computed = getattr(queries, name), getattr(uncached, name)
        torch.testing.assert_close(cached, computed, rtol=1e-2, atol=1e-2)
    assert queries.features.shape == (12, 64)
    assert queries.final_features.shape == (12, 32)
