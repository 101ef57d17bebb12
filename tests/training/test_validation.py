"""What a validation says of the flow: what it gains by reading, and how its way differs between tasks."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator

from hf_hyperflow.benchmark.methods import SharedWeights, Target
from hf_hyperflow.data.domains import load_domain, normalise
from hf_hyperflow.training.objectives import EpisodeImages
from hf_hyperflow.training.validation import average_weights, validate_on_domains
from tests.helpers.tiny import tiny_adapter, tiny_dinov2, tiny_processor
from tests.helpers.training_runs import make_images


@pytest.fixture(scope="module")
def processor():
    return tiny_processor()


@pytest.fixture(scope="module")
def domains(tmp_path_factory, processor):
    folder = tmp_path_factory.mktemp("validation")
    for seed, name in enumerate(("gold", "silver")):
        make_images(folder / name, n_classes=5, n_images=20, seed=seed)
    return [load_domain(folder / name, processor) for name in ("gold", "silver")]


@pytest.fixture
def backbone():
    return tiny_dinov2().eval()


def make_episode(domain, processor, first: int) -> EpisodeImages:
    rows = torch.arange(first, len(domain), 25)
    labels = torch.arange(len(rows))
    return EpisodeImages(normalise(domain.images[rows], processor), labels, labels[:0])


def test_weights_are_averaged_over_tasks(backbone, processor, domains):
    adapter = tiny_adapter(backbone, processor=processor).eval()
    accelerator = Accelerator(cpu=True)
    episodes = [make_episode(domains[0], processor, first) for first in (0, 7)]
    one, other = (average_weights(accelerator, adapter, backbone, [episode]) for episode in episodes)
    both = average_weights(accelerator, adapter, backbone, episodes)
    assert not torch.equal(one, other)
    torch.testing.assert_close(both, (one + other) / 2)


def test_a_flow_that_is_the_same_for_all_tasks_gains_nothing_by_reading(backbone, processor, domains):
    """Its way is all mean. The flow of a random drift network is not."""
    accelerator = Accelerator(cpu=True)
    for is_reading in (False, True):
        adapter = tiny_adapter(backbone, processor=processor).eval()
        if not is_reading:
            with torch.no_grad():
                adapter.drift.token_out.weight.zero_()
        shared = average_weights(accelerator, adapter, backbone, [make_episode(domains[0], processor, 0)])
        validation = validate_on_domains(accelerator, adapter, backbone, domains, n_episodes=2, shared_weights=shared)
        assert set(validation.accuracies) == {"gold", "silver"}
        assert validation.shares is not None
        if is_reading:
            assert validation.shares.conditional > 1e-4
        else:
            assert validation.shares.mean == pytest.approx(1, abs=1e-6)
            assert {figures["reading"] for figures in validation.accuracies.values()} == {0}


def test_an_untrained_flow_has_no_way_to_share(backbone, processor, domains):
    adapter = tiny_adapter(backbone, processor=processor).eval()
    adapter.token_scale.zero_()
    start = adapter.space.inject(backbone).start
    validation = validate_on_domains(
        Accelerator(cpu=True), adapter, backbone, domains, n_episodes=2, shared_weights=start
    )
    assert validation.shares is None


def test_shared_weights_at_the_start_are_the_head_alone(backbone, processor, domains):
    adapter = tiny_adapter(backbone, processor=processor).eval()
    target = Target(backbone, adapter)
    images, labels = domains[0].images[::5], domains[0].labels[::5]
    support = target.support(images, labels)
    start = adapter.space.inject(backbone).start
    at_start = SharedWeights(start).fit(support)
    predictions = at_start.classify(target.images(images))
    assert predictions.labels.shape == (20,)
    moved = SharedWeights(start + 0.5).fit(support).classify(target.images(images))
    assert not torch.equal(predictions.log_probabilities, moved.log_probabilities)
