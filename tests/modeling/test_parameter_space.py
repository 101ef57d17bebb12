from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from peft import BeftConfig, IA3Config, LNTuningConfig, LoraConfig, get_peft_model

from hf_hyperflow import IncompatibleBackboneError
from hf_hyperflow.modeling.parameter_space import ParameterSpace
from hf_hyperflow.modeling.peft_configs import (
    bias_config,
    find_linear_paths,
    layernorm_config,
    lora_config,
)
from tests.helpers.tiny import Snapshot, same_bits, tiny_dinov2, tiny_resnet, tiny_vit

KINDS = {
    "biases": (lambda b, k: bias_config(b, k, norms=False), ()),
    "biases and norms": (bias_config, ()),
    "lora": (lambda b, k: lora_config(b, k, r=3), ()),
    "lora, A frozen": (lambda b, k: lora_config(b, k, r=2), ("lora_A",)),
    "layernorms": (layernorm_config, ()),
}
BACKBONES = {"dinov2": tiny_dinov2, "vit": tiny_vit}


@pytest.fixture(params=KINDS)
def kind(request):
    return KINDS[request.param]


@pytest.fixture(params=BACKBONES)
def any_backbone(request):
    return BACKBONES[request.param]()


def space_of(backbone, kind, last_blocks=2, **arguments) -> ParameterSpace:
    make, frozen = kind
    return ParameterSpace.from_backbone(backbone, make(backbone, last_blocks), frozen=frozen, **arguments)


# Tokens and tensors


@pytest.mark.parametrize("token_dim", [None, 7, 1000])
def test_tensors_to_tokens_and_back_bit_for_bit(any_backbone, kind, token_dim):
    space = space_of(any_backbone, kind, token_dim=token_dim)
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(shape, generator=generator) for shape in space.shapes]
    tensors[0].view(-1)[0] = -0.0
    theta = space.to_tokens(tensors)
    assert theta.shape == (space.n_tokens, space.token_dim) == (len(space.mask), token_dim or 32)
    back = space.to_tensors(theta)
    assert list(back) == space.names
    assert all(same_bits(back[name], tensor) for name, tensor in zip(space.names, tensors, strict=True))


def test_tokens_to_tensors_and_back_bit_for_bit(any_backbone, kind):
    space = space_of(any_backbone, kind, token_dim=24)
    theta = torch.randn(space.n_tokens, 24) * space.mask
    again = space.to_tokens(space.to_tensors(theta).values())
    assert torch.equal(again, theta)
    assert not (again * ~space.mask).any()


def test_every_number_has_one_place(any_backbone, kind):
    space = space_of(any_backbone, kind)
    assert space.n_parameters == sum(torch.Size(shape).numel() for shape in space.shapes) == int(space.mask.sum())
    theta = torch.arange(1, 1 + space.n_tokens * space.token_dim).view(space.n_tokens, -1).float()
    values = torch.cat([tensor.flatten() for tensor in space.to_tensors(theta).values()])
    assert sorted(values.tolist()) == sorted(theta[space.mask].tolist())


def test_a_token_of_a_lora_factor_is_one_rank(backbone):
    space = space_of(backbone, KINDS["lora"])
    b = next(i for i, name in enumerate(space.names) if "lora_B" in name and space.shapes[i] == (32, 3))
    theta = torch.randn(space.n_tokens, 32)
    row = sum(space.rows[:b])
    assert torch.equal(space.to_tensors(theta)[space.names[b]], theta[row : row + 3].T)


def test_to_tensors_is_differentiable(backbone, kind):
    space = space_of(backbone, kind)
    theta = torch.randn(space.n_tokens, space.token_dim, requires_grad=True)
    sum(tensor.sum() for tensor in space.to_tensors(theta).values()).backward()
    assert torch.equal(theta.grad, space.mask.float())


def test_theta_of_another_shape(backbone):
    space = space_of(backbone, KINDS["biases"])
    with pytest.raises(ValueError, match=rf"theta has shape \(1, 32\), expected \({space.n_tokens}, 32\)"):
        space.to_tensors(torch.zeros(1, 32))


# Which tensors


def test_frozen_lora_a_is_left_out_and_follows_the_seed(backbone):
    make, frozen = KINDS["lora, A frozen"]
    starts = []
    for seed in (0, 0, 1):
        space = ParameterSpace.from_backbone(backbone, make(backbone, 2), frozen=frozen, seed=seed)
        assert space.names
        assert all("lora_B" in name for name in space.names)
        injection = space.inject(backbone)
        starts.append({n: p.clone() for n, p in backbone.named_parameters() if "lora_A" in n})
        injection.write(torch.randn(space.n_tokens, 32))
        now = {n: p for n, p in backbone.named_parameters() if "lora_A" in n}
        assert all(torch.equal(now[name], tensor) for name, tensor in starts[-1].items())
        injection.remove()
    assert all(torch.equal(starts[0][name], starts[1][name]) for name in starts[0])
    assert all(not torch.equal(starts[0][name], starts[2][name]) for name in starts[0])


