"""Fixed-step Runge-Kutta solvers of d z / d t = velocity(z, t), counting function evaluations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

Velocity = Callable[[torch.Tensor, float], torch.Tensor]

#: Butcher tableaux: (times of the stages, weights of the earlier stages in each, weights of the stages in the step).
TABLEAUX: dict[str, tuple[list[float], list[list[float]], list[float]]] = {
    "euler": ([0.0], [[]], [1.0]),
    "midpoint": ([0.0, 0.5], [[], [0.5]], [0.0, 1.0]),
    "heun": ([0.0, 1.0], [[], [1.0]], [0.5, 0.5]),
    "rk4": ([0.0, 0.5, 0.5, 1.0], [[], [0.5], [0.0, 0.5], [0.0, 0.0, 1.0]], [1 / 6, 1 / 3, 1 / 3, 1 / 6]),
}

#: Adaptive methods, integrated by torchdiffeq (the extra `ode`).
ADAPTIVE = ("dopri5", "dopri8", "bosh3")


@dataclass(frozen=True)
class Trajectory:
    """The solution at the ends of all steps.

    Attributes:
        times: `n_steps + 1` times, the first is the start.
        states: the state at each of them.
        nfe: how often the velocity was computed (number of function evaluations).
    """

    times: list[float]
    states: list[torch.Tensor]
    nfe: int

    @property
    def end(self) -> torch.Tensor:
        return self.states[-1]


def integrate(
    velocity: Velocity, start: torch.Tensor, *, n_steps: int, method: str = "euler", end_time: float = 1.0
) -> Trajectory:
    """Integrate from t = 0 to `end_time` in `n_steps` equal steps; differentiable in what `velocity` uses.

    Args:
        velocity: gives d z / d t of the shape of z.
        start: z(0), any shape.
        n_steps: with an adaptive method, the times to report; the method chooses its own steps between them.
        method: one of `TABLEAUX` or, with torchdiffeq installed, `ADAPTIVE`.

    Raises:
        ValueError: an unknown method or fewer than one step.
        ImportError: an adaptive method without torchdiffeq.
    """
    if n_steps < 1:
        raise ValueError(f"n_steps must be at least 1, not {n_steps}.")
    times = [end_time * i / n_steps for i in range(n_steps + 1)]
    if method in ADAPTIVE:
        return _adaptive(velocity, start, times, method)
    if method not in TABLEAUX:
        raise ValueError(f"unknown solver {method!r}: use one of {', '.join([*TABLEAUX, *ADAPTIVE])}.")
    nodes, stage_weights, step_weights = TABLEAUX[method]
    step = end_time / n_steps
    states, nfe = [start], 0
    for time in times[:-1]:
        state, slopes = states[-1], []
        for node, weights in zip(nodes, stage_weights, strict=True):
            slopes.append(velocity(_moved(state, step, weights, slopes), time + node * step))
        nfe += len(slopes)
        states.append(_moved(state, step, step_weights, slopes))
    return Trajectory(times, states, nfe)


def _moved(state: torch.Tensor, step: float, weights: list[float], slopes: list[torch.Tensor]) -> torch.Tensor:
    for weight, slope in zip(weights, slopes, strict=True):
        if weight:
            state = state + (step * weight) * slope
    return state


def _adaptive(velocity: Velocity, start: torch.Tensor, times: list[float], method: str) -> Trajectory:
    try:
        from torchdiffeq import odeint
    except ImportError as error:
        raise ImportError(f'solver {method!r} needs torchdiffeq: pip install "hf-hyperflow[ode]"') from error
    count = 0

    def counted(time: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        nonlocal count
        count += 1
        return velocity(state, float(time))

    grid = torch.tensor(times, dtype=start.dtype, device=start.device)
    states = odeint(counted, start, grid, method=method, rtol=1e-4, atol=1e-5)
    return Trajectory(times, list(states), count)
