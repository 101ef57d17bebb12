"""Tensors of safetensors files: read and checked, and compared with those that are expected."""

from __future__ import annotations

import reprlib
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from .json_fields import is_printable
from .saving import CheckpointError

#: The last one is that of the counters in batch norms.
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64)


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Read the tensors of a safetensors file, which the library checks against the length of the file.

    Raises:
        CheckpointError: the file is missing or damaged, or a tensor is not finite or of an unknown type.
    """
    if not path.is_file():
        raise CheckpointError(f"there is no file {path}: the folder is incomplete. Download or copy it again.")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path} is damaged or incomplete ({error}). Download or copy it again.") from error
    _validate_tensors(tensors, path)
    return tensors


def _validate_tensors(tensors: dict[str, torch.Tensor], source: str | Path) -> None:
    """Raise an error about a tensor that is not finite or of an unknown type."""
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPES:
            raise CheckpointError(
                f"{source}: {reprlib.repr(name)} is {tensor.dtype}; allowed are float16, bfloat16, float32, float64 "
                "and, for counters, int64."
            )
        if not torch.isfinite(tensor).all():
            raise CheckpointError(
                f"{source}: {reprlib.repr(name)} has NaN or infinite values. The file is damaged: download or copy it "
                "again."
            )


def halve_tensors(path: Path) -> None:
    """Round the tensors of a safetensors file to half precision.

    Raises:
        ValueError: a tensor has values that half precision cannot hold.
    """
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    halved = {}
    for name, tensor in load_file(path).items():
        halved[name] = tensor.half() if tensor.is_floating_point() else tensor
        if not halved[name].isfinite().all():
            raise ValueError(f"{name} has values beyond 65504, which half precision cannot hold: save with half=False.")
    save_file(halved, path, metadata)


def list_differences(tensors: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> list[str]:
    """Names of tensors that are missing, unknown, or of another shape or kind of numbers than expected, printable."""
    wrong = []
    for name in sorted(tensors.keys() | expected.keys()):
        if name not in tensors or name not in expected or not _is_alike(tensors[name], expected[name]):
            wrong.append(name if is_printable(name) and len(name) < 256 else reprlib.repr(name))
    return wrong


def _is_alike(tensor: torch.Tensor, expected: torch.Tensor) -> bool:
    return tensor.shape == expected.shape and tensor.is_floating_point() == expected.is_floating_point()
