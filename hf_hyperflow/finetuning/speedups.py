"""What need not be computed where only the first token of the last block is read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel

from ..modeling.backbones import Hidden, SplitBackbone, plain_modules


@contextmanager
def first_token_in_last_mlp(split: SplitBackbone, sample: Hidden) -> Iterator[bool]:
    """Within, the MLP of the last block runs on the first token alone, if the features stay the same.

    So they do where a LayerNorm starts the MLP, a residual connection ends it and the first token is the feature, as
    in Dinov2 and ViT: it comes out as ever, the MLP costs next to nothing, and the other tokens, which nothing reads
    any more, come out wrong. Saves a sixth of the work where the last four blocks are trained.

    Args:
        sample: what `split.prefix` gave of one or a few images, to try it on.

    Yields:
        Whether it is so; elsewhere nothing changes.
    """
    handle = _last_norm(split).register_forward_pre_hook(_first) if _works(split, sample) else None
    try:
        yield handle is not None
    finally:
        if handle is not None:
            handle.remove()


def _first(_: nn.Module, args: tuple) -> tuple:
    return (args[0][:, :1], *args[1:])


def _last_norm(split: SplitBackbone) -> nn.Module:
    """The last LayerNorm of the last block; IndexError where there is none."""
    block = split.backbone.get_submodule(split.blocks.path)[-1]
    norm = [path for path, module in plain_modules(block) if isinstance(module, nn.LayerNorm)][-1]
    return block.get_submodule(norm)


@torch.no_grad()
def _works(split: SplitBackbone, sample: Hidden) -> bool:
    """Whether this backbone's features are the same."""
    if split.pooling != "cls":
        return False
    expected = split.forward_suffix(sample).float()
    handle = None
    try:
        handle = _last_norm(split).register_forward_pre_hook(_first)
        found = split.forward_suffix(sample).float()
    except (RuntimeError, TypeError, ValueError, IndexError):  # a block of another make
        return False
    finally:
        if handle is not None:
            handle.remove()
    return found.shape == expected.shape and bool((found - expected).abs().max() <= 0.02 * expected.abs().max())


@contextmanager
def plain_attention(backbone: nn.Module) -> Iterator[None]:
    """For gradients under bfloat16 autocast on a CPU: attention as two products and a softmax.

    The backward pass of torch's fused attention is 4 times slower there (2.13: 23 ms against 6 ms for 50 images of 26
    tokens on one core), at 257 tokens still 1.4 times. Elsewhere, and if fused attention is not in use, nothing
    changes.
    """
    on_cpu = next(backbone.parameters()).device.type == "cpu"
    if not (on_cpu and torch.is_autocast_enabled("cpu") and isinstance(backbone, PreTrainedModel)):
        yield
        return
    before = backbone.config._attn_implementation
    if before == "sdpa":
        backbone.set_attn_implementation("eager")
    try:
        yield
    finally:
        if before == "sdpa":
            backbone.set_attn_implementation(before)
