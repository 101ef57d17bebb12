"""The gate in front of all that takes a backbone: it tries the model out, and refuses what cannot be adapted.

The model runs on random images twice. What its blocks are called with shows where it can be cut. The norms behind the
blocks are made rough for it, because new ones leave everything as it is, so that one passes for another.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from .blocks import Blocks, Tail, list_block_paths, read_features
from .cls_token import find_last_norm, run_cut_block
from .locks import get_lock
from .trials import Trial, draw_images, find_image_size, rough_norms, run_trial
from .trunks import FORWARD_ERRORS, IncompatibleBackboneError, eval_mode, find_trunk, plain_modules

#: Parts of a trunk that pool its states by weights of their own, as transformers calls them.
_POOLERS = ("head", "pooler")

_CLS_TOKENS = ("cls_token", "class_embedding", "class_token")

_found: weakref.WeakKeyDictionary[nn.Module, Blocks] = weakref.WeakKeyDictionary()


def find_blocks(backbone: nn.Module) -> Blocks:
    """Locate the blocks of a vision model, and what turns the states behind them into features.

    The model is tried out when it is first seen, on a few small random images.

    Raises:
        IncompatibleBackboneError: the model cannot be adapted. The error says why, and what to do.
    """
    trunk = find_trunk(backbone)
    with get_lock(trunk):
        blocks = _found.get(trunk)
        if blocks is None:
            blocks, is_finite = _try_out(trunk)
            if is_finite:  # otherwise all comparisons are void
                _found[trunk] = blocks
        return blocks


@torch.no_grad()
def _try_out(trunk: PreTrainedModel) -> tuple[Blocks, bool]:
    """The blocks of a trunk, and whether its features are finite, so that they could be compared."""
    paths = list_block_paths(trunk)
    with eval_mode(trunk), rough_norms(trunk, paths) as norms:
        image_size = find_image_size(trunk)
        pixel_values = draw_images(trunk, image_size)
        first = run_trial(trunk, paths, pixel_values, norms)
        second = run_trial(trunk, paths, pixel_values[[2, 0]], norms)
        _require_run_once(trunk, paths, first)
        is_last = _find_channels_last(first)
        _require_same_features(trunk, first.output, second.output, is_last[-1])
        tails = _find_tails(trunk, first, is_last[-1])
        cls_norm = _find_cls_norm(trunk, first, tails)
    pooling = _choose_pooling(trunk, first.output, tails)
    features = read_features(first.output, pooling, is_channels_last=is_last[-1])
    tail = tails.get(pooling)
    norms_behind = tuple(first.norms)
    if tail is not None:
        norms_behind = () if tail.norm is None else (tail.norm,)
    widths = []
    for (_, call), last in zip(first.calls, is_last[:-1], strict=True):
        widths.append(_count_channels(call.states, last))
    blocks = Blocks(
        paths=paths,
        norms=norms_behind,
        names=_list_parameters(trunk),
        pooling=pooling,
        tails=tails,
        first_cut=_find_first_cut(first, second),
        widths=tuple(widths),
        width=features.shape[1],
        are_maps_last=is_last,
        image_size=image_size,
        cls_norm=cls_norm,
    )
    return blocks, bool(features.isfinite().all())


def _list_parameters(trunk: nn.Module) -> tuple[str, ...]:
    """Names of the parameters of a trunk without those of adapters in it."""
    names = []
    for path, module in plain_modules(trunk):
        for name, _ in module.named_parameters(recurse=False):
            names.append(f"{path}.{name}" if path else name)
    return tuple(names)


def _require_run_once(trunk: nn.Module, paths: tuple[str, ...], trial: Trial) -> None:
    """Raise an error unless every block ran once, in order, on one row of hidden states for each image."""
    if [path for path, _ in trial.calls] != list(paths):
        missing = sorted(set(paths) - {path for path, _ in trial.calls}) or paths[:1]
        raise IncompatibleBackboneError(
            f"{type(trunk).__name__} does not run each of its blocks once and in turn ({', '.join(missing[:3])}). Use "
            "a model that does, such as Dinov2Model or ConvNextModel."
        )
    for path, call in trial.calls:
        for states in (call.states, call.output):
            if not isinstance(states, torch.Tensor) or states.ndim not in (3, 4) or len(states) != 3:
                raise IncompatibleBackboneError(
                    f"{path} of {type(trunk).__name__} does not turn the hidden states of an image into those of the "
                    "next block. Use a model that does, such as Dinov2Model or ConvNextModel."
                )


def _require_same_features(trunk: PreTrainedModel, first: ModelOutput, second: ModelOutput, is_last: bool) -> None:
    """Raise an error unless an image has the same features in a second run, in which it is among others."""
    for pooling in _list_poolings(first):
        whole = read_features(first, pooling, is_channels_last=is_last)
        again = read_features(second, pooling, is_channels_last=is_last)
        if not is_close(whole[[2, 0]], again):
            remedy = "Switch off what is random in it, or what mixes the images of a batch."
            if "mask_ratio" in vars(trunk.config):
                remedy = "Set mask_ratio=0 in its config, so that it sees whole images."
            raise IncompatibleBackboneError(
                f"{type(trunk).__name__} gives other features of the same image when it runs again. {remedy}"
            )


def is_close(expected: torch.Tensor, actual: torch.Tensor) -> bool:
    """Whether two tensors differ by rounding only. Numbers that are not finite are not compared."""
    return _measure_difference(expected, actual) <= _get_tolerance(expected)


def _get_tolerance(expected: torch.Tensor) -> float:
    """What rounding may change, relative to the largest number."""
    return 1e-3 if expected.dtype in (torch.float32, torch.float64) else 0.03


def _measure_difference(expected: torch.Tensor, actual: torch.Tensor) -> float:
    """The largest difference, relative to the largest number. Numbers that are not finite are left out."""
    if expected.shape != actual.shape:
        return float("inf")
    expected, actual = expected.float(), actual.float()
    difference = (expected - actual).abs().nan_to_num(0, 0, 0).max()
    return (difference / expected.abs().nan_to_num(0, 0, 0).max().clamp_min(1e-12)).item()


def _list_poolings(output: ModelOutput) -> list[str]:
    poolings = ["cls", "mean"]
    if isinstance(output.get("pooler_output"), torch.Tensor):
        poolings.append("pooler")
    return poolings


def _find_channels_last(trial: Trial) -> tuple[bool, ...]:
    """Whether the maps that enter each block, and those of the output, are `(n, height, width, channels)`.

    The images are square, and so are their maps.
    """
    tensors = [call.states for _, call in trial.calls]
    tensors.append(trial.output["last_hidden_state"])
    return tuple(_is_channels_last(states) for states in tensors)


def _is_channels_last(states: torch.Tensor) -> bool:
    return states.ndim == 4 and states.shape[1] == states.shape[2] != states.shape[3]


def _count_channels(states: torch.Tensor, is_channels_last: bool) -> int:
    """Number of channels of tokens `(n, tokens, channels)` or of feature maps."""
    return states.shape[1] if states.ndim == 4 and not is_channels_last else states.shape[-1]


def _find_first_cut(first: Trial, second: Trial) -> int:
    """The first block from which on a block's arguments are known before the one before has run, see `Blocks`."""
    calls = [call for _, call in first.calls]
    others = [call for _, call in second.calls]
    cut = len(calls)
    last = calls[-1]
    for i in range(len(calls) - 1, -1, -1):
        is_same = _are_same((calls[i].args, calls[i].kwargs), (last.args, last.kwargs))
        # Arguments that depend on the images cannot be kept for some of them.
        is_general = _are_same((calls[i].args, calls[i].kwargs), (others[i].args, others[i].kwargs))
        is_chained = i + 1 == len(calls) or calls[i + 1].states is calls[i].output
        if not (is_same and is_general and is_chained):
            break
        cut = i
    return cut


