"""Matching: the squared error in scaled units over the real parameters, repeatable, and small once it is learned."""

from __future__ import annotations

import pytest
import torch
from transformers import ViTConfig, ViTModel

from hf_hyperflow.data.domains import normalise
from hf_hyperflow.data.tasks import task_images
from hf_hyperflow.training.objectives import VelocityMatchingLoss, encode_recorded_support
from tests.helpers.recorded import colours, made_trajectories
from tests.helpers.tiny import scrambled, tiny_adapter, tiny_resnet

TIMES = torch.tensor([0.0, 0.25, 1.0])


@pytest.fixture
def padded():
    """An adapter whose tokens are padded in part: of 40 biases in rows of 32."""
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32,
        num_attention_heads=2,
        num_hidden_layers=3,
        intermediate_size=40,
        image_size=28,
        patch_size=14,
    )
    adapter = tiny_adapter(scrambled(ViTModel(config)))
    assert not adapter.space.mask.all()
    return adapter


def rows(adapter, n: int = 5, seed: int = 0):
    """Support sets of 2 to 4 classes, deltas of three points, times on both sides of 1, places hidden and known."""
    generator = torch.Generator().manual_seed(seed)
    support = []
    for row in range(n):
        labels = torch.arange(2 + row % 3).repeat_interleave(1 + row % 2)
        features = torch.randn(len(labels), 2 * adapter.config.backbone["hidden_size"], generator=generator)
        support.append((features, labels))
    deltas = 0.1 * torch.randn(n, 3, *adapter.space.mask.shape, generator=generator) * adapter.space.mask
    return support, deltas, torch.linspace(0.05, 1.3, n), torch.arange(n) % 3 == 1


def test_it_is_the_mean_squared_error_over_rows_and_real_parameters(padded):
    support, deltas, t, hidden = rows(padded)
    loss = VelocityMatchingLoss(padded, TIMES, path="piecewise")(support, deltas, t, hidden)
    errors = []
    for (features, labels), delta, now, blind in zip(support, deltas, t.tolist(), hidden.tolist(), strict=True):
        start, middle, end = delta / padded.token_scale
        if now >= 1:
            place, velocity = end, torch.zeros_like(end)
        elif now >= 0.25:
            velocity = (end - middle) / 0.75
            place = middle + (now - 0.25) * velocity
        else:
            velocity = (middle - start) / 0.25
            place = start + now * velocity
        seen = torch.zeros_like(place) if blind else place
        predicted = padded.drift(seen.unsqueeze(0), now, padded.task_encoder(features, labels))[0]
        errors.append((predicted - velocity)[padded.space.mask].square())
    torch.testing.assert_close(loss, torch.cat(errors).mean(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("path", ["linear", "piecewise", "cubic"])
def test_an_untrained_flow_is_right_where_the_teacher_has_stopped(padded, path):
    torch.nn.init.zeros_(padded.drift.token_out.weight)
    torch.nn.init.zeros_(padded.drift.token_out.bias)
    objective = VelocityMatchingLoss(padded, TIMES, path=path)
    support, deltas, t, hidden = rows(padded)
    assert objective(support, deltas, torch.full_like(t, 1.2), hidden) == 0
    assert objective(support, deltas, torch.full_like(t, 0.5), hidden) > 0


@pytest.mark.parametrize("path", ["linear", "piecewise", "cubic"])
def test_autocast_leaves_the_recorded_velocity_exact(adapter, path):
    objective = VelocityMatchingLoss(adapter, TIMES, path=path)
    batch = rows(adapter)
    torch.nn.init.zeros_(adapter.drift.token_out.weight)
    torch.nn.init.zeros_(adapter.drift.token_out.bias)
    exact = objective(*batch)
    with torch.autocast("cpu", torch.bfloat16):
        loss = objective(*batch)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, exact, rtol=1e-6, atol=0)


def test_gradients_reach_the_drift_network_and_the_task_encoder(adapter):
    VelocityMatchingLoss(adapter, TIMES)(*rows(adapter)).backward()
    parts = [*adapter.drift.named_parameters(), *adapter.task_encoder.named_parameters()]
    assert not [name for name, parameter in parts if parameter.grad is None or not parameter.grad.any()]


def test_an_unknown_path_is_an_error(adapter):
    with pytest.raises(ValueError, match=r"unknown path 'spline': use one of linear, piecewise, cubic"):
        VelocityMatchingLoss(adapter, TIMES, path="spline")


def trained(backbone, steps: int) -> tuple[float, float, dict]:
    """First and last loss of matching eight trajectories to different places, and the weights."""
    adapter = tiny_adapter(backbone, drift_width=32)
    objective = VelocityMatchingLoss(adapter, TIMES)
    support, *_ = rows(adapter, n=8)
    generator = torch.Generator().manual_seed(1)
    directions = torch.randn(4, adapter.space.token_dim, generator=generator)
    ends = 0.1 * torch.randn(8, 1, adapter.space.n_tokens, 4, generator=generator) @ directions
    deltas = TIMES.view(1, 3, 1, 1) * ends
    optimizer = torch.optim.Adam(adapter.parameters(), lr=3e-3)
    losses = []
    for _ in range(steps):
        t, chance = torch.rand(2, 8, generator=generator)
        loss = objective(support, deltas, 1.5 * t, chance < 0.5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses[0], sum(losses[-10:]) / 10, adapter.state_dict()


def test_training_is_repeatable_to_the_bit(backbone):
    first, second = trained(backbone, 3)[2], trained(backbone, 3)[2]
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_what_tasks_differ_in_can_be_learned(backbone):
    begin, end, _ = trained(backbone, 300)
    assert end < 0.1 * begin


@pytest.mark.parametrize("encoder", [None, "resnet"])
def test_support_features_are_those_of_the_tasks_images(backbone, encoder):
    adapter = tiny_adapter(backbone, encoder=None if encoder is None else tiny_resnet())
    domains = [colours("alpha"), colours("beta", seed=1)]
    recorded = made_trajectories(adapter, domains, 6)
    assert {task.transform_seed is None for task in recorded.tasks} == {True, False}
    split = adapter.split(backbone)
    found = encode_recorded_support(adapter, split, recorded, domains)
    assert len(found) == 6
    for task, (features, labels) in zip(recorded.tasks, found, strict=True):
        domain = next(d for d in domains if d.name == task.episode.domain)
        pixels = normalise(task_images(task, domain), adapter.processor)[: len(task.episode.support)]
        with torch.no_grad():
            expected, _ = adapter.encode_images(split, pixels)
        assert features.dtype == torch.float16
        torch.testing.assert_close(features.float(), expected, rtol=1e-3, atol=1e-3)
        assert torch.equal(labels, task.episode.support_labels)
