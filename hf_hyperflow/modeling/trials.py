"""One run of a model on random images: how its blocks are called, and which norms run behind them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from .trunks import IncompatibleBackboneError, is_norm, plain_modules, run_trunk

#: Height and width of images to try a plain vision transformer on.
_SMALL = 64


@dataclass
class Call:
    """How a block was called, and what it returned."""

    states: Any
    args: tuple
    kwargs: dict[str, Any]
    output: Any = None


@dataclass
class Trial:
    """One run of a model.

    Attributes:
        calls: of each block, in the order in which they were called.
        norms: paths of the norms that ran behind the last block.
    """

    output: ModelOutput
    calls: list[tuple[str, Call]] = field(default_factory=list)
    norms: list[str] = field(default_factory=list)


def split_arguments(args: tuple, kwargs: dict[str, Any]) -> tuple[Any, tuple, dict[str, Any]]:
    """The hidden states that a block is called with, and its other arguments."""
    if args:
        return args[0], args[1:], kwargs
    others = dict(kwargs)
    return others.pop("hidden_states", None), (), others


def first_tensor(output: Any) -> Any:
    """The hidden states that a block returns, which may be the first of several things."""
    while isinstance(output, tuple | list) and output:
        output = output[0]
    return output


def draw_images(trunk: nn.Module, size: tuple[int, int]) -> torch.Tensor:
    """Three random images `(3, 3, height, width)`, always the same, on the device and in the precision of a trunk."""
    parameter = next(p for p in trunk.parameters() if p.is_floating_point())
    images = torch.randn(3, 3, *size, generator=torch.Generator().manual_seed(0))
    return images.to(parameter.device, parameter.dtype)


def find_image_size(trunk: PreTrainedModel) -> tuple[int, int]:
    """Height and width of images that the trunk takes: small ones, or those of its config.

    Raises:
        IncompatibleBackboneError: it takes neither.
    """
    *small, own = _list_sizes(trunk)
    for size in small:
        try:
            run_trunk(trunk, draw_images(trunk, size)[:1])
        except IncompatibleBackboneError:
            continue
        return size
    return own


def _list_sizes(trunk: PreTrainedModel) -> list[tuple[int, int]]:
    """Heights and widths of images to try, the smallest first.

    Hierarchical models see images of their own size only: Swin, for one, shrinks its windows for good on small ones.
    """
    settings = vars(trunk.config)
    size, patch = settings.get("image_size"), settings.get("patch_size")
    if trunk.config.model_type == "timm_wrapper":  # its config knows no sizes, but the model of timm does
        timm_model: Any = trunk.timm_model
        size = timm_model.pretrained_cfg["input_size"][1:]
        size = (settings["model_args"] or {}).get("img_size", size)
    own = (224, 224)
    if isinstance(size, int):
        own = (size, size)
    elif isinstance(size, list | tuple) and len(size) == 2:
        own = (size[0], size[1])
    if not isinstance(patch, int) or "hidden_size" not in settings or {"depths", "window_size"} & settings.keys():
        return [own]
    small = max(patch, _SMALL // patch * patch)
    return [own] if small >= min(own) else [(small, small), own]


@contextmanager
def rough_norms(trunk: nn.Module, paths: tuple[str, ...]) -> Iterator[dict[str, nn.Module]]:
    """Within, this thread sees every norm outside the blocks scale its channels by numbers of its own.

    Yields:
        These norms by their paths.
    """
    own_thread = threading.get_ident()
    inside = tuple(f"{path}." for path in paths)
    norms: dict[str, nn.Module] = {}
    handles = []
    for path, plain in plain_modules(trunk):
        if not is_norm(plain) or path.startswith(inside):
            continue
        norms[path] = trunk.get_submodule(path)

        def scale(module: nn.Module, args: tuple, output: torch.Tensor, seed: int = len(norms)) -> torch.Tensor | None:
            if threading.get_ident() != own_thread:
                return None
            generator = torch.Generator().manual_seed(seed)
            return output * (0.5 + torch.rand(output.shape[-1], generator=generator)).to(output)

        handles.append(norms[path].register_forward_hook(scale))
    try:
        yield norms
    finally:
        for handle in handles:
            handle.remove()


def run_trial(
    trunk: nn.Module, paths: tuple[str, ...], pixel_values: torch.Tensor, norms: dict[str, nn.Module]
) -> Trial:
    """Run a trunk and note what its blocks are called with, and which norms run behind the last one.

    Args:
        paths: of the blocks.
        pixel_values: `(n, 3, height, width)`.
        norms: those outside the blocks, by their paths.

    Raises:
        IncompatibleBackboneError: see `run_trunk`.
    """
    own_thread = threading.get_ident()
    calls: list[tuple[str, Call]] = []
    behind: list[str] = []
    handles = []
    for path in paths:

        def note_call(module: nn.Module, args: tuple, kwargs: dict | None = None, path: str = path) -> None:
            if threading.get_ident() == own_thread:
                calls.append((path, Call(*split_arguments(args, kwargs or {}))))

        def note_output(module: nn.Module, args: tuple, output: Any) -> None:
            if threading.get_ident() == own_thread and calls:
                calls[-1][1].output = first_tensor(output)
                behind.clear()

        block = trunk.get_submodule(path)
        handles.append(block.register_forward_pre_hook(note_call, with_kwargs=True))
        handles.append(block.register_forward_hook(note_output))
    for path, norm in norms.items():

        def note_norm(module: nn.Module, args: tuple, output: Any, path: str = path) -> None:
            if threading.get_ident() == own_thread:
                behind.append(path)

        handles.append(norm.register_forward_hook(note_norm))
    try:
        output = run_trunk(trunk, pixel_values)
    finally:
        for handle in handles:
            handle.remove()
    return Trial(output, calls, behind)
