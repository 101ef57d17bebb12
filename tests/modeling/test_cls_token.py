"""The last MLP on the CLS token alone: the same features for less work, and only where that is so."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

from hf_hyperflow.benchmark.cost import count_flops
from hf_hyperflow.modeling.backbones import SplitBackbone
from hf_hyperflow.modeling.cls_token import cls_token_from
from hf_hyperflow.modeling.gate import find_blocks
from hf_hyperflow.modeling.peft_configs import bias_config, layernorm_config, lora_config
from tests.helpers.tiny import tiny_adapter, tiny_dinov2, tiny_vit


def whole_states(backbone: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    """What the model itself returns."""
    with torch.no_grad():
        return backbone(pixels).last_hidden_state


@pytest.mark.parametrize("make", [tiny_dinov2, tiny_vit])
def test_the_last_mlp_runs_on_the_cls_token_where_nothing_reads_the_others(make, pixels):
    backbone = make()
    split, mean = SplitBackbone(backbone, 2), SplitBackbone(backbone, 2, "mean")
    hidden = split.forward_prefix(pixels)
    expected = whole_states(backbone, pixels)
    torch.testing.assert_close(split.forward_features(pixels), expected[:, 0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(split.forward_suffix(hidden), expected[:, 0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(mean.forward_suffix(hidden), expected.mean(dim=1), rtol=1e-5, atol=1e-6)
    n_flops = count_flops(lambda: backbone(pixels))
    assert count_flops(lambda: split.forward_features(pixels)) < 0.97 * n_flops
    assert count_flops(lambda: split.forward_suffix(hidden)) < 0.92 * count_flops(lambda: mean.forward_suffix(hidden))
    assert count_flops(lambda: mean.forward_features(pixels)) == n_flops
    assert count_flops(lambda: backbone(pixels)) == n_flops  # nothing stays in the model


@pytest.mark.parametrize("adapter_config", [bias_config, lora_config, layernorm_config])
def test_with_an_adapter_in_the_block(adapter_config, pixels):
    backbone = tiny_dinov2()
    adapter = tiny_adapter(backbone, adapter_config(backbone, 2))
    task = adapter.adapt(backbone, (pixels, torch.arange(len(pixels)) % 2))
    task.logits(pixels)
    split = adapter.split(backbone)
    expected = whole_states(backbone, pixels)[:, 0]
    assert split.blocks.cls_norm is not None
    torch.testing.assert_close(split.forward_features(pixels), expected, rtol=1e-5, atol=1e-6)


def test_a_block_that_mixes_tokens_behind_its_mlp_runs_as_it_is(pixels):
    backbone = tiny_vit()
    last = backbone.get_submodule(find_blocks(tiny_vit()).paths[-1])
    last.mlp = nn.Sequential(last.mlp, _Mean())
    split = SplitBackbone(backbone, 2)
    assert split.blocks.cls_norm is None
    torch.testing.assert_close(split.forward_features(pixels), whole_states(backbone, pixels)[:, 0])


class _Mean(nn.Module):
    """Adds to each token the mean of all."""

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return states + states.mean(dim=1, keepdim=True)


def test_a_hook_on_the_last_block_sees_all_tokens(pixels):
    """Whoever puts a hook there later reads the tokens, or changes what they do to the CLS token."""
    backbone = tiny_dinov2()
    split = SplitBackbone(backbone, 2)
    last = backbone.get_submodule(split.blocks.paths[-1])
    last.register_forward_hook(lambda _, args, output: output + output.mean(dim=1, keepdim=True))
    torch.testing.assert_close(split.forward_features(pixels), whole_states(backbone, pixels)[:, 0])
    torch.testing.assert_close(split.forward_suffix(split.forward_prefix(pixels)), whole_states(backbone, pixels)[:, 0])


def test_other_threads_run_the_whole_model(pixels):
    backbone = tiny_dinov2()
    norm = SplitBackbone(backbone, 2).blocks.cls_norm
    expected = whole_states(backbone, pixels)
    seen = []
    with cls_token_from(backbone, norm):
        thread = threading.Thread(target=lambda: seen.append(whole_states(backbone, pixels)))
        thread.start()
        thread.join()
        own = whole_states(backbone, pixels)
    assert torch.equal(seen[0], expected)
    assert not torch.allclose(own[:, 1:], expected[:, 1:], atol=1e-3)
