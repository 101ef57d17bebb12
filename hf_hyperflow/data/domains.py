"""Labelled image datasets, decoded once into memory at the backbone's resolution."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import ClassLabel, Dataset, DatasetDict, Image, load_dataset, load_from_disk
from transformers.image_processing_utils import BaseImageProcessor

from ..modeling.images import decode
from ..modeling.support import find_columns


@dataclass(frozen=True)
class Domain:
    """A labelled image dataset in memory.

    Attributes:
        name: how reports call it.
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

    def indices_by_class(self) -> list[torch.Tensor]:
        """Image indices of each class, ascending; empty classes included."""
        return [torch.nonzero(self.labels == c).flatten() for c in range(len(self.class_names))]

    def with_classes(self, keep: list[int], name: str | None = None) -> Domain:
        """The same images restricted to the classes `keep`, relabelled 0..len(keep)-1."""
        new_label = torch.full((len(self.class_names),), -1)
        new_label[torch.tensor(keep)] = torch.arange(len(keep))
        labels = new_label[self.labels]
        kept = labels >= 0
        return Domain(name or self.name, self.images[kept], labels[kept], [self.class_names[c] for c in keep])


def open_dataset(source: str | Path | Dataset, split: str = "train") -> Dataset:
    """Open a `datasets.Dataset`, a Parquet file, a `save_to_disk` folder, an image folder or a Hub dataset.

    Raises:
        FileNotFoundError: `source` looks like a path and is not there.
    """
    if isinstance(source, Dataset):
        return source
    path = Path(source)
    if path.suffix == ".parquet":
        if not path.is_file():
            raise FileNotFoundError(f"{path} is not a file. Check the path of the dataset.")
        return Dataset.from_parquet(str(path))
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        found = load_from_disk(str(path))
        return found[split] if isinstance(found, DatasetDict) else found
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
        processor: the backbone's image processor; only its resize and crop are applied, so that one byte per
            value is held in memory.
        name: defaults to the file's or dataset's name.
        max_per_class: keep the first so many images of every class.

    Raises:
        ValueError: no rows, no image or label column, a label that is none of the classes, or an image that cannot
            be decoded (the row is named).
    """
    name = name or (Path(source).stem if isinstance(source, str | Path) else "dataset")
    dataset = open_dataset(source).with_format(None)
    image_column, label_column = find_columns(dataset)
    if not isinstance(dataset.features[label_column], ClassLabel):
        dataset = dataset.class_encode_column(label_column)
    class_names = dataset.features[label_column].names
    values = dataset[label_column][:]
    if not values:
        raise ValueError(f"{name} has no rows.")
    bad = [i for i, value in enumerate(values) if value is None or not 0 <= value < len(class_names)]
    if bad:
        raise ValueError(f"row {bad[0]} of {name} has label {values[bad[0]]}, none of the {len(class_names)} classes.")
    labels = torch.tensor(values)
    rows = torch.arange(len(labels))
    if max_per_class is not None:
        rows = torch.cat([torch.nonzero(labels == c).flatten()[:max_per_class] for c in range(len(class_names))])
        rows = rows.sort().values
    dataset = dataset.cast_column(image_column, Image(decode=False))
    chunks = []
    for start in range(0, len(rows), 512):
        chosen = rows[start : start + 512].tolist()
        records = dataset.select(chosen)[image_column]
        pictures = [decode(record, f"row {row} of {name}") for row, record in zip(chosen, records, strict=True)]
        chunks.append(resize_images(pictures, processor))
    return Domain(name, torch.cat(chunks), labels[rows], class_names)


def resize_images(pictures: list, processor: BaseImageProcessor) -> torch.Tensor:
    """PIL images to uint8 `(n, 3, height, width)`, resized and cropped as `processor` would."""
    return processor(pictures, do_rescale=False, do_normalize=False, return_tensors="pt")["pixel_values"].byte()


def normalise(images: torch.Tensor, processor: BaseImageProcessor) -> torch.Tensor:
    """The rest of the processor's work: uint8 `(n, 3, h, w)` to the float pixel values the backbone expects."""
    mean = torch.tensor(processor.image_mean, device=images.device).view(1, 3, 1, 1)
    std = torch.tensor(processor.image_std, device=images.device).view(1, 3, 1, 1)
    return (images.float() * processor.rescale_factor - mean) / std


def join_domains(domains: list[Domain], name: str) -> Domain:
    """Domains with the same class names as one (the other images of the same classes, say).

    Raises:
        ValueError: the class names differ.
    """
    first = domains[0]
    for other in domains[1:]:
        if other.class_names != first.class_names:
            raise ValueError(f"{other.name} and {first.name} have different classes and cannot be joined.")
    return Domain(
        name, torch.cat([d.images for d in domains]), torch.cat([d.labels for d in domains]), first.class_names
    )
