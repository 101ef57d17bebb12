"""Reads a support set, in whatever form people hold their labelled images."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import PIL.Image
import torch
from datasets import ClassLabel, Dataset, Image
from transformers.image_processing_utils import BaseImageProcessor

from .class_names import find_label_problem
from .finite import MAX_PIXEL_VALUE, find_bad_image
from .images import IMAGE_SUFFIXES, ImageError, decode, process_images, why_no_image


class SupportSetError(ValueError):
    """A support set that nothing can be learned from; the message says what is wrong and what to do."""


@dataclass(frozen=True)
class SupportSet:
    """Labelled images, ready for the backbone.

    Attributes:
        pixel_values: `(n, 3, height, width)` float32.
        labels: `(n,)` int64 in 0..n_way-1. Every class has an image.
        class_names: one name per class.
        skipped: what was left out and why, one line per file or image that was not read.
        names: what errors call the images; empty for tensors, whose images are numbered.
    """

    pixel_values: torch.Tensor
    labels: torch.Tensor
    class_names: list[str]
    skipped: tuple[str, ...] = ()
    names: tuple[str, ...] = ()

    @property
    def n_way(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    def to(self, device: torch.device, dtype: torch.dtype) -> SupportSet:
        """The support set with its tensors on a device and its pixel values in a precision."""
        return replace(self, pixel_values=self.pixel_values.to(device, dtype), labels=self.labels.to(device))


class _LabelledImage(NamedTuple):
    """An image in any form that `decode` reads, the name that errors call it, and the number of its class."""

    image: Any
    name: str
    label: int


def read_support(support: Any, processor: BaseImageProcessor | None, *, skip_bad: bool = False) -> SupportSet:
    """Read and check a support set.

    Args:
        support: a `datasets.Dataset` with an image and a label column; a mapping of class name to a list of images
            (paths, bytes, PIL images, arrays); a folder with one folder of images per class, see `image_folder`; a
            `SupportSet`; or a tuple `(pixel_values, labels)` of tensors `(n, 3, height, width)` and `(n,)`, used as
            they are.
        processor: the backbone's image processor. Tensors need none.
        skip_bad: leave out images that cannot be read instead of raising an error.

    Raises:
        SupportSetError: there are no images, an empty class, fewer than two classes, class names that are empty, equal
            or not printable, labels that are negative, out of range, not integers or of another number than the images,
            or tensors of a wrong shape or with NaN, infinity or values beyond a million.
        ImageError: an image cannot be read (`skip_bad=False`).
        FileNotFoundError: the folder is not there.
    """
    if isinstance(support, SupportSet):
        return support
    if isinstance(support, tuple) and len(support) == 2 and isinstance(support[0], torch.Tensor):
        return _read_tensors(*support)
    left_out: list[str] = []
    if isinstance(support, Dataset):
        examples, class_names = _list_dataset(support)
    elif isinstance(support, Mapping):
        examples, class_names = _list_mapping(support)
    elif isinstance(support, str | os.PathLike):
        found = image_folder(support)
        examples, class_names = _list_mapping(found.classes)
        left_out += found.skipped
    else:
        raise SupportSetError(
            f"a {type(support).__name__} is not a support set: give a datasets.Dataset, a dict of class name to "
            "images, a folder with one folder per class, or a tuple (pixel_values, labels) of tensors."
        )
    if processor is None:
        raise SupportSetError("images need an image processor: pass processor=, or give tensors of pixel values.")
    _require_images([example.label for example in examples], class_names, left_out)
    problem = find_label_problem(class_names)
    if problem is not None:
        raise SupportSetError(problem)
    decoded: list[_LabelledImage] = []
    pixel_values = process_images(_decode_examples(examples, skip_bad, decoded, left_out), processor)
    labels = [example.label for example in decoded]
    _require_images(labels, class_names, left_out)
    names = tuple(example.name for example in decoded)
    return SupportSet(pixel_values, torch.tensor(labels), class_names, tuple(left_out), names)


def _decode_examples(
    examples: list[_LabelledImage], skip_bad: bool, decoded: list[_LabelledImage], left_out: list[str]
) -> Iterator[PIL.Image.Image]:
    """Yield images as RGB, noting in `decoded` which could be read and in `left_out` why others could not."""
    for example in examples:
        try:
            picture = decode(example.image, example.name)
        except ImageError as error:
            if not skip_bad:
                raise
            left_out.append(str(error))
            continue
        decoded.append(example)
        yield picture


@dataclass(frozen=True)
class ImageFolder:
    """The files of a folder with one folder of images per class.

    Attributes:
        classes: the image files of each class, sorted.
        skipped: what is not read and why, one line per file.
    """

    classes: dict[str, list[Path]]
    skipped: list[str]


def image_folder(folder: str | os.PathLike) -> ImageFolder:
    """List the image files of each class folder of `folder`.

    A file is an image if its name ends like one (`IMAGE_SUFFIXES`) or if its content begins like one. All other files
    are named in `skipped`. Hidden files and those that file managers leave behind (Thumbs.db, desktop.ini) are passed
    over.

    Raises:
        FileNotFoundError: the folder is not there.
        SupportSetError: it has no folders in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder. Give a folder with one folder of images per class.")
    classes: dict[str, list[Path]] = {}
    skipped: list[str] = []
    for path in _list_visible(folder):
        if path.is_dir():
            classes[path.name] = _list_images(path, skipped)
        else:
            skipped.append(f"{path} is in no folder of a class.")
    if not classes:
        raise SupportSetError(f"{folder} has no folders in it: put the images of each class in a folder of its name.")
    return ImageFolder(classes, skipped)


