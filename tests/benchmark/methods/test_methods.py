"""What holds for every method."""

from __future__ import annotations

import dataclasses
import itertools
import subprocess
import sys

import pytest
import torch

from hf_hyperflow.benchmark.evaluation import evaluate_method
from hf_hyperflow.benchmark.methods import (
    EASYFSL_METHODS,
    FLOW_POINTS,
    METHODS,
    FineTuning,
    Method,
    find_methods,
    list_labels,
)
from tests.helpers.benchmark_runs import ENVIRONMENT
from tests.helpers.tiny import Snapshot


def shortened(method: Method) -> Method:
    """The method, with three gradient steps if it has any."""
    if isinstance(method, FineTuning):
        return dataclasses.replace(method, steps=3, learning_rate=3e-3)
    return method


def test_every_method_leaves_the_backbone_as_it_was(backbone, target, features, episode):
    before, methods = Snapshot(backbone), [shortened(method) for method in METHODS]
    first, second = {}, {}
    for method in methods:
        first.update(evaluate_method(method, features, episode))
    for method in reversed(methods):
        second.update(evaluate_method(method, features, episode))
    assert first == second  # whatever ran before
    heads = {method.head_name for method in METHODS if isinstance(method, FineTuning)}
    assert set(first) == {method.name for method in METHODS} | heads
    assert all(0 <= outcome.accuracy <= 100 for outcome in first.values())
    target.unload()
    before.assert_unchanged()


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_images_and_a_cache_give_the_same_classifier(method, target, features, colours, episode):
    """Hidden states are kept in half precision: prototypes agree to three digits."""
    method = shortened(method)
    support = target.support(colours.images[episode.support], episode.support_labels, seed=episode.index)
    one, other = method.fit(support), method.fit(features.support(episode))
    predicted = one.predict(target.images(colours.images[episode.query]))
    assert predicted.shape == (30,)
    assert predicted.device.type == "cpu"
    if hasattr(one, "prototypes"):
        torch.testing.assert_close(one.prototypes, other.prototypes, rtol=2e-2, atol=1e-2)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_every_method_gets_the_views(method, target, features, colours, episode):
    """Views of the support set make another classifier, and views of the queries change what it says of them."""
    method = shortened(method)
    images, labels, queries = colours.images[episode.support], episode.support_labels, colours.images[episode.query]
    one, four = (method.fit(target.support(images, labels, views=views)) for views in (1, 4))
    said = []
    for classifier, views in ((one, 1), (one, 4), (four, 1), (four, 4)):
        predictions = classifier.classify(target.images(queries, views))
        assert torch.equal(predictions.labels, predictions.log_probabilities.argmax(-1))
        said.append(predictions.log_probabilities.exp())
        torch.testing.assert_close(said[-1].sum(1), torch.ones(30, dtype=torch.float64))
    for first, second in itertools.combinations(said, 2):
        assert not torch.allclose(first, second, rtol=1e-4)


def test_names_and_labels():
    labels = list_labels()
    names = [method.name for method in (*METHODS, *EASYFSL_METHODS)]
    assert set(names) < set(labels)
    assert len(set(labels.values())) == len(labels)
    assert labels["bias-head"] == "bias and norm tuning, in HyperFlow's head"
    assert list(labels)[:4] == ["direct", "no-flow", "logistic", "hyperflow"]
    points = [point.name for point in FLOW_POINTS]
    assert len(set(points) | set(labels)) == len(points) + len(labels)


def test_hyperparameters_are_those_of_the_dataclass():
    for method in METHODS:
        assert dataclasses.replace(method, **method.hyperparameters()) == method
    tunable = {method.name for method in METHODS if method.hyperparameters()}
    assert tunable == {"direct", "logistic", "bias", "lora", "layernorm", "full"}


def test_lists_of_methods():
    assert [method.name for method in find_methods("direct, logistic,hyperflow")] == ["direct", "logistic", "hyperflow"]
    assert find_methods("direct,easyfsl") == [METHODS[0], *EASYFSL_METHODS]
    for names, words in (("magic", "unknown method 'magic'"), ("direct,direct", "twice"), (" ,", "no methods")):
        with pytest.raises(ValueError, match=words):
            find_methods(names)


@pytest.mark.slow
def test_methods_and_evaluation_are_imported_without_extras():
    """Who adapts and compares in Python needs none of the packages of the benchmark's command line."""
    code = (
        "import sys\n"
        "for name in ('sklearn', 'matplotlib', 'easyfsl', 'evaluate'): sys.modules[name] = None\n"
        "import hf_hyperflow, hf_hyperflow.benchmark.evaluation\n"
        "from hf_hyperflow.benchmark.methods import METHODS\n"
        "print(len(METHODS))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=ENVIRONMENT)
    assert done.stdout.strip() == str(len(METHODS))


def test_a_target_without_image_processor(target, colours, episode):
    target.adapter.processor = None
    support = target.support(colours.images[episode.support], episode.support_labels)
    with pytest.raises(ValueError, match="the adapter has no image processor"):
        METHODS[0].fit(support)
