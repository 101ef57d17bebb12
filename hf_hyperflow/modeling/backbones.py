"""A backbone as HyperFlow runs it: in two halves where it can be cut, as a whole where not."""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from .blocks import Blocks, read_features
from .cls_token import cls_token_from
from .gate import find_blocks, is_close
from .locks import get_lock
from .trials import draw_images, first_tensor, split_arguments
from .trunks import IncompatibleBackboneError, eval_mode, find_trunk, run_trunk


@dataclass(frozen=True)
class Hidden:
    """What the second half of a backbone goes on from.

    Attributes:
        states: the hidden states behind the first blocks: tokens `(n, tokens, width)` or feature maps. Where the
            backbone is not cut, the pixel values `(n, 3, height, width)`.
        args, kwargs: further arguments that the next block is called with.
    """

    states: torch.Tensor
    args: tuple = ()
    kwargs: dict = field(default_factory=dict)

    def __getitem__(self, rows: torch.Tensor | slice) -> Hidden:
        """The same for some of the images."""
        return Hidden(self.states[rows], self.args, self.kwargs)


class _Reached(Exception):
    """Carries a block's inputs out of the backbone's forward pass, so that the rest of it is not run."""


class SplitBackbone(nn.Module):
    """A backbone that can stop before block `start` and go on from there.

    The frozen first blocks then run once per image, whatever is tried on the adapted rest. Adapters may be injected
    into the backbone before or after it is split, because blocks are looked up when they are run.

    Some backbones do more between their blocks or behind them than call them in turn. These are not cut: the first
    half does nothing, and the second is the whole.

    Where the CLS token is the feature, the MLP of the last block runs on this token alone, if that leaves the feature
    as it is up to rounding. A model of twelve blocks then takes 5 % fewer operations.

    Args:
        backbone: a vision model of transformers, or a wrapper of one, see `find_trunk`.
        start: index of the first block of the second half; 0 splits right behind the embeddings.
        pooling: the feature of an image, see `read_features`; None takes what suits the backbone.
        blocks: where the blocks are, if that is known already.
        intermediate_weight: weight of the intermediate features, see `concat_features`; 0 leaves them out.

    Attributes:
        backbone: the vision model itself.
        is_cut: whether the first half is run apart.
        width: length of the features that come from the last block.
        prefix_width: number of channels of what enters block `start`.

    Raises:
        IncompatibleBackboneError: the backbone cannot be adapted, or has no block `start`.
    """

    backbone: PreTrainedModel

    def __init__(
        self,
        backbone: PreTrainedModel,
        start: int,
        pooling: str | None = None,
        blocks: Blocks | None = None,
        intermediate_weight: float = 0.0,
    ):
        super().__init__()
        self.backbone = find_trunk(backbone)
        self.start = start
        self.blocks = blocks or find_blocks(backbone)
        self.pooling = pooling or self.blocks.pooling
        self.intermediate_weight = intermediate_weight
        if not 0 <= start < len(self.blocks):
            raise IncompatibleBackboneError(
                f"the flow starts at block {start}, but {type(self.backbone).__name__} has {len(self.blocks)} blocks."
            )
        self.is_cut = start >= self.blocks.first_cut and self.pooling in self.blocks.tails
        self.width = self.blocks.width
        self.prefix_width = self.blocks.widths[start]

    @property
    def feature_width(self) -> int:
        """Length of the features, with the intermediate ones if there are any."""
        return self.width + self.prefix_width if self.intermediate_weight else self.width

    def concat_features(self, final: torch.Tensor, hidden: Hidden) -> torch.Tensor:
        """Append intermediate features to the final ones, `(n, width)` to `(n, width + prefix_width)`.

        The intermediate features are the mean over the tokens before block `start`, without the CLS token where that is
        pooled. They are scaled to `intermediate_weight` times the length of the final features. With a weight of 0 the
        final features are returned as they are. The first blocks know textures and shapes that the last blocks have
        dropped, and they are run anyway.
        """
        if not self.intermediate_weight:
            return final
        states = self.get_prefix_states(hidden)
        if states.ndim == 4:
            intermediate = states.mean(dim=(2, 3))
        else:
            intermediate = states[:, 1:].mean(dim=1) if self.pooling == "cls" else states.mean(dim=1)
        intermediate = F.normalize(intermediate.to(final), dim=-1)
        length = self.intermediate_weight * final.norm(dim=-1, keepdim=True)
        return torch.cat([final, length * intermediate], dim=-1)

    def final_features(self, features: torch.Tensor) -> torch.Tensor:
        """The part of features that comes from the last block, `(n, width)`."""
        return features if not self.intermediate_weight else features[:, : self.width]

    def forward_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Features of images `(n, 3, height, width)`: `(n, feature_width)`.

        Raises:
            IncompatibleBackboneError: the backbone cannot see images of this size.
        """
        if self.intermediate_weight:
            return self.forward_suffix(self.forward_prefix(pixel_values))
        with self._last_mlp_on_cls():
            output = run_trunk(self.backbone, pixel_values)
        return read_features(output, self.pooling, is_channels_last=self.blocks.are_maps_last[-1])

    def forward_prefix(self, pixel_values: torch.Tensor) -> Hidden:
        """Run the backbone on images `(n, 3, height, width)` up to block `start` and stop there.

        Other threads can run the whole backbone at the same time. Where the backbone is not cut, nothing is run.

        Raises:
            IncompatibleBackboneError: the backbone cannot see images of this size, or does not run that block.
        """
        return self._stop_at_start(pixel_values) if self.is_cut else Hidden(pixel_values)

    def _stop_at_start(self, pixel_values: torch.Tensor) -> Hidden:
        own_thread = threading.get_ident()

        # Other threads pass here, too. In the moment in which the hook is removed they get here without `kwargs`.
        def stop(module: nn.Module, args: tuple, kwargs: dict | None = None) -> None:
            if threading.get_ident() == own_thread:
                raise _Reached(args, kwargs)

        path = self.blocks.paths[self.start]
        handle = self.backbone.get_submodule(path).register_forward_pre_hook(stop, with_kwargs=True)
        try:
            run_trunk(self.backbone, pixel_values)
            raise IncompatibleBackboneError(f"{type(self.backbone).__name__} does not run {path}.")
        except _Reached as reached:
            return Hidden(*split_arguments(*reached.args))
        finally:
            handle.remove()

    def get_prefix_states(self, hidden: Hidden) -> torch.Tensor:
        """What enters block `start`: tokens `(n, tokens, prefix_width)` or maps `(n, prefix_width, height, width)`.

        Args:
            hidden: what `forward_prefix` returned. Where the backbone is not cut, the first half is run now.
        """
        states = hidden.states if self.is_cut else self._stop_at_start(hidden.states).states
        return states.movedim(-1, 1) if self.blocks.are_maps_last[self.start] else states

    def forward_suffix(self, hidden: Hidden) -> torch.Tensor:
        """Run the remaining blocks, the final norm and the pooling on what `forward_prefix` returned.

        The features are those of `forward_features`.
        """
        if not self.is_cut:
            output = run_trunk(self.backbone, hidden.states)
            final = read_features(output, self.pooling, is_channels_last=self.blocks.are_maps_last[-1])
        else:
            states = hidden.states
            with self._last_mlp_on_cls():
                for path in self.blocks.paths[self.start :]:
                    block = self.backbone.get_submodule(path)
                    states = first_tensor(block(states, *hidden.args, **hidden.kwargs))
            final = self.blocks.tails[self.pooling].run(self.backbone, states)
        return self.concat_features(final, hidden)

    def _last_mlp_on_cls(self) -> AbstractContextManager[None]:
        """Within, the last MLP runs on the CLS token alone where nothing reads the other tokens."""
        last = self.backbone.get_submodule(self.blocks.paths[-1])
        is_read = self.pooling != "cls" or bool(last._forward_hooks)  # whoever put a hook there sees all tokens
        return cls_token_from(self.backbone, None if is_read else self.blocks.cls_norm)

    def forward(self, hidden: Hidden) -> torch.Tensor:
        """`forward_suffix`, under the name that `torch.func.functional_call` calls."""
        return self.forward_suffix(hidden)

    @torch.no_grad()
    def check(self) -> None:
        """Check that the two halves compute what the whole does, on some of a few random images.

        Raises:
            IncompatibleBackboneError: they do not, because the model does something between its blocks since it was
                first seen.
        """
        with get_lock(self.backbone), eval_mode(self.backbone):
            pixel_values = draw_images(self.backbone, self.blocks.image_size)
            whole = self.forward_features(pixel_values)[[2, 0]]
            halves = self.forward_suffix(self.forward_prefix(pixel_values)[torch.tensor([2, 0])])
        if not is_close(whole, halves):
            raise IncompatibleBackboneError(
                f"{type(self.backbone).__name__} cannot be split at its blocks: running them in turn from "
                f"{self.blocks.paths[self.start]} on differs from its forward. Take out what changes it, such as hooks."
            )
