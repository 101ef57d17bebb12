"""`training/ablations.py` as a user runs it, on a tiny backbone, interrupted and gone on with."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from test_benchmark import ENVIRONMENT, with_known_costs
from tiny import tiny_dinov2, tiny_processor
from training_runs import SCRIPTS, make_images


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


def test_each_variant_is_trained_and_measured_once(ground, tmp_path):
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
    accuracies = []
    for name in variants:
        found = json.loads((tmp_path / name.replace(" ", "-") / "benchmark" / "results.json").read_text())
        accuracies.append(next(m["accuracy"] for m in found["means"] if m["method"] == "hyperflow"))
    assert [row["against_the_first"] for row in rows] == pytest.approx([0, accuracies[1] - accuracies[0]], abs=1e-3)
    written = (tmp_path / "ablations.md").read_text()
    assert written.splitlines()[3].startswith(f"| with metric and middle | {rows[1]['gain']:+.2f} ± ")


def test_an_unknown_variant_is_named(ground, tmp_path):
    done = ablations(ground, tmp_path, "--variants", "magic")
    assert done.returncode == 1
    assert "there are no variants ['magic']: choose from task objective, " in done.stderr
