from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    BeitConfig,
    BeitModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    DeiTConfig,
    DeiTModel,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    SwinConfig,
    SwinModel,
)

from hf_hyperflow import IncompatibleBackboneError
from hf_hyperflow.modeling.backbones import SplitBackbone, find_blocks
from hf_hyperflow.modeling.parameter_space import ParameterSpace
from hf_hyperflow.modeling.peft_configs import (
    bias_config,
    find_linear_paths,
    find_norm_paths,
    layernorm_config,
    lora_config,
)
from tests.helpers.tiny import SIZE, Snapshot, scrambled, tiny_dinov2, tiny_resnet, tiny_vit

SIZES = {
    "hidden_size": 32,
    "num_attention_heads": 2,
    "num_hidden_layers": 4,
    "intermediate_size": 64,
    "image_size": SIZE,
    "patch_size": 14,
}


def _made(model: type, config: object) -> nn.Module:
    torch.manual_seed(0)
    return scrambled(model(config))


def clip() -> nn.Module:
    return _made(CLIPVisionModel, CLIPVisionConfig(**SIZES))


def swin() -> nn.Module:
    config = SwinConfig(image_size=32, patch_size=4, embed_dim=8, depths=[2, 2], num_heads=[1, 2], window_size=4)
    return _made(SwinModel, config)


VITS = {
    "dinov2": tiny_dinov2,
    "vit": tiny_vit,
    "deit": lambda: _made(DeiTModel, DeiTConfig(**SIZES)),
    "dinov2 with registers": lambda: _made(
        Dinov2WithRegistersModel, Dinov2WithRegistersConfig(**{k: v for k, v in SIZES.items() if "inter" not in k})
    ),
    "dinov3": lambda: _made(DINOv3ViTModel, DINOv3ViTConfig(num_register_tokens=2, **SIZES)),
    "beit": lambda: _made(BeitModel, BeitConfig(use_mean_pooling=False, **SIZES)),
}


