from __future__ import annotations

import dataclasses

import pytest
import torch

from hf_hyperflow.benchmark.domain_features import DomainFeatures
from hf_hyperflow.benchmark.evaluation import evaluate_method
from hf_hyperflow.benchmark.methods import (
    METHODS,
    BiasTuning,
    FineTuning,
    FullFineTuning,
    LayerNormTuning,
    LoraTuning,
    Target,
)
from hf_hyperflow.modeling.prototypes import unit_means
from tests.helpers.tiny import tiny_adapter

TUNINGS = [method for method in METHODS if isinstance(method, FineTuning)]


@pytest.mark.parametrize(
    ("method", "parts"),
    [
        (BiasTuning(), ("beft_bias", "modules_to_save")),
        (LoraTuning(), ("lora_A", "lora_B")),
        (LayerNormTuning(), ("norm", "ln_")),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_peft_tuning_moves_its_parts_of_the_last_blocks(backbone, target, method, parts):
    with method.get_weights(target).tuning() as parameters:
        ids = {id(parameter) for parameter in parameters}
        names = [name for name, parameter in backbone.named_parameters() if id(parameter) in ids]
    assert len(names) == len(parameters) > 0
    assert all(name.startswith(("encoder.layer.2.", "encoder.layer.3.", "layernorm")) for name in names)
    assert all(any(part in name for part in parts) for name in names), names


def test_full_fine_tuning_moves_all_parameters(backbone, target):
    BiasTuning().get_weights(target)
    with FullFineTuning().get_weights(target).tuning() as parameters:
        assert [id(parameter) for parameter in parameters] == [id(parameter) for parameter in backbone.parameters()]
    assert not any("beft" in name or "lora" in name for name, _ in backbone.named_parameters())


@pytest.mark.parametrize("method", TUNINGS, ids=lambda method: method.name)
def test_weights_go_back_after_an_error(backbone, target, method):
    weights = method.get_weights(target)
    start = {name: parameter.clone() for name, parameter in backbone.named_parameters()}

    def fail() -> None:
        with weights.tuning() as parameters:
            with torch.no_grad():
                parameters[0].add_(1)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert all(torch.equal(parameter, start[name]) for name, parameter in backbone.named_parameters())


@pytest.mark.parametrize("method", TUNINGS, ids=lambda method: method.name)
def test_one_run_gives_the_classifiers_after_fewer_steps(method, features, episode):
    method = dataclasses.replace(method, steps=6, learning_rate=1e-2)
    support = features.support(episode)
    along = method.fit_after(support, [1, 2, 6])
    for steps, classifier in zip((1, 2, 6), along, strict=True):
        alone = dataclasses.replace(method, steps=steps).fit(features.support(episode))
        torch.testing.assert_close(
            classifier.tuned.features(support.images), alone.tuned.features(support.images), rtol=1e-2, atol=1e-2
        )
    first, last = along[0].tuned.features(support.images), along[-1].tuned.features(support.images)
    assert (first - last).abs().max() > 0.1  # ten times the tolerance
    with pytest.raises(ValueError, match=r"steps must be in 1\.\.6"):
        method.fit_after(support, [7])


def test_augmentation_depends_on_the_seed(target, colours, episode):
    images, labels = colours.images[episode.support], episode.support_labels
    method = LayerNormTuning(steps=3, learning_rate=1e-2)
    one, same, other = (method.fit(target.support(images, labels, seed=seed)).prototypes for seed in (0, 0, 1))
    torch.testing.assert_close(one, same)
    assert not torch.allclose(one, other, atol=1e-4)


def test_tuned_features_are_classified_by_cosines_and_in_the_adapter_s_head(target, features, episode):
    method = LayerNormTuning(steps=3, learning_rate=3e-3)
    support = features.support(episode)
    classifier = method.fit(support)
    tuned = classifier.tuned.features(support.images)
    torch.testing.assert_close(classifier.prototypes, unit_means(tuned, support.labels))
    both = target.split.concat_features(tuned, support.images.hidden)
    torch.testing.assert_close(classifier.in_head.prototypes, target.adapter.head(both, support.labels))
    assert set(evaluate_method(method, features, episode)) == {"layernorm", "layernorm-head"}


def test_without_a_head_of_the_adapter_there_are_cosines_only(backbone, processor, colours, episode):
    plain = Target(backbone, tiny_adapter(backbone, processor=processor))
    method = LayerNormTuning(steps=2)
    assert set(evaluate_method(method, DomainFeatures(plain, colours), episode)) == {"layernorm"}


def test_a_classifier_outlives_other_methods_on_the_same_backbone(target, colours, episode):
    support = target.support(colours.images[episode.support], episode.support_labels)
    classifiers = [dataclasses.replace(method, steps=2, learning_rate=1e-2).fit(support) for method in TUNINGS]
    for classifier in classifiers:
        tuned = classifier.tuned.features(support.images)
        torch.testing.assert_close(classifier.prototypes, unit_means(tuned, support.labels))
