from __future__ import annotations

import math
import subprocess
import sys
from itertools import pairwise

import pytest
import torch

from hf_hyperflow.modeling.solvers import ADAPTIVE, TABLEAUX, integrate, list_stage_times

ORDERS = {"euler": 1, "midpoint": 2, "heun": 2, "rk4": 4}
STAGES = {"euler": 1, "midpoint": 2, "heun": 2, "rk4": 4}

# name: (velocity, start, solution at time t)
ODES = {
    "logistic": (
        lambda z, t: 3 * z * (1 - z),
        torch.tensor([0.1, 0.3], dtype=torch.float64),
        lambda t: 1 / (1 + (1 / torch.tensor([0.1, 0.3], dtype=torch.float64) - 1) * math.exp(-3 * t)),
    ),
    "time dependent": (
        lambda z, t: -2 * t * z + math.cos(3 * t) * math.exp(-t * t),
        torch.tensor([1.0], dtype=torch.float64),
        lambda t: torch.tensor([math.exp(-t * t) * (1 + math.sin(3 * t) / 3)], dtype=torch.float64),
    ),
    "rotation": (
        lambda z, t: 2.5 * torch.stack([-z[1], z[0]]),
        torch.tensor([1.0, 0.0], dtype=torch.float64),
        lambda t: torch.tensor([math.cos(2.5 * t), math.sin(2.5 * t)], dtype=torch.float64),
    ),
}


@pytest.mark.parametrize("ode", ODES)
@pytest.mark.parametrize("method", TABLEAUX)
def test_measured_order_of_convergence(method, ode):
    velocity, start, solution = ODES[ode]
    errors = [
        (integrate(velocity, start, n_steps=n, method=method).end - solution(1.0)).abs().max().item()
        for n in (32, 64, 128)
    ]
    measured = [math.log2(coarse / fine) for coarse, fine in pairwise(errors)]
    assert measured == pytest.approx([ORDERS[method]] * 2, abs=0.15)


@pytest.mark.parametrize("method", TABLEAUX)
def test_counts_function_evaluations(method):
    calls = []

    def velocity(z, t):
        calls.append(t)
        return z

    trajectory = integrate(velocity, torch.ones(2), n_steps=5, method=method)
    assert trajectory.nfe == len(calls) == 5 * STAGES[method]
    assert all(0 <= t <= 1 for t in calls)
    assert sorted(set(calls)) == list_stage_times(5, method)


@pytest.mark.parametrize(("method", "theirs"), [("euler", "euler"), ("midpoint", "midpoint"), ("heun", "heun2")])
def test_fixed_steps_agree_with_torchdiffeq(method, theirs):
    odeint = pytest.importorskip("torchdiffeq").odeint
    velocity, start, _ = ODES["time dependent"]
    ours = integrate(velocity, start, n_steps=7, method=method)
    grid = torch.tensor(ours.times, dtype=torch.float64)
    expected = odeint(lambda t, z: velocity(z, float(t)), start, grid, method=theirs)
    torch.testing.assert_close(torch.stack(ours.states), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("ode", ODES)
def test_rk4_agrees_with_torchdiffeq_to_tight_tolerance(ode):
    odeint = pytest.importorskip("torchdiffeq").odeint
    velocity, start, _ = ODES[ode]
    ours = integrate(velocity, start, n_steps=200, method="rk4")
    grid = torch.tensor([0.0, 1.0], dtype=torch.float64)
    expected = odeint(lambda t, z: velocity(z, float(t)), start, grid, method="dopri5", rtol=1e-10, atol=1e-12)[-1]
    torch.testing.assert_close(ours.end, expected, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("method", ADAPTIVE)
@pytest.mark.parametrize("ode", ODES)
def test_adaptive_methods(method, ode):
    pytest.importorskip("torchdiffeq")
    velocity, start, solution = ODES[ode]
    calls = []

    def counted(z, t):
        calls.append(t)
        return velocity(z, t)

    trajectory = integrate(counted, start, n_steps=4, method=method)
    assert trajectory.times == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert trajectory.nfe == len(calls) > 4
    for time, state in zip(trajectory.times, trajectory.states, strict=True):
        torch.testing.assert_close(state, solution(time), rtol=5e-3, atol=5e-3)


@pytest.mark.parametrize("method", TABLEAUX)
def test_end_time_and_all_states(method):
    trajectory = integrate(lambda z, t: torch.full_like(z, 2.0), torch.zeros(3), n_steps=4, method=method, end_time=0.5)
    assert trajectory.times == [0.0, 0.125, 0.25, 0.375, 0.5]
    expected = torch.tensor(trajectory.times)[:, None].expand(5, 3) * 2
    torch.testing.assert_close(torch.stack(trajectory.states), expected)


def test_going_on_from_the_middle_is_the_same_as_going_through():
    velocity, start, _ = ODES["logistic"]  # autonomous
    whole = integrate(velocity, start, n_steps=8, method="rk4")
    half = integrate(velocity, start, n_steps=4, method="rk4", end_time=0.5)
    rest = integrate(velocity, half.end, n_steps=4, method="rk4", end_time=0.5)
    torch.testing.assert_close(rest.end, whole.end)


@pytest.mark.parametrize("method", TABLEAUX)
def test_differentiable(method):
    rate = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    start = torch.ones(1, dtype=torch.float64)
    integrate(lambda z, t: rate * z, start, n_steps=400, method=method).end.sum().backward()
    assert rate.grad.item() == pytest.approx(math.exp(0.7), rel=2e-2 if method == "euler" else 1e-4)


@pytest.mark.parametrize("n_steps", [0, -3])
def test_no_steps(n_steps):
    with pytest.raises(ValueError, match=f"at least 1, not {n_steps}"):
        integrate(lambda z, t: z, torch.ones(1), n_steps=n_steps)


def test_unknown_method():
    with pytest.raises(ValueError, match=r"unknown solver 'leapfrog': use one of euler, midpoint, heun, rk4, dopri5"):
        integrate(lambda z, t: z, torch.ones(1), n_steps=1, method="leapfrog")


@pytest.mark.slow
def test_without_torchdiffeq_the_error_says_what_to_install():
    code = """
import sys, torch
sys.modules["torchdiffeq"] = None  # what makes an import fail
from hf_hyperflow.modeling.solvers import integrate
print(integrate(lambda z, t: z, torch.ones(1), n_steps=2, method="rk4").nfe)
try:
    integrate(lambda z, t: z, torch.ones(1), n_steps=2, method="dopri5")
except ImportError as error:
    print(error)
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.splitlines()[-2:] == [
        "8",
        "solver 'dopri5' needs torchdiffeq: pip install \"hf-hyperflow[ode]\"",
    ]
