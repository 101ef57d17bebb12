"""Reads anything that a person calls an image as RGB: files, bytes, PIL images in any mode, arrays."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageOps
from transformers import AutoImageProcessor
from transformers.image_processing_utils import BaseImageProcessor

from .saving import CheckpointError

#: File name of a saved image processor.
PROCESSOR = "preprocessor_config.json"

#: File name endings that count as images when a folder is read.
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")


class ImageError(ValueError):
    """An image that cannot be read; the message names it."""


def load_processor(folder: str | Path) -> BaseImageProcessor | None:
    """The image processor saved in a folder, or None if there is none.

    It is always the one on PIL, so that images get the same pixels with and without torchvision.

    Raises:
        CheckpointError: its file is damaged.
    """
    path = Path(folder) / PROCESSOR
    if not path.is_file():
        return None
    try:
        return AutoImageProcessor.from_pretrained(str(folder), backend="pil")
    except Exception as error:  # a damaged file can fail anywhere in the making of the processor
        raise CheckpointError(f"{path} is damaged or describes no image processor: {error}") from error


def decode(image: Any, name: str) -> PIL.Image.Image:
    """Read one image as RGB.

    Args:
        image: a path, encoded bytes, a `datasets` record (`{"bytes", "path"}`), a PIL image in any mode, or an array
            `(h, w)` or `(h, w, 1|3|4)` of uint8, uint16 or floats in 0..1.
        name: the name of the image in error messages.

    Raises:
        ImageError: it is not an image, or it is truncated, has NaN or infinite pixels, or is out of range or of a
            strange shape.
    """
    if isinstance(image, dict):
        image = image.get("path") if image.get("bytes") is None else image["bytes"]
    if isinstance(image, np.ndarray):
        image = _read_array(image, name)
    if isinstance(image, bytes):
        image = io.BytesIO(image)
    try:
        if isinstance(image, str | Path | io.BytesIO):
            with PIL.Image.open(image) as opened:
                return to_rgb(PIL.ImageOps.exif_transpose(opened))
        if isinstance(image, PIL.Image.Image):
            return to_rgb(PIL.ImageOps.exif_transpose(image))
    except FileNotFoundError:
        raise ImageError(f"{name}: there is no file {image}.") from None
    except Exception as error:  # the readers of damaged files raise whatever they stumble over
        raise ImageError(f"{name} cannot be read as an image ({error}). Replace or remove it.") from error
    raise ImageError(f"{name} is a {type(image).__name__}, not an image: give a path, bytes, a PIL image or an array.")


def to_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    """Convert an image of any PIL mode to RGB: alpha is laid on white, 16-bit and float greys are scaled to 8 bits.

    Raises:
        ValueError: it has NaN or infinite pixels.
    """
    if image.mode in ("I;16", "I;16B", "I;16L", "I", "F"):
        image = _scale_to_8_bits(image)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        layer = image.convert("RGBA")
        white = PIL.Image.new("RGBA", layer.size, (255, 255, 255, 255))
        image = PIL.Image.alpha_composite(white, layer)
    return image.convert("RGB")


def _scale_to_8_bits(image: PIL.Image.Image) -> PIL.Image.Image:
    """Scale a 16-bit or float grey image to 8 bits. PIL would clip it at 255, which turns 16-bit images white."""
    values = np.asarray(image, dtype=np.float64)
    if not np.isfinite(values).all():
        raise ValueError("it has NaN or infinite pixels")
    white = 65535.0
    if image.mode == "F" and values.max() <= 255:  # floats come in 0..1, 0..255 or 0..65535
        white = 255.0 if values.max() > 1 else 1.0
    scaled = values.clip(0, white) * (255.0 / white)
    return PIL.Image.fromarray(scaled.round().astype(np.uint8))


def _read_array(array: np.ndarray, name: str) -> PIL.Image.Image:
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)) or 0 in array.shape:
        raise ImageError(f"{name} has shape {array.shape}: give (height, width) or (height, width, 1, 3 or 4).")
    if np.issubdtype(array.dtype, np.floating):
        if not np.isfinite(array).all():
            raise ImageError(f"{name} has NaN or infinite pixels. Replace or remove it.")
        if array.min() < 0 or array.max() > 1:
            raise ImageError(f"{name} has floats outside 0..1. Scale it, or give uint8.")
        array = (array * 255).round().astype(np.uint8)
    if array.dtype == np.uint16:
        array = (array / 257).round().astype(np.uint8)
    if array.dtype != np.uint8:
        raise ImageError(f"{name} has dtype {array.dtype}: give uint8, uint16 or floats in 0..1.")
    return PIL.Image.fromarray(array)
