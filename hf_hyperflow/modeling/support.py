"""Reads a support set, in whatever form people hold their labelled images."""

from __future__ import annotations

import operator
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.image_processing_utils import BaseImageProcessor

from .class_names import find_label_problem
from .dataset_images import find_columns, get_split, is_dataset, iterate_rows, list_class_names
from .finite import MAX_PIXEL_VALUE, find_bad_image
from .images import IMAGE_SUFFIXES, NamedImage, decode_all, is_one_image, process_images, why_no_image


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


#: What a support set can be.
_FORMS = (
    "Give a datasets.Dataset, a dict of class name to images or to a folder, a folder with one folder per class, pairs "
    "(image, label), or a tuple (pixel_values, labels) of tensors."
)


@dataclass(frozen=True)
class LabelledImage(NamedImage):
    """An image, its name and the number of its class."""

    label: int


def read_support(support: Any, processor: BaseImageProcessor | None, *, skip_bad: bool = False) -> SupportSet:
    """Read and check a support set.

    Args:
        support: one of

            - a `datasets.Dataset`, streamed or not, with an image and a label column, or a dict of its only split;
            - a mapping of class name to images: an iterable of them (paths, bytes, PIL images, arrays) or a folder;
            - a folder with one folder of images per class, see `image_folder`;
            - anything that yields pairs `(image, label)`; a label is a name or an integer;
            - a tuple `(pixel_values, labels)` of tensors `(n, 3, height, width)` and `(n,)`, used as they are;
            - a `SupportSet`.
        processor: the backbone's image processor. Tensors need none.
        skip_bad: leave out images that cannot be read instead of raising an error.

    Raises:
        SupportSetError: there are no images, an empty class, fewer than two classes, class names that are empty, equal
            or not printable, labels that are negative, out of range, not integers or of another number than the images,
            or tensors of a wrong shape or with NaN, infinity or values beyond a million.
        ValueError: a dataset lacks a column, or has several splits, which are named.
        ImageError: an image cannot be read (`skip_bad=False`).
        FileNotFoundError: the folder is not there.
    """
    if isinstance(support, SupportSet):
        return support
    if isinstance(support, tuple) and len(support) == 2 and isinstance(support[0], torch.Tensor):
        return _read_tensors(*support)
    left_out: list[str] = []
    examples, class_names = _list_examples(support, left_out)
    if processor is None:
        raise SupportSetError("images need an image processor: pass processor=, or give tensors of pixel values.")
    _require_images([example.label for example in examples], class_names, left_out)
    problem = find_label_problem(class_names)
    if problem is not None:
        raise SupportSetError(problem)
    read: list[int] = []
    pixel_values = process_images(decode_all(examples, read, left_out if skip_bad else None), processor)
    labels = [examples[number].label for number in read]
    _require_images(labels, class_names, left_out)
    names = tuple(examples[number].name for number in read)
    return SupportSet(pixel_values, torch.tensor(labels), class_names, tuple(left_out), names)


def _list_examples(support: Any, left_out: list[str]) -> tuple[list[LabelledImage], list[str]]:
    """The images of a support set in any form but tensors, and the class names."""
    if is_dataset(support):
        return _list_dataset(support)
    if isinstance(support, Mapping):
        return list_mapping(support, left_out)
    if isinstance(support, str | os.PathLike):
        found = image_folder(support)
        left_out += found.skipped
        return list_mapping(found.classes, left_out)
    if isinstance(support, torch.Tensor | np.ndarray) or is_one_image(support):
        raise SupportSetError(f"a {type(support).__name__} is not a support set. {_FORMS}")
    return _list_pairs(support)


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
        SupportSetError: it has no folders in it, or the folders of the classes lie one folder deeper.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder. Give a folder with one folder of images per class.")
    classes: dict[str, list[Path]] = {}
    skipped: list[str] = []
    for path in list_visible(folder):
        if path.is_dir():
            classes[path.name] = _list_images(path, skipped)
        else:
            skipped.append(f"{path} is in no folder of a class.")
    if (folder / MACOS_FOLDER).is_dir():
        skipped.append(f"{folder / MACOS_FOLDER} is no class: macOS puts it into zip files.")
    if not classes:
        raise SupportSetError(f"{folder} has no folders in it: put the images of each class in a folder of its name.")
    _require_flat(folder, classes)
    return ImageFolder(classes, skipped)


def _require_flat(folder: Path, classes: dict[str, list[Path]]) -> None:
    """Raise an error if the only folder of a class has no images but folders, as after unpacking a zip file."""
    (name, images), *others = classes.items()
    inner = folder / name
    if others or images:
        return
    if any(path.is_dir() for path in list_visible(inner)):
        raise SupportSetError(
            f"{folder} has a single folder, {inner}, which has no images but folders. If those are the classes, give "
            f"{inner}."
        )


#: What macOS puts into zip files beside the files that were chosen.
MACOS_FOLDER = "__MACOSX"

#: Files and folders that file managers leave behind.
_LITTER = ("thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", MACOS_FOLDER.lower())


