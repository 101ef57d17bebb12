"""The smaller training scripts as a user runs them, on a tiny backbone and image folders."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_adapter
from training_runs import SCRIPTS, make_ground
from transformers import AutoImageProcessor, AutoModel

from hf_hyperflow import HyperFlowAdapter


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
    assert {name for name in before if not torch.equal(before[name].half(), after[name].half())} == {"log_scale"}
    said = float(done.stdout.split("->")[1])
    assert after["log_scale"].float().exp().item() == pytest.approx(said, rel=0.01)  # stored in half precision
    HyperFlowAdapter.from_pretrained(ground / "adapter")  # its digest is the new one
