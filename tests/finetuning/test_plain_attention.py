"""Attention as two products and a softmax: the same features, in use only where it is faster."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hf_hyperflow.finetuning.speedups import plain_attention
from hf_hyperflow.modeling.backbones import SplitBackbone
from tests.helpers.vits import VITS


@pytest.mark.parametrize("kind", VITS)
def test_plain_attention_gives_the_same(kind, pixels):
    """In use only under bfloat16 autocast, and only until the block ends, however it does."""
    vit = VITS[kind]()
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
