"""Read a support set, in whatever form people hold their labelled images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from datasets import ClassLabel, Dataset, Image
from transformers.image_processing_utils import BaseImageProcessor

from .images import IMAGE_SUFFIXES, ImageError, decode


class SupportSetError(ValueError):
    """A support set that nothing can be learned from; the message says what is wrong with it and what to do."""


@dataclass(frozen=True)
class SupportSet:
    """Labelled images, ready for the backbone.

    Attributes:
        pixel_values: `(n, 3, height, width)` float32.
        labels: `(n,)` int64 in 0..n_way-1; every class has an image.
        class_names: one per class.
        skipped: what was left out because it could not be read, with the reason.
    """

    pixel_values: torch.Tensor
    labels: torch.Tensor
    class_names: list[str]
    skipped: tuple[str, ...] = ()

    @property
    def n_way(self) -> int:
        return len(self.class_names)

    def to(self, device: torch.device, dtype: torch.dtype) -> SupportSet:
        """The same with its tensors on a device and its pixel values in a precision."""
        return replace(self, pixel_values=self.pixel_values.to(device, dtype), labels=self.labels.to(device))


def read_support(support: object, processor: BaseImageProcessor | None, *, skip_bad: bool = False) -> SupportSet:
    """Read and check a support set.

    Args:
        support: a `datasets.Dataset` with an image and a label column; a mapping of class name to a list of images
            (paths, bytes, PIL images, arrays); a folder with one folder of images per class; a `SupportSet`; or a
            tuple `(pixel_values, labels)` of tensors `(n, 3, height, width)` and `(n,)`, taken as they are.
        processor: the backbone's image processor; only tensors can do without.
        skip_bad: leave out images that cannot be read instead of raising.

    Raises:
        SupportSetError: no images, an empty class, fewer than two classes, labels that are negative, out of range,
            not integers or of another number than the images, tensors of a wrong shape or with NaN or infinity.
        ImageError: an image that cannot be read (`skip_bad=False`).
        FileNotFoundError: the folder is not there.
    """
    if isinstance(support, SupportSet):
        return support
    if isinstance(support, tuple) and len(support) == 2 and isinstance(support[0], torch.Tensor):
        return _from_tensors(*support)
    if isinstance(support, Dataset):
        pairs, class_names = _from_dataset(support)
    elif isinstance(support, Mapping):
        pairs, class_names = _from_mapping(support)
    elif isinstance(support, str | Path):
        pairs, class_names = _from_mapping(image_folder(support))
    else:
        raise SupportSetError(
            f"a {type(support).__name__} is not a support set: give a datasets.Dataset, a dict of class name to "
            "images, a folder with one folder per class, or a tuple (pixel_values, labels) of tensors."
        )
    if processor is None:
        raise SupportSetError("images need an image processor: pass processor=, or give tensors of pixel values.")
    images, labels, skipped = [], [], []
    for image, name, label in pairs:
        try:
            images.append(decode(image, name))
            labels.append(label)
        except ImageError as error:
            if not skip_bad:
                raise
            skipped.append(str(error))
    _check(labels, class_names)
    pixel_values = processor(images, return_tensors="pt")["pixel_values"]
    return SupportSet(pixel_values, torch.tensor(labels), class_names, tuple(skipped))


def image_folder(folder: str | Path) -> dict[str, list[Path]]:
    """Image files of each class folder of `folder`, sorted; hidden files and other kinds of files are passed over.

    Raises:
        FileNotFoundError: the folder is not there.
        SupportSetError: it has no folders in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder. Give a folder with one folder of images per class.")
    classes = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not classes:
        raise SupportSetError(f"{folder} has no folders in it: put the images of each class in a folder of its name.")
    return {
        c.name: sorted(p for p in c.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith("."))
        for c in classes
    }


