"""`pretrain_backbone.py`: what it trains, what it records, and a killed run that goes on."""

from __future__ import annotations

import json
import signal
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel

from tests.helpers.training_runs import die_while_saving, make_ground, run, run_here


@pytest.fixture(scope="module")
def ground(tmp_path_factory) -> Path:
    return make_ground(tmp_path_factory.mktemp("ground"))


def arguments(ground: Path, output: Path) -> list:
    data = ["--backbone", ground / "backbone", "--dataset", ground / "alpha", "--output_dir", output]
    blocks = ["--trained_blocks", 1, "--holdout_every", 3, "--mixed_precision", "no"]
    return [*data, *blocks, "--steps", 3, "--warmup_steps", 1, "--batch_size", 8, "--checkpointing_steps", 1]


@pytest.fixture(scope="module")
def whole(ground, tmp_path_factory) -> Path:
    """The folder of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    done = run_here("pretrain_backbone", *arguments(ground, folder))
    assert done.exitcode == 0, done.output
    return folder


def record(folder: Path) -> dict:
    return json.loads((folder / "pretraining.json").read_text())


def test_learns_only_its_last_blocks(ground, whole):
    before, after = (AutoModel.from_pretrained(folder).state_dict() for folder in (ground / "backbone", whole))
    moved = {name for name in before if not torch.equal(before[name].half(), after[name].half())}
    assert moved
    assert all(name.startswith(("encoder.layer.2.", "layernorm.")) for name in moved)


def test_record_of_the_run(whole):
    found = record(whole)
    assert [entry["step"] for entry in found["history"]] == [0, 1, 2, 3]
    for entry in (found["history"][0], found["history"][-1]):
        assert 0 <= entry["accuracy_5_shot"] <= 100
    phase = found["phases"]["pretraining"]
    assert (phase["runs"], phase["images"]) == (3, 24)
    assert phase["flops"] > 0
    assert phase["seconds"] > 0


def assert_same_run(first: Path, second: Path) -> None:
    weights, others = (load_file(folder / "model.safetensors") for folder in (first, second))
    assert weights.keys() == others.keys()
    assert all(torch.equal(weights[name], others[name]) for name in weights)
    assert record(first)["history"] == record(second)["history"]


def test_resumed_from_a_checkpoint_equals_uninterrupted(ground, whole, tmp_path):
    done = run_here(
        "pretrain_backbone", *arguments(ground, tmp_path), "--resume_from_checkpoint", whole / "checkpoint-2"
    )
    assert done.exitcode == 0, done.output
    assert f"going on from {whole / 'checkpoint-2'}" in done.output
    assert_same_run(whole, tmp_path)


@pytest.mark.slow
def test_killed_while_saving_and_resumed_equals_uninterrupted(ground, whole, tmp_path):
    resume = [*arguments(ground, tmp_path / "out"), "--resume_from_checkpoint", "latest"]
    killed = run("pretrain_backbone", *resume, fault=partial(die_while_saving, 2), log=tmp_path / "log")
    assert killed.exitcode == -signal.SIGKILL, killed.output
    done = run("pretrain_backbone", *resume, "--checkpoints_total_limit", 1, log=tmp_path / "log")
    assert done.exitcode == 0, done.output
    assert "checkpoint-1" in done.output
    assert_same_run(whole, tmp_path / "out")
    assert [folder.name for folder in (tmp_path / "out").glob("checkpoint*")] == ["checkpoint-3"]
