"""The losses: query logits are those of `adapt`; matching is a mean squared error that training makes small."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import ViTConfig, ViTModel

from hf_hyperflow import HyperFlowAdapter
from hf_hyperflow.data.domains import normalise
from hf_hyperflow.data.tasks import task_images
from hf_hyperflow.modeling.lda import RegularisedLDA
from hf_hyperflow.modeling.peft_configs import bias_config, layernorm_config, lora_config
from hf_hyperflow.training.objectives import (
    EpisodeImages,
    EpisodicLoss,
    MatchingRows,
    VelocityMatchingLoss,
    encode_recorded_support,
    find_best_scale,
)
from tests.helpers.recorded import colours, made_trajectories
from tests.helpers.tiny import SIZE, scrambled, tiny_adapter, tiny_resnet

TIMES = torch.tensor([0.0, 0.25, 1.0])
PEFT_CONFIGS = {"bias": bias_config, "lora": lora_config, "layernorm": layernorm_config}


def make_adapter(backbone: nn.Module, parameters: str, *, lda: bool, intermediate_weight: float) -> HyperFlowAdapter:
    """An adapter with a flow that moves and, with an LDA, a prior that is far from equal in all directions."""
    peft_config = PEFT_CONFIGS[parameters](backbone, 2)
    adapter = tiny_adapter(backbone, peft_config, lda=lda, intermediate_weight=intermediate_weight)
    if lda:
        assert isinstance(adapter.head, RegularisedLDA)
        width = len(adapter.head.variances)
        root = torch.randn(width, width, generator=torch.Generator().manual_seed(2))
        adapter.head.set_prior(root @ root.T / width, spread=1.0, count=5.0)
    return adapter


def make_episode(n_way: int, n_shot: int, seed: int) -> EpisodeImages:
    """Support images and two queries of each class."""
    support_labels, query_labels = torch.arange(n_way).repeat(n_shot), torch.arange(n_way).repeat(2)
    n_images = len(support_labels) + len(query_labels)
    pixel_values = torch.randn(n_images, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))
    return EpisodeImages(pixel_values, support_labels, query_labels)


@pytest.mark.parametrize("intermediate_weight", [0.0, 0.5])
@pytest.mark.parametrize("lda", [True, False])
@pytest.mark.parametrize("parameters", ["bias", "lora", "layernorm"])
def test_query_cosines_are_those_of_the_adapted_backbone(backbone, parameters, lda, intermediate_weight):
    """The oracle of training: what is trained is what is used. Episodes of unequal ways share a padded batch."""
    adapter = make_adapter(backbone, parameters, lda=lda, intermediate_weight=intermediate_weight)
    episodes = [make_episode(3, 2, seed=0), make_episode(5, 1, seed=1)]
    with torch.no_grad():
        trained = EpisodicLoss(adapter, adapter.split(backbone)).query_cosines(episodes)
    for episode, cosines in zip(episodes, trained, strict=True):
        n_support = len(episode.support_labels)
        support, query = episode.pixel_values[:n_support], episode.pixel_values[n_support:]
        task = adapter.adapt(backbone, (support, episode.support_labels))
        logits = task.scale * cosines
        torch.testing.assert_close(logits, task.logits(query), rtol=1e-4, atol=1e-4)
        unmoved = adapter.adapt(backbone, (support, episode.support_labels), n_steps=1)
        unmoved.theta = adapter.space.inject(backbone).start
        assert (logits - unmoved.logits(query)).abs().max() > 0.01, "the flow has moved the logits"


def test_the_episodic_loss_is_the_mean_over_episodes_each_with_its_best_scale(adapter, backbone):
    loss = EpisodicLoss(adapter, adapter.split(backbone))
    episodes = [make_episode(3, 2, seed=0), make_episode(5, 1, seed=1)]
    mean, accuracy = loss(episodes)
    expected, correct = [], []
    for cosines, episode in zip(loss.query_cosines(episodes), episodes, strict=True):
        scales = torch.logspace(0.5, 2.3, 2000)
        losses = torch.stack([F.cross_entropy(scale * cosines, episode.query_labels) for scale in scales])
        expected.append(losses.min())
        correct.append((cosines.argmax(1) == episode.query_labels).sum() / len(cosines))
    torch.testing.assert_close(mean, torch.stack(expected).mean(), rtol=1e-2, atol=0)
    torch.testing.assert_close(accuracy, torch.stack(correct).mean())


def test_how_sure_scores_are_is_no_matter_of_the_flow():
    """The loss does not change with the length of the cosines, and so has no gradient along it."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(40) % 4
    cosines = 0.1 * torch.randn(40, 4, generator=generator) + 0.1 * F.one_hot(labels)
    length = torch.tensor(1.0, requires_grad=True)
    logits = find_best_scale(cosines, labels) * length * cosines
    F.cross_entropy(logits, labels).backward()
    assert abs(length.grad) < 0.05
    for factor in (0.5, 2.0):
        longer = factor * cosines
        scaled = F.cross_entropy(find_best_scale(longer, labels) * longer, labels)
        torch.testing.assert_close(scaled, F.cross_entropy(logits, labels).detach(), rtol=2e-3, atol=0)


