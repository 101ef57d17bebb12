"""The training scripts as a user runs them: on a tiny backbone and image folders, interrupted and resumed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, BitImageProcessorPil, Dinov2Config, Dinov2Model

from hf_hyperflow import HyperFlowAdapter

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def ground(tmp_path_factory) -> Path:
    """A tiny backbone and two image folders whose classes differ in colour."""
    folder = tmp_path_factory.mktemp("training")
    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=24, num_attention_heads=2, num_hidden_layers=3, image_size=28, patch_size=14)
    Dinov2Model(config).save_pretrained(folder / "backbone")
    BitImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}).save_pretrained(
        folder / "backbone"
    )
    generator = np.random.default_rng(0)
    for name in ("alpha", "beta"):
        for c in range(6):
            (folder / name / f"class{c}").mkdir(parents=True)
            colour = generator.integers(0, 256, 3)
            for i in range(20):
                pixels = (colour + generator.normal(0, 30, (28, 28, 3))).clip(0, 255).astype(np.uint8)
                PIL.Image.fromarray(pixels).save(folder / name / f"class{c}" / f"{i}.png")
    return folder


def run(script: str, *arguments: object, launcher: tuple = ()) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, *launcher, str(ROOT / "training" / script), *map(str, arguments), "--cpu", "true"]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def drift_arguments(ground: Path, output: Path) -> list:
    sizes = ["--drift_width", 12, "--drift_depth", 1, "--last_blocks", 2, "--n_steps", 2, "--mixed_precision", "no"]
    episodes = ["--episodes_per_step", 2, "--validate_every", 2, "--validation_episodes", 2, "--warmup_steps", 1]
    data = ["--backbone", ground / "backbone", "--dataset", ground / "alpha", ground / "beta", "--holdout", "beta"]
    return [*data, *sizes, *episodes, "--output_dir", output]


def test_train_drift_resumed_equals_uninterrupted(ground, tmp_path):
    whole = run("train_drift.py", *drift_arguments(ground, tmp_path / "whole"), "--steps", 4)
    assert whole.returncode == 0, whole.stderr
    # Killed between two checkpoints: the work after the first is lost and done again.
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "training/train_drift.py")]
        + [str(a) for a in drift_arguments(ground, tmp_path / "resumed")]
        + ["--steps", "4", "--cpu", "true"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    while process.poll() is None and not (tmp_path / "resumed/checkpoint-2").exists():
        pass
    process.kill()
    process.wait()
    resumed = run("train_drift.py", *drift_arguments(ground, tmp_path / "resumed"), "--steps", 4, "--resume", "true")
    assert resumed.returncode == 0, resumed.stderr
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "resumed"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    histories = [
        json.loads((tmp_path / name / "training.json").read_text())["history"] for name in ("whole", "resumed")
    ]
    for record in (*histories[0], *histories[1]):
        record.pop("seconds")
    assert histories[0] == histories[1]
    assert histories[0][0]["step"] == 2
    assert {"direct", "hyperflow", "difference_ci95"} <= set(histories[0][0]["beta"])
    adapter = HyperFlowAdapter.from_pretrained(tmp_path / "whole")
    backbone = AutoModel.from_pretrained(ground / "backbone").eval()
    task = adapter.adapt(backbone, ground / "beta")
    assert task.class_names == [f"class{c}" for c in range(6)]


def test_pretrain_backbone_learns_only_its_last_blocks(ground, tmp_path):
    arguments = ["--backbone", ground / "backbone", "--dataset", ground / "alpha", "--output_dir", tmp_path / "out"]
    settings = ["--trained_blocks", 1, "--holdout_every", 3, "--steps", 3, "--batch_size", 8, "--mixed_precision", "no"]
    done = run("pretrain_backbone.py", *arguments, *settings)
    assert done.returncode == 0, done.stderr
    before, after = (AutoModel.from_pretrained(f).state_dict() for f in (ground / "backbone", tmp_path / "out"))
    moved = {name for name in before if not torch.equal(before[name].half(), after[name].half())}
    assert moved
    assert all(name.startswith(("encoder.layer.2.", "layernorm.")) for name in moved)
    history = json.loads((tmp_path / "out/pretraining.json").read_text())["history"]
    assert [record["step"] for record in history] == [0, 3]
    assert all(0 <= record["accuracy_5_shot"] <= 100 for record in history)


def run_plain(script: str, *arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "training" / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_unknown_key_in_a_preset_is_named(tmp_path):
    (tmp_path / "preset.yaml").write_text("stepz: 3\n")
    done = run_plain("train_drift.py", "--config", tmp_path / "preset.yaml")
    assert done.returncode == 2
    assert "stepz" in done.stderr


def test_calibrate_moves_the_scale_alone(ground, tmp_path):
    trained = run("train_drift.py", *drift_arguments(ground, tmp_path / "adapter"), "--steps", 2)
    assert trained.returncode == 0, trained.stderr
    before = load_file(tmp_path / "adapter" / "model.safetensors")
    common = ["--backbone", ground / "backbone", "--adapter", tmp_path / "adapter", "--dataset", ground / "beta"]
    done = run_plain("calibrate.py", *common, "--n_episodes", 3)
    assert done.returncode == 0, done.stderr
    after = load_file(tmp_path / "adapter" / "model.safetensors")
    assert {name for name in before if not torch.equal(before[name], after[name])} == {"log_scale"}
    said = float(done.stdout.split("->")[1])
    assert after["log_scale"].float().exp().item() == pytest.approx(said, rel=0.01)  # stored in half precision
    HyperFlowAdapter.from_pretrained(tmp_path / "adapter")  # its digest is the new one
