"""Vision transformers as HyperFlow sees them: where their blocks are, and how to run them in two halves."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PreTrainedModel

from .locks import get_lock


class IncompatibleBackboneError(ValueError):
    """The backbone cannot be adapted, or it is not the one that the adapter was made for."""


@dataclass(frozen=True)
class Blocks:
    """Where the transformer blocks of a backbone are.

    Attributes:
        path: dotted path of the `nn.ModuleList` of blocks.
        count: number of blocks.
        norm: dotted path of the LayerNorm behind the last block, or None.
        names: names of all parameters of the backbone, in order.
    """

    path: str
    count: int
    norm: str | None
    names: tuple[str, ...]

    def __len__(self) -> int:
        return self.count

    def after(self, start: int) -> set[str]:
        """Names of the parameters in the blocks from `start` on and in the final norm."""
        prefixes = [f"{self.path}.{i}." for i in range(start, self.count)]
        if self.norm is not None:
            prefixes.append(f"{self.norm}.")
        return {name for name in self.names if name.startswith(tuple(prefixes))}


def get_name(backbone: nn.Module) -> str:
    """The Hub id that a backbone was loaded by, or the whole path of its folder; "" if it has no name.

    A path as it was typed would mean nothing in another directory, and one like "models/vit" would pass for a Hub id.
    """
    config: Any = backbone.config
    name = str(config._name_or_path)
    return os.path.abspath(name) if os.path.isdir(name) else name


def find_blocks(backbone: nn.Module) -> Blocks:
    """Locate the blocks of a vision transformer and its final LayerNorm.

    The blocks are the longest list of modules of one class that hold linear layers. The final norm is the last
    LayerNorm beside that list or further out, embeddings aside.

    Raises:
        IncompatibleBackboneError: the model has no such list (a convolutional network, say).
    """
    best_path, best_count = "", 1
    for path, module in plain_modules(backbone):
        if isinstance(module, nn.ModuleList) and len(module) > best_count and _is_block_list(module):
            best_path, best_count = path, len(module)
    if not best_path:
        raise IncompatibleBackboneError(
            f"{type(backbone).__name__} has no list of transformer blocks. Use a vision transformer such as "
            "Dinov2Model or ViTModel (transformers.AutoModel)."
        )
    norm = None
    for path, module in plain_modules(backbone):
        if isinstance(module, nn.LayerNorm) and path.count(".") <= best_path.count(".") and "embed" not in path:
            norm = path
    names = tuple(name for name, _ in backbone.named_parameters())
    return Blocks(best_path, best_count, norm, names)


def _is_block_list(modules: nn.ModuleList) -> bool:
    """Whether all modules are of one class and hold linear layers."""
    classes = {type(module) for module in modules}
    has_linear = any(isinstance(part, nn.Linear) for part in modules[0].modules())
    return len(classes) == 1 and has_linear


def plain_modules(backbone: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield `named_modules()` as they are without PEFT adapters: wrapped modules under the path of their wrapper."""
    wrapper = None
    for path, module in backbone.named_modules():
        if wrapper is not None and path.startswith(wrapper):
            continue
        if isinstance(module, BaseTunerLayer):
            wrapper, module = f"{path}.", module.get_base_layer()
        elif isinstance(module, AuxiliaryTrainingWrapper):
            wrapper, module = f"{path}.", module.original_module
        yield path, module


@dataclass(frozen=True)
class Hidden:
    """The hidden states behind the first blocks, and the other arguments that the next block is called with.

    Attributes:
        states: `(n, tokens, width)`.
        args, kwargs: further arguments of a block.
    """

    states: torch.Tensor
    args: tuple = ()
    kwargs: dict = field(default_factory=dict)

    def __getitem__(self, rows: torch.Tensor | slice) -> Hidden:
        """The hidden states of some of the images."""
        return Hidden(self.states[rows], self.args, self.kwargs)


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Within, the model is in evaluation mode. Afterwards every module is in the mode that it was in.

    If other threads use the model, the caller holds its lock.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


class _Reached(Exception):
    """Carries a block's inputs out of the backbone's forward pass, so that the rest of it is not run."""


