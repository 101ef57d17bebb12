"""Checks that inputs and results are finite, and errors that name what is not."""

from __future__ import annotations

import torch
from torch import nn

#: Pixel values of normalised images lie within ten or so, raw ones within 65,535: beyond this they are a mistake.
MAX_PIXEL_VALUE = 1e6


class NotFiniteError(ValueError):
    """Weights or settings are NaN, infinite or so large that a result would be; the message names them."""


def find_bad_image(pixel_values: torch.Tensor) -> int | None:
    """Number of the first image with NaN, infinity or values beyond `MAX_PIXEL_VALUE`; None if there is none.

    Args:
        pixel_values: `(n, ...)`.
    """
    if pixel_values.numel() == 0:
        return None
    flat = pixel_values.flatten(1)
    # The extremes are NaN if one of the values is. On a CPU `aminmax` of rows takes four times as long.
    is_good = (flat.amin(dim=1) >= -MAX_PIXEL_VALUE) & (flat.amax(dim=1) <= MAX_PIXEL_VALUE)
    return _find_false(is_good)


def find_bad_row(features: torch.Tensor) -> int | None:
    """Number of the first row of `(n, width)` whose length is NaN or infinite, or overflows; None if there is none."""
    return _find_false(features.norm(dim=-1).isfinite())


def _find_false(is_good: torch.Tensor) -> int | None:
    if is_good.all():
        return None
    return int((~is_good).nonzero()[0])


def require_finite_weights(module: nn.Module, owner: str) -> None:
    """Check all parameters and buffers of a module. This takes time: do it once a result is not finite, to say why.

    Args:
        module: what to check.
        owner: what errors call the module.

    Raises:
        NotFiniteError: one of them has NaN or infinite values; it is named.
    """
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if not tensor.isfinite().all():
            raise NotFiniteError(f"{name} of {owner} has NaN or infinite values: load it again.")
