"""Reads anything that a person calls an image as RGB: files, bytes, PIL images in any mode, arrays."""

from __future__ import annotations

import io
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from transformers import AutoImageProcessor
from transformers.image_processing_utils import BaseImageProcessor

from .finite import MAX_PIXEL_VALUE, NotFiniteError
from .image_gate import MAX_PIXELS, ImageError, open_image, read_file, require_size, turn_upright
from .json_fields import read_json
from .processor_validation import validate_processor
from .saving import CheckpointError

#: File name of a saved image processor.
PROCESSOR = "preprocessor_config.json"

#: Files with these endings are images when a folder is read; of others the content decides.
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")


#: How many pixels are converted at a time, so that no wider type ever holds a whole image.
_STRIP_PIXELS = 2**20

#: How many decoded images may wait for the image processor, whatever their size.
_IMAGES_AT_ONCE = 512


@dataclass(frozen=True)
class NamedImage:
    """An image in any form that `decode` reads, and the name that errors call it: its path, its row or its number."""

    image: Any
    name: str


def load_processor(folder: str | Path) -> BaseImageProcessor | None:
    """The image processor saved in a folder, or None if there is none.

    It is always the one on PIL, so that images get the same pixels with and without torchvision.

    Raises:
        CheckpointError: its file is damaged, or says what is not allowed (see `validate_processor`).
    """
    path = Path(folder) / PROCESSOR
    if not path.exists():
        return None
    validate_processor(read_json(path), path)
    try:
        with tempfile.TemporaryDirectory() as alone:  # transformers would prefer a `processor_config.json` beside it
            shutil.copyfile(path, Path(alone) / PROCESSOR)
            processor = AutoImageProcessor.from_pretrained(alone, backend="pil", trust_remote_code=False)
        blank = PIL.Image.new("RGB", (40, 36), (128, 128, 128))
        pixel_values = processor(blank, return_tensors="pt")["pixel_values"]
    except Exception as error:  # a damaged file can fail anywhere in the making and the work of the processor
        raise CheckpointError(f"{path} is damaged or describes no image processor: {error}") from error
    if pixel_values.ndim != 4 or pixel_values.shape[1] != 3 or not torch.isfinite(pixel_values).all():
        raise CheckpointError(
            f"{path} is damaged: it makes pixel values of shape {tuple(pixel_values.shape)} or values that are not "
            "finite. Download or copy it again."
        )
    return processor


def is_one_image(images: Any) -> bool:
    """Whether this is a single image, or nothing that holds images at all, rather than several of them.

    A path is one image, also that of a folder, which `decode` refuses. Arrays and tensors of four dimensions hold
    several images.
    """
    if isinstance(images, torch.Tensor | np.ndarray):
        return images.ndim < 4
    if isinstance(images, Mapping):
        return images.keys() == {"bytes", "path"}
    if isinstance(images, str | os.PathLike | bytes | io.BytesIO):
        return True
    try:
        iter(images)
    except TypeError:
        return True
    return False


def decode(image: Any, name: str) -> PIL.Image.Image:
    """Read one image as RGB.

    Only regular files are opened, and only formats that Pillow decodes itself (`image_gate.FORMATS`; HEIC with
    pillow-heif). Before anything is decoded, images of more than 64 megapixels (16 in JPEG 2000), of sides that differ
    by more than a factor of 50, and files of more than 256 MiB are refused. JPEGs may have 256 megapixels, progressive
    ones 128: those whose sides are both longer than 4,096 pixels are decoded at a half, a quarter or an eighth of their
    size, the shorter side at 2,048 pixels or more, and long ones of more than 64 megapixels at a half. All other images
    keep every pixel. Of an animation the first frame is read.

    Args:
        image: a path, encoded bytes, a `datasets` record (`{"bytes", "path"}`), a PIL image in any mode, or an array
            `(h, w)` or `(h, w, 1|3|4)` of uint8, uint16 or floats in 0..1.
        name: the name of the image in error messages.

    Raises:
        ImageError: it is not an image, or it is too large, truncated, has NaN or infinite pixels, or is out of range or
            of a strange shape.
    """
    if isinstance(image, dict):
        if not {"bytes", "path"} & image.keys():
            raise ImageError(f"{name} is a dict with the keys {', '.join(map(repr, image))}: give the image in it.")
        image = image.get("path") if image.get("bytes") is None else image["bytes"]
    try:
        if isinstance(image, np.ndarray):
            return to_rgb(_read_array(image, name))
        if isinstance(image, str | Path):
            image = read_file(image, name)
        if isinstance(image, io.BytesIO):
            image = image.getvalue()
        if isinstance(image, bytes):
            with open_image(image, name) as opened:
                opened.load()
                return to_rgb(turn_upright(opened))
        if isinstance(image, PIL.Image.Image):
            return _read_picture(image, name)
    except ImageError:
        raise
    except Exception as error:  # the readers of damaged files raise whatever they stumble over
        raise ImageError(f"{name} cannot be read as an image ({error}). Replace or remove it.") from error
    if isinstance(image, torch.Tensor):
        raise ImageError(f"{name} is a tensor, not an image: give one tensor of the pixel values of all images.")
    raise ImageError(f"{name} is a {type(image).__name__}, not an image: give a path, bytes, a PIL image or an array.")