def test_the_global_random_state_is_left_alone(backbone):
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    space_of(backbone, KINDS["lora"]).inject(backbone)
    assert torch.equal(torch.rand(3), expected)


# In and out of a backbone


def test_inject_write_read_remove(any_backbone, kind, pixels):
    before, features = Snapshot(any_backbone), any_backbone(pixels).last_hidden_state
    space = space_of(any_backbone, kind)
    before.assert_unchanged()
    injection = space.inject(any_backbone)
    assert space.is_in(any_backbone)
    assert space.inject(any_backbone) is injection
    torch.testing.assert_close(any_backbone(pixels).last_hidden_state, features)
    theta = injection.start + 0.2 * torch.randn(space.n_tokens, space.token_dim) * space.mask
    injection.write(theta)
    assert same_bits(injection.read(), theta)
    assert (any_backbone(pixels).last_hidden_state - features).abs().max() > 1e-3
    assert not any(p.requires_grad for p in any_backbone.parameters())
    injection.remove()
    assert not space.is_in(any_backbone)
    before.assert_unchanged()
    assert same_bits(any_backbone(pixels).last_hidden_state, features)


def test_biases_do_what_biases_do(backbone, pixels):
    """BEFT tuning by the flow is the same as moving the biases of the linear layers and norms by hand."""
    space = space_of(backbone, KINDS["biases and norms"])
    by_hand = copy.deepcopy(backbone)
    injection = space.inject(backbone)
    theta = injection.start + 0.1 * torch.randn(space.n_tokens, space.token_dim) * space.mask
    injection.write(theta)
    with torch.no_grad():
        for name, tensor in space.to_tensors(theta).items():
            if "modules_to_save" in name:
                by_hand.get_parameter(name.replace("modules_to_save.default.", "")).copy_(tensor)
            else:
                by_hand.get_parameter(name.replace("beft_bias.default", "bias")).add_(tensor.flatten())
    torch.testing.assert_close(backbone(pixels).last_hidden_state, by_hand(pixels).last_hidden_state)


def test_mixed_flags_survive(backbone):
    backbone.train()
    backbone.encoder.layer[3].eval()
    for parameter in backbone.encoder.layer[2].parameters():
        parameter.requires_grad_(False)
    before = Snapshot(backbone)
    space = space_of(backbone, KINDS["biases and norms"])
    before.assert_unchanged()
    injection = space.inject(backbone)
    assert backbone.encoder.layer[2].mlp.training
    assert not backbone.encoder.layer[3].mlp.training
    injection.remove()
    before.assert_unchanged()


def test_a_second_space_replaces_the_first(backbone):
    before = Snapshot(backbone)
    first, second = space_of(backbone, KINDS["biases"]), space_of(backbone, KINDS["lora"])
    first.inject(backbone)
    injection = second.inject(backbone)
    assert not first.is_in(backbone)
    assert second.is_in(backbone)
    assert not any("beft" in name for name, _ in backbone.named_parameters())
    injection.remove()
    before.assert_unchanged()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_backbone(backbone, dtype):
    backbone.to(dtype)
    before = Snapshot(backbone)
    space = space_of(backbone, KINDS["biases and norms"])
    injection = space.inject(backbone)
    theta = injection.read()
    assert theta.dtype == torch.float32
    injection.write(theta)
    assert same_bits(injection.read(), theta)
    injection.remove()
    before.assert_unchanged()


def test_merge_computes_the_same_and_remove_restores_the_bits(any_backbone, kind, pixels):
    before = Snapshot(any_backbone)
    names = list(dict(any_backbone.named_parameters()))
    space = space_of(any_backbone, kind)
    injection = space.inject(any_backbone)
    injection.write(injection.start + 0.2 * torch.randn(space.n_tokens, space.token_dim) * space.mask)
    adapted = any_backbone(pixels).last_hidden_state
    injection.merge()
    assert list(dict(any_backbone.named_parameters())) == names
    torch.testing.assert_close(any_backbone(pixels).last_hidden_state, adapted, rtol=1e-4, atol=1e-5)
    with pytest.raises(IncompatibleBackboneError, match=r"merged into this .*: reset that task first"):
        space.inject(any_backbone)
    injection.remove()
    before.assert_unchanged()
    space.inject(any_backbone).remove()


