"""What an image processor does, in the words of `hyperflow_onnx.process`, which works without transformers."""

from __future__ import annotations

from typing import Any

import numpy as np
import PIL.Image
from transformers.image_processing_utils import BaseImageProcessor

from ..modeling.images import process_images
from .hyperflow_onnx import process

#: Widths and heights of pictures that both are compared on: wide, tall, small and square ones.
_SIZES = ((90, 61), (57, 143), (300, 200), (17, 23), (64, 64))


def describe(processor: BaseImageProcessor) -> dict[str, Any]:
    """The settings of `hyperflow_onnx.process` for an image processor.

    Raises:
        ValueError: the processor does something else, or gives images of different sizes.
    """
    settings = vars(processor)
    description: dict[str, Any] = {"size": None, "resample": None, "crop": None, "scale": None}
    description |= {"mean": None, "std": None}
    if settings.get("do_resize"):
        description["size"] = _read_size(settings["size"])
        description["resample"] = int(PIL.Image.Resampling(settings["resample"]))
    if settings.get("do_center_crop"):
        description["crop"] = _read_size(settings["crop_size"])
    if settings.get("do_rescale"):
        description["scale"] = float(settings["rescale_factor"])
    if settings.get("do_normalize"):
        description["mean"] = np.broadcast_to(settings["image_mean"], 3).tolist()
        description["std"] = np.broadcast_to(settings["image_std"], 3).tolist()
    description["height"], description["width"] = _compare(processor, description)
    return description


def _read_size(size: Any) -> int | list[int] | None:
    """A length of the shorter side, or a height and a width; None if it is something else."""
    lengths = {name: length for name, length in dict(size).items() if length is not None}
    if lengths.keys() == {"shortest_edge"}:
        return lengths["shortest_edge"]
    if lengths.keys() == {"height", "width"}:
        return [lengths["height"], lengths["width"]]
    return None


def _compare(processor: BaseImageProcessor, description: dict[str, Any]) -> tuple[int, int]:
    """The height and width that the processor gives its images, once it is known to do what is described."""
    generator = np.random.default_rng(0)
    shapes = set()
    for width, height in _SIZES:
        pixels = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
        picture = PIL.Image.fromarray(pixels)
        expected = process_images([picture], processor)[0].numpy()
        shapes.add(expected.shape)
        if not np.array_equal(process(picture, description), expected):
            raise ValueError(
                f"what {type(processor).__name__} does cannot be described for use without transformers: only "
                "resizing, cropping at the centre, rescaling and normalising can. Use such an image processor."
            )
    if len(shapes) > 1:
        raise ValueError(
            f"{type(processor).__name__} gives images of different sizes, and the graphs are made for one. Set "
            "do_center_crop, or a height and a width."
        )
    _, height, width = shapes.pop()
    return height, width
