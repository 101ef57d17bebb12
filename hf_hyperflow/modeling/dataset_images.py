"""Images and labels of the package `datasets`, row by row."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from transformers.utils import is_datasets_available

if is_datasets_available():  # where it is not, images in other forms are still read
    from datasets import ClassLabel, Dataset, DatasetDict, Image, IterableDataset, IterableDatasetDict


def is_dataset(images: Any) -> bool:
    """Whether something is a dataset, streamed or not, or a dict of the splits of one."""
    if not is_datasets_available():
        return False
    return isinstance(images, Dataset | IterableDataset | DatasetDict | IterableDatasetDict)


def get_split(dataset: Any) -> Dataset | IterableDataset:
    """The only split of a dict of splits. A dataset is returned as it is.

    Raises:
        ValueError: there are several splits, which the message names, or none.
    """
    if not isinstance(dataset, DatasetDict | IterableDatasetDict):
        return dataset
    splits = [repr(str(name)) for name in dataset]
    if len(splits) == 1:
        return next(iter(dataset.values()))
    if not splits:
        raise ValueError(f"the {type(dataset).__name__} has no splits: give a dataset.")
    raise ValueError(
        f"the {type(dataset).__name__} has {len(splits)} splits, {', '.join(splits)}: "
        f"give one of them, like dataset[{splits[0]}]."
    )


def iterate_rows(dataset: Dataset | IterableDataset, image_column: str, *columns: str) -> Iterator[dict[str, Any]]:
    """Yield rows of these columns as plain values, whatever format the dataset is set to, their images undecoded."""
    plain = dataset.with_format(None).select_columns([image_column, *columns])
    yield from plain.cast_column(image_column, Image(decode=False))


def find_image_column(dataset: Dataset | IterableDataset) -> str:
    """Name of the first column with an `Image()` feature.

    Raises:
        ValueError: there is none, or the columns of a streamed dataset are not known.
    """
    if dataset.features is None:
        raise ValueError("the columns of this streamed dataset are not known: pass features= where it is made.")
    for name, feature in dataset.features.items():
        if isinstance(feature, Image):
            return name
    raise _missing("image", dataset)


def find_columns(dataset: Dataset | IterableDataset) -> tuple[str, str]:
    """Names of the image column and of the label column.

    The first `Image()` feature holds the images. The first `ClassLabel` feature holds the labels, or else the column
    "label".

    Raises:
        ValueError: one of them is missing. The message lists the columns that are there.
    """
    image_column = find_image_column(dataset)
    for name, feature in dataset.features.items():
        if isinstance(feature, ClassLabel):
            return image_column, name
    if "label" in dataset.features:
        return image_column, "label"
    raise _missing("label", dataset)


def list_class_names(dataset: Dataset | IterableDataset, label_column: str) -> list[str] | None:
    """The names that a `ClassLabel()` column has for its labels 0, 1, 2, ...; None for a column of another kind."""
    feature = dataset.features[label_column]
    return feature.names if isinstance(feature, ClassLabel) else None


def _missing(column: str, dataset: Dataset | IterableDataset) -> ValueError:
    return ValueError(
        f"the dataset has no {column} column: its columns are {dataset.features}. "
        "Cast one with dataset.cast_column('image', datasets.Image()) or ('label', datasets.ClassLabel(...))."
    )
