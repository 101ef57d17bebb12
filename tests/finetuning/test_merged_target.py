"""The target that training runs: features and gradients of the backbone with the adapter in it, for less work."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call, vmap

from hf_hyperflow.finetuning.merged_target import MergedTarget
from hf_hyperflow.modeling.backbones import SplitBackbone
from hf_hyperflow.modeling.parameter_space import ParameterSpace
from hf_hyperflow.modeling.peft_configs import bias_config, layernorm_config, lora_config
from tests.helpers.tiny import SIZE, Snapshot, tiny_dinov2, tiny_vit
from tests.helpers.vits import VITS

CONFIGS = {"bias": bias_config, "lora": lora_config, "layernorm": layernorm_config}


def compare_with_peft(backbone: nn.Module, kind: str, pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Features and gradients of theta through a merged target, and the same through PEFT's own layers."""
    space = ParameterSpace.from_backbone(backbone, CONFIGS[kind](backbone, 2))
    split = SplitBackbone(backbone, len(SplitBackbone(backbone, 0).blocks) - 2, intermediate_weight=0.5)
    dtype = torch.bfloat16 if torch.is_autocast_enabled("cpu") else None
    target = MergedTarget(space, split, dtype)
    noise = 0.1 * torch.randn(target.start.shape, generator=torch.Generator().manual_seed(3)) * space.mask
    found = (target.start + noise).requires_grad_()
    features = target.compute_features(found, target.forward_prefix(pixels))
    expected = (target.start + noise).requires_grad_()
    tensors = {f"backbone.{name}": tensor for name, tensor in space.to_tensors(expected).items()}
    with torch.no_grad():
        hidden = split.forward_prefix(pixels)
    expected_features = functional_call(split, tensors, (hidden,))
    weights = torch.randn(features.shape, generator=torch.Generator().manual_seed(4))
    (features * weights).sum().backward()
    (expected_features * weights).sum().backward()
    return features.detach(), expected_features.detach(), found.grad, expected.grad


@pytest.mark.parametrize(
    ("backbone", "kind"), [*((name, "bias") for name in VITS), ("dinov2", "lora"), ("dinov2", "layernorm")]
)
def test_features_and_gradients_are_those_of_peft(backbone, kind, pixels):
    features, expected_features, grad, expected = compare_with_peft(VITS[backbone](), kind, pixels)
    torch.testing.assert_close(features, expected_features, rtol=1e-4, atol=1e-5)
    assert expected.abs().max() > 0
    torch.testing.assert_close(grad, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize("kind", CONFIGS)
def test_under_autocast_they_differ_by_its_rounding(kind, pixels):
    with torch.autocast("cpu", torch.bfloat16):
        features, expected_features, grad, expected = compare_with_peft(tiny_dinov2(), kind, pixels)
    assert (features - expected_features).norm() < 0.02 * expected_features.norm()
    assert (grad - expected).norm() < 0.03 * expected.norm()


def test_linear_layers_without_a_bias_get_one(pixels):
    backbone = tiny_vit(qkv_bias=False)
    assert any(isinstance(m, nn.Linear) and m.bias is None for m in backbone.modules())
    features, expected_features, grad, expected = compare_with_peft(backbone, "bias", pixels)
    torch.testing.assert_close(features, expected_features, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(grad, expected, rtol=1e-3, atol=1e-5)


def test_it_leaves_the_backbone_alone_and_does_not_look_at_it_again(backbone, pixels):
    space = ParameterSpace.from_backbone(backbone, bias_config(backbone, 2))
    injection = space.inject(backbone)
    before = Snapshot(backbone)
    target = MergedTarget(space, SplitBackbone(backbone, 2), torch.bfloat16)
    before.assert_unchanged()
    with torch.autocast("cpu", torch.bfloat16):
        features = target.compute_features(target.start, target.forward_prefix(pixels))
        injection.write(injection.start + 1)
        assert torch.equal(features, target.compute_features(target.start, target.forward_prefix(pixels)))


def test_tasks_run_at_once_under_vmap(backbone, pixels):
    space = ParameterSpace.from_backbone(backbone, bias_config(backbone, 2))
    target = MergedTarget(space, SplitBackbone(backbone, 2))
    hidden = target.forward_prefix(pixels)
    thetas = target.start + 0.1 * torch.randn(3, *target.start.shape) * space.mask
    features = vmap(lambda theta: target.compute_features(theta, hidden))(thetas)
    for theta, rows in zip(thetas, features, strict=True):
        torch.testing.assert_close(rows, target.compute_features(theta, hidden), rtol=1e-4, atol=1e-5)


def test_any_number_of_images_runs_through_the_first_blocks(backbone):
    target = MergedTarget(ParameterSpace.from_backbone(backbone, bias_config(backbone, 2)), SplitBackbone(backbone, 2))
    images = torch.randn(2 * target.images_at_once + 1, 3, SIZE, SIZE)
    hidden = target.forward_prefix(images)
    torch.testing.assert_close(hidden.states, copy.deepcopy(target.split).forward_prefix(images).states)
