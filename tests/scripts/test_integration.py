"""Does the flow arrive where the teacher went? Told of flows for which the answer is known, and by the script."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from hf_hyperflow import HyperFlowAdapter
from hf_hyperflow.finetuning.trajectories import measure_token_scale
from hf_hyperflow.modeling.solvers import TABLEAUX
from hf_hyperflow.training.objectives import VelocityMatchingLoss, encode_recorded_support
from tests.helpers.recorded import colours, made_trajectories, straight
from tests.helpers.tiny import Snapshot, tiny_adapter
from tests.helpers.training_runs import SCRIPTS, make_ground, run
from training.card.integration import (
    ARRIVAL,
    GRID,
    QUERY_GRID,
    along_records,
    arrival_record,
    compare_solvers,
    follow,
    query_curves,
    some_of,
    task_tokens,
    training_interpolant,
)


@pytest.fixture
def domains():
    return [colours("alpha"), colours("beta", seed=1)]


def constant(adapter: HyperFlowAdapter, velocity: torch.Tensor | float) -> HyperFlowAdapter:
    """The adapter with a drift that is the same for every task, time, place and token."""
    with torch.no_grad():
        adapter.drift.token_out.weight.zero_()
        adapter.drift.token_out.bias.copy_(torch.as_tensor(velocity))
    return adapter


def followed(adapter, backbone, recorded, domains, *, path="linear", mean_end=None):
    tasks = task_tokens(adapter, encode_recorded_support(adapter, adapter.split(backbone), recorded, domains))
    if mean_end is None:
        mean_end = recorded.deltas[:, -1].float().mean(dim=0)
    return follow(adapter, tasks, recorded, path=path, mean_end=mean_end), tasks


@pytest.mark.parametrize("path", ["linear", "piecewise", "cubic"])
def test_a_flow_that_is_the_teacher_arrives(adapter, backbone, domains, path):
    velocity = torch.linspace(-1, 2, 32)
    constant(adapter, velocity)
    recorded = made_trajectories(adapter, domains, 4, place=straight(adapter.token_scale * velocity))
    found, _ = followed(adapter, backbone, recorded, domains, path=path)
    assert found.distance.max() < 1e-3  # the trajectories are in half precision
    assert found.distance_from_start.max() < 1e-3
    assert found.cosine_path.shape == found.cosine_flow.shape == (4, ARRIVAL)
    assert min(found.cosine_path.min(), found.cosine_flow.min()) > 0.999
    np.testing.assert_allclose(found.speed, 1, atol=2e-3)
    np.testing.assert_allclose(found.recorded_speed, [[float(t < 1) for t in GRID]] * 4, atol=5e-3)
    np.testing.assert_allclose(found.drifted, 0.5, atol=1e-3)  # it does not know when to stop
    assert found.distance_of_mean.max() < 1e-3  # the same way for all
    expected = torch.tensor(QUERY_GRID).view(1, -1, 1, 1) * adapter.token_scale * velocity
    torch.testing.assert_close(found.deltas, expected.expand_as(found.deltas), rtol=1e-4, atol=1e-5)


def test_an_untrained_flow_has_distance_one(adapter, backbone, domains):
    constant(adapter, 0.0)
    recorded = made_trajectories(adapter, domains, 3)
    found, tasks = followed(adapter, backbone, recorded, domains)
    assert (found.distance == 1).all()
    assert (found.distance_from_start == 1).all()
    assert (found.drifted == 0).all()
    assert (found.cosine_flow == 0).all()
    assert (found.speed == 0).all()
    assert {record["distance"] for record in compare_solvers(adapter, tasks, recorded)} == {1.0}


def test_a_flow_in_the_opposite_direction_is_told(adapter, backbone, domains):
    velocity = torch.linspace(-1, 2, 32)
    constant(adapter, -velocity)
    recorded = made_trajectories(adapter, domains, 3, place=straight(adapter.token_scale * velocity))
    found, _ = followed(adapter, backbone, recorded, domains, mean_end=torch.zeros(adapter.space.mask.shape))
    np.testing.assert_allclose(found.distance, 2, atol=2e-3)
    assert found.cosine_path.max() < -0.999
    np.testing.assert_allclose(found.distance_of_mean, 1, atol=1e-6)


def test_the_teachers_own_start_counts(adapter, backbone, domains):
    velocity = torch.linspace(-1, 2, 32)
    constant(adapter, velocity)
    away = 0.05 * torch.randn(adapter.space.mask.shape, generator=torch.Generator().manual_seed(3))
    way = straight(adapter.token_scale * velocity)
    recorded = made_trajectories(adapter, domains, 3, place=lambda row, t: away + way(row, t))
    found, _ = followed(adapter, backbone, recorded, domains)
    assert found.distance_from_start.max() < 5e-3
    assert found.distance.min() > 0.1


@pytest.mark.parametrize("path", ["linear", "piecewise", "cubic"])
def test_the_recorded_velocity_is_that_of_the_path(adapter, backbone, domains, path):
    """A teacher that goes out for half of the time and back again: only a straight line does not see it."""
    out = adapter.token_scale * torch.linspace(-1, 2, 32)
    recorded = made_trajectories(
        adapter, domains, 2, place=lambda row, t: out * [0.0, 1.0, 2.0, 0.5][[0.0, 0.25, 0.5, 1.0].index(t)]
    )
    constant(adapter, torch.linspace(-1, 2, 32))
    found, _ = followed(adapter, backbone, recorded, domains, path=path)
    late = found.cosine_path[:, GRID.index(0.75)]
    assert late.min() > 0.99 if path == "linear" else late.max() < -0.99


def matched(backbone, domains, *, hidden_share: float):
    """An adapter trained on six trajectories that go straight to different places and stop there, and how it flows."""
    adapter = tiny_adapter(backbone, drift_width=32)
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(4, adapter.space.token_dim, generator=generator)
    ends = 0.01 * torch.randn(6, adapter.space.n_tokens, 4, generator=generator) @ directions
    recorded = made_trajectories(adapter, domains, 6, place=lambda row, t: t * ends[row])
    adapter.token_scale.copy_(measure_token_scale(recorded))
    constant(adapter, 0.0)
    support = encode_recorded_support(adapter, adapter.split(backbone), recorded, domains)
    support = [(features.float(), labels) for features, labels in support]
    objective = VelocityMatchingLoss(adapter, recorded.times)
    optimizer = torch.optim.Adam(adapter.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, total_iters=400)
    for _ in range(400):
        t, chance = torch.rand(2, 6, generator=generator)
        loss = objective(support, recorded.deltas, 1.5 * t, chance < hidden_share)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return followed(adapter, backbone, recorded, domains)[0]


def test_matching_makes_the_flow_arrive(backbone, domains):
    found = matched(backbone, domains, hidden_share=0.5)
    assert found.distance.mean() < 0.6
    assert found.distance.max() < found.distance_of_mean.min()
    assert found.drifted.max() < 0.1
    assert found.cosine_flow.mean() > 0.8


def test_a_flow_that_knows_only_the_recorded_paths_is_told(backbone, domains):
    """Without hidden places the velocity is read off the place: right on the path, and wrong along the flow."""
    found = matched(backbone, domains, hidden_share=0.0)
    assert found.cosine_path[:, 1:].mean() > 0.95
    assert found.cosine_flow.mean() < 0.6
    assert found.distance.mean() > 0.9


def test_solvers_come_nearer_with_steps_and_count_evaluations(adapter, backbone, domains):
    recorded = made_trajectories(adapter, domains, 3)
    _, tasks = followed(adapter, backbone, recorded, domains)
    records = compare_solvers(adapter, tasks, recorded)
    stages = {"euler": 1, "midpoint": 2, "heun": 2, "rk4": 4}
    for solver in TABLEAUX:
        mine = [record for record in records if record["solver"] == solver]
        assert [record["n_steps"] for record in mine] == [1, 2, 4, 8, 16, 50]
        assert [record["nfe"] for record in mine] == [stages[solver] * r["n_steps"] for r in mine]
        assert mine[-1]["difference"] < 0.2 * mine[0]["difference"]
    by_name = {(record["solver"], record["n_steps"]): record["difference"] for record in records}
    assert by_name["rk4", 8] < by_name["euler", 8]


def test_query_curves_are_those_of_the_weights(adapter, backbone, domains):
    recorded = made_trajectories(adapter, domains, 3)
    before = Snapshot(backbone)
    split = adapter.split(backbone)
    nothing = torch.zeros(3, 2, *adapter.space.mask.shape)
    still, teacher = query_curves(
        split, adapter.space, adapter.processor, recorded, domains, [nothing, recorded.deltas]
    )
    before.assert_unchanged()
    assert still.loss.shape == (3, 2)
    assert teacher.loss.shape == teacher.accuracy.shape == (3, 4)
    assert (still.loss[:, 0] == still.loss[:, 1]).all()
    assert (np.abs(teacher.loss - still.loss[:, :1]) > 1e-4).any(axis=1).all()
    first = some_of(recorded, 1)
    again, _ = query_curves(split, adapter.space, adapter.processor, first, domains, [recorded.deltas[:1], nothing[:1]])
    np.testing.assert_allclose(again.loss[0], teacher.loss[0], rtol=1e-5)
    assert ((teacher.accuracy >= 0) & (teacher.accuracy <= 100)).all()


def test_records(adapter, backbone, domains):
    recorded = made_trajectories(adapter, domains, 4)
    found, _ = followed(adapter, backbone, recorded, domains)
    curve, teacher = query_curves(
        adapter.split(backbone), adapter.space, adapter.processor, recorded, domains, [found.deltas, recorded.deltas]
    )
    record = arrival_record(found, curve, teacher)
    assert record["n_tasks"] == 4
    assert record["loss_gain"] == pytest.approx((curve.loss[:, 4] - curve.loss[:, 0]).mean(), abs=1e-5)
    assert record["accuracy_after"] == pytest.approx((curve.accuracy[:, -1] - curve.accuracy[:, 4]).mean())
    along = along_records(found, curve)
    assert [entry["t"] for entry in along] == GRID
    assert [entry["cosine_path"] is None for entry in along] == [t >= 1 for t in GRID]
    assert [entry["t"] for entry in along if entry["loss"] is not None] == QUERY_GRID
    assert along[-1]["loss"] == pytest.approx(curve.loss[:, -1].mean(), abs=1e-5)
    json.dumps([record, along], allow_nan=False)


def test_some_rows_are_spread(adapter, domains):
    recorded = made_trajectories(adapter, domains, 10)
    some = some_of(recorded, 4)
    assert [task.episode.index for task in some.tasks] == [0, 2, 5, 7]
    assert torch.equal(some.deltas, recorded.deltas[[0, 2, 5, 7]])
    assert len(some_of(recorded, 64)) == 10


def test_the_path_is_that_of_training(adapter):
    assert training_interpolant(adapter) == "linear"
    adapter.training_record = {"arguments": {"trajectories": ["rows"], "path": "cubic"}}
    assert training_interpolant(adapter) == "cubic"
    adapter.training_record = {"arguments": {"trajectories": [], "path": "cubic"}}
    assert training_interpolant(adapter) == "linear"


# The script


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
        done = run("collect_trajectories", *common, *teacher, *more, "--output_dir", folder / name, log=folder / "log")
        assert done.exitcode == 0, done.output
    sizes = ["--drift_width", 12, "--drift_depth", 1, "--n_steps", 2, "--matching_batch_size", 8, "--warmup_steps", 1]
    steps = ["--steps", 6, "--matching_steps", 6, "--validation_episodes", 2, "--validate_every", 6]
    data = [*both, "--holdout", "beta", "--trajectories", folder / "rows"]
    for path in ("linear", "cubic"):
        more = [*sizes, *steps, *data, "--path", path, "--output_dir", folder / path]
        done = run("train_drift", *common, *more, log=folder / "log")
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
    return [str(part) for k, v in settings.items() for part in (f"--{k}", *(v if isinstance(v, list) else [v]))]


def test_the_report(made, tmp_path):
    done = run("integration_report", *flags(made, tmp_path / "report"), log=tmp_path / "log")
    assert done.exitcode == 0, done.output
    report = json.loads((tmp_path / "report" / "integration.json").read_text())
    assert report["adapters"] == {"L": {"path": "linear"}, "C": {"path": "cubic"}}
    assert report["tasks"] == {"training": ["alpha"], "unseen": ["alpha", "beta"]}
    assert [(r["tasks"], r["adapter"], r["n_tasks"]) for r in report["arrival"]] == [
        (tasks, name, 5) for tasks in ("training", "unseen") for name in ("L", "C")
    ]
    assert len(report["along"]) == 4 * len(GRID)
    assert [r["t"] for r in report["teacher"]] == 2 * [0.0, pytest.approx(1 / 3, abs=1e-4), 1.0]
    assert len(report["solvers"]) == 4 * 4 * 6
    for record in report["arrival"]:
        assert f"| {record['adapter']} | {record['tasks']} (5) | {record['distance']:.3f} ±" in done.output
    for name in ("distance", "cosine", "loss", "solvers"):
        assert (tmp_path / "report" / f"{name}.png").read_bytes()[1:4] == b"PNG"
    teacher = {(r["tasks"], r["t"]): r["accuracy"] for r in report["teacher"]}
    assert teacher["training", 0.0] > 0


@pytest.fixture
def main(monkeypatch):
    """The script's `main` in this process: its error message."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    module = importlib.import_module("integration_report")

    def called(arguments: list[str]) -> str:
        with pytest.raises(SystemExit) as caught:
            module.main([*arguments, "--cpu", "true"])
        return str(caught.value)

    return called


def test_bad_input_is_named(made, tmp_path, main):
    for changes, word in {
        "no name": ({"adapter": [str(made / "linear")]}, "NAME=FOLDER"),
        "one name": ({"adapter": [f"L={made / 'linear'}", f"L={made / 'cubic'}"]}, "names of their own"),
        "one task": ({"n_tasks": 1}, "at least 2"),
        "no adapter": ({"adapter": [f"L={made / 'nowhere'}"]}, "nowhere"),
        "other parameters": ({"unseen": made / "few"}, "another parameter space"),
        "missing dataset": ({"dataset": made / "alpha"}, r"give ['beta'] with --dataset"),
        "no trajectories": ({"trajectories": made / "alpha"}, "holds no trajectories"),
    }.values():
        message = main(flags(made, tmp_path, **changes))
        assert word in message, message
        assert message.startswith("error: ")
    assert not list(tmp_path.iterdir())
