"""The parts that `HyperFlowAdapter.adapt` is made of: encode, velocity, flow, theta; and the baseline without them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from hf_hyperflow import AdaptedTask, HyperFlowAdapter
from hf_hyperflow.modeling.calibration import COSINE_SCALE
from hf_hyperflow.modeling.peft_configs import bias_config, lora_config
from hf_hyperflow.modeling.support import read_support
from tests.helpers.tiny import Snapshot, pictures, tiny_adapter, tiny_dinov2, tiny_resnet


@pytest.fixture
def tokens(adapter, backbone, support):
    images = read_support(support, adapter.processor)
    with torch.no_grad():
        tokens, _ = adapter.encode(adapter.split(backbone), images.pixel_values, images.labels)
    return tokens


def random_z(adapter, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, adapter.space.n_tokens, adapter.space.token_dim, generator=generator)


def learn_start(adapter, seed: int = 2):
    """An adapter of the same weights whose flow starts from others than the backbone's."""
    moved = tiny_adapter(tiny_dinov2(), learned_start=True)
    weights = adapter.state_dict()
    weights["start_z"] = random_z(adapter, seed)[0] * adapter.space.mask
    moved.load_state_dict(weights)
    return moved


# Velocity and theta


@pytest.mark.parametrize("t", [0.3, torch.tensor([0.3])])
def test_velocity_is_the_drift_and_zero_on_padding(tokens, t):
    """The biases of a SwiGLU fill no whole number of rows, so that some are padded."""
    adapter = tiny_adapter(tiny_dinov2(use_swiglu_ffn=True), last_blocks=1)
    mask = adapter.space.mask
    assert not mask.all()
    z = random_z(adapter)
    with torch.no_grad():
        velocity = adapter.velocity(z, t, tokens)
        drift = adapter.drift(z, 0.3, tokens)
    assert torch.equal(velocity[0][~mask], torch.zeros(int((~mask).sum())))
    torch.testing.assert_close(velocity[0][mask], drift[0][mask])
    assert drift[0][~mask].abs().min() > 0


def test_padding_stays_zero_along_the_flow(tokens):
    adapter = tiny_adapter(tiny_dinov2(use_swiglu_ffn=True), last_blocks=1)
    with torch.no_grad():
        trajectory = adapter.flow(tokens, n_steps=2, solver="rk4")
    assert not (trajectory.end[0] * ~adapter.space.mask).any()
    assert trajectory.end.abs().max() > 1e-2


def test_theta_is_the_start_plus_the_scaled_flow(adapter):
    z, start = random_z(adapter), random_z(adapter, seed=1)[0]
    theta = adapter.theta(z[0], start)
    for row in range(adapter.space.n_tokens):
        torch.testing.assert_close(theta[row], start[row] + adapter.token_scale[row].item() * z[0, row])
    torch.testing.assert_close(adapter.theta(torch.cat([z, 2 * z]), start)[1], start + 2 * (theta - start))
    assert torch.equal(adapter.theta(torch.zeros_like(z[0]), start), start)
    assert adapter.theta(z[0], start.half()).dtype == torch.float16


def test_flow_of_euler_is_the_sum_of_the_velocities(adapter, tokens):
    with torch.no_grad():
        trajectory = adapter.flow(tokens, n_steps=3, solver="euler", end_time=0.75)
        z = torch.zeros_like(trajectory.states[0])
        for step in range(3):
            torch.testing.assert_close(trajectory.states[step], z)
            z = z + 0.25 * adapter.velocity(z, 0.25 * step, tokens)
    torch.testing.assert_close(trajectory.end, z)
    assert trajectory.times == [0.0, 0.25, 0.5, 0.75]


def test_a_learned_start_moves_the_whole_flow(adapter, tokens):
    moved = learn_start(adapter)
    with torch.no_grad():
        trajectory, expected = moved.flow(tokens), adapter.flow(tokens)
        velocity = moved.velocity(trajectory.states[1], 0.25, tokens)
        torch.testing.assert_close(velocity, adapter.velocity(expected.states[1], 0.25, tokens))
    assert torch.equal(trajectory.states[0][0], moved.start_z)
    for state, other in zip(trajectory.states, expected.states, strict=True):
        torch.testing.assert_close(state, other + moved.start_z, rtol=1e-4, atol=1e-4)
    assert not moved.flow(tokens, n_steps=0).end.any()


