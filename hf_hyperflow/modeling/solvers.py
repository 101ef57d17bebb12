"""Solvers of the ordinary differential equation d z / d t = velocity(z, t)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral

import torch

Velocity = Callable[[torch.Tensor, float], torch.Tensor]

#: Butcher tableaux of the fixed-step methods: times of the stages, weights of the earlier stages in each stage, weights
#: of the stages in the step.
TABLEAUX: dict[str, tuple[list[float], list[list[float]], list[float]]] = {
    "euler": ([0.0], [[]], [1.0]),
    "midpoint": ([0.0, 0.5], [[], [0.5]], [0.0, 1.0]),
    "heun": ([0.0, 1.0], [[], [1.0]], [0.5, 0.5]),
    "rk4": ([0.0, 0.5, 0.5, 1.0], [[], [0.5], [0.0, 0.5], [0.0, 0.0, 1.0]], [1 / 6, 1 / 3, 1 / 3, 1 / 6]),
}

#: Adaptive methods, which torchdiffeq integrates (the extra `ode`).
ADAPTIVE = ("dopri5", "dopri8", "bosh3")


@dataclass(frozen=True)
class Trajectory:
    """The solution at the ends of all steps.

    Attributes:
        times: `n_steps + 1` times, of which the first is the start.
        states: the state at each of them.
        nfe: how often the velocity was computed (number of function evaluations).
    """

    times: list[float]
    states: list[torch.Tensor]
    nfe: int

    @property
    def end(self) -> torch.Tensor:
        """The state at the last time."""
        return self.states[-1]


def integrate(
    velocity: Velocity, start: torch.Tensor, *, n_steps: int, method: str = "euler", end_time: float = 1.0
) -> Trajectory:
    """Integrate from t = 0 to `end_time` in `n_steps` equal steps.

    The result is differentiable in whatever `velocity` uses.

    Args:
        velocity: returns d z / d t, of the shape of z.
        start: z(0), of any shape.
        n_steps: number of steps. An adaptive method chooses its own steps and reports at the ends of these.
        method: one of `TABLEAUX` or, with torchdiffeq installed, of `ADAPTIVE`.

    Raises:
        ValueError: the method is not known, or `n_steps` is not an integer of at least 1.
        ImportError: an adaptive method without torchdiffeq.
    """
    if not isinstance(n_steps, Integral):
        raise ValueError(f"n_steps must be an integer, not {n_steps!r}.")
    if n_steps < 1:
        raise ValueError(f"n_steps must be at least 1, not {n_steps}.")
    times = [end_time * i / n_steps for i in range(n_steps + 1)]
    if method in ADAPTIVE:
        return _integrate_adaptively(velocity, start, times, method)
    if method not in TABLEAUX:
        raise ValueError(f"unknown solver {method!r}: use one of {', '.join([*TABLEAUX, *ADAPTIVE])}.")
    stage_times, stage_weights, step_weights = TABLEAUX[method]
    step = end_time / n_steps
    states = [start]
    nfe = 0
    for time in times[:-1]:
        slopes: list[torch.Tensor] = []
        for stage_time, weights in zip(stage_times, stage_weights, strict=True):
            stage = _move(states[-1], step, weights, slopes)
            slopes.append(velocity(stage, time + stage_time * step))
        nfe += len(slopes)
        states.append(_move(states[-1], step, step_weights, slopes))
    return Trajectory(times, states, nfe)


def list_stage_times(n_steps: int, method: str, end_time: float = 1.0) -> list[float]:
    """The times at which `integrate` computes the velocity; an empty list for an adaptive method, which chooses them.

    The arguments are those of `integrate`, which raises the errors.
    """
    if method not in TABLEAUX or not isinstance(n_steps, Integral) or n_steps < 1:
        return []
    stage_times, _, _ = TABLEAUX[method]
    step = end_time / n_steps
    times = []
    for i in range(n_steps):
        times += [end_time * i / n_steps + stage_time * step for stage_time in stage_times]
    return sorted(set(times))


def _move(state: torch.Tensor, step: float, weights: list[float], slopes: list[torch.Tensor]) -> torch.Tensor:
    """The state after a step along the weighted sum of the slopes."""
    for weight, slope in zip(weights, slopes, strict=True):
        if weight:
            state = state + (step * weight) * slope
    return state


def _integrate_adaptively(velocity: Velocity, start: torch.Tensor, times: list[float], method: str) -> Trajectory:
    try:
        from torchdiffeq import odeint
    except ImportError as error:
        raise ImportError(f'solver {method!r} needs torchdiffeq: pip install "hf-hyperflow[ode]"') from error
    nfe = 0

    def count(time: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        nonlocal nfe
        nfe += 1
        return velocity(state, float(time))

    grid = torch.tensor(times, dtype=start.dtype, device=start.device)
    states = odeint(count, start, grid, method=method, rtol=1e-4, atol=1e-5)
    return Trajectory(times, list(states), nfe)