class SplitBackbone(nn.Module):
    """A backbone that can stop before block `start` and go on from there.

    The frozen first blocks then run once per image, whatever is tried on the adapted rest. Adapters may be injected
    into the backbone before or after it is split, because blocks are looked up when they are run.

    Args:
        backbone: a transformers vision model that returns `last_hidden_state`.
        start: index of the first block of the second half; 0 splits right behind the embeddings.
        pooling: the feature of an image: "cls" (the CLS token) or "mean" (the mean over the tokens).
        blocks: where the blocks are, if that is known already.
        intermediate_weight: weight of the intermediate features, see `concat_features`; 0 leaves them out.

    Raises:
        IncompatibleBackboneError: the backbone has no blocks, or no block `start`.
    """

    def __init__(
        self,
        backbone: PreTrainedModel,
        start: int,
        pooling: str = "cls",
        blocks: Blocks | None = None,
        intermediate_weight: float = 0.0,
    ):
        super().__init__()
        self.backbone = backbone
        self.start = start
        self.pooling = pooling
        self.intermediate_weight = intermediate_weight
        with get_lock(backbone):
            self.blocks = blocks or find_blocks(backbone)
        if not 0 <= start < len(self.blocks):
            raise IncompatibleBackboneError(
                f"the flow starts at block {start}, but {type(backbone).__name__} has {len(self.blocks)} blocks."
            )

    def pool(self, states: torch.Tensor) -> torch.Tensor:
        """Hidden states `(n, tokens, width)` to features `(n, width)`."""
        if self.pooling == "cls":
            return states[:, 0]
        return states.mean(dim=1)

    def concat_features(self, final: torch.Tensor, hidden: Hidden) -> torch.Tensor:
        """Append intermediate features to the final ones, `(n, width)` to `(n, 2 width)`.

        The intermediate features are the mean over the tokens before block `start`, without the CLS token where that is
        pooled. They are scaled to `intermediate_weight` times the length of the final features. With a weight of 0 the
        final features are returned as they are. The first blocks know textures and shapes that the last blocks have
        dropped, and they are run anyway.
        """
        if not self.intermediate_weight:
            return final
        tokens = hidden.states
        if self.pooling == "cls":
            tokens = tokens[:, 1:]
        intermediate = F.normalize(tokens.mean(dim=1).to(final), dim=-1)
        length = self.intermediate_weight * final.norm(dim=-1, keepdim=True)
        return torch.cat([final, length * intermediate], dim=-1)

    def final_features(self, features: torch.Tensor) -> torch.Tensor:
        """The part of features that comes from the last block, `(n, width)`."""
        if not self.intermediate_weight:
            return features
        return features[:, : features.shape[1] // 2]

    def forward_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Features of images `(n, 3, height, width)`: `(n, width)`, or `(n, 2 width)` with intermediate features.

        Raises:
            IncompatibleBackboneError: the backbone cannot see images of this size.
        """
        if self.intermediate_weight:
            return self.forward_suffix(self.forward_prefix(pixel_values))
        return self.pool(self._run(pixel_values).last_hidden_state)

    def forward_prefix(self, pixel_values: torch.Tensor) -> Hidden:
        """Run the backbone on images `(n, 3, height, width)` up to block `start` and stop there.

        Other threads can run the whole backbone at the same time.

        Raises:
            IncompatibleBackboneError: the backbone cannot see images of this size, or does not run that block.
        """
        own_thread = threading.get_ident()

        # Other threads pass here, too. In the moment in which the hook is removed they get here without `kwargs`.
        def stop(module: nn.Module, args: tuple, kwargs: dict | None = None) -> None:
            if threading.get_ident() == own_thread:
                raise _Reached(args, kwargs)

        handle = self._get_block_list()[self.start].register_forward_pre_hook(stop, with_kwargs=True)
        try:
            self._run(pixel_values)
            raise IncompatibleBackboneError(
                f"{type(self.backbone).__name__} does not run block {self.start} of {self.blocks.path}."
            )
        except _Reached as reached:
            args, kwargs = reached.args
        finally:
            handle.remove()
        if args:
            return Hidden(args[0], args[1:], kwargs)
        return Hidden(kwargs.pop("hidden_states"), (), kwargs)

    def forward_suffix(self, hidden: Hidden) -> torch.Tensor:
        """Run the remaining blocks, the final norm and the pooling on what `forward_prefix` returned.

        The features are those of `forward_features`.
        """
        states = hidden.states
        for block in self._get_block_list()[self.start :]:
            output = block(states, *hidden.args, **hidden.kwargs)
            states = output if isinstance(output, torch.Tensor) else output[0]
        if self.blocks.norm is not None:
            states = self.backbone.get_submodule(self.blocks.norm)(states)
        return self.concat_features(self.pool(states), hidden)

    def forward(self, hidden: Hidden) -> torch.Tensor:
        """`forward_suffix`, under the name that `torch.func.functional_call` calls."""
        return self.forward_suffix(hidden)

    def _run(self, pixel_values: torch.Tensor) -> Any:
        """Run the whole backbone; returns its output.

        Raises:
            IncompatibleBackboneError: it cannot see images of this size: they are smaller than a patch, say.
        """
        try:
            return self.backbone(pixel_values)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError) as error:
            shape = " x ".join(str(size) for size in pixel_values.shape)
            raise IncompatibleBackboneError(
                f"this {type(self.backbone).__name__} does not run on pixel values of shape {shape}: {error}. Use the "
                "image processor of the backbone."
            ) from error

    def _get_block_list(self) -> nn.ModuleList:
        blocks = self.backbone.get_submodule(self.blocks.path)
        assert isinstance(blocks, nn.ModuleList)
        return blocks

    @torch.no_grad()
    def check(self) -> None:
        """Check that the two halves compute what the whole does, on a blank image of the backbone's own size.

        Raises:
            IncompatibleBackboneError: they do not. Such a model does more between its blocks than call them in turn.
        """
        size = self.backbone.config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        pixel_values = next(self.backbone.parameters()).new_zeros(1, 3, height, width)
        problem = (
            f"{type(self.backbone).__name__} cannot be split at its blocks: running {self.blocks.path} in turn and "
            f"then {self.blocks.norm}"
        )
        with get_lock(self.backbone), eval_mode(self.backbone):
            whole = self.forward_features(pixel_values)
            try:
                halves = self.forward_suffix(self.forward_prefix(pixel_values))
                difference = (whole - halves).float().abs()
            except (RuntimeError, TypeError, ValueError) as error:
                raise IncompatibleBackboneError(f"{problem} fails: {error}") from error
        if not (difference <= 1e-3 + 1e-2 * whole.float().abs()).all():
            raise IncompatibleBackboneError(f"{problem} differs from its forward by {difference.max():.3g}.")
