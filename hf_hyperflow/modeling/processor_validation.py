"""Checks of a saved image processor, made before transformers builds it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from .json_fields import Fields, is_bounded

#: Height and width that an image processor gives its images.
MAX_PROCESSED_SIZE = 2048

#: The largest of its other numbers.
MAX_NUMBER = 1 << 16


def validate_processor(content: dict[str, Any], source: str | Path) -> None:
    """Check the fields of an image processor: sizes, means and scales within bounds, and no code of its own.

    Raises:
        CheckpointError: a value is not allowed.
    """
    fields = Fields(source, content)
    name = fields.text("image_processor_type", 100)
    if not re.fullmatch(r"[A-Za-z0-9]+ImageProcessor(Fast|Pil)?", name):
        fields.refuse("image_processor_type", "the class of an image processor of transformers")
    for name, value in content.items():
        if name == "auto_map" and value is not None:
            fields.refuse(name, "null")
        if (name == "size" or name.endswith("_size")) and not _is_bounded_size(value):
            fields.refuse(name, f"sizes of 1 to {MAX_PROCESSED_SIZE} pixels")
        if not is_bounded(value, MAX_NUMBER):
            fields.refuse(name, f"a value with numbers up to {MAX_NUMBER} and texts of up to 1000 characters")


def _is_bounded_size(value: Any) -> bool:
    """Whether a size of images is None, a number of pixels or some of them."""
    sizes = [value]
    if isinstance(value, dict):
        sizes = list(value.values())
    elif isinstance(value, list):
        sizes = value
    return all(size is None or (type(size) is int and 1 <= size <= MAX_PROCESSED_SIZE) for size in sizes)