def test_a_learned_start_is_saved_and_used(adapter, backbone, support, tmp_path):
    moved = learn_start(adapter)
    moved.save_pretrained(tmp_path)
    loaded = HyperFlowAdapter.from_pretrained(tmp_path)
    difference = loaded.adapt(backbone, support).theta - adapter.adapt(backbone, support).theta
    torch.testing.assert_close(difference, adapter.token_scale * moved.start_z, rtol=1e-3, atol=1e-4)
    untouched = adapter.direct_transfer(backbone, support).theta
    assert torch.equal(loaded.adapt(backbone, support, n_steps=0).theta, untouched)


def test_adapt_is_encode_flow_and_theta(adapter, backbone, support, tokens):
    with torch.no_grad():
        trajectory = adapter.flow(tokens)
    task = adapter.adapt(backbone, support)
    start = adapter.space.inject(backbone).start
    torch.testing.assert_close(task.theta, adapter.theta(trajectory.end[0], start).detach())
    assert (task.theta - start).abs().max() > 1e-2
    assert task.nfe == trajectory.nfe


def test_hidden_states_that_are_known_are_used(adapter, backbone, support):
    images = read_support(support, adapter.processor)
    split = adapter.split(backbone)
    with torch.no_grad():
        tokens, hidden = adapter.encode(split, images.pixel_values, images.labels)
        again, same = adapter.encode(split, torch.full_like(images.pixel_values, torch.nan), images.labels, hidden)
    assert same is hidden
    torch.testing.assert_close(again.classes, tokens.classes)


# Direct transfer


@pytest.mark.parametrize(
    "arguments",
    [{}, {"lda": True}, {"intermediate_weight": 0.5}, {"pooling": "mean"}, {"encoder": tiny_resnet()}],
    ids=["plain", "lda", "intermediate features", "mean pooling", "own encoder"],
)
def test_direct_transfer_is_cosines_to_class_means(backbone, support, pixels, arguments):
    """Against transformers alone: whatever the adapter's head and features are."""
    adapter = tiny_adapter(backbone, **arguments)
    values = adapter.processor([image for images in support.values() for image in images], return_tensors="pt")
    plain = tiny_dinov2()
    with torch.no_grad():
        states = [plain(x).last_hidden_state for x in (values["pixel_values"], pixels)]
    pool = (lambda x: x.mean(1)) if arguments.get("pooling") == "mean" else (lambda x: x[:, 0])
    features, queries = map(pool, states)
    means = features.unflatten(0, (3, 2)).mean(1)
    cosines = F.cosine_similarity(queries[:, None], means[None], dim=-1)
    task = adapter.direct_transfer(backbone, support)
    torch.testing.assert_close(task.logits(pixels), COSINE_SCALE * cosines, rtol=1e-4, atol=1e-4)
    assert task.class_names == list(support)
    assert (task.nfe, task.stopping_point) == (0, None)


def test_direct_transfer_shares_a_backbone_and_is_taken_out(adapter, backbone, support, pixels):
    before = Snapshot(backbone)
    direct, adapted = adapter.direct_transfer(backbone, support), adapter.adapt(backbone, support)
    expected = [direct.logits(pixels), adapted.logits(pixels)]
    assert (expected[0] - expected[1]).abs().max() > 1e-2
    for i in (0, 1, 0):
        torch.testing.assert_close((direct, adapted)[i].logits(pixels), expected[i])
    direct.reset()
    before.assert_unchanged()


@pytest.mark.parametrize("make", [bias_config, lora_config])
def test_direct_transfer_is_saved_and_loaded(support, pixels, tmp_path, make):
    backbone = tiny_dinov2()
    adapter = tiny_adapter(backbone, make(backbone, 2))
    task = adapter.direct_transfer(backbone, support)
    expected = task.logits(pixels)
    task.save_pretrained(tmp_path)
    task.reset()
    loaded = AdaptedTask.from_pretrained(tmp_path, backbone)
    torch.testing.assert_close(loaded.logits(pixels), expected, rtol=1e-4, atol=1e-4)


def test_an_error_in_direct_transfer_leaves_the_backbone_as_it_was(adapter, backbone):
    before = Snapshot(backbone)
    with pytest.raises(ValueError, match="only one class"):
        adapter.direct_transfer(backbone, pictures(n_way=1))
    before.assert_unchanged()
