"""Which weights a backbone has, in a few numbers."""

from __future__ import annotations

import torch
from torch import nn

from .backbones import find_blocks


def compute_fingerprint(backbone: nn.Module) -> list[float]:
    """Mean absolute value of the one-dimensional parameters of each block, to 4 digits: tells most weights apart.

    Equal for the same weights in any floating-point precision; for a backbone without adapters in it.
    """
    blocks = find_blocks(backbone)
    result = []
    for i in range(len(blocks)):
        named = backbone.get_submodule(f"{blocks.path}.{i}").named_parameters()
        values = [p.detach().float().abs().mean() for n, p in named if p.ndim == 1 and p.dtype.is_floating_point]
        result.append(float(f"{torch.stack(values).mean().item():.4g}"))
    return result


def fingerprints_match(expected: list[float], found: list[float]) -> bool:
    """Whether two fingerprints are of the same weights, up to the rounding of devices and precisions."""
    return len(expected) == len(found) and all(
        abs(a - b) <= 0.01 * abs(a) for a, b in zip(expected, found, strict=True)
    )