#: Files that file managers leave behind.
_LITTER = ("thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r")


def _list_visible(folder: Path) -> list[Path]:
    """What is in a folder, sorted, without hidden files and litter."""
    paths = []
    for path in sorted(folder.iterdir()):
        if not path.name.startswith(".") and path.name.lower() not in _LITTER:
            paths.append(path)
    return paths


def _list_images(folder: Path, skipped: list[str]) -> list[Path]:
    """The images in a folder. Why other files are none is appended to `skipped`."""
    paths = []
    for path in _list_visible(folder):
        if path.suffix.lower() in IMAGE_SUFFIXES:
            paths.append(path)
            continue
        reason = why_no_image(path)
        if reason is None:
            paths.append(path)
        else:
            skipped.append(reason)
    return paths


def _list_mapping(support: Mapping) -> tuple[list[_LabelledImage], list[str]]:
    """The images of a mapping of class name to images, and the class names."""
    examples = []
    for label, (class_name, images) in enumerate(support.items()):
        if not isinstance(images, list | tuple):
            raise SupportSetError(f"class {class_name!r} holds a {type(images).__name__}: give a list of images.")
        for i, image in enumerate(images):
            name = str(image) if isinstance(image, str | Path) else f"image {i} of class {class_name!r}"
            examples.append(_LabelledImage(image, name, label))
    return examples, [str(name) for name in support]


def _list_dataset(support: Dataset) -> tuple[list[_LabelledImage], list[str]]:
    """The images of a dataset, and the names of the classes that occur in it, in the order of their labels."""
    image_column, label_column = find_columns(support)
    support = support.with_format(None)  # plain numbers and bytes, whatever format the dataset is set to
    values = support[label_column][:]
    feature = support.features[label_column]
    _require_labels(values, feature, label_column)
    classes = sorted(set(values))
    if isinstance(feature, ClassLabel):
        names = [feature.names[value] for value in classes]
    else:
        names = [str(value) for value in classes]
    position = {value: i for i, value in enumerate(classes)}
    records = support.cast_column(image_column, Image(decode=False))[image_column]
    examples = []
    for row, (record, value) in enumerate(zip(records, values, strict=True)):
        examples.append(_LabelledImage(record, f"row {row}", position[value]))
    return examples, names


