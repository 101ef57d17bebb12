from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hf_hyperflow.modeling.drift import DriftNetwork, time_features
from hf_hyperflow.modeling.task_encoder import TaskTokens, stack

N_TOKENS, TOKEN_DIM, WIDTH = 6, 10, 16


def tokens(n_way: int, seed: int) -> TaskTokens:
    generator = torch.Generator().manual_seed(seed)
    classes = torch.randn(1, n_way, WIDTH, generator=generator)
    return TaskTokens(classes, torch.ones(1, n_way, dtype=torch.bool), torch.randn(1, WIDTH, generator=generator))


@pytest.fixture
def untrained():
    torch.manual_seed(0)
    return DriftNetwork(N_TOKENS, TOKEN_DIM, WIDTH, depth=2, heads=4)


@pytest.fixture
def drift(untrained):
    with torch.no_grad():
        for parameter in untrained.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return untrained.eval()


@pytest.fixture
def z():
    return torch.randn(1, N_TOKENS, TOKEN_DIM, generator=torch.Generator().manual_seed(3))


def test_untrained_velocity_is_exactly_zero_and_can_be_learned(untrained, z):
    velocity = untrained(z, 0.3, tokens(3, 0))
    assert torch.equal(velocity, torch.zeros_like(z))
    (velocity - 1).square().mean().backward()
    assert untrained.token_out.weight.grad.abs().max() > 0


def test_order_of_classes_does_not_matter(drift, z):
    task = tokens(5, 0)
    order = torch.tensor([3, 0, 4, 1, 2])
    shuffled = task._replace(classes=task.classes[:, order])
    torch.testing.assert_close(drift(z, 0.5, shuffled), drift(z, 0.5, task))


def test_padding_has_no_effect(drift, z):
    task = tokens(2, 0)
    garbage = torch.full((1, 3, WIDTH), 1e4)
    padded = TaskTokens(
        torch.cat([task.classes, garbage], dim=1), torch.tensor([[True, True, False, False, False]]), task.task
    )
    torch.testing.assert_close(drift(z, 0.5, padded), drift(z, 0.5, task))


def test_a_batch_equals_single_tasks(drift):
    tasks = [tokens(2, 0), tokens(5, 1), tokens(3, 2)]
    batch = torch.randn(3, N_TOKENS, TOKEN_DIM, generator=torch.Generator().manual_seed(4))
    times = torch.tensor([0.0, 0.4, 1.0])
    together = drift(batch, times, stack(tasks))
    for i, task in enumerate(tasks):
        alone = drift(batch[i : i + 1], times[i].item(), task)
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-4, atol=1e-5)


def compute_plainly(drift: DriftNetwork, z: torch.Tensor, t: float, task: TaskTokens) -> torch.Tensor:
    """The velocity of one task by the formulas of the papers, all of it computed anew."""

    def attend(attention: nn.Module, x: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
        heads = []
        keys, values = attention.key_value(memory).split(WIDTH, dim=-1)
        for part in attention.query(x).split(WIDTH // attention.heads, dim=-1):
            start = len(heads) * part.shape[-1]
            columns = slice(start, start + part.shape[-1])
            weights = (part @ keys[:, columns].T / part.shape[-1] ** 0.5).softmax(-1)
            heads.append(weights @ values[:, columns])
        return attention.out(torch.cat(heads, dim=-1))

    condition = F.silu(drift.time(time_features(torch.tensor([t]), WIDTH)) + task.task)
    x = drift.token_in(z[0]) + drift.position
    for block in drift.blocks:
        shift, scale, gate = block.modulation(condition).view(3, 3, WIDTH).unbind(1)
        y = block.norm(x) * (1 + scale[0]) + shift[0]
        x = x + gate[0] * attend(block.self_attention, y, y)
        y = block.norm(x) * (1 + scale[1]) + shift[1]
        x = x + gate[1] * attend(block.cross_attention, y, task.classes[0])
        x = x + gate[2] * block.mlp(block.norm(x) * (1 + scale[2]) + shift[2])
    return drift.token_out(drift.norm(x)).unsqueeze(0)


def test_tasks_that_are_prepared_for_all_times(drift, z):
    task, other, times = tokens(3, 0), tokens(5, 1), [0.0, 0.25, 0.7]
    both = drift.prepare(stack([task, other]), times)
    for t in (*times, 0.4):
        velocity = drift.move(torch.cat([z, z + 1]), t, both)
        torch.testing.assert_close(velocity[:1], compute_plainly(drift, z, t, task), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(velocity[1:], compute_plainly(drift, z + 1, t, other), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(drift(z, t, task), velocity[:1], rtol=1e-5, atol=1e-5)


def test_depends_on_state_time_classes_and_task(drift, z):
    task, other = tokens(3, 0), tokens(3, 1)
    base = drift(z, 0.2, task)
    for changed in (
        drift(z + 0.5, 0.2, task),
        drift(z, 0.9, task),
        drift(z, 0.2, task._replace(classes=other.classes)),
        drift(z, 0.2, task._replace(task=other.task)),
    ):
        assert (changed - base).abs().max() > 1e-3


def test_tokens_are_told_apart_by_their_position(drift):
    velocity = drift(torch.zeros(1, N_TOKENS, TOKEN_DIM), 0.0, tokens(3, 0))[0]
    distances = torch.cdist(velocity, velocity) + torch.eye(N_TOKENS)
    assert distances.min() > 1e-3


def test_time_features_tell_times_apart():
    times = torch.linspace(0, 1, 51)
    features = time_features(times, WIDTH)
    assert features.shape == (51, WIDTH)
    assert (torch.cdist(features, features) + torch.eye(51)).min() > 1e-2
