"""The target as training runs it: features that are a fast, differentiable function of the adapter's weights."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import nn
from torch.func import functional_call

from ..modeling.backbones import Hidden, SplitBackbone
from ..modeling.parameter_space import ParameterSpace
from ..modeling.trunks import plain_modules
from .speedups import plain_attention

#: How many images the first blocks run at once. On a CPU more are slower, because they leave its caches.
_AT_ONCE_ON_CPU = 32
_AT_ONCE = 256

#: How PEFT's norms are named inside the wrapper of the norm that they replace.
_NORM_PARTS = (".modules_to_save.default.", ".ln_tuning_layers.default.")


@dataclass(frozen=True)
class _Place:
    """Where a tensor of the adapter goes in a forward pass.

    Attributes:
        name: the parameter of the backbone whose place it takes.
        added_to: a bias of the backbone that it is added to first, or None.
    """

    name: str
    added_to: torch.Tensor | None = None


class MergedTarget:
    """A copy of a split backbone that is differentiated with respect to theta, many times, as fast as it goes.

    PEFT adds a bias in a pass of its own over the hidden states, and autocast casts every frozen matrix whenever it is
    used. Here a generated bias is added to that of the backbone, and a generated norm takes the place of the
    backbone's. Other tensors, as those of LoRA, go through PEFT's layers. Frozen matrices are cast once.

    The features are those of the backbone with the adapter in it, up to rounding. The backbone itself may carry other
    adapters meanwhile.

    Args:
        space: the tensors of the adapter.
        split: the backbone. The space's adapter is injected into it.
        dtype: the precision of the autocast that the target will be run under; None if it will be run without.

    Attributes:
        split: the copy.
        start: theta `(n_tokens, token_dim)` before anything is generated.

    Raises:
        IncompatibleBackboneError: the adapter does not fit the backbone.
    """

    def __init__(self, space: ParameterSpace, split: SplitBackbone, dtype: torch.dtype | None = None):
        self.space = space
        self.start = space.inject(split.backbone).start
        self.split = copy.deepcopy(split).eval().requires_grad_(False)
        backbone = self.split.backbone
        self._places = [_find_place(backbone, name) for name in space.names]
        if dtype is not None:
            _cast_matrices(backbone, dtype)

    @property
    def images_at_once(self) -> int:
        """How many images `forward_prefix` runs at once."""
        return _AT_ONCE_ON_CPU if self.start.device.type == "cpu" else _AT_ONCE

    @torch.no_grad()
    def forward_prefix(self, pixel_values: torch.Tensor) -> Hidden:
        """What `SplitBackbone.forward_prefix` gives for any number of images `(n, 3, height, width)`."""
        parts = [self.split.forward_prefix(part) for part in pixel_values.split(self.images_at_once)]
        return Hidden(torch.cat([part.states for part in parts]), parts[0].args, parts[0].kwargs)

    def compute_features(self, theta: torch.Tensor, hidden: Hidden) -> torch.Tensor:
        """Features `(n, width)` with the adapter's weights theta `(n_tokens, token_dim)`; differentiable in theta."""
        tensors = {}
        for place, tensor in zip(self._places, self.space.to_tensors(theta).values(), strict=True):
            if place.added_to is not None:
                tensor = place.added_to + tensor.flatten()
            tensors[f"backbone.{place.name}"] = tensor
        with plain_attention(self.split.backbone):
            return functional_call(self.split, tensors, (hidden,))


def _find_place(backbone: nn.Module, name: str) -> _Place:
    """Where the adapter's tensor `name` goes; PEFT's wrapper is taken out where the backbone does as well without."""
    path, _, is_bias = name.partition(".beft_bias.")
    if is_bias:
        linear = _unwrap(backbone, path)
        if linear.bias is None:
            linear.bias = nn.Parameter(linear.weight.new_zeros(len(linear.weight)), requires_grad=False)
        return _Place(f"{path}.bias", linear.bias)
    for part in _NORM_PARTS:
        path, _, parameter = name.partition(part)
        if parameter:
            _unwrap(backbone, path)
            return _Place(f"{path}.{parameter}")
    return _Place(name)


def _unwrap(backbone: nn.Module, path: str) -> nn.Module:
    """Put the backbone's own module back in the place of PEFT's wrapper at `path`, and return it."""
    module = dict(plain_modules(backbone))[path]
    backbone.set_submodule(path, module)
    return module


def _cast_matrices(backbone: nn.Module, dtype: torch.dtype) -> None:
    """Cast what autocast would cast anyway, whenever it is used: the weights of linear layers and convolutions."""
    for module in backbone.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.weight.data = module.weight.to(dtype)
