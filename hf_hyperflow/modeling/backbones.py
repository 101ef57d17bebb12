"""What the flow needs to know of a vision transformer: where its blocks are, and how to run it in two halves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn


class IncompatibleBackboneError(ValueError):
    """The backbone cannot be adapted, or is not the one the adapter was made for."""


@dataclass(frozen=True)
class Blocks:
    """Where the transformer blocks of a backbone are.

    Attributes:
        path: dotted path of the `nn.ModuleList` of blocks.
        count: how many there are.
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
        """Names of the parameters in blocks `start`, `start + 1`, ... and in the final norm."""
        inside = tuple(f"{self.path}.{i}." for i in range(start, self.count))
        if self.norm is not None:
            inside += (f"{self.norm}.",)
        return {name for name in self.names if name.startswith(inside)}


def find_blocks(backbone: nn.Module) -> Blocks:
    """Locate the blocks: the longest list of modules of one class with linear layers in them, and the LayerNorm
    beside or around it.

    Raises:
        IncompatibleBackboneError: the model has no such list (a convolutional network, say).
    """
    best_path, best = "", None
    for path, module in plain_modules(backbone):
        alike = isinstance(module, nn.ModuleList) and len({type(child) for child in module}) == 1
        if alike and _has_linear(module[0]) and (best is None or len(module) > len(best)):
            best_path, best = path, module
    if best is None or len(best) < 2:
        raise IncompatibleBackboneError(
            f"{type(backbone).__name__} has no list of transformer blocks. Use a vision transformer such as "
            "Dinov2Model or ViTModel (transformers.AutoModel)."
        )
    norm = None
    for path, module in plain_modules(backbone):
        if isinstance(module, nn.LayerNorm) and path.count(".") <= best_path.count(".") and "embed" not in path:
            norm = path
    return Blocks(best_path, len(best), norm, tuple(name for name, _ in backbone.named_parameters()))


