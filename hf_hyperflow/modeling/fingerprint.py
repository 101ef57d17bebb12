"""A few numbers by which the weights of a backbone are recognised."""

from __future__ import annotations

import torch
from torch import nn

from .backbones import find_blocks


def compute_fingerprint(backbone: nn.Module) -> list[float]:
    """Mean absolute value of the one-dimensional parameters of each block, to 4 digits.

    It tells most weights apart and is the same in any floating-point precision. The backbone carries no adapter.

    Raises:
        IncompatibleBackboneError: the backbone has no transformer blocks.
    """
    blocks = find_blocks(backbone)
    fingerprint = []
    for i in range(len(blocks)):
        values = []
        for parameter in backbone.get_submodule(f"{blocks.path}.{i}").parameters():
            if parameter.ndim == 1 and parameter.dtype.is_floating_point:
                values.append(parameter.detach().float().abs().mean())
        mean = torch.stack(values).mean().item()
        fingerprint.append(float(f"{mean:.4g}"))
    return fingerprint


def fingerprints_match(expected: list[float], actual: list[float]) -> bool:
    """Whether two fingerprints are of the same weights, up to the rounding of devices and precisions."""
    if len(expected) != len(actual):
        return False
    pairs = zip(expected, actual, strict=True)
    return all(abs(a - b) <= 0.01 * abs(a) for a, b in pairs)