def decode_all(
    images: Iterable[NamedImage], read: list[int], reasons: list[str] | None = None
) -> Iterator[PIL.Image.Image]:
    """Yield images as RGB, one by one.

    Args:
        images: the images and their names, as in `decode`.
        read: the numbers of the images that could be read are appended to it.
        reasons: why images cannot be read is appended to it, and they are left out. None raises the error instead.

    Raises:
        ImageError: an image cannot be read.
    """
    for number, image in enumerate(images):
        try:
            picture = decode(image.image, image.name)
        except ImageError as error:
            if reasons is None:
                raise
            reasons.append(str(error))
            continue
        read.append(number)
        yield picture


def why_no_image(path: Path) -> str | None:
    """None if `decode` would read a file, as its header says; else a sentence that names the file and says why not."""
    try:
        with open_image(read_file(path, str(path)), str(path)):
            return None
    except ImageError as error:
        return str(error)
    except Exception as error:  # whatever the readers of headers stumble over
        return f"{path} cannot be read as an image ({error})."


def _read_picture(image: PIL.Image.Image, name: str) -> PIL.Image.Image:
    """A PIL image as RGB, a new one: the given image is left as it was."""
    if image.format == "EPS":
        raise ImageError(f"{name} is PostScript, which only a program could draw. Convert it to PNG.")
    require_size(*image.size, name)
    image.load()
    return to_rgb(turn_upright(image))


def to_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    """Convert an image of any PIL mode to RGB: alpha is laid on white, 16-bit and float greys are scaled to 8 bits.

    Raises:
        ValueError: it has NaN or infinite pixels.
    """
    if image.mode == "F":
        image = _scale_floats(image)
    elif image.mode in ("I;16", "I;16B", "I;16L", "I"):
        image = _scale_integers(image)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        return _lay_on_white(image)
    return image.convert("RGB")


