"""Ways to spare work in training that leave the results as they are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel

from ..modeling.backbones import Hidden, SplitBackbone
from ..modeling.trunks import plain_modules


@contextmanager
def cls_only_last_mlp(split: SplitBackbone, sample: Hidden) -> Iterator[bool]:
    """Within, the MLP of the last block runs on the CLS token alone, where that leaves the features as they are.

    It does where a LayerNorm starts the MLP, a residual connection ends it and the CLS token is the feature, as in
    Dinov2 and ViT. The other tokens of the last block come out wrong then, but nothing reads them.

    Args:
        sample: what `split.forward_prefix` gives for one or a few images, to try it on.

    Yields:
        Whether the MLP runs on the CLS token alone; if not, nothing has changed.
    """
    handle = run_last_mlp_on_cls(split, sample)
    try:
        yield handle is not None
    finally:
        if handle is not None:
            handle.remove()


def run_last_mlp_on_cls(split: SplitBackbone, sample: Hidden) -> torch.utils.hooks.RemovableHandle | None:
    """The same until the handle is removed; None if nothing has changed, see `cls_only_last_mlp`."""
    return _register(split) if _leaves_features(split, sample) else None


def _register(split: SplitBackbone) -> torch.utils.hooks.RemovableHandle:
    """Cut the input of the last LayerNorm of the last block; IndexError if the block has none."""
    block = split.backbone.get_submodule(split.blocks.paths[-1])
    norms = [path for path, module in plain_modules(block) if isinstance(module, nn.LayerNorm)]
    return block.get_submodule(norms[-1]).register_forward_pre_hook(_keep_cls_token)


def _keep_cls_token(_: nn.Module, args: tuple) -> tuple:
    return (args[0][:, :1], *args[1:])


@torch.no_grad()
def _leaves_features(split: SplitBackbone, sample: Hidden) -> bool:
    """Whether the features of `sample` are the same if the last MLP runs on the CLS token alone."""
    if split.pooling != "cls":
        return False
    expected = split.forward_suffix(sample).float()
    handle = None
    try:
        handle = _register(split)
        features = split.forward_suffix(sample).float()
    except (RuntimeError, TypeError, ValueError, IndexError):  # a block that is built otherwise
        return False
    finally:
        if handle is not None:
            handle.remove()
    if features.shape != expected.shape:
        return False
    # A block that mixes tokens behind its MLP differs by far more than rounding in half precision does.
    return bool((features - expected).abs().max() <= 0.02 * expected.abs().max())


@contextmanager
def plain_attention(backbone: nn.Module) -> Iterator[None]:
    """Within, attention is two matrix products and a softmax, where gradients are taken in bfloat16 on a CPU.

    The backward pass of torch's fused attention is slow there. On other devices, without autocast, and where fused
    attention is not in use, nothing changes.
    """
    on_cpu = next(backbone.parameters()).device.type == "cpu"
    if not (on_cpu and torch.is_autocast_enabled("cpu") and isinstance(backbone, PreTrainedModel)):
        yield
        return
    implementation = backbone.config._attn_implementation
    if implementation == "sdpa":
        backbone.set_attn_implementation("eager")
    try:
        yield
    finally:
        if implementation == "sdpa":
            backbone.set_attn_implementation(implementation)


def unfused_attention(device: torch.device) -> AbstractContextManager[None]:
    """The same for modules that call torch's attention themselves, as the drift network does."""
    if device.type == "cpu" and torch.is_autocast_enabled("cpu"):
        return sdpa_kernel(SDPBackend.MATH)
    return nullcontext()
