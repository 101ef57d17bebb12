"""The images to classify, in whatever form people hold them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from numbers import Integral
from typing import Any

from .dataset_images import find_image_column, get_split, is_dataset, iterate_rows
from .images import NamedImage, is_one_image
from .support import list_mapping, name_image, read_pair


def iterate_queries(images: Any, left_out: list[str]) -> Iterator[NamedImage]:
    """Yield the images to classify, one by one.

    Args:
        images: one image in any form that `decode` reads, or several, whose labels are not looked at:

            - a list, an iterator or anything else that yields images or pairs `(image, label)`;
            - a `datasets.Dataset`, streamed or not, with or without labels, or a dict of its only split;
            - a dict of class name to images: an iterable of them, or a folder, of which they are sorted by name. The
              images of one class come after those of the other;
            - a tensor of pixel values `(3, height, width)`, which is one image, or `(n, 3, height, width)`.
        left_out: why files of such folders are no images is appended to it.

    Raises:
        ValueError: a dataset has no image column, or several splits, which are named.
        SupportSetError: a value of a dict holds no images, or the second part of a pair is no label.
    """
    if is_one_image(images):
        yield NamedImage(images, name_image(images, 0))
    elif is_dataset(images):
        dataset = get_split(images)
        column = find_image_column(dataset)
        for number, row in enumerate(iterate_rows(dataset, column)):
            yield NamedImage(row[column], f"row {number}")
    elif isinstance(images, Mapping):
        examples, _ = list_mapping(images, left_out)
        yield from examples
    else:
        for number, item in enumerate(images):
            pair = read_pair(item, number)
            image = item if pair is None else pair[0]
            yield NamedImage(image, name_image(image, number))


def require_count(name: str, value: Any) -> None:
    """Check that an argument of this name is an integer of at least 1.

    Raises:
        ValueError: it is not.
    """
    if not isinstance(value, Integral):
        raise ValueError(f"{name} must be an integer, not {value!r}.")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, not {value}.")
