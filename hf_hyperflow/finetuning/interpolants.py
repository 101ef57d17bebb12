"""Interpolants of a recorded trajectory: where it is at time t, and how fast it moves there.

HyperFlow (arXiv 2504.15323, section 3) interpolates fine-tuning trajectories linearly (L), piecewise linearly (PL) or
by cubic splines (C), and takes the derivative as the velocity to learn. At t = 1 the teacher stopped. From there on an
interpolant stands still, with velocity zero, so that a flow that has learned it does not overshoot.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

#: Takes points `(batch, n_points, ...)`, their times `(n_points,)` and times t `(batch,)` to positions and velocities,
#: `(batch, ...)` each.
Interpolant = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def linear(points: torch.Tensor, times: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Straight from the first point to the last (L), past all points between them.

    Arguments, results and errors are those of `piecewise_linear`.
    """
    _check_points(points, times)
    return piecewise_linear(points[:, [0, -1]], times[[0, -1]], t)


def piecewise_linear(points: torch.Tensor, times: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Straight from each point to the next (PL); at a point, the velocity is that towards the next one.

    Args:
        points: `(batch, n_points, ...)`.
        times: `(n_points,)`, ascending from 0 to 1.
        t: `(batch,)`, 0 or more; from 1 on the last point is the position.

    Returns:
        Position and velocity, `(batch, ...)` each.

    Raises:
        ValueError: there are fewer than two points, the times do not ascend from 0 to 1 or are not one for each point,
            or t is negative.
    """
    piece, width, is_moving = _find_piece(points, times, t)
    rows = torch.arange(len(points), device=points.device)
    left, right = points[rows, piece], points[rows, piece + 1]
    share = _expand((t.clamp(max=1) - times[piece]) / width, left)
    velocity = (right - left) / _expand(width, left)
    return left + share * (right - left), velocity * _expand(is_moving, left)


def cubic_spline(points: torch.Tensor, times: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The natural cubic spline through all points (C): twice differentiable, without curvature at either end.

    Arguments, results and errors are those of `piecewise_linear`.
    """
    piece, width, is_moving = _find_piece(points, times, t)
    rows = torch.arange(len(points), device=points.device)
    left, right = points[rows, piece], points[rows, piece + 1]
    curvature = torch.einsum("qp,bp...->bq...", _solve_curvatures(times).to(points.dtype), points)
    bend_left, bend_right = curvature[rows, piece], curvature[rows, piece + 1]
    # The formula of the textbooks (Press et al., Numerical Recipes, section 3.3), with a piece of width h.
    h = _expand(width, left)
    b = _expand((t.clamp(max=1) - times[piece]) / width, left)
    a = 1 - b
    position = a * left + b * right + ((a**3 - a) * bend_left + (b**3 - b) * bend_right) * h**2 / 6
    velocity = (right - left) / h + ((3 * b**2 - 1) * bend_right - (3 * a**2 - 1) * bend_left) * h / 6
    return position, velocity * _expand(is_moving, left)


#: The paper's three: its tables call them L, PL and C.
INTERPOLANTS: dict[str, Interpolant] = {"linear": linear, "piecewise": piecewise_linear, "cubic": cubic_spline}


def _find_piece(
    points: torch.Tensor, times: torch.Tensor, t: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """For each t the piece it lies in, the width of that piece, and whether the interpolant moves there."""
    _check_points(points, times)
    if not (t >= 0).all():
        raise ValueError(f"an interpolant starts at t = 0, and t = {t.min()} was asked for.")
    piece = (torch.searchsorted(times, t.contiguous(), right=True) - 1).clamp(max=len(times) - 2)
    return piece, times[piece + 1] - times[piece], t < 1


def _check_points(points: torch.Tensor, times: torch.Tensor) -> None:
    if len(times) < 2 or points.shape[1] != len(times):
        raise ValueError(
            "an interpolant needs two or more points and a time for each of them, not "
            f"{points.shape[1]} points, {len(times)} times."
        )
    if times[0] != 0 or times[-1] != 1 or not (times[1:] > times[:-1]).all():
        raise ValueError(f"the times of an interpolant ascend from 0 to 1, not {times.tolist()}.")


def _expand(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Values `(batch,)` in a shape that multiplies the rows of `like`."""
    return values.to(like.dtype).view(-1, *[1] * (like.ndim - 1))


def _solve_curvatures(times: torch.Tensor) -> torch.Tensor:
    """The matrix `(n_points, n_points)` that takes the points to the natural spline's second derivatives there.

    At the inner points the second derivatives M solve h_{i-1} M_{i-1} + 2 (h_{i-1} + h_i) M_i + h_i M_{i+1} =
    6 (s_i - s_{i-1}), where h_i is the width of piece i and s_i its slope. At both ends they are zero.
    """
    n, h = len(times), (times[1:] - times[:-1]).double()
    system, slopes = torch.eye(n, dtype=torch.float64, device=times.device), h.new_zeros(n, n)
    for i in range(1, n - 1):
        system[i, i - 1 : i + 2] = torch.stack([h[i - 1], 2 * (h[i - 1] + h[i]), h[i]])
        slopes[i, i - 1 : i + 2] = 6 * torch.stack([1 / h[i - 1], -1 / h[i - 1] - 1 / h[i], 1 / h[i]])
    return torch.linalg.solve(system, slopes)