def test_a_backbone_is_not_kept_alive(backbone):
    space = space_of(backbone, KINDS["biases"])
    other = tiny_dinov2()
    space.inject(other)
    gone = weakref.ref(other)
    del other
    gc.collect()
    assert gone() is None


def test_a_copy_of_an_adapted_backbone_is_independent(backbone, pixels):
    space = space_of(backbone, KINDS["biases"])
    plain = backbone(pixels).last_hidden_state
    injection = space.inject(backbone)
    injection.write(torch.full((space.n_tokens, 32), 0.3))
    adapted = backbone(pixels).last_hidden_state
    copied = copy.deepcopy(backbone)
    injection.remove()
    assert torch.equal(copied(pixels).last_hidden_state, adapted)
    in_copy = space.inject(copied)
    in_copy.write(torch.zeros(space.n_tokens, 32))
    torch.testing.assert_close(copied(pixels).last_hidden_state, plain)
    in_copy.remove()
    Snapshot(backbone).assert_unchanged()
    assert torch.equal(copied(pixels).last_hidden_state, plain)


# What does not fit


def test_a_wider_backbone_is_refused_with_all_names_and_shapes(backbone, kind):
    space = space_of(backbone, kind)
    wide = tiny_dinov2(hidden_size=48)
    before = Snapshot(wide)
    with pytest.raises(IncompatibleBackboneError) as caught:
        space.inject(wide)
    message = str(caught.value)
    for name, shape in zip(space.names, space.shapes, strict=True):
        wide_shape = tuple({32: 48, 128: 192}.get(side, side) for side in shape)
        assert (f"{name}: expected {shape}, found {wide_shape}" in message) == (shape != wide_shape)
    assert "Use the backbone that the adapter was trained for" in message
    before.assert_unchanged()


def test_a_shallower_backbone_is_refused_by_the_names_it_lacks(backbone):
    space = space_of(backbone, KINDS["biases"])
    shallow = tiny_dinov2(num_hidden_layers=3)
    before = Snapshot(shallow)
    with pytest.raises(IncompatibleBackboneError, match=r"Dinov2Model has no modules encoder\.layer\.3\.attention"):
        space.inject(shallow)
    before.assert_unchanged()


def test_other_tensors_than_expected_are_listed(backbone):
    space = space_of(backbone, KINDS["biases"])
    space.names[0], missing = "encoder.layer.0.norm1.weight", space.names[0]
    before = Snapshot(backbone)
    with pytest.raises(IncompatibleBackboneError) as caught:
        space.inject(backbone)
    assert f"encoder.layer.0.norm1.weight: expected {space.shapes[0]}, not there" in str(caught.value)
    assert f"{missing}: {space.shapes[0]}, not expected" in str(caught.value)
    before.assert_unchanged()


@pytest.mark.parametrize(
    "config",
    [
        BeftConfig(target_modules=["encoder.layer.9.mlp.fc1"]),
        BeftConfig(target_modules=["encoder.layer.3.mlp.fc1"], modules_to_save=["head"]),
        LoraConfig(target_modules=["encoder.layer.3.mlp"]),
        LoraConfig(target_modules=["encoder.layer.3.mlp.activation_fn"]),
        LNTuningConfig(target_modules=["layernorm_of_another_model"]),
        BeftConfig(target_modules=[]),
    ],
    ids=["no such layer", "no such module to save", "not a layer", "no weights", "no such norm", "nothing"],
)
def test_targets_that_cannot_be_adapted(backbone, config):
    before = Snapshot(backbone)
    with pytest.raises(IncompatibleBackboneError, match=r"Dinov2Model"):
        ParameterSpace.from_backbone(backbone, config)
    before.assert_unchanged()


def test_a_backbone_with_somebody_elses_adapter(backbone):
    space = space_of(backbone, KINDS["biases"])
    get_peft_model(backbone, LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(IncompatibleBackboneError, match=r"already carries a PEFT adapter\. Unload or merge it first"):
        space.inject(backbone)


def test_ia3_fits_too(backbone, pixels):
    targets = find_linear_paths(backbone, 1)
    config = IA3Config(target_modules=targets, feedforward_modules=[p for p in targets if p.endswith("fc2")])
    before = Snapshot(backbone)
    space = ParameterSpace.from_backbone(backbone, config)
    injection = space.inject(backbone)
    assert torch.equal(injection.start[space.mask], torch.ones(space.n_parameters))
    injection.remove()
    before.assert_unchanged()


def test_a_convolutional_network():
    with pytest.raises(IncompatibleBackboneError, match="ResNetModel"):
        ParameterSpace.from_backbone(tiny_resnet(), bias_config(tiny_resnet(), 1))