@pytest.fixture(params=VITS)
def vit(request):
    return VITS[request.param]()


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("start", [0, 2, 3])
def test_prefix_and_rest_equal_the_whole(vit, pixels, start, pooling):
    split = SplitBackbone(vit, start, pooling)
    split.check(pixels)
    with torch.no_grad():
        states = vit(pixels).last_hidden_state
        expected = states[:, 0] if pooling == "cls" else states.mean(dim=1)
        torch.testing.assert_close(split(split.forward_prefix(pixels)), expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(split.forward_features(pixels), expected, rtol=0, atol=0)


def test_some_of_the_images(vit, pixels):
    split = SplitBackbone(vit, 2)
    with torch.no_grad():
        hidden, expected = split.forward_prefix(pixels), split.forward_features(pixels)
        rows = torch.tensor([4, 1])
        torch.testing.assert_close(split.forward_suffix(hidden[rows]), expected[rows], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(split.forward_suffix(hidden[:2]), expected[:2], rtol=1e-5, atol=1e-6)


def test_the_rest_runs_adapters_injected_later(vit, pixels):
    split = SplitBackbone(vit, 2)
    space = ParameterSpace.from_backbone(vit, bias_config(vit, 2))
    with torch.no_grad():
        hidden, plain = split.forward_prefix(pixels), split.forward_features(pixels)
        injection = space.inject(vit)
        injection.write(injection.start + 0.3 * torch.randn(space.n_tokens, space.token_dim) * space.mask)
        adapted = split.forward_features(pixels)
        assert (adapted - plain).abs().max() > 1e-2
        torch.testing.assert_close(split.forward_suffix(hidden), adapted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_features_with_a_middle(vit, pixels, pooling):
    plain, split = SplitBackbone(vit, 2, pooling), SplitBackbone(vit, 2, pooling, intermediate_weight=0.5)
    with torch.no_grad():
        hidden, last = split.forward_prefix(pixels), plain.forward_features(pixels)
        found = split.forward_features(pixels)
        assert torch.equal(split.forward_suffix(hidden), found)
    tokens = hidden.states[:, 1:] if pooling == "cls" else hidden.states
    torch.testing.assert_close(split.final_features(found), last, rtol=1e-5, atol=1e-6)
    middle = found[:, last.shape[1] :]
    torch.testing.assert_close(middle.norm(dim=1), 0.5 * last.norm(dim=1))
    torch.testing.assert_close(F.normalize(middle, dim=1), F.normalize(tokens.mean(1), dim=1))
    assert plain.last(last) is last


def test_prefix_runs_no_block_behind_the_split_and_leaves_no_hook(vit, pixels):
    before, ran = Snapshot(vit), []
    blocks = vit.get_submodule(find_blocks(vit).path)
    handles = [b.register_forward_hook(lambda *_, i=i: ran.append(i)) for i, b in enumerate(blocks)]
    SplitBackbone(vit, 2).forward_prefix(pixels)
    for handle in handles:
        handle.remove()
    assert ran == [0, 1]
    before.assert_unchanged()


def test_where_the_blocks_are(vit):
    blocks = find_blocks(vit)
    assert len(blocks) == 4
    assert isinstance(vit.get_submodule(blocks.norm), nn.LayerNorm)
    inside = blocks.after(3)
    assert {name for name in inside if name.startswith(blocks.norm)} == {f"{blocks.norm}.weight", f"{blocks.norm}.bias"}
    rest = {name for name in inside if not name.startswith(blocks.norm)}
    assert rest == {n for n in blocks.names if n.startswith(f"{blocks.path}.3.")}


def test_block_10_is_not_taken_for_block_1():
    model = tiny_dinov2(num_hidden_layers=12)
    inside = find_blocks(model).after(11)
    assert not any(name.startswith(("encoder.layer.1.", "encoder.layer.10.")) for name in inside)


@pytest.mark.parametrize("make", [bias_config, lora_config, layernorm_config])
def test_adapters_inside_do_not_hide_the_parts(vit, make):
    expected = find_blocks(vit), find_linear_paths(vit, 2), find_norm_paths(vit, 2)
    space = ParameterSpace.from_backbone(vit, make(vit, 2))
    space.inject(vit)
    found = find_blocks(vit)
    assert (found.path, found.count, found.norm) == (expected[0].path, expected[0].count, expected[0].norm)
    assert (find_linear_paths(vit, 2), find_norm_paths(vit, 2)) == expected[1:]


@pytest.mark.parametrize("start", [-1, 4])
def test_start_outside_the_blocks(backbone, start):
    with pytest.raises(IncompatibleBackboneError, match=f"starts at block {start}, but Dinov2Model has 4 blocks"):
        SplitBackbone(backbone, start)


def test_a_convolutional_network_has_no_blocks():
    with pytest.raises(IncompatibleBackboneError, match="ResNetModel has no list of transformer blocks"):
        find_blocks(tiny_resnet())


@pytest.mark.parametrize("make", [clip, swin])
def test_check_notices_a_model_that_cannot_be_split(make):
    model = make()
    size = model.config.image_size
    split = SplitBackbone(model, 0)
    with pytest.raises(IncompatibleBackboneError, match=f"{type(model).__name__} cannot be split at its blocks"):
        split.check(torch.randn(2, 3, size, size))


def test_check_notices_a_change_between_the_blocks(backbone, pixels):
    split = SplitBackbone(backbone, 2)
    split.check(pixels)
    backbone.encoder.register_forward_hook(
        lambda module, args, output: type(output)(last_hidden_state=output.last_hidden_state.flip(-1))
    )
    with pytest.raises(IncompatibleBackboneError, match=r"encoder\.layer in turn and then layernorm differs"):
        split.check(pixels)


def test_plain_attention_gives_the_same(vit, pixels):
    """In use only under bfloat16 autocast, where it is faster, and only until the block ends, however it does."""
    before = vit.config._attn_implementation
    with plain_attention(vit):
        assert vit.config._attn_implementation == before
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        expected = SplitBackbone(vit, 0).forward_features(pixels)
        with plain_attention(vit):
            assert vit.config._attn_implementation == "eager"
            torch.testing.assert_close(SplitBackbone(vit, 0).forward_features(pixels), expected, rtol=0.05, atol=0.05)
    assert vit.config._attn_implementation == before
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(KeyError), plain_attention(vit):
        raise KeyError
    assert vit.config._attn_implementation == before


def test_plain_attention_leaves_other_modules_alone():
    with torch.autocast("cpu", torch.bfloat16), plain_attention(nn.Linear(2, 2)) as nothing:
        assert nothing is None
