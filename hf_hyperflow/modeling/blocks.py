"""Where the blocks of a vision model are, and what turns the hidden states behind them into features."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from transformers.utils import ModelOutput

from .trunks import IncompatibleBackboneError, plain_modules

#: How the features of an image are pooled, see `read_features`.
POOLINGS = ("cls", "mean", "pooler")


@dataclass(frozen=True)
class Tail:
    """What follows the last block on the way to the features.

    Attributes:
        pool: "cls", "mean", "patches" (the mean over the tokens but for the first), or the dotted path of a module.
        norm: dotted path of the norm, or None.
        pools_first: whether the norm comes behind the pooling.
        is_channels_last: whether a feature map is `(n, height, width, channels)`.
        keeps_map: whether the norm behind the pooling takes maps `(n, width, 1, 1)`, as timm's do.
    """

    pool: str
    norm: str | None
    pools_first: bool
    is_channels_last: bool
    keeps_map: bool = False

    def run(self, trunk: nn.Module, states: torch.Tensor) -> torch.Tensor:
        """Features `(n, width)` from the hidden states behind the last block."""
        if self.norm is None:
            return self._pool(trunk, states)
        norm = trunk.get_submodule(self.norm)
        if self.keeps_map:
            return norm(self._pool(trunk, states)[:, :, None, None]).flatten(1)
        if self.pools_first:
            return norm(self._pool(trunk, states))
        return self._pool(trunk, norm(states))

    def _pool(self, trunk: nn.Module, states: torch.Tensor) -> torch.Tensor:
        if self.pool == "patches":
            return states[:, 1:].mean(dim=1)
        if self.pool in ("cls", "mean"):
            return pool_states(states, self.pool, is_channels_last=self.is_channels_last)
        return trunk.get_submodule(self.pool)(states).flatten(1)


@dataclass(frozen=True)
class Blocks:
    """Where the blocks of a backbone are, as trying it out has shown.

    Attributes:
        paths: dotted paths of the blocks, in the order in which they are run. Hierarchical and convolutional models
            have their stages for blocks.
        norms: dotted paths of the norms behind the last block.
        names: names of all parameters of the backbone, without those of adapters.
        pooling: how the backbone's features are best pooled, see `read_features`.
        tails: what follows the last block for each pooling; those that no simple tail computes are left out.
        first_cut: the first block from which on each block is called with what the one before returned and with the
            same further arguments. Before it the backbone cannot be cut. It is the number of blocks if there is none.
        widths: number of channels that enter each block.
        width: length of the features.
        are_maps_last: of each block, and of the output, whether it takes maps `(n, height, width, channels)`.
        image_size: height and width of the images that it was tried on.
        cls_norm: dotted path of the norm of the last block from which on it may run on the CLS token alone where that
            is the feature; None if it may not.
    """

    paths: tuple[str, ...]
    norms: tuple[str, ...]
    names: tuple[str, ...]
    pooling: str
    tails: dict[str, Tail]
    first_cut: int
    widths: tuple[int, ...]
    width: int
    are_maps_last: tuple[bool, ...]
    image_size: tuple[int, int]
    cls_norm: str | None

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def norm(self) -> str | None:
        """The norm behind the last block, if there is one."""
        return self.norms[0] if self.norms else None

    def after(self, start: int) -> set[str]:
        """Names of the parameters in the blocks from `start` on and in the norms behind them."""
        prefixes = tuple(f"{path}." for path in (*self.paths[start:], *self.norms))
        return {name for name in self.names if name.startswith(prefixes)}


def pool_states(states: torch.Tensor, pooling: str, *, is_channels_last: bool = False) -> torch.Tensor:
    """Pool hidden states to `(n, width)`: tokens by "cls" or "mean", feature maps by their mean."""
    if states.ndim == 4:
        return states.mean(dim=(1, 2) if is_channels_last else (2, 3))
    return states[:, 0] if pooling == "cls" else states.mean(dim=1)


def read_features(output: ModelOutput, pooling: str, *, is_channels_last: bool = False) -> torch.Tensor:
    """The features `(n, width)` in the output of a model.

    Args:
        output: what `run_trunk` returns.
        pooling: "cls" (the CLS token), "mean" (the mean over tokens or positions) or "pooler" (what the model itself
            returns as pooled features, its `pooler_output`). Feature maps are averaged in any case.
        is_channels_last: whether a feature map is `(n, height, width, channels)`.

    Raises:
        IncompatibleBackboneError: the model has no pooled features of its own.
    """
    if pooling != "pooler":
        return pool_states(output["last_hidden_state"], pooling, is_channels_last=is_channels_last)
    pooled = output.get("pooler_output")
    if pooled is None:
        raise IncompatibleBackboneError("this backbone returns no pooler_output. Use pooling='mean'.")
    return pooled if pooled.ndim == 2 else pooled.flatten(2).mean(dim=2)


def list_block_paths(trunk: nn.Module) -> tuple[str, ...]:
    """Dotted paths of the blocks: of all lists of modules, those that hold most of the parameters.

    Raises:
        IncompatibleBackboneError: the model has no list of modules that all have parameters.
    """
    best: tuple[str, ...] = ()
    best_size = 0
    for paths in _iterate_lists(trunk):
        sizes = [sum(p.numel() for p in trunk.get_submodule(path).parameters()) for path in paths]
        if min(sizes) > 0 and sum(sizes) > best_size:  # of equal ones, the outermost comes first
            best, best_size = paths, sum(sizes)
    if not best:
        raise IncompatibleBackboneError(
            f"{type(trunk).__name__} has no list of blocks. Use a vision model such as Dinov2Model, ConvNextModel or "
            "ViTModel (transformers.AutoModel)."
        )
    return best


def _iterate_lists(trunk: nn.Module) -> Iterator[tuple[str, ...]]:
    """Yield the paths of the items of each list of two or more modules: a list, a sequence, or `layer1`, `layer2`..."""
    for path, module in plain_modules(trunk):
        if isinstance(module, nn.ModuleList | nn.Sequential):
            groups = {"": _list_items(path, module)}
        else:
            groups = _group_numbered(path, module)
        for items in groups.values():
            if len(items) > 1:
                yield tuple(items)


def _list_items(path: str, modules: nn.Module) -> list[str]:
    """Paths of the items of a list, and of lists in that list instead of these."""
    items = []
    for name, module in modules.named_children():
        item = f"{path}.{name}" if path else name
        items += _list_items(item, module) if isinstance(module, nn.ModuleList) else [item]
    return items


def _group_numbered(path: str, module: nn.Module) -> dict[str, list[str]]:
    """Paths of the children of a module whose names differ by a number at the end only, by what they share."""
    groups: dict[str, list[str]] = {}
    for name, _ in module.named_children():
        match = re.fullmatch(r"(.*?)\d+", name)
        if match is not None:
            groups.setdefault(match[1], []).append(f"{path}.{name}" if path else name)
    return groups
