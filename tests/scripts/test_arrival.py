"""Does the flow arrive where the teacher went? Measured on flows for which the answer is known."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from hf_hyperflow import HyperFlowAdapter
from hf_hyperflow.finetuning.trajectories import measure_token_scale
from hf_hyperflow.modeling.solvers import TABLEAUX
from hf_hyperflow.training.objectives import MatchingRows, VelocityMatchingLoss, encode_recorded_support
from tests.helpers.recorded import colours, made_trajectories, straight
from tests.helpers.tiny import Snapshot, tiny_adapter
from training.card.arrival import (
    ARRIVAL,
    GRID,
    QUERY_GRID,
    compare_solvers,
    encode_tasks,
    get_interpolant,
    measure_flow,
    measure_queries,
    select_tasks,
    summarise_along_flow,
    summarise_arrival,
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


def follow(adapter, backbone, recorded, domains, *, interpolant="linear", mean_end=None):
    tasks = encode_tasks(adapter, encode_recorded_support(adapter, adapter.split(backbone), recorded, domains))
    if mean_end is None:
        mean_end = recorded.deltas[:, -1].float().mean(dim=0)
    return measure_flow(adapter, tasks, recorded, interpolant=interpolant, mean_end=mean_end), tasks


@pytest.mark.parametrize("interpolant", ["linear", "piecewise", "cubic"])
def test_a_flow_that_is_the_teacher_arrives(adapter, backbone, domains, interpolant):
    velocity = torch.linspace(-1, 2, 32)
    constant(adapter, velocity)
    recorded = made_trajectories(adapter, domains, 4, place=straight(adapter.token_scale * velocity))
    measures, _ = follow(adapter, backbone, recorded, domains, interpolant=interpolant)
    assert measures.distance.max() < 1e-3  # the trajectories are in half precision
    assert measures.distance_from_start.max() < 1e-3
    assert measures.cosine_on_path.shape == measures.cosine_on_flow.shape == (4, ARRIVAL)
    assert min(measures.cosine_on_path.min(), measures.cosine_on_flow.min()) > 0.999
    np.testing.assert_allclose(measures.speed, 1, atol=2e-3)
    np.testing.assert_allclose(measures.recorded_speed, [[float(t < 1) for t in GRID]] * 4, atol=5e-3)
    np.testing.assert_allclose(measures.drifted, 0.5, atol=1e-3)  # it does not know when to stop
    assert measures.distance_of_mean.max() < 1e-3  # the same way for all
    expected = torch.tensor(QUERY_GRID).view(1, -1, 1, 1) * adapter.token_scale * velocity
    torch.testing.assert_close(measures.deltas, expected.expand_as(measures.deltas), rtol=1e-4, atol=1e-5)


def test_an_untrained_flow_has_distance_one(adapter, backbone, domains):
    constant(adapter, 0.0)
    recorded = made_trajectories(adapter, domains, 3)
    measures, tasks = follow(adapter, backbone, recorded, domains)
    assert (measures.distance == 1).all()
    assert (measures.distance_from_start == 1).all()
    assert (measures.drifted == 0).all()
    assert (measures.cosine_on_flow == 0).all()
    assert (measures.speed == 0).all()
    assert {record["distance"] for record in compare_solvers(adapter, tasks, recorded)} == {1.0}


def test_a_flow_in_the_opposite_direction_is_told(adapter, backbone, domains):
    velocity = torch.linspace(-1, 2, 32)
    constant(adapter, -velocity)
    recorded = made_trajectories(adapter, domains, 3, place=straight(adapter.token_scale * velocity))
    measures, _ = follow(adapter, backbone, recorded, domains, mean_end=torch.zeros(adapter.space.mask.shape))
    np.testing.assert_allclose(measures.distance, 2, atol=2e-3)
    assert measures.cosine_on_path.max() < -0.999
    np.testing.assert_allclose(measures.distance_of_mean, 1, atol=1e-6)


def test_the_teachers_own_start_counts(adapter, backbone, domains):
    velocity = torch.linspace(-1, 2, 32)
    constant(adapter, velocity)
    away = 0.05 * torch.randn(adapter.space.mask.shape, generator=torch.Generator().manual_seed(3))
    way = straight(adapter.token_scale * velocity)
    recorded = made_trajectories(adapter, domains, 3, place=lambda row, t: away + way(row, t))
    measures, _ = follow(adapter, backbone, recorded, domains)
    assert measures.distance_from_start.max() < 5e-3
    assert measures.distance.min() > 0.1


@pytest.mark.parametrize("interpolant", ["linear", "piecewise", "cubic"])
def test_the_recorded_velocity_is_that_of_the_interpolant(adapter, backbone, domains, interpolant):
    """A teacher that goes out for half of the time and back again: only a straight line does not see it."""
    out = adapter.token_scale * torch.linspace(-1, 2, 32)
    recorded = made_trajectories(
        adapter, domains, 2, place=lambda row, t: out * [0.0, 1.0, 2.0, 0.5][[0.0, 0.25, 0.5, 1.0].index(t)]
    )
    constant(adapter, torch.linspace(-1, 2, 32))
    measures, _ = follow(adapter, backbone, recorded, domains, interpolant=interpolant)
    late = measures.cosine_on_path[:, GRID.index(0.75)]
    assert late.min() > 0.99 if interpolant == "linear" else late.max() < -0.99


def matched(backbone, domains, *, mask_prob: float):
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
        loss = objective(MatchingRows(support, recorded.deltas, 1.5 * t, chance < mask_prob))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return follow(adapter, backbone, recorded, domains)[0]


@pytest.mark.slow
def test_matching_makes_the_flow_arrive(backbone, domains):
    measures = matched(backbone, domains, mask_prob=0.5)
    assert measures.distance.mean() < 0.6
    assert measures.distance.max() < measures.distance_of_mean.min()
    assert measures.drifted.max() < 0.1
    assert measures.cosine_on_flow.mean() > 0.8


@pytest.mark.slow
def test_a_flow_that_knows_only_the_recorded_paths_is_told(backbone, domains):
    """Without hidden places the velocity is read off the place: right on the path, and wrong along the flow."""
    measures = matched(backbone, domains, mask_prob=0.0)
    assert measures.cosine_on_path[:, 1:].mean() > 0.95
    assert measures.cosine_on_flow.mean() < 0.6
    assert measures.distance.mean() > 0.9


def test_solvers_come_nearer_with_steps_and_count_evaluations(adapter, backbone, domains):
    recorded = made_trajectories(adapter, domains, 3)
    _, tasks = follow(adapter, backbone, recorded, domains)
    records = compare_solvers(adapter, tasks, recorded)
    stages = {"euler": 1, "midpoint": 2, "heun": 2, "rk4": 4}
    for solver in TABLEAUX:
        of_solver = [record for record in records if record["solver"] == solver]
        assert [record["n_steps"] for record in of_solver] == [1, 2, 4, 8, 16, 50]
        assert [record["nfe"] for record in of_solver] == [stages[solver] * r["n_steps"] for r in of_solver]
        assert of_solver[-1]["difference"] < 0.2 * of_solver[0]["difference"]
    by_name = {(record["solver"], record["n_steps"]): record["difference"] for record in records}
    assert by_name["rk4", 8] < by_name["euler", 8]


def test_query_curves_are_those_of_the_weights(adapter, backbone, domains):
    recorded = made_trajectories(adapter, domains, 3)
    before = Snapshot(backbone)
    split = adapter.split(backbone)
    nothing = torch.zeros(3, 2, *adapter.space.mask.shape)
    still, teacher = measure_queries(
        split, adapter.space, adapter.processor, recorded, domains, [nothing, recorded.deltas]
    )
    before.assert_unchanged()
    assert still.loss.shape == (3, 2)
    assert teacher.loss.shape == teacher.accuracy.shape == (3, 4)
    assert (still.loss[:, 0] == still.loss[:, 1]).all()
    assert (np.abs(teacher.loss - still.loss[:, :1]) > 1e-4).any(axis=1).all()
    first = select_tasks(recorded, 1)
    again, _ = measure_queries(
        split, adapter.space, adapter.processor, first, domains, [recorded.deltas[:1], nothing[:1]]
    )
    np.testing.assert_allclose(again.loss[0], teacher.loss[0], rtol=1e-5)
    assert ((teacher.accuracy >= 0) & (teacher.accuracy <= 100)).all()


def test_records(adapter, backbone, domains):
    recorded = made_trajectories(adapter, domains, 4)
    measures, _ = follow(adapter, backbone, recorded, domains)
    curve, teacher = measure_queries(
        adapter.split(backbone), adapter.space, adapter.processor, recorded, domains, [measures.deltas, recorded.deltas]
    )
    record = summarise_arrival(measures, curve, teacher)
    assert record["n_tasks"] == 4
    assert record["loss_gain"] == pytest.approx((curve.loss[:, 4] - curve.loss[:, 0]).mean(), abs=1e-5)
    assert record["accuracy_after"] == pytest.approx((curve.accuracy[:, -1] - curve.accuracy[:, 4]).mean())
    along = summarise_along_flow(measures, curve)
    assert [entry["t"] for entry in along] == GRID
    assert [entry["cosine_path"] is None for entry in along] == [t >= 1 for t in GRID]
    assert [entry["t"] for entry in along if entry["loss"] is not None] == QUERY_GRID
    assert along[-1]["loss"] == pytest.approx(curve.loss[:, -1].mean(), abs=1e-5)
    json.dumps([record, along], allow_nan=False)


def test_selected_rows_are_spread(adapter, domains):
    recorded = made_trajectories(adapter, domains, 10)
    some = select_tasks(recorded, 4)
    assert [task.episode.index for task in some.tasks] == [0, 2, 5, 7]
    assert torch.equal(some.deltas, recorded.deltas[[0, 2, 5, 7]])
    assert len(select_tasks(recorded, 64)) == 10


def test_the_interpolant_is_that_of_training(adapter):
    assert get_interpolant(adapter) == "linear"
    adapter.training_record = {"arguments": {"trajectories": ["rows"], "interpolant": "cubic"}}
    assert get_interpolant(adapter) == "cubic"
    adapter.training_record = {"arguments": {"trajectories": [], "interpolant": "cubic"}}
    assert get_interpolant(adapter) == "linear"
