"""The same flow, conditioned on other support sets than the episode's own."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoImageProcessor, AutoModel

from hf_hyperflow import HyperFlowAdapter
from hf_hyperflow.data.domains import load_domain
from hf_hyperflow.data.episodes import cdfsl_episode
from hf_hyperflow.modeling.saving import CheckpointError
from tests.helpers.tiny import tiny_adapter
from tests.helpers.training_runs import SCRIPTS, make_ground, make_images

sys.path.insert(0, str(SCRIPTS))  # the scripts of training/ find each other so
from training.card.conditioning import (
    CONDITIONS,
    NEXT,
    NOTHING,
    OTHER,
    OWN,
    SHUFFLED,
    WITHOUT,
    Arguments,
    Flow,
    main,
    records,
    shuffled,
)
from training.card.tables import conditioning_table


@pytest.fixture(scope="module")
def ground(tmp_path_factory):
    folder = make_ground(tmp_path_factory.mktemp("ground"))
    make_images(folder / "gamma", n_classes=4, n_images=22, seed=2)
    processor = AutoImageProcessor.from_pretrained(folder / "backbone", backend="pil")
    backbone = AutoModel.from_pretrained(folder / "backbone")
    tiny_adapter(backbone, processor=processor).save_pretrained(folder / "adapter")
    return folder


@pytest.fixture
def measure(ground, tmp_path, monkeypatch):
    """Runs the script with more options; the file it is to write."""

    def run(*more: object) -> Path:
        output = tmp_path / "conditioning.json"
        command = ["--backbone", ground / "backbone", "--adapter", ground / "adapter", "--dataset", ground / "alpha"]
        command += ["--unseen", ground / "beta", ground / "gamma", "--output", output, *more]
        monkeypatch.setattr(sys, "argv", ["conditioning.py", *map(str, command)])
        main()
        return output

    return run


def test_a_record_for_every_condition_and_domain(measure):
    found = json.loads(measure("--n_shot", 1, "--n_episodes", 6).read_text())["records"]
    assert [r["condition"] for r in found if r["domain"] is None] == list(CONDITIONS)
    assert {(r["domain"], r["n_episodes"]) for r in found} == {("beta", 6), ("gamma", 6), (None, 12)}
    more = {r["condition"]: r["own_has_more"] for r in found if r["domain"] is None}
    assert more[OWN] == 0
    assert any(more[condition] != 0 for condition in (NEXT, OTHER, NOTHING))
    assert "| next episode | " in conditioning_table(("unseen domains", {"records": found}))


@torch.no_grad()
def test_shuffled_labels_lead_elsewhere_but_at_one_shot(ground):
    """The flow does not depend on the order of the classes, but it does on what is in them."""
    backbone = AutoModel.from_pretrained(ground / "backbone").eval()
    adapter = HyperFlowAdapter.from_pretrained(ground / "adapter").eval()
    for n_shot, elsewhere in ((1, False), (5, True)):
        flow = Flow(adapter, backbone, Arguments("", "", ["alpha"], ["beta"], "", n_shot=n_shot))
        features = flow.load(str(ground / "beta"))
        episode = flow.episode(features, 0)
        ends = [flow.end(features, e) - flow.injection.start for e in (episode, shuffled(episode, seed=0))]
        assert torch.allclose(*ends, rtol=1e-3, atol=1e-5) is not elsewhere


def test_labels_are_shuffled_by_seed_and_episode_alone(ground):
    processor = AutoImageProcessor.from_pretrained(ground / "backbone", backend="pil")
    episode = cdfsl_episode(load_domain(ground / "beta", processor), 3, n_way=5, n_shot=5)
    one, again = shuffled(episode, seed=0), shuffled(episode, seed=0)
    assert torch.equal(one.support_labels, again.support_labels)
    assert not torch.equal(one.support_labels, episode.support_labels)
    assert torch.equal(one.support_labels.bincount(), episode.support_labels.bincount())
    assert torch.equal(one.support, episode.support)
    assert not torch.equal(one.support_labels, shuffled(episode, seed=1).support_labels)


def test_figures_are_paired_by_episode_and_mean_over_domains():
    def rows(own, other):
        same = dict.fromkeys((NEXT, SHUFFLED, NOTHING), 50.0)
        return [{WITHOUT: 50.0, OWN: a, OTHER: b} | same for a, b in zip(own, other, strict=True)]

    found = records({"a": rows([52, 54], [50, 52]), "b": rows([50, 60], [50, 50])})
    by = {(r["condition"], r["domain"]): r for r in found}
    assert by[OWN, "a"]["gain"] == 3
    assert by[OTHER, "a"]["own_has_more"] == 2
    assert by[OTHER, "a"]["own_has_more_ci95"] == 0
    assert by[OTHER, None]["own_has_more"] == (2 + 5) / 2
    assert by[OTHER, None]["own_has_more_ci95"] == pytest.approx(1.96 * 5 / 2, abs=1e-3)
    assert by[OWN, None]["own_has_more"] == 0


def test_no_episodes_no_other_domain_or_too_few_images_are_named(measure, tmp_path):
    with pytest.raises(SystemExit, match="--n_episodes"):
        measure("--n_episodes", 0)
    with pytest.raises(SystemExit, match="--dataset needs a domain beside beta"):
        Arguments("", "", ["beta"], ["alpha", "beta"], "")
    with pytest.raises(ValueError, match="domain 'alpha' has 0 classes of at least 21 images"):
        measure("--n_shot", 6, "--n_episodes", 1)
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_told_before_the_work(measure, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="file"):
        measure("--dataset", tmp_path / "nowhere", "--output", tmp_path / "file" / "conditioning.json")
