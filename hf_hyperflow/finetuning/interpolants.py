"""Paths through the recorded points of a trajectory: where it is at time t, and how fast it moves there.

HyperFlow (arXiv 2504.15323, section 3) interpolates fine-tuning trajectories linearly (L), piecewise linearly (PL) or
by cubic splines (C), and takes the derivative as the velocity to learn. Where the teacher stopped, at t = 1, a path
stays: its velocity there and beyond is zero, so that a flow that has learned it does not overshoot.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

#: A path takes points `(batch, n_points, ...)`, their times `(n_points,)` and times t `(batch,)`, and gives
#: positions and velocities `(batch, ...)`.
Path = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def linear(points: torch.Tensor, times: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Straight from the first point to the last (L), whatever lies between.

    Raises:
        ValueError: see `piecewise_linear`.
    """
    _require_path(points, times)
    return piecewise_linear(points[:, [0, -1]], times[[0, -1]], t)


def piecewise_linear(points: torch.Tensor, times: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Straight from each point to the next (PL); at a point, the velocity is that of the piece behind it.

    Args:
        points: `(batch, n_points, ...)`.
        times: `(n_points,)`, ascending from 0 to 1.
        t: `(batch,)`, at least 0; at 1 and beyond the path stands still.

    Returns:
        Position and velocity, `(batch, ...)` each.

    Raises:
        ValueError: fewer than two points, times that do not ascend from 0 to 1 or do not fit the points, or t < 0.
    """
    piece, width, moving = _piece(points, times, t)
    rows = torch.arange(len(points), device=points.device)
    left, right = points[rows, piece], points[rows, piece + 1]
    share = _as(((t.clamp(max=1) - times[piece]) / width), left)
    velocity = (right - left) / _as(width, left)
    return left + share * (right - left), velocity * _as(moving, left)


def cubic_spline(points: torch.Tensor, times: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The natural cubic spline through all points (C): twice differentiable, no curvature at either end.

    Arguments, results and errors as for `piecewise_linear`.
    """
    piece, width, moving = _piece(points, times, t)
    rows = torch.arange(len(points), device=points.device)
    left, right = points[rows, piece], points[rows, piece + 1]
    curvature = torch.einsum("qp,bp...->bq...", _curvatures(times).to(points.dtype), points)
    bend_left, bend_right = curvature[rows, piece], curvature[rows, piece + 1]
    h = _as(width, left)
    b = _as((t.clamp(max=1) - times[piece]) / width, left)
    a = 1 - b
    position = a * left + b * right + ((a**3 - a) * bend_left + (b**3 - b) * bend_right) * h**2 / 6
    velocity = (right - left) / h + ((3 * b**2 - 1) * bend_right - (3 * a**2 - 1) * bend_left) * h / 6
    return position, velocity * _as(moving, left)


#: By the names in the paper's tables: L, PL, C.
INTERPOLANTS: dict[str, Path] = {"linear": linear, "piecewise": piecewise_linear, "cubic": cubic_spline}


def _piece(
    points: torch.Tensor, times: torch.Tensor, t: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of each t the piece it falls in, that piece's width, and whether the path moves there."""
    _require_path(points, times)
    if not (t >= 0).all():
        raise ValueError(f"a path starts at t = 0, and t = {t.min()} was asked for.")
    piece = (torch.searchsorted(times, t.contiguous(), right=True) - 1).clamp(max=len(times) - 2)
    return piece, times[piece + 1] - times[piece], t < 1


def _require_path(points: torch.Tensor, times: torch.Tensor) -> None:
    if len(times) < 2 or points.shape[1] != len(times):
        raise ValueError(
            f"a path needs two points or more and a time for each: {points.shape[1]} points, {len(times)}."
        )
    if times[0] != 0 or times[-1] != 1 or not (times[1:] > times[:-1]).all():
        raise ValueError(f"the times of a path ascend from 0 to 1, not {times.tolist()}.")


def _as(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Values `(batch,)` that multiply rows of `like`."""
    return values.to(like.dtype).view(-1, *[1] * (like.ndim - 1))


def _curvatures(times: torch.Tensor) -> torch.Tensor:
    """`(n_points, n_points)`: the natural spline's second derivatives at its points are this times the points.

    Inside, the second derivatives M solve h_{i-1} M_{i-1} + 2 (h_{i-1} + h_i) M_i + h_i M_{i+1} = 6 (s_i - s_{i-1})
    with the slopes s of the pieces; at both ends they are zero.
    """
    n, h = len(times), (times[1:] - times[:-1]).double()
    system, slopes = torch.eye(n, dtype=torch.float64, device=times.device), h.new_zeros(n, n)
    for i in range(1, n - 1):
        system[i, i - 1 : i + 2] = torch.stack([h[i - 1], 2 * (h[i - 1] + h[i]), h[i]])
        slopes[i, i - 1 : i + 2] = 6 * torch.stack([1 / h[i - 1], -1 / h[i - 1] - 1 / h[i], 1 / h[i]])
    return torch.linalg.solve(system, slopes)