def _strips(image: PIL.Image.Image) -> Iterator[tuple[PIL.Image.Image, tuple[int, int]]]:
    """Yield an image in strips of whole rows, each with the place of its upper left corner."""
    n_rows = max(1, _STRIP_PIXELS // image.width)
    for top in range(0, image.height, n_rows):
        bottom = min(top + n_rows, image.height)
        yield image.crop((0, top, image.width, bottom)), (0, top)


def _lay_on_white(image: PIL.Image.Image) -> PIL.Image.Image:
    """An image with alpha on a white ground."""
    result = PIL.Image.new("RGB", image.size)
    for strip, corner in _strips(image):
        layer = strip.convert("RGBA")
        white = PIL.Image.new("RGBA", layer.size, (255, 255, 255, 255))
        result.paste(PIL.Image.alpha_composite(white, layer).convert("RGB"), corner)
    return result


# PIL would clip 16-bit and float images at 255, which turns them white.


def _scale_integers(image: PIL.Image.Image) -> PIL.Image.Image:
    """Scale a grey image of 16 or 32 bits from 0..65535 to 8 bits."""
    result = PIL.Image.new("L", image.size)
    for strip, corner in _strips(image):
        values = np.asarray(strip).astype(np.int32).clip(0, 65535)
        result.paste(PIL.Image.fromarray(((values + 128) // 257).astype(np.uint8)), corner)
    return result


def _scale_floats(image: PIL.Image.Image) -> PIL.Image.Image:
    """Scale a float grey image to 8 bits; floats come in 0..1, 0..255 or 0..65535."""
    largest = -np.inf
    for strip, _ in _strips(image):
        values = np.asarray(strip)
        if not np.isfinite(values).all():
            raise ValueError("it has NaN or infinite pixels")
        largest = max(largest, values.max())
    white = 65535.0
    if largest <= 255:
        white = 255.0 if largest > 1 else 1.0
    result = PIL.Image.new("L", image.size)
    for strip, corner in _strips(image):
        scaled = np.asarray(strip, dtype=np.float64).clip(0, white) * (255.0 / white)
        result.paste(PIL.Image.fromarray(scaled.round().astype(np.uint8)), corner)
    return result


def _read_array(array: np.ndarray, name: str) -> PIL.Image.Image:
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)) or 0 in array.shape:
        raise ImageError(f"{name} has shape {array.shape}: give (height, width) or (height, width, 1, 3 or 4).")
    require_size(array.shape[1], array.shape[0], name)
    is_float = np.issubdtype(array.dtype, np.floating)
    if not is_float and array.dtype not in (np.uint8, np.uint16):
        raise ImageError(f"{name} has dtype {array.dtype}: give uint8, uint16 or floats in 0..1.")
    if array.dtype == np.uint8:
        return PIL.Image.fromarray(array)
    result = np.empty(array.shape, dtype=np.uint8)
    n_rows = max(1, _STRIP_PIXELS // array.shape[1])
    for top in range(0, len(array), n_rows):
        strip = array[top : top + n_rows]
        if is_float:
            result[top : top + n_rows] = _scale_unit_floats(strip, name)
        else:
            result[top : top + n_rows] = (strip.astype(np.int32) + 128) // 257
    return PIL.Image.fromarray(result)


def _scale_unit_floats(array: np.ndarray, name: str) -> np.ndarray:
    """Floats in 0..1 as integers in 0..255."""
    if not np.isfinite(array).all():
        raise ImageError(f"{name} has NaN or infinite pixels. Replace or remove it.")
    if array.min() < 0 or array.max() > 1:
        raise ImageError(f"{name} has floats outside 0..1. Scale it, or give uint8.")
    return (array * 255).round()


def process_images(pictures: Iterable[PIL.Image.Image], processor: BaseImageProcessor, **options: Any) -> torch.Tensor:
    """Pixel values `(n, 3, height, width)` of RGB images.

    The images are processed as they come, so that no more than a few of full size are in memory at a time.

    Args:
        pictures: the images. Without any, the result is `(0, 3, 0, 0)`.
        processor: the backbone's image processor.
        options: further arguments of the processor.

    Raises:
        NotFiniteError: a setting of the processor is NaN, infinite or huge, or it divides by zero.
    """
    _require_sound_settings(processor)
    chunks: list[torch.Tensor] = []
    waiting: list[PIL.Image.Image] = []
    n_pixels = 0
    for picture in pictures:
        n_pixels += picture.width * picture.height
        waiting.append(picture)
        if n_pixels >= MAX_PIXELS or len(waiting) == _IMAGES_AT_ONCE:
            chunks.append(processor(waiting, return_tensors="pt", **options)["pixel_values"])
            waiting, n_pixels = [], 0
    if waiting:
        chunks.append(processor(waiting, return_tensors="pt", **options)["pixel_values"])
    if not chunks:
        return torch.empty(0, 3, 0, 0)
    return torch.cat(chunks)


def _require_sound_settings(processor: BaseImageProcessor) -> None:
    """Raise an error if the processor would make pixel values that are not finite, or wipe out all differences."""
    settings = vars(processor)
    for name in ("image_mean", "image_std", "rescale_factor"):
        values = np.atleast_1d(np.asarray(settings.get(name) or 0.0, dtype=np.float64))
        is_zero = name == "image_std" and settings.get(name) is not None and (values == 0).any()
        if is_zero or not (np.abs(values) <= MAX_PIXEL_VALUE).all():
            raise NotFiniteError(f"{name} of the image processor is {settings[name]}: correct its {PROCESSOR}.")
