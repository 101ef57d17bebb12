"""The smaller training scripts as a user runs them, on a tiny backbone and image folders."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModel

from hf_hyperflow import HyperFlowAdapter
from hf_hyperflow.benchmark.evaluation import prototype_accuracy
from hf_hyperflow.data.domains import load_domain, normalise
from hf_hyperflow.data.episodes import cdfsl_episode
from hf_hyperflow.modeling.lda import RegularisedLDA, spread_between, within_covariance
from tests.helpers.tiny import tiny_adapter
from tests.helpers.training_runs import SCRIPTS, make_ground


@pytest.fixture(scope="module")
def ground(tmp_path_factory) -> Path:
    """A tiny backbone, image folders and an adapter."""
    folder = make_ground(tmp_path_factory.mktemp("ground"))
    processor = AutoImageProcessor.from_pretrained(folder / "backbone", backend="pil")
    tiny_adapter(AutoModel.from_pretrained(folder / "backbone"), processor=processor).save_pretrained(
        folder / "adapter"
    )
    return folder


def run_plain(script: str, *arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, str(SCRIPTS / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_unknown_key_in_a_preset_is_named(tmp_path):
    (tmp_path / "preset.yaml").write_text("stepz: 3\n")
    done = run_plain("train_drift.py", "--config", tmp_path / "preset.yaml")
    assert done.returncode == 2
    assert "stepz" in done.stderr


def test_calibrate_moves_the_scale_alone(ground):
    weights = ground / "adapter" / "model.safetensors"
    before = load_file(weights)
    common = ["--backbone", ground / "backbone", "--adapter", ground / "adapter", "--dataset", ground / "beta"]
    done = run_plain("calibrate.py", *common, "--n_episodes", 3)
    assert done.returncode == 0, done.stderr
    after = load_file(weights)
    assert {name for name in before if not torch.equal(before[name].half(), after[name].half())} == {"logit_scale"}
    said = float(done.stdout.split("->")[1])
    assert after["logit_scale"].float().exp().item() == pytest.approx(said, rel=0.01)
    HyperFlowAdapter.from_pretrained(ground / "adapter")  # its digest is the new one


def test_choose_metric_evaluates_each_domain_with_what_the_other_gives(ground, tmp_path):
    common = ["--backbone", ground / "backbone", "--output", tmp_path / "metric.json", "--dataset"]
    numbers = [
        "--made",
        0,
        "--last_blocks",
        2,
        "--middle",
        0,
        "--count",
        5,
        "--power",
        0,
        4,
        "--n_shot",
        3,
        50,
        "--n_episodes",
        4,
    ]
    done = run_plain("choose_metric.py", *common, ground / "alpha", ground / "beta", *numbers)
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "metric.json").read_text())
    assert written["arguments"]["dataset"] == ["alpha", "beta"]
    assert [(r["n_shot"], r["count"], r["power"], r["n_domains"]) for r in written["records"]] == [
        (3, 5, 0, 2),
        (3, 5, 4, 2),
    ]
    backbone = AutoModel.from_pretrained(ground / "backbone").eval()
    processor = AutoImageProcessor.from_pretrained(ground / "backbone", backend="pil")
    domains = [load_domain(ground / name, processor) for name in ("alpha", "beta")]
    with torch.no_grad():
        features = [backbone(normalise(d.images, processor)).last_hidden_state[:, 0] for d in domains]
    gains = []
    for mine, other in ((0, 1), (1, 0)):
        metric = RegularisedLDA(24, power=4)
        labels = domains[other].labels
        spread = spread_between(features[other], labels)
        metric.set_prior(within_covariance(features[other], labels), spread, count=5)
        for index in range(4):
            episode = cdfsl_episode(domains[mine], index, n_way=5, n_shot=3, seed=0)
            found = features[mine][torch.cat([episode.support, episode.query])]
            gains.append(prototype_accuracy(found, episode, metric) - prototype_accuracy(found, episode))
    assert any(gains)
    assert written["records"][1]["gain"] == pytest.approx(sum(gains) / 8, abs=0.3)
    assert run_plain("choose_metric.py", *common, ground / "alpha").returncode != 0


def test_choose_metric_with_made_up_domains(ground, tmp_path):
    common = ["--backbone", ground / "backbone", "--output", tmp_path / "metric.json", "--dataset"]
    numbers = ["--made", 2, "--last_blocks", 2, "--count", 5, "--power", 4, "--n_shot", 1, "--n_episodes", 2]
    done = run_plain("choose_metric.py", *common, ground / "alpha", ground / "beta", *numbers)
    assert done.returncode == 0, done.stderr
    (record,) = json.loads((tmp_path / "metric.json").read_text())["records"]
    assert record["n_domains"] == 6
    assert record["worst"] <= record["gain"]
