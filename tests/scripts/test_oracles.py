"""Displacements that are tuned on a domain and on all domains."""

from __future__ import annotations

import json
from itertools import islice

import pytest
import torch
from transformers import AutoImageProcessor, AutoModel

from hf_hyperflow import HyperFlowAdapter
from hf_hyperflow.benchmark.domain_features import DomainFeatures
from hf_hyperflow.benchmark.methods import Target
from hf_hyperflow.data.domains import load_domain
from tests.helpers.tiny import tiny_adapter
from tests.helpers.training_runs import make_ground, make_images
from training.card.oracles import (
    KINDS,
    ORACLE,
    UNIVERSAL,
    Arguments,
    DisplacementTuner,
    draw_tasks,
    main,
    split_classes,
)


@pytest.fixture(scope="module")
def ground(tmp_path_factory):
    folder = make_ground(tmp_path_factory.mktemp("ground"))
    make_images(folder / "gamma", n_classes=6, n_images=22, seed=2)
    make_images(folder / "few", n_classes=5, n_images=22, seed=3)
    processor = AutoImageProcessor.from_pretrained(folder / "backbone", backend="pil")
    tiny_adapter(AutoModel.from_pretrained(folder / "backbone"), processor=processor).save_pretrained(
        folder / "adapter"
    )
    return folder


@pytest.fixture
def target(ground):
    backbone = AutoModel.from_pretrained(ground / "backbone").eval().requires_grad_(False)
    return Target(backbone, HyperFlowAdapter.from_pretrained(ground / "adapter").eval().requires_grad_(False))


def measure(ground, output, *more: object) -> None:
    command = ["--backbone", ground / "backbone", "--adapter", ground / "adapter", "--dataset", ground / "alpha"]
    command += ["--unseen", ground / "few", ground / "gamma", "--steps", 2, "--episodes_per_step", 1]
    main([str(part) for part in (*command, "--output_file", output, *more)])


def test_a_record_for_every_kind_and_domain_with_enough_classes(ground, tmp_path, capsys):
    measure(ground, tmp_path / "oracles.json", "--n_episodes", 2)
    records = json.loads((tmp_path / "oracles.json").read_text())["records"]
    assert "few is left out: it has 5 classes" in capsys.readouterr().out
    expected = [(kind, domain) for kind in KINDS for domain in ("gamma", None)]
    assert [(record["kind"], record["domain"]) for record in records] == expected
    of_universal = [record for record in records if record["kind"] == UNIVERSAL]
    assert {record["over_universal"] for record in of_universal} == {0}


def test_tuning_lowers_the_loss_on_the_tasks_it_was_tuned_on(ground, target):
    arguments = Arguments("", "", [], [], "", steps=20, episodes_per_step=2, learning_rate=2e-3)
    tuner = DisplacementTuner(target, arguments)
    domain = DomainFeatures(target, load_domain(ground / "gamma", target.processor))
    tasks = list(islice(draw_tasks([domain], seed=0), 40))
    tuned = tuner.tune(tuner.target.start, iter(tasks), ORACLE)
    losses = []
    with torch.no_grad():
        for theta in (tuner.target.start, tuned):
            losses.append(sum(tuner._compute_loss(theta, *task).item() for task in tasks))
    assert losses[1] < losses[0]
    padding = ~target.adapter.space.mask
    assert torch.equal(tuned[padding], tuner.target.start[padding])


def test_halves_share_no_class_and_lose_none(ground, target):
    domain = load_domain(ground / "gamma", target.processor)
    halves = split_classes(domain, seed=0)
    assert halves is not None
    first, second = halves
    assert sorted(first.class_names + second.class_names) == sorted(domain.class_names)
    assert len(first) + len(second) == len(domain)
    assert split_classes(load_domain(ground / "few", target.processor), seed=0) is None


def test_nothing_to_measure_is_named(ground, tmp_path):
    with pytest.raises(SystemExit, match="none of the --unseen domains"):
        measure(ground, tmp_path / "oracles.json", "--unseen", ground / "few")
    with pytest.raises(SystemExit, match="--n_way"):
        measure(ground, tmp_path / "oracles.json", "--n_way", 1)
    assert list(tmp_path.iterdir()) == []
