"""Labelled image datasets, decoded once into memory at the backbone's resolution."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Image, load_dataset, load_from_disk
from transformers.image_processing_utils import BaseImageProcessor

from ..modeling.dataset_images import find_columns
from ..modeling.images import decode, process_images

#: How many rows are read at a time.
_ROWS_AT_ONCE = 512


@dataclass(frozen=True)
class Domain:
    """A labelled image dataset in memory.

    Attributes:
        name: what reports call it.
        images: `(n, 3, height, width)` uint8, resized and cropped as the image processor does.
        labels: `(n,)` int64, indices into `class_names`.
        class_names: one name per class.
    """

    name: str
    images: torch.Tensor
    labels: torch.Tensor
    class_names: list[str]

    def __len__(self) -> int:
        return len(self.labels)

    def class_sizes(self) -> torch.Tensor:
        """How many images each class has, `(n_classes,)`; empty classes are included."""
        return torch.bincount(self.labels, minlength=len(self.class_names))

    def classes_with(self, n_images: int) -> list[int]:
        """The classes that have at least `n_images` images, ascending."""
        return torch.nonzero(self.class_sizes() >= n_images).flatten().tolist()

    def indices_by_class(self) -> list[torch.Tensor]:
        """The image indices of each class, ascending; empty classes are included."""
        return list(self.labels.argsort(stable=True).split(self.class_sizes().tolist()))

    def select_classes(self, classes: list[int], name: str | None = None) -> Domain:
        """The images of some classes; `classes[i]` becomes class `i` of the new domain."""
        new_labels = torch.full((len(self.class_names),), -1)
        new_labels[torch.tensor(classes)] = torch.arange(len(classes))
        labels = new_labels[self.labels]
        selected = labels >= 0
        class_names = [self.class_names[c] for c in classes]
        return Domain(name or self.name, self.images[selected], labels[selected], class_names)


def open_dataset(source: str | Path | Dataset, split: str = "train") -> Dataset:
    """Open a `datasets.Dataset`, a Parquet file, a `save_to_disk` folder, an image folder or a Hub dataset.

    Raises:
        FileNotFoundError: `source` looks like a path, but nothing is there.
    """
    if isinstance(source, Dataset):
        return source
    path = Path(source)
    if path.suffix == ".parquet":
        if not path.is_file():
            raise FileNotFoundError(f"{path} is not a file. Check the path of the dataset.")
        return Dataset.from_parquet(str(path))
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        saved = load_from_disk(str(path))
        return saved[split] if isinstance(saved, DatasetDict) else saved
    if path.is_dir():
        return load_dataset("imagefolder", data_dir=str(path), split=split)
    if path.is_absolute() or str(source).startswith("."):
        raise FileNotFoundError(f"{path} does not exist. Give a Parquet file, an image folder or a Hub dataset id.")
    return load_dataset(str(source), split=split)


def load_domain(
    source: str | Path | Dataset,
    processor: BaseImageProcessor,
    *,
    name: str | None = None,
    max_per_class: int | None = None,
) -> Domain:
    """Decode a labelled image dataset into a `Domain`.

    Args:
        source: see `open_dataset`.
        processor: the backbone's image processor. Only its resize and crop are applied here, so that a pixel value
            takes one byte of memory; see `normalise` for the rest.
        name: of the domain; by default that of the file, folder or Hub dataset.
        max_per_class: keep only the first so many images of each class.

    Raises:
        FileNotFoundError: see `open_dataset`.
        ValueError: the dataset has no rows, no image column or no label column, a row has none of the classes as its
            label, or an image cannot be decoded. The message names the row.
    """
    if not name:
        name = "dataset" if isinstance(source, Dataset) else Path(source).stem
    dataset = open_dataset(source).with_format(None)
    image_column, label_column = find_columns(dataset)
    if not isinstance(dataset.features[label_column], ClassLabel):
        dataset = dataset.class_encode_column(label_column)
    class_names = dataset.features[label_column].names
    labels = _check_labels(dataset[label_column][:], len(class_names), name)
    rows = torch.arange(len(labels))
    if max_per_class is not None:
        rows = _first_of_each_class(labels, max_per_class)
    return Domain(name, _decode_rows(dataset, image_column, rows, processor, name), labels[rows], class_names)


def _check_labels(values: list[int | None], n_classes: int, name: str) -> torch.Tensor:
    """The labels `(n,)` of a dataset."""
    if not values:
        raise ValueError(f"{name} has no rows.")
    for row, value in enumerate(values):
        if value is None or not 0 <= value < n_classes:
            raise ValueError(f"row {row} of {name} has label {value}, none of the {n_classes} classes.")
    return torch.tensor(values)


def _first_of_each_class(labels: torch.Tensor, n_images: int) -> torch.Tensor:
    """The first `n_images` rows of each class, ascending."""
    rows = [torch.nonzero(labels == label).flatten()[:n_images] for label in labels.unique()]
    return torch.cat(rows).sort().values


def _decode_rows(
    dataset: Dataset, image_column: str, rows: torch.Tensor, processor: BaseImageProcessor, name: str
) -> torch.Tensor:
    """The images of some rows, `(n, 3, height, width)` uint8."""
    # Undecoded, so that an image that cannot be read is met here, where its row is known.
    dataset = dataset.cast_column(image_column, Image(decode=False))
    chunks = []
    for chunk in rows.split(_ROWS_AT_ONCE):
        records = dataset.select(chunk.tolist())[image_column]
        pictures = (decode(record, f"row {row} of {name}") for row, record in zip(chunk.tolist(), records, strict=True))
        chunks.append(resize_images(pictures, processor))
    return torch.cat(chunks)


def resize_images(pictures: Iterable[PIL.Image.Image], processor: BaseImageProcessor) -> torch.Tensor:
    """RGB images as `(n, 3, height, width)` uint8, resized and cropped as `processor` does."""
    return process_images(pictures, processor, do_rescale=False, do_normalize=False).byte()


def normalise(images: torch.Tensor, processor: BaseImageProcessor) -> torch.Tensor:
    """The rest of the processor's work: pixels `(n, 3, h, w)` in 0..255 become what the backbone expects, float32."""
    settings: Any = processor  # transformers declares these attributes on no class that all processors share
    mean = torch.tensor(settings.image_mean, device=images.device).view(1, 3, 1, 1)
    std = torch.tensor(settings.image_std, device=images.device).view(1, 3, 1, 1)
    return (images.float() * settings.rescale_factor - mean) / std


def join_domains(domains: list[Domain], name: str) -> Domain:
    """Domains with the same class names as one: for instance several files of one dataset.

    Raises:
        ValueError: the class names differ.
    """
    first = domains[0]
    for other in domains[1:]:
        if other.class_names != first.class_names:
            raise ValueError(f"{other.name} and {first.name} have different classes and cannot be joined.")
    images = torch.cat([domain.images for domain in domains])
    labels = torch.cat([domain.labels for domain in domains])
    return Domain(name, images, labels, first.class_names)
