"""Checks of what a saved task says about its prototypes, labels and features."""

from __future__ import annotations

import reprlib
from pathlib import Path
from typing import Any

import torch

from .blocks import POOLINGS
from .calibration import MAX_SCALE, MIN_SCALE
from .class_names import find_label_problem
from .config_validation import MAX_BLOCKS, MAX_INTERMEDIATE_WEIGHT
from .json_fields import Fields
from .saving import CheckpointError

#: Of a task's rejection: what the largest coefficients of an adapter can make of a support set.
MAX_REJECTION = 1e5


def validate_task(tensors: dict[str, torch.Tensor], description: dict[str, Any], source: str | Path) -> None:
    """Check the prototypes of a task and what it says about its labels and features.

    Args:
        tensors: "prototypes" `(n_way, width)`, "scale", a number, and "rejection" `(3,)` or nothing.
        description: "labels", "start", "pooling" and "intermediate_weight".
        source: the file that both come from, for errors.

    Raises:
        CheckpointError: a tensor has another name or shape, or a value is not allowed.
    """
    n_dimensions = {name: tensor.ndim for name, tensor in tensors.items() if tensor.is_floating_point()}
    rejection = tensors.get("rejection", torch.zeros(3))
    expected = {"prototypes": 2, "scale": 0} | dict.fromkeys(tensors.keys() & {"rejection"}, 1)
    if len(tensors) != len(expected) or n_dimensions != expected or len(rejection) != 3:
        raise CheckpointError(
            f"{source} holds {reprlib.repr(sorted(tensors))}; expected are floats, prototypes (n_way, width), a number "
            "scale and, if anything, three numbers rejection. Download or copy it again."
        )
    if not MIN_SCALE <= tensors["scale"].item() <= MAX_SCALE:
        scale = tensors["scale"].item()
        raise CheckpointError(f"{source}: scale is {scale:g}; allowed is a number from {MIN_SCALE:g} to {MAX_SCALE:g}.")
    if not rejection.abs().max() <= MAX_REJECTION:
        raise CheckpointError(
            f"{source}: rejection is {rejection.tolist()}; allowed are numbers up to {MAX_REJECTION:g} in size."
        )
    fields = Fields(source, description)
    fields.integer("start", 0, MAX_BLOCKS - 1)
    fields.choice("pooling", POOLINGS)
    fields.number("intermediate_weight", 0, MAX_INTERMEDIATE_WEIGHT)
    n_way = len(tensors["prototypes"])
    labels = description.get("labels")
    if not isinstance(labels, list) or len(labels) != n_way or any(not isinstance(label, str) for label in labels):
        fields.refuse("labels", f"a list of {n_way} texts, one for each prototype")
    problem = find_label_problem(labels)
    if problem is not None or not labels:
        raise CheckpointError(f"{source}: {problem or 'there are no labels'}")
