"""The report on where flows arrive, as a user runs it, on trajectories and adapters of a tiny backbone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.helpers.training_runs import make_ground, run_here
from training.card.arrival import GRID
from training.card.integration_report import main


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A backbone, two datasets, trajectories on one and on both, and two adapters matched to the first."""
    folder = make_ground(tmp_path_factory.mktemp("made"))
    common = ["--backbone", folder / "backbone", "--last_blocks", 2, "--mixed_precision", "no"]
    alpha, both = ["--dataset", folder / "alpha"], ["--dataset", folder / "alpha", folder / "beta"]
    teacher = ["--teacher_steps", 3, "--n_points", 3, "--n_views", 1, "--n_trajectories", 8, "--group_size", 4]
    collections = {
        "rows": [*both, "--holdout", "beta"],
        "unseen": [*both, "--seed", 1],
        "few": [*alpha, "--norms", "no"],
    }
    for name, more in collections.items():
        done = run_here("collect_trajectories", *common, *teacher, *more, "--output_dir", folder / name)
        assert done.exitcode == 0, done.output
    sizes = ["--drift_width", 12, "--drift_depth", 1, "--n_steps", 2, "--matching_batch_size", 8, "--warmup_steps", 1]
    steps = ["--steps", 6, "--matching_steps", 6, "--validation_episodes", 2, "--validate_every", 6]
    data = [*both, "--holdout", "beta", "--trajectories", folder / "rows"]
    for interpolant in ("linear", "cubic"):
        more = [*sizes, *steps, *data, "--interpolant", interpolant, "--output_dir", folder / interpolant]
        done = run_here("train_drift", *common, *more)
        assert done.exitcode == 0, done.output
    return folder


def flags(made: Path, output: Path, **changes: object) -> list[str]:
    settings = {
        "backbone": made / "backbone",
        "adapter": [f"L={made / 'linear'}", f"C={made / 'cubic'}"],
        "trajectories": made / "rows",
        "unseen": made / "unseen",
        "dataset": [made / "alpha", made / "beta"],
        "n_tasks": 5,
        "solver_tasks": 2,
        "output_dir": output,
    } | changes
    options = []
    for name, value in settings.items():
        values = value if isinstance(value, list) else [value]
        options += [f"--{name}", *(str(part) for part in values)]
    return options


@pytest.mark.slow
def test_the_report(made, tmp_path, capsys):
    main([*flags(made, tmp_path / "report"), "--cpu", "true"])
    printed = capsys.readouterr().out
    report = json.loads((tmp_path / "report" / "integration.json").read_text())
    assert report["adapters"] == {"L": {"interpolant": "linear"}, "C": {"interpolant": "cubic"}}
    assert report["tasks"] == {"training": ["alpha"], "unseen": ["alpha", "beta"]}
    assert [(r["tasks"], r["adapter"], r["n_tasks"]) for r in report["arrival"]] == [
        (tasks, name, 5) for tasks in ("training", "unseen") for name in ("L", "C")
    ]
    assert len(report["along"]) == 4 * len(GRID)
    assert [r["t"] for r in report["teacher"]] == 2 * [0.0, pytest.approx(1 / 3, abs=1e-4), 1.0]
    assert len(report["solvers"]) == 4 * 4 * 6
    for record in report["arrival"]:
        assert f"| {record['adapter']} | {record['tasks']} (5) | {record['distance']:.3f} ±" in printed
    for name in ("distance", "cosine", "loss", "solvers"):
        assert (tmp_path / "report" / f"{name}.png").read_bytes()[1:4] == b"PNG"
    teacher = {(r["tasks"], r["t"]): r["accuracy"] for r in report["teacher"]}
    assert teacher["training", 0.0] > 0


def read_error(arguments: list[str]) -> str:
    """The message with which the report ends, run in this process."""
    with pytest.raises(SystemExit) as caught:
        main([*arguments, "--cpu", "true"])
    return str(caught.value)


@pytest.mark.slow
def test_bad_input_is_named(made, tmp_path):
    for changes, word in {
        "no name": ({"adapter": [str(made / "linear")]}, "NAME=FOLDER"),
        "one name": ({"adapter": [f"L={made / 'linear'}", f"L={made / 'cubic'}"]}, "names of their own"),
        "one task": ({"n_tasks": 1}, "at least 2"),
        "no adapter": ({"adapter": [f"L={made / 'nowhere'}"]}, "nowhere"),
        "other parameters": ({"unseen": made / "few"}, "another parameter space"),
        "missing dataset": ({"dataset": made / "alpha"}, r"give ['beta'] with --dataset"),
        "no trajectories": ({"trajectories": made / "alpha"}, "holds no trajectories"),
    }.values():
        message = read_error(flags(made, tmp_path, **changes))
        assert word in message, message
        assert message.startswith("error: ")
    assert not list(tmp_path.iterdir())