def list_visible(folder: Path) -> list[Path]:
    """What is in a folder, sorted, without hidden files and litter."""
    paths = []
    for path in sorted(folder.iterdir()):
        if not path.name.startswith(".") and path.name.lower() not in _LITTER:
            paths.append(path)
    return paths


def _list_images(folder: Path, skipped: list[str]) -> list[Path]:
    """The images in a folder. Why other files are none is appended to `skipped`."""
    paths = []
    for path in list_visible(folder):
        if path.suffix.lower() in IMAGE_SUFFIXES:
            paths.append(path)
            continue
        if path.is_dir():
            reason: str | None = f"{path} is a folder in the folder of a class: what is in it is not read."
        else:
            reason = why_no_image(path)
        if reason is None:
            paths.append(path)
        else:
            skipped.append(reason)
    return paths


def list_mapping(support: Mapping, left_out: list[str]) -> tuple[list[LabelledImage], list[str]]:
    """The images of a mapping of class name to images or to a folder of images, and the class names.

    Args:
        support: the mapping.
        left_out: why files of the folders are no images is appended to it.

    Raises:
        SupportSetError: a value is neither a folder nor several images.
    """
    examples = []
    for label, (class_name, images) in enumerate(support.items()):
        if isinstance(images, str | os.PathLike) and os.path.isdir(images):
            images = _list_images(Path(images), left_out)
        elif isinstance(images, str | os.PathLike):
            raise SupportSetError(f"class {class_name!r} holds {str(images)!r}: there is no such folder of images.")
        elif isinstance(images, Mapping) or is_dataset(images) or is_one_image(images):
            raise SupportSetError(
                f"class {class_name!r} holds a {type(images).__name__}: give a list of images, or a folder of them."
            )
        for i, image in enumerate(images):
            name = str(image) if isinstance(image, str | Path) else f"image {i} of class {class_name!r}"
            examples.append(LabelledImage(image, name, label))
    return examples, [str(name) for name in support]


def _list_dataset(support: Any) -> tuple[list[LabelledImage], list[str]]:
    """The images of a dataset, and the names of the classes that occur in it, in the order of their labels."""
    dataset = get_split(support)
    image_column, label_column = find_columns(dataset)
    rows = list(iterate_rows(dataset, image_column, label_column))
    values = [row[label_column] for row in rows]
    class_names = list_class_names(dataset, label_column)
    _require_labels(values, class_names, label_column)
    classes = sorted(set(values))
    if class_names is None:
        names = [str(value) for value in classes]
    else:
        names = [class_names[value] for value in classes]
    position = {value: i for i, value in enumerate(classes)}
    examples = []
    for number, row in enumerate(rows):
        examples.append(LabelledImage(row[image_column], f"row {number}", position[row[label_column]]))
    return examples, names


def read_pair(item: Any, number: int) -> tuple[Any, str | int] | None:
    """An item as an image and its label, a name or a number; None if it is no pair.

    Raises:
        SupportSetError: it is a pair, but its second part is no label.
    """
    if not isinstance(item, tuple | list) or len(item) != 2:
        return None
    image, label = item
    if isinstance(label, str):
        return image, str(label)
    try:
        return image, int(operator.index(label))  # also of numpy's and torch's integers
    except TypeError:
        kind = type(label).__name__
        raise SupportSetError(f"the label of image {number} is a {kind}: give a name or an integer.") from None


def name_image(image: Any, number: int) -> str:
    """What errors call an image that was given without a name: its path or its number."""
    return str(image) if isinstance(image, str | Path) else f"image {number}"


def _list_pairs(support: Iterable) -> tuple[list[LabelledImage], list[str]]:
    """The images of pairs `(image, label)`, and the names of the classes, in the order of their labels."""
    pairs = []
    for number, item in enumerate(support):
        pair = read_pair(item, number)
        if pair is None:
            raise SupportSetError(f"item {number} is a {type(item).__name__}, not a pair (image, label). {_FORMS}")
        pairs.append(pair)
    labels = {label for _, label in pairs}
    if len({type(label) for label in labels}) > 1:
        raise SupportSetError("some labels are names and others are integers: give one kind of them.")
    classes = sorted(labels)
    position = {label: i for i, label in enumerate(classes)}
    examples = []
    for number, (image, label) in enumerate(pairs):
        examples.append(LabelledImage(image, name_image(image, number), position[label]))
    return examples, [str(label) for label in classes]


def _require_labels(values: list, class_names: list[str] | None, column: str) -> None:
    """Raise an error if a row has no label, or one for which a `ClassLabel` column has no name."""
    for row, value in enumerate(values):
        if value is None and class_names is None:
            raise SupportSetError(f"row {row} has no label in column {column!r}. Remove such rows or give them one.")
        if class_names is not None and (value is None or not 0 <= value < len(class_names)):
            raise SupportSetError(
                f"row {row} has label {value}, out of range for the {len(class_names)} classes of column "
                f"{column!r}. Remove such rows or give them a class."
            )


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
