"""`training/ablations.py` as a user runs it, on a tiny backbone, interrupted and gone on with."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import mean

import pytest

from tests.benchmark.test_runner import ENVIRONMENT, with_known_costs
from tests.helpers.tiny import tiny_dinov2, tiny_processor
from tests.helpers.training_runs import SCRIPTS, make_images


@pytest.fixture(scope="module")
def ground(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ground")
    tiny_dinov2(num_hidden_layers=5).save_pretrained(folder / "backbone")
    tiny_processor().save_pretrained(folder / "backbone")
    for seed, name in enumerate(("alpha", "beta", "unseen")):
        make_images(folder / name, n_classes=6, n_images=20, seed=seed)
    return folder


def ablations(ground: Path, output: Path, *more: object) -> subprocess.CompletedProcess:
    data = ["--backbone", ground / "backbone", "--dataset", ground / "alpha", ground / "beta"]
    numbers = ["--unseen", ground / "unseen", "--steps", 1, "--n_shot", 2, "--n_episodes", 3]
    command = [SCRIPTS / "ablations.py", *data, *numbers, "--output_dir", output, *more]
    return subprocess.run(
        [sys.executable, *map(str, command)], env=ENVIRONMENT, capture_output=True, text=True, check=False
    )


def test_each_variant_is_trained_and_measured_once(ground, tmp_path, tmp_path_factory):
    variants = ["task objective", "with metric and middle"]
    for name in variants:
        with_known_costs(tmp_path / name.replace(" ", "-") / "benchmark")
    first = ablations(ground, tmp_path, "--variants", variants[0])
    assert first.returncode == 0, first.stderr
    both = ablations(ground, tmp_path, "--variants", *variants)
    assert both.returncode == 0, both.stderr
    assert "task objective: training" not in both.stdout
    rows = json.loads((tmp_path / "ablations.json").read_text())
    assert [row["variant"] for row in rows] == variants
    assert [row["arguments"]["metric"] for row in rows] == [False, True]
    assert all(row["n_episodes"] == 3 for row in rows)
    assert rows[0]["gain"] == rows[0]["gain_of_the_flow"]  # by plain cosines there is nothing else
    means = []
    for name in variants:
        found = json.loads((tmp_path / name.replace(" ", "-") / "benchmark" / "results.json").read_text())
        means.append(next(m["accuracy"] for m in found["means"] if m["method"] == "hyperflow"))
    assert [mean(row["accuracies"]["unseen"]) for row in rows] == pytest.approx(means, abs=1e-3)
    lines = (tmp_path / "ablations.md").read_text().splitlines()
    assert lines[3].startswith(f"| with metric and middle | {rows[1]['gain']:+.2f} ± ")
    assert f" | {means[1] - means[0]:+.2f} ± " in lines[3]
    # The rows are enough to go on from, wherever the adapters and their benchmarks are.
    shutil.copy(tmp_path / "ablations.json", elsewhere := tmp_path_factory.mktemp("elsewhere"))
    again = ablations(ground, elsewhere, "--variants", *variants)
    assert again.returncode == 0, again.stderr
    assert "===" not in again.stdout
    assert [path.name for path in elsewhere.iterdir()] == ["ablations.json"]
    (elsewhere / "ablations.json").write_text("[{}]")
    damaged = ablations(ground, elsewhere, "--variants", *variants)
    assert damaged.returncode == 1
    assert "ablations.json holds no ablations (KeyError('variant')): remove it" in damaged.stderr


def test_an_unknown_variant_is_named(ground, tmp_path):
    done = ablations(ground, tmp_path, "--variants", "magic")
    assert done.returncode == 1
    assert "there are no variants ['magic']: choose from task objective, " in done.stderr