def _require_labels(values: list, feature: Any, column: str) -> None:
    """Raise an error if a row has no label or one that the `ClassLabel` feature of the column does not know."""
    for row, value in enumerate(values):
        if isinstance(feature, ClassLabel):
            if value is None or not 0 <= value < feature.num_classes:
                raise SupportSetError(
                    f"row {row} has label {value}, out of range for the {feature.num_classes} classes of column "
                    f"{column!r}. Remove such rows or give them a class."
                )
        elif value is None:
            raise SupportSetError(f"row {row} has no label in column {column!r}. Remove such rows or give them one.")


def find_columns(dataset: Dataset) -> tuple[str, str]:
    """Names of the image column and of the label column.

    The first `Image()` feature holds the images. The first `ClassLabel` feature holds the labels, or else the column
    "label".

    Raises:
        ValueError: one of them is missing. The message lists the columns that are there.
    """
    image = label = None
    for name, feature in dataset.features.items():
        if image is None and isinstance(feature, Image):
            image = name
        if label is None and isinstance(feature, ClassLabel):
            label = name
    if label is None and "label" in dataset.features:
        label = "label"
    if image is None or label is None:
        missing = "image" if image is None else "label"
        raise ValueError(
            f"the dataset has no {missing} column: its columns are {dataset.features}. "
            "Cast one with dataset.cast_column('image', datasets.Image()) or ('label', datasets.ClassLabel(...))."
        )
    return image, label


_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def _read_tensors(pixel_values: torch.Tensor, labels: Any) -> SupportSet:
    """A support set of tensors. The labels are renumbered without gaps, and their numbers are the class names."""
    try:
        labels = torch.as_tensor(labels)
    except (TypeError, ValueError) as error:
        raise SupportSetError(f"labels are no tensor ({error}): give {len(pixel_values)} integers.") from error
    if pixel_values.ndim != 4 or pixel_values.shape[1] != 3 or not pixel_values.is_floating_point():
        raise SupportSetError(
            f"pixel_values are {pixel_values.dtype} of shape {tuple(pixel_values.shape)}: "
            "give floats of shape (n, 3, height, width)."
        )
    if len(pixel_values) == 0:
        _require_images([], [])
    if labels.ndim != 1 or len(labels) != len(pixel_values) or labels.dtype not in _INTEGERS:
        raise SupportSetError(
            f"labels are {labels.dtype} of shape {tuple(labels.shape)}: "
            f"give {len(pixel_values)} integers, one per image."
        )
    pixel_values = pixel_values.float()
    bad = find_bad_image(pixel_values)
    if bad is not None:
        raise SupportSetError(
            f"image {bad} has NaN or infinite pixels, or values beyond {MAX_PIXEL_VALUE:,.0f}. Remove or normalise it."
        )
    if int(labels.min()) < 0:
        raise SupportSetError(f"label {int(labels.min())} is out of range: labels are 0, 1, 2, ...")
    values, compact = labels.long().unique(return_inverse=True)
    class_names = [str(value) for value in values.tolist()]
    _require_images(compact.tolist(), class_names)
    return SupportSet(pixel_values, compact, class_names)


def _require_images(labels: list[int], class_names: list[str], skipped: list[str] | None = None) -> None:
    """Raise an error if a class has no images, or if there are fewer than two classes."""
    reasons = ""
    if skipped:
        more = f" and {len(skipped) - 5} more" if len(skipped) > 5 else ""
        reasons = f" Left out: {' '.join(skipped[:5])}{more}"
    if not labels:
        raise SupportSetError(
            f"the support set has no images. Give at least one image of each of two classes.{reasons}"
        )
    present = set(labels)
    for label, name in enumerate(class_names):
        if label not in present:
            raise SupportSetError(f"class {name!r} has no images. Give it at least one, or leave it out.{reasons}")
    if len(class_names) < 2:
        raise SupportSetError(
            f"there is only one class, {class_names[0]!r}. Give at least two: telling classes apart is the task."
        )
