from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression

from hf_hyperflow import easyfsl_methods
from hf_hyperflow.benchmark.easyfsl_methods import EASYFSL_METHODS, easyfsl_classifier, import_easyfsl
from hf_hyperflow.benchmark.evaluation import DomainFeatures, prototype_accuracy
from hf_hyperflow.benchmark.hyperparameters import Hyperparameters
from hf_hyperflow.benchmark.methods import (
    GRADIENT_METHODS,
    IN_METRIC,
    METHODS,
    Target,
    accuracies,
    fine_tuned_features,
    flow_points,
    get_ready,
    method_list,
)
from hf_hyperflow.data.domains import Domain, normalise, resize_images
from hf_hyperflow.data.episodes import cdfsl_episode
from hf_hyperflow.finetuning.finetune import FineTuningConfig, draw_batches
from hf_hyperflow.modeling.backbones import SplitBackbone
from hf_hyperflow.modeling.prototypes import class_means
from tests.helpers.tiny import Snapshot, picture, tiny_adapter

RECIPES = Hyperparameters(
    steps=dict.fromkeys(GRADIENT_METHODS, 3), learning_rates=dict.fromkeys(GRADIENT_METHODS, 3e-3), head_c=2.0
)


@pytest.fixture
def domain(processor):
    colours = [(110 + 30 * (c % 2), 110 + 30 * (c // 2 % 2), 110 + 30 * (c // 4)) for c in range(5)]
    images = [picture(100 * c + i, colour=colour) for c, colour in enumerate(colours) for i in range(10)]
    return Domain("colours", resize_images(images, processor), torch.arange(5).repeat_interleave(10), list("abcde"))


@pytest.fixture
def target(backbone, processor):
    adapter = tiny_adapter(backbone, processor=processor, lda=True, intermediate_weight=0.5)
    adapter.head.set_prior(torch.eye(64), spread=10.0, count=3.0)
    return Target(backbone, adapter, RECIPES)


@pytest.fixture
def features(target, domain):
    return DomainFeatures(target.split, domain, target.adapter.processor)


def draw(domain: Domain, index: int = 0):
    return cdfsl_episode(domain, index, n_way=5, n_shot=2, n_query=6)


def test_every_method_leaves_the_backbone_as_it_was(backbone, target, features, domain):
    before, episode = Snapshot(backbone), draw(domain)
    first = {method: accuracies(method, target, features, episode) for method in METHODS}
    second = {method: accuracies(method, target, features, episode) for method in reversed(METHODS)}
    assert first == second  # whatever ran before
    reached = {name: value for found in first.values() for name, value in found.items()}
    assert set(reached) == {*METHODS, *IN_METRIC.values()}
    assert all(0 <= value <= 100 for value in reached.values())
    target.plain()
    before.assert_unchanged()


def test_gradient_methods_move_what_they_say(backbone, target):
    blocks = tuple(f"encoder.layer.{i}." for i in (2, 3))
    parts = {"bias": ("beft_bias", "modules_to_save"), "lora": ("lora_A", "lora_B"), "layernorm": ("norm", "ln_")}
    for method in ("bias", "lora", "layernorm"):
        with target.moving(method) as parameters:
            ids = {id(p) for p in parameters}
            names = [name for name, p in backbone.named_parameters() if id(p) in ids]
        assert len(names) == len(parameters) > 0
        assert all(name.startswith((*blocks, "layernorm")) for name in names)
        assert all(any(part in name for part in parts[method]) for name in names), names
    with target.moving("full") as parameters:
        assert [id(p) for p in parameters] == [id(p) for p in backbone.parameters()]
    assert not any("beft" in name or "lora" in name for name, _ in backbone.named_parameters())


def test_moved_parameters_go_back_after_an_error(target, backbone):
    start = {name: p.clone() for name, p in target.plain().named_parameters()}

    def fail() -> None:
        with target.moving("full") as parameters:
            with torch.no_grad():
                parameters[0].add_(1)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert all(torch.equal(p, start[name]) for name, p in backbone.named_parameters())


@pytest.mark.parametrize("method", GRADIENT_METHODS)
def test_one_run_gives_the_features_after_fewer_steps(method, target, features, domain):
    episode, recipe = draw(domain), FineTuningConfig(learning_rate=1e-2)
    along = fine_tuned_features(method, target, features, episode, recipe, [1, 2, 6])
    each = [fine_tuned_features(method, target, features, episode, recipe, [n])[0] for n in (1, 2, 6)]
    assert all(torch.equal(a, b) for a, b in zip(along, each, strict=True))
    assert not torch.allclose(along[0], along[2], atol=1e-4)


def test_fine_tuned_features_are_classified_by_cosines_and_in_the_metric(target, features, domain):
    episode, recipe = draw(domain), target.recipes.fine_tuning("layernorm")
    (found,) = fine_tuned_features("layernorm", target, features, episode, recipe, [3])
    reached = accuracies("layernorm", target, features, episode)
    both = target.split.concat_features(found, features.hidden(torch.cat([episode.support, episode.query])))
    assert reached == {
        "layernorm": prototype_accuracy(found, episode),
        "layernorm-metric": prototype_accuracy(both, episode, target.adapter.head),
    }
    plain = Target(target.backbone, tiny_adapter(target.backbone, processor=target.adapter.processor), RECIPES)
    assert accuracies("layernorm", plain, features, episode) == {"layernorm": reached["layernorm"]}


def test_the_head_is_a_logistic_regression_on_unit_features(target, features, domain):
    episode = draw(domain)
    split = SplitBackbone(target.plain(), 2, "cls")
    with torch.no_grad():
        found = split.forward_suffix(features.hidden(torch.cat([episode.support, episode.query])))
    unit = F.normalize(found, dim=-1).numpy()
    head = LogisticRegression(C=2.0, max_iter=1000).fit(unit[:10], episode.support_labels.numpy())
    hits = head.predict(unit[10:]) == episode.query_labels.numpy()
    assert accuracies("head", target, features, episode)["head"] == pytest.approx(100 * np.mean(hits), abs=1e-4)


def test_the_flow_begins_in_the_metric(target, features, domain):
    for index in range(4):
        episode = draw(domain, index)
        (along,) = accuracies("hyperflow t=0", target, features, episode).values()
        assert along == accuracies("metric", target, features, episode)["metric"]


def test_the_guard_stops_the_flow_as_in_use(target, features, domain):
    """The same accuracy as that of a task adapted with the guard, which is not always at the end of the flow."""
    times = set()
    for index in range(4):
        episode = draw(domain, index)
        pixels = normalise(domain.images, target.adapter.processor)
        support = (pixels[episode.support], episode.support_labels)
        reached = accuracies("hyperflow-guard", target, features, episode)["hyperflow-guard"]
        task = target.adapter.adapt(target.backbone, support, early_stopping=True)
        hits = task.logits(pixels[episode.query]).argmax(1) == episode.query_labels
        times.add(task.stopping_point.time)
        task.reset()
        assert reached == pytest.approx(100 * hits.float().mean().item(), abs=1e-3)
    assert times != {1.0}


def test_points_along_the_flow():
    points = flow_points(4)
    assert points["hyperflow t=0"] == (0, 0.0)
    assert points["hyperflow t=0.25"] == (1, 0.25)
    assert points["hyperflow t=1.5"] == (6, 1.5)
    assert points["hyperflow steps=16"] == (16, 1.0)
    assert flow_points(6)["hyperflow t=0.75"] == (6, 0.75)  # steps of 1/8: not longer than those of 1/6
    steps = {n / t for n, t in flow_points(10).values() if t not in (0.0, 1.0)}
    assert steps == {12.0}


@pytest.mark.parametrize("method", METHODS)
def test_getting_ready_does_all_of_the_work(method, target, features, domain, backbone):
    """It starts at the images, and ends with a classifier like the one whose accuracy is measured."""
    episode, processor = draw(domain), target.adapter.processor
    seen = []
    backbone.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    images, labels = domain.images[episode.support], episode.support_labels
    found = get_ready(method, target, images, labels)
    if method == "full":
        assert sum(seen) == 1 + 3 * 20 + 10  # one image is tried beforehand
    elif method in GRADIENT_METHODS:  # frozen blocks run once for every view that one of the 3 steps draws
        batches = draw_batches(labels, RECIPES.fine_tuning(method))
        views = {pair for b in batches for pair in zip(b.augmented.tolist(), b.views.tolist(), strict=True)}
        assert sum(seen) == 1 + 10 + len(views) + 10
        assert 10 < len(views) <= 3 * 10
    else:
        assert sum(seen) == 10
    pixels = normalise(images, processor)
    if method == "direct":
        with torch.no_grad():
            expected = class_means(target.plain()(pixels).last_hidden_state[:, 0], labels)
        torch.testing.assert_close(found, F.normalize(expected, dim=1))
    elif method == "metric":
        with torch.no_grad():
            target.plain()
            expected = target.adapter.head(target.split.forward_features(pixels), labels)
        torch.testing.assert_close(found, expected)
    elif method == "head":
        with torch.no_grad():
            assert found(target.plain()(pixels).last_hidden_state[:, 0]).shape == (10,)
    elif method.startswith("hyperflow"):
        assert found.prototypes.shape == (5, 64)
    else:
        assert found.shape == (5, 32)
        direct = get_ready("direct", target, images, labels)
        assert not torch.allclose(found, direct, atol=1e-4)


def test_lists_of_methods():
    assert method_list("direct, head,hyperflow") == ["direct", "head", "hyperflow"]
    assert method_list("direct,easyfsl") == ["direct", *EASYFSL_METHODS]
    for names, words in (("magic", "unknown methods"), ("direct,direct", "twice"), (" ,", "no methods")):
        with pytest.raises(ValueError, match=words):
            method_list(names)


def test_easyfsl_that_is_not_installed_is_named(monkeypatch):
    import_easyfsl.cache_clear()
    monkeypatch.setitem(sys.modules, "easyfsl", None)
    with pytest.raises(ImportError, match="pip install --no-deps easyfsl"):
        easyfsl_methods.import_easyfsl()


def test_easyfsl_needs_no_torchvision():
    pytest.importorskip("easyfsl")
    code = (
        "import sys; sys.modules['torchvision'] = None\n"
        "from hf_hyperflow.benchmark.easyfsl_methods import import_easyfsl\n"
        "print(sorted(import_easyfsl()), [m for m in sys.modules if m.startswith('easyfsl.methods')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    modules = ["bd_cspn", "finetune", "laplacian_shot", "prototypical_networks", "simple_shot"]
    assert done.stdout.strip() == f"{modules} []"


@pytest.mark.parametrize("method", EASYFSL_METHODS)
def test_easyfsl_on_the_same_features(method, target, features, domain):
    pytest.importorskip("easyfsl")
    import_easyfsl.cache_clear()
    episode = draw(domain)
    assert 0 <= accuracies(method, target, features, episode)[method] <= 100
    get_ready(method, target, domain.images[episode.support], episode.support_labels)
    generator = torch.Generator().manual_seed(0)
    centres = 5 * torch.randn(4, 16, generator=generator)
    labels, true = torch.arange(4).repeat_interleave(3), torch.arange(4).repeat_interleave(6)
    support = centres[labels] + torch.randn(12, 16, generator=generator)
    query = centres[true] + torch.randn(24, 16, generator=generator)
    classify = easyfsl_classifier(method, support, labels)
    assert torch.equal(classify(query), true)
    if method == "easyfsl-simpleshot":
        prototypes = class_means(F.normalize(support, dim=1), labels)
        expected = (F.normalize(query, dim=1) @ F.normalize(prototypes, dim=1).T).argmax(-1)
        assert torch.equal(classify(query), expected)


def test_easyfsl_with_a_single_query():
    pytest.importorskip("easyfsl")
    support, labels = torch.eye(4)[:2], torch.arange(2)
    assert easyfsl_classifier("easyfsl-laplacianshot", support, labels)(torch.eye(4)[1:2]).tolist() == [1]
