"""Interpolants against their definitions, their own derivatives and scipy's spline."""

from __future__ import annotations

import pytest
import torch
from scipy.interpolate import CubicSpline

from hf_hyperflow.finetuning.interpolants import INTERPOLANTS, cubic_spline, linear, piecewise_linear

TIMES = torch.tensor([0.0, 0.1, 0.3, 0.6, 1.0], dtype=torch.float64)


@pytest.fixture
def points():
    return torch.randn(4, 5, 3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def at(t: float, n: int = 4) -> torch.Tensor:
    return torch.full((n,), t, dtype=torch.float64)


@pytest.mark.parametrize("interpolant", [piecewise_linear, cubic_spline])
def test_goes_through_the_points(interpolant, points):
    for i, time in enumerate(TIMES):
        position, _ = interpolant(points, TIMES, at(time))
        torch.testing.assert_close(position, points[:, i])


def test_linear_goes_straight_from_the_first_to_the_last_point(points):
    position, velocity = linear(points, TIMES, at(0.25))
    torch.testing.assert_close(position, 0.75 * points[:, 0] + 0.25 * points[:, -1])
    torch.testing.assert_close(velocity, points[:, -1] - points[:, 0])


def test_piecewise_velocity_is_the_slope_of_the_piece(points):
    position, velocity = piecewise_linear(points, TIMES, at(0.2))
    torch.testing.assert_close(position, 0.5 * (points[:, 1] + points[:, 2]))
    torch.testing.assert_close(velocity, (points[:, 2] - points[:, 1]) / 0.2)


@pytest.mark.parametrize("interpolant", INTERPOLANTS.values(), ids=INTERPOLANTS)
def test_velocity_is_the_derivative_of_the_position(interpolant, points):
    step = 1e-6
    for t in (0.05, 0.17, 0.45, 0.99):
        _, velocity = interpolant(points, TIMES, at(t))
        ahead, behind = interpolant(points, TIMES, at(t + step))[0], interpolant(points, TIMES, at(t - step))[0]
        torch.testing.assert_close(velocity, (ahead - behind) / (2 * step), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("interpolant", INTERPOLANTS.values(), ids=INTERPOLANTS)
@pytest.mark.parametrize("t", [1.0, 1.2, 7.0])
def test_stays_at_the_last_point_from_one_on(interpolant, points, t):
    position, velocity = interpolant(points, TIMES, at(t))
    torch.testing.assert_close(position, points[:, -1])
    assert (velocity == 0).all()


def test_spline_is_the_natural_one(points):
    t = torch.tensor([0.0, 0.08, 0.5, 0.93], dtype=torch.float64)
    position, velocity = cubic_spline(points, TIMES, t)
    for row in range(4):
        oracle = CubicSpline(TIMES, points[row], bc_type="natural")
        torch.testing.assert_close(position[row], torch.from_numpy(oracle(t[row].item())))
        torch.testing.assert_close(velocity[row], torch.from_numpy(oracle(t[row].item(), 1)))


@pytest.mark.parametrize("interpolant", INTERPOLANTS.values(), ids=INTERPOLANTS)
def test_points_on_a_line_give_that_line(interpolant):
    slope = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    points = TIMES.view(1, -1, 1) * slope.unsqueeze(1)
    position, velocity = interpolant(points, TIMES, at(0.37))
    torch.testing.assert_close(position, 0.37 * slope)
    torch.testing.assert_close(velocity, slope)


@pytest.mark.parametrize("interpolant", INTERPOLANTS.values(), ids=INTERPOLANTS)
def test_two_points_are_enough(interpolant, points):
    position, velocity = interpolant(points[:, :2], TIMES[[0, -1]], at(0.5))
    torch.testing.assert_close(position, points[:, :2].mean(dim=1))
    torch.testing.assert_close(velocity, points[:, 1] - points[:, 0])


def test_each_row_has_its_own_time(points):
    t = torch.tensor([0.05, 0.3, 0.8, 1.4], dtype=torch.float64)
    together = cubic_spline(points, TIMES, t)
    for row in range(4):
        alone = cubic_spline(points[[row]], TIMES, t[[row]])
        for one, all_ in zip(alone, together, strict=True):
            torch.testing.assert_close(one[0], all_[row])


@pytest.mark.parametrize("interpolant", INTERPOLANTS.values(), ids=INTERPOLANTS)
@pytest.mark.parametrize(
    ("times", "t", "word"),
    [
        ([0.0, 0.5, 0.4, 0.9, 1.0], 0.5, "ascend"),
        ([0.0, 0.5, 0.5, 0.9, 1.0], 0.5, "ascend"),
        ([0.1, 0.3, 0.5, 0.9, 1.0], 0.5, "from 0 to 1"),
        ([0.0, 1.0], 0.5, "5 points, 2"),
        ([0.0, 0.3, 0.5, 0.9, 1.0], -0.1, "starts at t = 0"),
    ],
)
def test_times_that_cannot_be_interpolated_are_refused(interpolant, points, times, t, word):
    with pytest.raises(ValueError, match=word):
        interpolant(points, torch.tensor(times, dtype=torch.float64), at(t))
