"""The same flow, conditioned on other support sets than the episode's own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoImageProcessor, AutoModel

from hf_hyperflow import HyperFlowAdapter
from hf_hyperflow.benchmark.conditioning import (
    AMPLIFICATIONS,
    CONDITIONS,
    OTHER_DOMAIN,
    OTHER_EPISODE,
    OWN,
    SHUFFLED,
    SUM,
    TWICE_OWN,
    TWICE_UNCONDITIONAL,
    UNCONDITIONAL,
    ConditioningTest,
    shuffle_labels,
)
from hf_hyperflow.benchmark.methods import NoFlow, Target
from hf_hyperflow.data.domains import load_domain
from hf_hyperflow.data.episodes import cdfsl_episode
from hf_hyperflow.modeling.saving import CheckpointError
from tests.helpers.tiny import tiny_adapter
from tests.helpers.training_runs import make_ground, make_images
from training.card.conditioning import Arguments, Experiment, main, summarise
from training.card.tables import build_conditioning_table

WITHOUT = NoFlow.name


@pytest.fixture(scope="module")
def ground(tmp_path_factory):
    folder = make_ground(tmp_path_factory.mktemp("ground"))
    make_images(folder / "gamma", n_classes=4, n_images=22, seed=2)
    processor = AutoImageProcessor.from_pretrained(folder / "backbone", backend="pil")
    backbone = AutoModel.from_pretrained(folder / "backbone")
    tiny_adapter(backbone, processor=processor).save_pretrained(folder / "adapter")
    return folder


@pytest.fixture
def measure(ground, tmp_path):
    """Runs the command with more options, and returns the file it is to write."""

    def run(*more: object) -> Path:
        output = tmp_path / "conditioning.json"
        command = ["--backbone", ground / "backbone", "--adapter", ground / "adapter", "--dataset", ground / "alpha"]
        command += ["--unseen", ground / "beta", ground / "gamma", "--output_file", output, *more]
        main([str(part) for part in command])
        return output

    return run


@pytest.fixture
def make_experiment(ground):
    def make(n_shot: int) -> Experiment:
        backbone = AutoModel.from_pretrained(ground / "backbone").eval()
        adapter = HyperFlowAdapter.from_pretrained(ground / "adapter").eval()
        arguments = Arguments("", "", [str(ground / "alpha")], ["beta"], "", n_shot=n_shot, n_training_episodes=2)
        return Experiment(Target(backbone, adapter), arguments)

    return make


def test_a_record_for_every_condition_and_domain(measure):
    records = json.loads(measure("--n_shot", 1, "--n_episodes", 2).read_text())["records"]
    assert [r["condition"] for r in records if r["domain"] is None] == list(CONDITIONS)
    assert {(r["domain"], r["n_episodes"]) for r in records} == {("beta", 2), ("gamma", 2), (None, 4)}
    own = [r for r in records if r["condition"] == OWN]
    assert [(r["own_advantage"], r["own_advantage_ci95"]) for r in own] == [(0, 0)] * 3
    assert "| other episode | " in build_conditioning_table(("unseen domains", {"records": records}))


def test_unbalanced_episodes_and_shares_of_the_way(ground, tmp_path, measure):
    for name, seed in (("gold", 3), ("silver", 4)):
        make_images(tmp_path / name, n_classes=5, n_images=23, seed=seed)
    sources = ["--unseen", tmp_path / "gold", tmp_path / "silver", "--dataset", tmp_path / "gold", tmp_path / "silver"]
    content = json.loads(measure(*sources, "--protocol", "unbalanced", "--n_episodes", 2).read_text())
    assert content["protocol"] == "unbalanced"
    assert set(content["shares"]) == {"mean", "between", "within"}
    assert sum(content["shares"].values()) == pytest.approx(1)


@torch.no_grad()
def test_every_condition_generates_other_weights(ground, make_experiment):
    """Told of weights and not of accuracies, which may agree by chance."""
    experiment = make_experiment(n_shot=5)
    beta, gamma = experiment.load(str(ground / "beta")), experiment.load(str(ground / "gamma"))
    episode = experiment.arguments.draw(beta.domain, 0)
    thetas = {
        OWN: experiment.test.generate(beta, episode),
        OTHER_EPISODE: experiment.test.generate(beta, experiment.arguments.draw(beta.domain, 1)),
        SHUFFLED: experiment.test.generate(beta, shuffle_labels(episode, seed=0)),
        OTHER_DOMAIN: experiment.test.generate(gamma, experiment.arguments.draw(gamma.domain, 0)),
        UNCONDITIONAL: experiment.compute_unconditional(),
    }
    injection = experiment.target.adapter.space.inject(experiment.target.backbone)
    way = (thetas[OWN] - injection.start).norm()
    assert way > 1e-3
    for condition in (OTHER_EPISODE, SHUFFLED, OTHER_DOMAIN, UNCONDITIONAL):
        assert (thetas[condition] - thetas[OWN]).norm() > 0.001 * way, condition


@torch.no_grad()
def test_accuracies_are_those_of_the_weights(ground, make_experiment):
    """With no flow at all, every condition classifies as the head alone does."""
    experiment = make_experiment(n_shot=1)
    experiment.target.adapter.token_scale.zero_()
    beta, gamma = experiment.load(str(ground / "beta")), experiment.load(str(ground / "gamma"))
    unconditional = experiment.compute_unconditional()
    accuracies = experiment.test.evaluate_episode(beta, gamma, 0, unconditional)
    assert set(accuracies) == {WITHOUT, *CONDITIONS}
    assert set(accuracies.values()) == {accuracies[WITHOUT]}


@torch.no_grad()
def test_ways_are_lengthened_from_the_backbone_as_it_is_and_from_the_mean(ground, make_experiment, monkeypatch):
    experiment = make_experiment(n_shot=1)
    beta, gamma = experiment.load(str(ground / "beta")), experiment.load(str(ground / "gamma"))
    start = experiment.target.adapter.space.inject(experiment.target.backbone).start
    own = experiment.test.generate(beta, experiment.arguments.draw(beta.domain, 0))
    unconditional = experiment.compute_unconditional()
    seen = {}
    monkeypatch.setattr(ConditioningTest, "measure_weights", lambda self, domain, episode, thetas: seen.update(thetas))
    experiment.test.evaluate_episode(beta, gamma, 0, unconditional)
    one, mean = own - start, unconditional - start
    expected = {TWICE_OWN: 2 * one, TWICE_UNCONDITIONAL: 2 * mean, SUM: one + mean, OWN: one}
    for times, condition in AMPLIFICATIONS.items():
        expected[condition] = mean + times * (one - mean)
    for condition, way in expected.items():
        torch.testing.assert_close(seen[condition] - start, way, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_shuffled_labels_lead_elsewhere_but_at_one_shot(ground, make_experiment):
    """The flow does not depend on the order of the classes, but it does on what is in them."""
    distances = {}
    for n_shot in (1, 5):
        experiment = make_experiment(n_shot)
        domain = experiment.load(str(ground / "beta"))
        episode = experiment.arguments.draw(domain.domain, 0)
        shuffled = experiment.test.generate(domain, shuffle_labels(episode, seed=0))
        own = experiment.test.generate(domain, episode)
        start = experiment.target.adapter.space.inject(experiment.target.backbone).start
        distances[n_shot] = ((shuffled - own).norm() / (own - start).norm()).item()
    assert distances[1] < 1e-4
    assert distances[5] > 1e-3


def test_labels_are_shuffled_by_seed_and_episode_alone(ground):
    processor = AutoImageProcessor.from_pretrained(ground / "backbone", backend="pil")
    episode = cdfsl_episode(load_domain(ground / "beta", processor), 3, n_way=5, n_shot=5)
    one, again = shuffle_labels(episode, seed=0), shuffle_labels(episode, seed=0)
    assert torch.equal(one.support_labels, again.support_labels)
    assert not torch.equal(one.support_labels, episode.support_labels)
    assert torch.equal(one.support_labels.bincount(), episode.support_labels.bincount())
    assert torch.equal(one.support, episode.support)
    assert not torch.equal(one.support_labels, shuffle_labels(episode, seed=1).support_labels)


def test_records_are_paired_by_episode_and_mean_over_domains():
    def episodes(own: list[float], other: list[float]) -> list[dict[str, float]]:
        same = dict.fromkeys(CONDITIONS, 50.0)
        return [same | {WITHOUT: 50.0, OWN: a, OTHER_DOMAIN: b} for a, b in zip(own, other, strict=True)]

    records = summarise({"a": episodes([52, 54], [50, 52]), "b": episodes([50, 60], [50, 50])})
    by = {(r["condition"], r["domain"]): r for r in records}
    assert by[OWN, "a"]["gain"] == 3
    assert by[OTHER_DOMAIN, "a"]["own_advantage"] == 2
    assert by[OTHER_DOMAIN, "a"]["own_advantage_ci95"] == 0
    assert by[OTHER_DOMAIN, None]["own_advantage"] == (2 + 5) / 2
    assert by[OTHER_DOMAIN, None]["own_advantage_ci95"] == pytest.approx(1.96 * 5 / 2, abs=1e-3)
    assert by[OWN, None]["own_advantage"] == 0


def test_a_single_episode_has_no_interval():
    one = dict.fromkeys((WITHOUT, *CONDITIONS), 50.0)
    assert {record["gain_ci95"] for record in summarise({"a": [one], "b": [one]})} == {None}


def test_no_episodes_no_other_domain_or_too_few_images_are_named(measure, tmp_path):
    with pytest.raises(SystemExit, match="--n_episodes"):
        measure("--n_episodes", 0)
    with pytest.raises(SystemExit, match="--dataset needs a domain beside beta"):
        Arguments("", "", ["beta"], ["alpha", "beta"], "")
    with pytest.raises(ValueError, match="domain 'alpha' has 0 classes of at least 21 images"):
        measure("--n_shot", 6, "--n_episodes", 1)
    with pytest.raises(SystemExit, match="--protocol must be one of cdfsl, meta-dataset, unbalanced"):
        measure("--protocol", "other")
    with pytest.raises(SystemExit, match="--n_way"):
        measure("--n_way", 1)
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_told_before_the_work(measure, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="file"):
        measure("--dataset", tmp_path / "nowhere", "--output_file", tmp_path / "file" / "conditioning.json")
