"""The schedule from velocity matching to the episodic loss, and both losses summed over shares of a batch."""

from __future__ import annotations

import pytest
import torch

from hf_hyperflow.training.objectives import EpisodeImages, EpisodicLoss, MatchingRows, VelocityMatchingLoss
from hf_hyperflow.training.schedule import METRICS, Schedule, ScheduledLoss, draw_rows


def test_weight_falls_from_one_to_zero():
    schedule = Schedule(matching_steps=2, annealing_steps=3)
    assert [schedule.weight(step) for step in range(7)] == [1, 1, 0.75, 0.5, 0.25, 0, 0]
    phases = ["matching"] * 2 + ["annealing"] * 3 + ["episodic"] * 2
    assert [schedule.phase(step) for step in range(7)] == phases


def test_what_each_phase_measures():
    schedule = Schedule(matching_steps=1, annealing_steps=1)
    assert schedule.measured(0) == ("loss", "matching_loss")
    assert schedule.measured(1) == METRICS
    assert schedule.measured(2) == ("loss", "episodic_loss", "accuracy")
    assert schedule.end_of_matching == 2


def test_without_annealing_or_without_matching():
    assert [Schedule(2).weight(step) for step in range(4)] == [1, 1, 0, 0]
    assert [Schedule(0, 1).weight(step) for step in range(3)] == [0.5, 0, 0]
    assert [Schedule().weight(step) for step in range(2)] == [0, 0]
    with pytest.raises(ValueError, match="annealing_steps=-1"):
        Schedule(1, -1)


@pytest.mark.parametrize("batch_size", [1, 3, 5, 12])
def test_every_row_comes_once_in_a_pass(batch_size):
    rows = [row for step in range(10) for row in draw_rows(5, step, batch_size, seed=0)]
    for start in range(0, len(rows), 5):
        assert sorted(rows[start : start + 5]) == [0, 1, 2, 3, 4]
    assert rows[:5] != rows[5:10], "shuffled anew"
    assert rows != [row for step in range(10) for row in draw_rows(5, step, batch_size, seed=1)]
    assert draw_rows(5, 7, batch_size, seed=0) == rows[7 * batch_size : 8 * batch_size]


@pytest.fixture
def batch(adapter):
    """Five episodes and five rows."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.tensor([0, 0, 1, 1])
    episodes = [EpisodeImages(torch.randn(8, 3, 28, 28, generator=generator), labels, labels) for _ in range(5)]
    support = [(torch.randn(4, 64, generator=generator), labels) for _ in range(5)]
    deltas = torch.randn(5, 3, *adapter.space.mask.shape, generator=generator) * adapter.space.mask
    masked = torch.tensor([True, False, False, True, False])
    return episodes, MatchingRows(support, deltas, 1.5 * torch.rand(5, generator=generator), masked)


@pytest.fixture
def objective(adapter, backbone):
    matching = VelocityMatchingLoss(adapter, torch.tensor([0, 0.5, 1.0]), interpolant="piecewise")
    return ScheduledLoss(adapter, EpisodicLoss(adapter, adapter.split(backbone)), matching)


def gradients(adapter) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in adapter.named_parameters() if p.requires_grad}
    adapter.zero_grad()
    return found


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_unequal_shares_add_up_to_the_whole(adapter, objective, batch, weight):
    episodes, rows = batch
    loss, metrics = objective(episodes, rows, weight, 5, 5)
    loss.backward()
    whole = gradients(adapter)
    sums = torch.zeros(len(METRICS))
    for share in (slice(0, 3), slice(3, 5)):
        some = MatchingRows(rows.support[share], rows.deltas[share], rows.t[share], rows.masked[share])
        loss, measured = objective(episodes[share], some, weight, 5, 5)
        loss.backward()
        sums += measured
    torch.testing.assert_close(sums, metrics)
    for name, gradient in gradients(adapter).items():
        torch.testing.assert_close(gradient, whole[name], rtol=1e-3, atol=1e-5, msg=name)


def test_what_is_measured(adapter, objective, batch):
    episodes, rows = batch
    _, metrics = objective(episodes, rows, 0.3, 5, 5)
    loss, episodic_loss, accuracy, matching_loss = metrics.tolist()
    assert loss == pytest.approx(0.3 * matching_loss + 0.7 * episodic_loss, rel=1e-5)
    assert 0 <= accuracy <= 1
    episodic, matching = objective._losses
    assert episodic_loss == pytest.approx(episodic(episodes)[0].item(), rel=1e-4)
    assert matching_loss == pytest.approx(matching(rows).item(), rel=1e-4)


def test_what_has_no_weight_is_not_run_and_everything_has_a_gradient(adapter, objective, batch):
    episodes, rows = batch
    for weight, given in ((1.0, ([], rows)), (0.0, (episodes, None))):
        loss, metrics = objective(*given, weight, 5, 5)
        loss.backward()
        assert all(p.grad is not None for p in adapter.parameters() if p.requires_grad)
        assert metrics[METRICS.index("episodic_loss" if weight else "matching_loss")] == 0
        adapter.zero_grad(set_to_none=True)


def test_the_adapter_is_saved_once(objective):
    assert all(name.startswith("adapter.") for name in objective.state_dict())
