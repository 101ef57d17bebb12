"""`training.card.ablations` as a user runs it, on a tiny backbone, interrupted and gone on with."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from statistics import mean

import pytest

from tests.helpers.benchmark_runs import with_known_costs
from tests.helpers.modules import run_module
from tests.helpers.tiny import tiny_dinov2, tiny_processor
from tests.helpers.training_runs import make_images
from training.card.ablations import FIRST, WITH_HEAD, Arguments, list_variants, read_rows, thin_out


@pytest.fixture(scope="module")
def ground(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ground")
    tiny_dinov2(num_hidden_layers=5).save_pretrained(folder / "backbone")
    tiny_processor().save_pretrained(folder / "backbone")
    for seed, name in enumerate(("alpha", "beta", "unseen")):
        make_images(folder / name, n_classes=6, n_images=20, seed=seed)
    return folder


def run_ablations(ground: Path, output: Path, *variants: str) -> subprocess.CompletedProcess[str]:
    return run_module(
        "training.card.ablations",
        *("--backbone", ground / "backbone", "--dataset", ground / "alpha", ground / "beta"),
        *("--unseen", ground / "unseen", "--steps", 1, "--n_shot", 2, "--n_episodes", 3),
        *("--output_dir", output, "--variants", *variants),
    )


@pytest.mark.slow
def test_each_variant_is_trained_and_measured_once(ground, tmp_path, tmp_path_factory):
    variants = [FIRST, WITH_HEAD]
    for name in variants:
        with_known_costs(tmp_path / name.replace(" ", "-") / "benchmark")
    first = run_ablations(ground, tmp_path, FIRST)
    assert first.returncode == 0, first.stderr
    both = run_ablations(ground, tmp_path, *variants)
    assert both.returncode == 0, both.stderr
    assert f"{FIRST}: training" not in both.stdout
    rows = json.loads((tmp_path / "ablations.json").read_text())
    assert [row["variant"] for row in rows] == variants
    assert [row["arguments"]["lda"] for row in rows] == [False, True]
    assert all(row["n_episodes"] == 3 for row in rows)
    assert rows[0]["gain"] == rows[0]["gain_of_the_flow"]  # by plain cosines there is nothing else
    means = []
    for name in variants:
        results = json.loads((tmp_path / name.replace(" ", "-") / "benchmark" / "results.json").read_text())
        means.append(next(m["accuracy"] for m in results["means"] if m["method"] == "hyperflow"))
    assert [mean(row["accuracies"]["unseen"]) for row in rows] == pytest.approx(means, abs=1e-3)
    lines = (tmp_path / "ablations.md").read_text().splitlines()
    assert lines[3].startswith(f"| {WITH_HEAD} | {rows[1]['gain']:+.2f} ± ")
    assert f" | {means[1] - means[0]:+.2f} ± " in lines[3]
    # The rows are enough to go on from, wherever the adapters and their benchmarks are.
    shutil.copy(tmp_path / "ablations.json", elsewhere := tmp_path_factory.mktemp("elsewhere"))
    again = run_ablations(ground, elsewhere, *variants)
    assert again.returncode == 0, again.stderr
    assert "===" not in again.stdout
    assert [path.name for path in elsewhere.iterdir()] == ["ablations.json"]


def make_arguments(**changes: object) -> Arguments:
    settings = {"backbone": "vit", "dataset": list("abcdef"), "unseen": ["z"], "output_dir": "", "holdout": ["c:4"]}
    return Arguments(**(settings | changes))


def test_an_unknown_variant_is_named():
    with pytest.raises(SystemExit, match=r"there are no variants \['magic'\]: choose from episodic loss, "):
        list_variants(make_arguments(variants=["magic"]))


def test_rows_of_something_else_are_named(tmp_path):
    assert read_rows(tmp_path / "ablations.json") == []
    (tmp_path / "ablations.json").write_text("[{}]")
    with pytest.raises(SystemExit, match=r"ablations\.json holds no ablations \(KeyError\('variant'\)\): remove it"):
        read_rows(tmp_path / "ablations.json")


def test_all_but_one_variant_compare_by_plain_cosines(tmp_path):
    (tmp_path / "collection.json").write_text('{"totals": {"rows": 32}}')
    variants = list_variants(make_arguments(trajectories=[str(tmp_path)]))
    assert [name for name, options in variants.items() if "--no_lda" not in options] == [WITH_HEAD]
    cubic = [str(option) for option in variants["C, 32 trajectories"]]
    assert cubic[cubic.index("--interpolant") + 1] == "cubic"
    assert cubic[cubic.index("--matching_steps") + 1] == cubic[cubic.index("--steps") + 1] == "300"


def test_domains_with_a_holdout_are_kept_when_others_are_left_out():
    assert thin_out(make_arguments(), 2) == ["c", "a", "d", "f"]
    assert thin_out(make_arguments(), 4) == ["c", "a", "f"]