def plain_modules(backbone: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """`named_modules()` as it is without PEFT adapters: what is wrapped, under the path of its wrapper."""
    inside = None
    for path, module in backbone.named_modules():
        if inside is not None and path.startswith(inside):
            continue
        if isinstance(module, BaseTunerLayer):
            inside, module = f"{path}.", module.get_base_layer()
        elif isinstance(module, AuxiliaryTrainingWrapper):
            inside, module = f"{path}.", module.original_module
        yield path, module


def _has_linear(module: nn.Module) -> bool:
    return any(isinstance(part, nn.Linear) for part in module.modules())


@dataclass(frozen=True)
class Hidden:
    """What the first blocks computed: the hidden states `(n, tokens, width)` and what else a block is called with."""

    states: torch.Tensor
    args: tuple = ()
    kwargs: dict = field(default_factory=dict)

    def __getitem__(self, rows: torch.Tensor | slice) -> Hidden:
        """The same for some of the images."""
        return Hidden(self.states[rows], self.args, self.kwargs)


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while; afterwards every module is in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


class _Reached(Exception):
    """Carries a block's inputs out of the backbone's forward, so that the rest of it is not run."""


class SplitBackbone(nn.Module):
    """A backbone that can stop before block `start` and go on from there.

    The frozen first blocks then run once per image, whatever is tried on the adapted rest. Adapters may be injected
    into the backbone before or after it is wrapped: blocks are looked up when they are run.

    Args:
        backbone: a transformers vision model that returns `last_hidden_state`.
        start: index of the first block of the second half; 0 splits right behind the embeddings.
        pooling: the feature of an image: "cls" (first token) or "mean" (of all tokens).
        intermediate_weight: weight of a second half of the features, see `concat_features`; 0: there is none.
    """

    def __init__(
        self,
        backbone: nn.Module,
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
        self.blocks = blocks or find_blocks(backbone)
        if not 0 <= start < len(self.blocks):
            raise IncompatibleBackboneError(
                f"the flow starts at block {start}, but {type(backbone).__name__} has {len(self.blocks)} blocks."
            )

    def pool(self, sequence: torch.Tensor) -> torch.Tensor:
        """`(n, tokens, width)` to `(n, width)`."""
        return sequence[:, 0] if self.pooling == "cls" else sequence.mean(dim=1)

    def concat_features(self, last: torch.Tensor, hidden: Hidden) -> torch.Tensor:
        """Features `(n, 2 width)` with a second half, if there is an `intermediate_weight`; otherwise `last` `(n, width)` itself.

        The second half is the mean of the tokens before block `start` (but the first, if that is what is pooled), at `intermediate_weight` times the length of the first half, `last`. The first blocks know of textures and shapes what the
        last have dropped, and are run anyway; see `training/choose_metric.py` for what that is worth.
        """
        if not self.intermediate_weight:
            return last
        tokens = hidden.states[:, 1:] if self.pooling == "cls" else hidden.states
        mean = F.normalize(tokens.mean(dim=1).to(last), dim=-1)
        return torch.cat([last, self.intermediate_weight * last.norm(dim=-1, keepdim=True) * mean], dim=-1)

    def final_features(self, features: torch.Tensor) -> torch.Tensor:
        """The part of features that the last block gives, `(n, width)`."""
        return features[:, : features.shape[1] // 2] if self.intermediate_weight else features

    def forward_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Features of images `(n, 3, height, width)` by an ordinary forward pass: `(n, width)`, see `concat_features`."""
        if self.intermediate_weight:
            return self.forward_suffix(self.forward_prefix(pixel_values))
        return self.pool(self.backbone(pixel_values).last_hidden_state)

    def forward_prefix(self, pixel_values: torch.Tensor) -> Hidden:
        """Run the backbone up to block `start` and stop there."""

        def stop(module: nn.Module, args: tuple, kwargs: dict) -> None:
            raise _Reached(args, kwargs)

        block = self.backbone.get_submodule(self.blocks.path)[self.start]
        handle = block.register_forward_pre_hook(stop, with_kwargs=True)
        try:
            self.backbone(pixel_values)
        except _Reached as reached:
            args, kwargs = reached.args
        finally:
            handle.remove()
        if args:
            return Hidden(args[0], args[1:], kwargs)
        return Hidden(kwargs.pop("hidden_states"), (), kwargs)

    def forward_suffix(self, hidden: Hidden) -> torch.Tensor:
        """Features from what `forward_prefix` returned: the remaining blocks, the final norm, the pooling; see `concat_features`."""
        states = hidden.states
        for block in self.backbone.get_submodule(self.blocks.path)[self.start :]:
            output = block(states, *hidden.args, **hidden.kwargs)
            states = output if isinstance(output, torch.Tensor) else output[0]
        if self.blocks.norm is not None:
            states = self.backbone.get_submodule(self.blocks.norm)(states)
        return self.concat_features(self.pool(states), hidden)

    def forward(self, hidden: Hidden) -> torch.Tensor:
        """`forward_suffix`, under the name that `torch.func.functional_call` calls."""
        return self.forward_suffix(hidden)

    @torch.no_grad()
    def check(self) -> None:
        """Compare both halves, one after the other, with the whole, on a blank image of the backbone's own size.

        Raises:
            IncompatibleBackboneError: they differ (the model does more between its blocks than call them in turn).
        """
        size, parameter = self.backbone.config.image_size, next(self.backbone.parameters())
        height, width = (size, size) if isinstance(size, int) else size
        pixel_values = parameter.new_zeros(1, 3, height, width)
        cannot = (
            f"{type(self.backbone).__name__} cannot be split at its blocks: running {self.blocks.path} in turn and "
            f"then {self.blocks.norm}"
        )
        with eval_mode(self.backbone):
            whole = self.forward_features(pixel_values)
            try:
                halves = self.forward_suffix(self.forward_prefix(pixel_values))
                difference = (whole - halves).float().abs()
            except (RuntimeError, TypeError, ValueError) as error:
                raise IncompatibleBackboneError(f"{cannot} fails: {error}") from error
        if not (difference <= 1e-3 + 1e-2 * whole.float().abs()).all():
            raise IncompatibleBackboneError(f"{cannot} differs from its forward by {difference.max():.3g}.")
