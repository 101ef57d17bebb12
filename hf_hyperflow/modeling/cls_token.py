"""The MLP of the last block on the CLS token alone, where nothing reads the other tokens."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from .blocks import Tail
from .trials import Call, first_tensor
from .trunks import FORWARD_ERRORS, is_norm, plain_modules


@contextmanager
def cls_token_from(trunk: nn.Module, path: str | None) -> Iterator[None]:
    """Within, this thread runs the module at a path on the first token of its input; with None nothing changes."""
    if path is None:
        yield
        return
    own_thread = threading.get_ident()

    def keep_first(module: nn.Module, args: tuple) -> tuple | None:
        return (args[0][:, :1], *args[1:]) if threading.get_ident() == own_thread else None

    handle = trunk.get_submodule(path).register_forward_pre_hook(keep_first)
    try:
        yield
    finally:
        handle.remove()


def find_last_norm(trunk: nn.Module, path: str) -> str | None:
    """The last norm in the block at a path; None if it has none. In a transformer the MLP follows it."""
    norms = [name for name, module in plain_modules(trunk.get_submodule(path)) if is_norm(module)]
    return f"{path}.{norms[-1]}" if norms else None


def run_cut_block(trunk: nn.Module, path: str, norm: str, call: Call, tail: Tail) -> torch.Tensor | None:
    """Features `(n, width)` if the last block runs on the CLS token alone from a norm on; None if it cannot.

    The other tokens of the block come out wrong: the residual connection adds to each what the MLP makes of the CLS
    token.

    Args:
        path: of the last block.
        norm: path of the norm.
        call: how the block is called.
        tail: makes the features from the states behind the block.
    """
    try:
        with cls_token_from(trunk, norm):
            states = first_tensor(trunk.get_submodule(path)(call.states, *call.args, **call.kwargs))
        return tail.run(trunk, states)
    except FORWARD_ERRORS:  # a convolution between the tokens, say
        return None
