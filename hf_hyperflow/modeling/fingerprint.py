"""A few numbers by which the weights of a backbone are recognised."""

from __future__ import annotations

import torch
from torch import nn

from .gate import find_blocks
from .trunks import find_trunk


def compute_fingerprint(backbone: nn.Module) -> list[float]:
    """Mean absolute value of the one-dimensional parameters of each block (of all, if it has none), to 4 digits.

    It tells most weights apart and is the same in any floating-point precision. The backbone carries no adapter.

    Raises:
        IncompatibleBackboneError: the backbone cannot be adapted.
    """
    trunk = find_trunk(backbone)
    fingerprint = []
    for path in find_blocks(trunk).paths:
        parameters = [p for p in trunk.get_submodule(path).parameters() if p.dtype.is_floating_point]
        vectors = [p for p in parameters if p.ndim == 1]
        values = [p.detach().float().abs().mean() for p in vectors or parameters]
        mean = torch.stack(values).mean().item()
        fingerprint.append(float(f"{mean:.4g}"))
    return fingerprint


def fingerprints_match(expected: list[float], actual: list[float]) -> bool:
    """Whether two fingerprints are of the same weights, up to the rounding of devices and precisions."""
    if len(expected) != len(actual):
        return False
    pairs = zip(expected, actual, strict=True)
    return all(abs(a - b) <= 0.01 * abs(a) for a, b in pairs)