def _are_same(a: Any, b: Any) -> bool:
    """Whether arguments are the same, tensors by their values."""
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        is_pair = isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)
        return is_pair and a.shape == b.shape and bool(((a == b) | (a != a) & (b != b)).all())
    if isinstance(a, tuple | list) and isinstance(b, tuple | list):
        return len(a) == len(b) and all(_are_same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_are_same(a[key], b[key]) for key in a)
    return a is b or a == b


def _find_tails(trunk: nn.Module, trial: Trial, is_channels_last: bool) -> dict[str, Tail]:
    """The tail that reproduces the model's own features, for each pooling that has one. The norms are rough."""
    states = trial.calls[-1][1].output
    tails = {}
    for pooling in _list_poolings(trial.output):
        features = read_features(trial.output, pooling, is_channels_last=is_channels_last)
        best = _get_tolerance(features)
        for tail in _iterate_tails(trunk, trial, pooling, _is_channels_last(states)):
            difference = _measure_tail(trunk, tail, states, features)
            if difference < best:
                best, tails[pooling] = difference, tail
    return tails


def _measure_tail(trunk: nn.Module, tail: Tail, states: torch.Tensor, features: torch.Tensor) -> float:
    try:
        return _measure_difference(features, tail.run(trunk, states))
    except FORWARD_ERRORS:  # this tail does not take such states
        return float("inf")


def _find_cls_norm(trunk: nn.Module, trial: Trial, tails: dict[str, Tail]) -> str | None:
    """The norm of the last block from which on the CLS token alone makes the same features, see `Blocks`."""
    path, call = trial.calls[-1]
    norm = find_last_norm(trunk, path)
    if norm is None or "cls" not in tails or call.output.ndim != 3:
        return None
    features = run_cut_block(trunk, path, norm, call, tails["cls"])
    expected = tails["cls"].run(trunk, call.output)
    return norm if features is not None and is_close(expected, features) else None


def _iterate_tails(trunk: nn.Module, trial: Trial, pooling: str, is_channels_last: bool) -> Iterator[Tail]:
    """Yield the tails that may lead to features of this pooling."""
    pools = [pooling]
    if pooling == "pooler":
        pools = ["mean", "cls", "patches"]
        for name, module in trunk.named_children():
            if name in _POOLERS and any(True for _ in module.parameters()):
                pools.append(name)
    for pool in pools:
        yield Tail(pool, None, False, is_channels_last)
        for norm in trial.norms:
            yield Tail(pool, norm, False, is_channels_last)
            yield Tail(pool, norm, True, is_channels_last)
            yield Tail(pool, norm, True, is_channels_last, keeps_map=True)


def _choose_pooling(trunk: nn.Module, output: ModelOutput, tails: dict[str, Tail]) -> str:
    """How the features of a model are pooled unless somebody says otherwise.

    A CLS token behind a norm is the feature; else what the model pools itself; else the CLS token, else the mean.
    """
    has_cls = output["last_hidden_state"].ndim == 3 and _has_cls_token(trunk)
    if has_cls and "cls" in tails and tails["cls"].norm is not None:
        return "cls"
    if "pooler" in _list_poolings(output):
        return "pooler"
    return "cls" if has_cls else "mean"


def _has_cls_token(trunk: nn.Module) -> bool:
    """Whether the embeddings have a CLS token. That of a pooler is another one."""
    for name, _ in trunk.named_parameters():
        first, _, _ = name.partition(".")
        if name.rpartition(".")[2] in _CLS_TOKENS and first not in _POOLERS:
            return True
    return False
