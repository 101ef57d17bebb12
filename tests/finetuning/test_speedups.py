"""Speed-ups: the same features for less work, and only where that is so."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from hf_hyperflow.benchmark.cost import count_flops
from hf_hyperflow.finetuning.speedups import cls_only_last_mlp
from hf_hyperflow.modeling.backbones import SplitBackbone
from tests.helpers.tiny import SIZE, tiny_dinov2, tiny_vit


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("make", [tiny_dinov2, tiny_vit])
def test_the_last_mlp_runs_on_the_cls_token_where_nothing_reads_the_others(make, pooling):
    split = SplitBackbone(make(), 2, pooling)
    split.blocks = dataclasses.replace(split.blocks, cls_norm=None)  # it would do the same by itself
    hidden = split.forward_prefix(torch.randn(3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1)))
    whole, n_flops = split.forward_suffix(hidden), count_flops(lambda: split.forward_suffix(hidden))
    with cls_only_last_mlp(split, hidden[:1]) as shorter:
        assert shorter == (pooling == "cls")
        torch.testing.assert_close(split.forward_suffix(hidden), whole)
        assert (count_flops(lambda: split.forward_suffix(hidden)) < 0.85 * n_flops) == shorter
    assert count_flops(lambda: split.forward_suffix(hidden)) == n_flops


@pytest.mark.parametrize("change", ["after the MLP", "no LayerNorm"])
def test_other_blocks_run_as_they_are(change):
    backbone = tiny_vit()
    split = SplitBackbone(backbone, 2)
    last = backbone.get_submodule(split.blocks.paths[-1])
    if change == "no LayerNorm":
        last.layernorm_before, last.layernorm_after = nn.Identity(), nn.Identity()
    else:  # the CLS token is made of all of them
        last.register_forward_hook(lambda _, args, output: output + output.mean(dim=1, keepdim=True))
    hidden = split.forward_prefix(torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1)))
    whole, n_flops = split.forward_suffix(hidden), count_flops(lambda: split.forward_suffix(hidden))
    with cls_only_last_mlp(split, hidden[:1]) as shorter:
        assert not shorter
        torch.testing.assert_close(split.forward_suffix(hidden), whole)
        assert count_flops(lambda: split.forward_suffix(hidden)) == n_flops


def test_it_ends_with_the_block_however_that_ends():
    split = SplitBackbone(tiny_dinov2(), 2)
    hidden = split.forward_prefix(torch.randn(2, 3, SIZE, SIZE))
    n_flops = count_flops(lambda: split.forward_suffix(hidden))
    with pytest.raises(KeyError), cls_only_last_mlp(split, hidden[:1]):
        raise KeyError
    assert count_flops(lambda: split.forward_suffix(hidden)) == n_flops