def test_gradients_of_the_episodic_loss_reach_all_that_is_trained_and_not_the_backbone(adapter, backbone):
    before = {name: parameter.clone() for name, parameter in backbone.named_parameters()}
    loss, _ = EpisodicLoss(adapter, adapter.split(backbone))([make_episode(3, 2, seed=0)])
    loss.backward()
    trained = {name: parameter for name, parameter in adapter.named_parameters() if parameter.requires_grad}
    assert not [name for name, parameter in trained.items() if parameter.grad is None or not parameter.grad.any()]
    adapter.space.inject(backbone).remove()
    for name, parameter in backbone.named_parameters():
        assert torch.equal(parameter, before[name]), name


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


def rows(adapter, n: int = 5, seed: int = 0) -> MatchingRows:
    """Support sets of 2 to 4 classes, deltas of three points, times on both sides of 1, z masked and known."""
    generator = torch.Generator().manual_seed(seed)
    support = []
    for row in range(n):
        labels = torch.arange(2 + row % 3).repeat_interleave(1 + row % 2)
        features = torch.randn(len(labels), 2 * adapter.config.backbone["hidden_size"], generator=generator)
        support.append((features, labels))
    deltas = 0.1 * torch.randn(n, 3, *adapter.space.mask.shape, generator=generator) * adapter.space.mask
    return MatchingRows(support, deltas, torch.linspace(0.05, 1.3, n), torch.arange(n) % 3 == 1)


def test_it_is_the_mean_squared_error_over_rows_and_real_parameters(padded):
    batch = rows(padded)
    loss = VelocityMatchingLoss(padded, TIMES, interpolant="piecewise")(batch)
    errors = []
    columns = (batch.support, batch.deltas, batch.t.tolist(), batch.masked.tolist())
    for (features, labels), delta, now, is_masked in zip(*columns, strict=True):
        start, middle, end = delta / padded.token_scale
        if now >= 1:
            place, velocity = end, torch.zeros_like(end)
        elif now >= 0.25:
            velocity = (end - middle) / 0.75
            place = middle + (now - 0.25) * velocity
        else:
            velocity = (middle - start) / 0.25
            place = start + now * velocity
        seen = torch.zeros_like(place) if is_masked else place
        predicted = padded.drift(seen.unsqueeze(0), now, padded.task_encoder(features, labels))[0]
        errors.append((predicted - velocity)[padded.space.mask].square())
    torch.testing.assert_close(loss, torch.cat(errors).mean(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("interpolant", ["linear", "piecewise", "cubic"])
def test_an_untrained_flow_is_right_where_the_teacher_has_stopped(padded, interpolant):
    torch.nn.init.zeros_(padded.drift.token_out.weight)
    torch.nn.init.zeros_(padded.drift.token_out.bias)
    objective = VelocityMatchingLoss(padded, TIMES, interpolant=interpolant)
    batch = rows(padded)
    assert objective(replace(batch, t=torch.full_like(batch.t, 1.2))) == 0
    assert objective(replace(batch, t=torch.full_like(batch.t, 0.5))) > 0


@pytest.mark.parametrize("interpolant", ["linear", "piecewise", "cubic"])
def test_autocast_leaves_the_recorded_velocity_exact(adapter, interpolant):
    objective = VelocityMatchingLoss(adapter, TIMES, interpolant=interpolant)
    batch = rows(adapter)
    torch.nn.init.zeros_(adapter.drift.token_out.weight)
    torch.nn.init.zeros_(adapter.drift.token_out.bias)
    exact = objective(batch)
    with torch.autocast("cpu", torch.bfloat16):
        loss = objective(batch)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, exact, rtol=1e-6, atol=0)


def test_gradients_reach_the_drift_network_and_the_task_encoder(adapter):
    VelocityMatchingLoss(adapter, TIMES)(rows(adapter)).backward()
    parts = [*adapter.drift.named_parameters(), *adapter.task_encoder.named_parameters()]
    assert not [name for name, parameter in parts if parameter.grad is None or not parameter.grad.any()]


def test_an_unknown_interpolant_is_an_error(adapter):
    with pytest.raises(ValueError, match=r"unknown interpolant 'spline': use one of linear, piecewise, cubic"):
        VelocityMatchingLoss(adapter, TIMES, interpolant="spline")


def trained(backbone, steps: int) -> tuple[float, float, dict]:
    """First and last loss of matching eight trajectories to different places, and the weights."""
    adapter = tiny_adapter(backbone, drift_width=32)
    objective = VelocityMatchingLoss(adapter, TIMES)
    support = rows(adapter, n=8).support
    generator = torch.Generator().manual_seed(1)
    directions = torch.randn(4, adapter.space.token_dim, generator=generator)
    ends = 0.1 * torch.randn(8, 1, adapter.space.n_tokens, 4, generator=generator) @ directions
    deltas = TIMES.view(1, 3, 1, 1) * ends
    optimizer = torch.optim.Adam(adapter.parameters(), lr=3e-3)
    losses = []
    for _ in range(steps):
        t, chance = torch.rand(2, 8, generator=generator)
        loss = objective(MatchingRows(support, deltas, 1.5 * t, chance < 0.5))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses[0], sum(losses[-10:]) / 10, adapter.state_dict()


def test_training_is_repeatable_to_the_bit(backbone):
    first, second = trained(backbone, 3)[2], trained(backbone, 3)[2]
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
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