def _from_mapping(support: Mapping) -> tuple[list[tuple[object, str, int]], list[str]]:
    class_names = [str(name) for name in support]
    pairs = []
    for label, (name, images) in enumerate(support.items()):
        if not isinstance(images, list | tuple):
            raise SupportSetError(f"class {name!r} holds a {type(images).__name__}: give a list of images.")
        for i, image in enumerate(images):
            described = str(image) if isinstance(image, str | Path) else f"image {i} of class {name!r}"
            pairs.append((image, described, label))
    return pairs, class_names


def _from_dataset(support: Dataset) -> tuple[list[tuple[object, str, int]], list[str]]:
    image_column, label_column = find_columns(support)
    support = support.with_format(None)  # plain numbers and bytes, whatever the dataset is set to give
    values = support[label_column][:]
    feature = support.features[label_column]
    if isinstance(feature, ClassLabel):
        bad = [i for i, v in enumerate(values) if v is None or not 0 <= v < feature.num_classes]
        if bad:
            raise SupportSetError(
                f"row {bad[0]} has label {values[bad[0]]}, out of range for the {feature.num_classes} classes of "
                f"column {label_column!r}. Remove such rows or give them a class."
            )
        names = {v: feature.names[v] for v in sorted(set(values))}
    else:
        if any(v is None for v in values):
            raise SupportSetError(f"row {values.index(None)} has no label in column {label_column!r}.")
        names = {v: str(v) for v in sorted(set(values))}
    position = {value: i for i, value in enumerate(names)}
    records = support.cast_column(image_column, Image(decode=False))[image_column]
    pairs = [(r, f"row {i}", position[v]) for i, (r, v) in enumerate(zip(records, values, strict=True))]
    return pairs, list(names.values())


def find_columns(dataset: Dataset) -> tuple[str, str]:
    """Names of the image and of the label column: the first `Image()` feature and the `ClassLabel` (or `label`).

    Raises:
        ValueError: one of them is missing; the message lists the columns there are.
    """
    image = next((name for name, feature in dataset.features.items() if isinstance(feature, Image)), None)
    labels = [name for name, feature in dataset.features.items() if isinstance(feature, ClassLabel)]
    label = labels[0] if labels else ("label" if "label" in dataset.features else None)
    if image is None or label is None:
        missing = "image" if image is None else "label"
        raise ValueError(
            f"the dataset has no {missing} column: its columns are {dataset.features}. "
            "Cast one with dataset.cast_column('image', datasets.Image()) or ('label', datasets.ClassLabel(...))."
        )
    return image, label


_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def _from_tensors(pixel_values: torch.Tensor, labels: torch.Tensor) -> SupportSet:
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
        _check([], [])
    if labels.ndim != 1 or len(labels) != len(pixel_values) or labels.dtype not in _INTEGERS:
        raise SupportSetError(
            f"labels are {labels.dtype} of shape {tuple(labels.shape)}: "
            f"give {len(pixel_values)} integers, one per image."
        )
    finite = torch.isfinite(pixel_values).flatten(1).all(dim=1)
    if not finite.all():
        raise SupportSetError(f"image {int((~finite).nonzero()[0])} has NaN or infinite pixels. Remove it.")
    if int(labels.min()) < 0:
        raise SupportSetError(f"label {int(labels.min())} is out of range: labels are 0, 1, 2, ...")
    values, compact = labels.long().unique(return_inverse=True)
    class_names = [str(int(value)) for value in values]
    _check(compact.tolist(), class_names)
    return SupportSet(pixel_values.float(), compact, class_names)


def _check(labels: list[int], class_names: list[str]) -> None:
    if not labels:
        raise SupportSetError("the support set has no images. Give at least one image of each of two classes.")
    present = set(labels)
    empty = [name for i, name in enumerate(class_names) if i not in present]
    if empty:
        raise SupportSetError(f"class {empty[0]!r} has no images. Give it at least one, or leave it out.")
    if len(class_names) < 2:
        raise SupportSetError(
            f"there is only one class, {class_names[0]!r}. Give at least two: telling classes apart is the task."
        )
