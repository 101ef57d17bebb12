"""A way to spare work in training that leaves the results as they are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel


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
