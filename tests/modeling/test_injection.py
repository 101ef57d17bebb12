"""Weights of an adapter inside a backbone: written when they are used, once, and whole again after tuning."""

from __future__ import annotations

import pytest
import torch

from hf_hyperflow.modeling.injection import Injection
from hf_hyperflow.modeling.parameter_space import ParameterSpace
from hf_hyperflow.modeling.peft_configs import bias_config
from tests.helpers.tiny import pictures


@pytest.fixture
def space(backbone):
    return ParameterSpace.from_backbone(backbone, bias_config(backbone, 2))


@pytest.fixture
def injection(space, backbone):
    return space.inject(backbone)


def random_theta(injection: Injection, seed: int) -> torch.Tensor:
    noise = torch.randn(injection.start.shape, generator=torch.Generator().manual_seed(seed))
    return injection.start + 0.1 * noise * injection.space.mask


@pytest.fixture
def writes(monkeypatch) -> list[torch.Tensor]:
    """Grows with every theta that is written into a backbone."""
    thetas: list[torch.Tensor] = []
    write = Injection.write

    def record(injection: Injection, theta: torch.Tensor) -> None:
        thetas.append(theta)
        write(injection, theta)

    monkeypatch.setattr(Injection, "write", record)
    return thetas


def test_the_same_theta_is_written_once(injection, writes):
    first, second = random_theta(injection, 0), random_theta(injection, 1)
    for theta in (first, first, second, second, first):
        with injection.using(theta):
            assert torch.equal(injection.read(), theta)
    assert [theta is first for theta in writes] == [True, False, True]


def test_weights_stay_until_others_are_used(injection):
    theta = random_theta(injection, 0)
    with injection.using(theta):
        pass
    assert torch.equal(injection.read(), theta)


@pytest.mark.parametrize("change", ["write", "tuning"])
def test_theta_is_written_again_when_others_were_written_between(injection, change):
    theta = random_theta(injection, 0)
    with injection.using(theta):
        pass
    if change == "write":
        injection.write(random_theta(injection, 1))
    else:
        with injection.tuning():
            pass
    assert not torch.equal(injection.read(), theta)
    with injection.using(theta):
        assert torch.equal(injection.read(), theta)


def test_tuning_starts_and_ends_at_the_start(injection):
    injection.write(random_theta(injection, 0))
    seen = []

    def fail() -> None:
        with injection.tuning() as parameters, torch.no_grad():
            seen.append(injection.read())
            parameters[0].add_(1)
            seen.append(injection.read())
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert torch.equal(seen[0], injection.start)
    assert not torch.equal(seen[1], injection.start)
    assert torch.equal(injection.read(), injection.start)


def test_theta_of_another_shape_is_not_taken_for_written(injection):
    with pytest.raises(ValueError, match="theta has shape"), injection.using(torch.zeros(1, 32)):
        pass
    theta = random_theta(injection, 0)
    with injection.using(theta):
        assert torch.equal(injection.read(), theta)


def test_two_tasks_of_one_adapter_alternate_and_write_when_they_take_turns(adapter, backbone, pixels, writes):
    tasks = [adapter.adapt(backbone, pictures(seed=seed)) for seed in range(2)]
    expected = [task.logits(pixels) for task in tasks]
    assert (expected[0] - expected[1]).abs().max() > 1e-3
    writes.clear()
    for i in (0, 0, 1, 1, 1, 0):
        torch.testing.assert_close(tasks[i].logits(pixels), expected[i])
    assert [theta is tasks[0].theta for theta in writes] == [True, False, True]
