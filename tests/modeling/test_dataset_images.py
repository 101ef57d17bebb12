"""Datasets, as `AdaptedTask` and `HyperFlowAdapter.adapt` take them; bad labels are in test_support."""

from __future__ import annotations

import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, IterableDataset, IterableDatasetDict


@pytest.fixture
def dataset(support):
    images = [image for shots in support.values() for image in shots]
    features = Features({"image": Image(), "label": ClassLabel(names=list(support))})
    return Dataset.from_dict({"image": images, "label": [0, 0, 1, 1, 2, 2]}, features=features)


def test_streams_and_dicts_of_one_split_adapt_as_the_dataset(adapter, backbone, support, dataset):
    expected = adapter.adapt(backbone, support)
    stream = dataset.to_iterable_dataset(num_shards=2)
    for form in (dataset, DatasetDict(train=dataset), stream, IterableDatasetDict(train=stream)):
        task = adapter.adapt(backbone, form)
        assert task.class_names == expected.class_names
        assert torch.equal(task.theta, expected.theta)


def test_several_splits_are_named(adapter, backbone, support, dataset):
    task = adapter.adapt(backbone, support)
    stream = dataset.to_iterable_dataset()
    for kind, form in (("DatasetDict", dataset), ("IterableDatasetDict", stream)):
        splits = (DatasetDict if kind == "DatasetDict" else IterableDatasetDict)(train=form, test=form)
        message = rf"the {kind} has 2 splits, 'train', 'test': give one of them, like dataset\['train'\]"
        for use in (task, task.predict, task.scores, lambda splits: adapter.adapt(backbone, splits)):
            with pytest.raises(ValueError, match=message):
                use(splits)
    with pytest.raises(ValueError, match="the DatasetDict has no splits"):
        task.predict(DatasetDict())


def test_columns_that_are_missing_or_not_known(adapter, backbone, support, dataset):
    task = adapter.adapt(backbone, support)
    with pytest.raises(ValueError, match=r"the dataset has no image column: its columns are .*label"):
        task.predict(dataset.remove_columns("image"))
    with pytest.raises(ValueError, match=r"the dataset has no label column: its columns are .*image"):
        adapter.adapt(backbone, dataset.remove_columns("label"))
    unknown = IterableDataset.from_generator(lambda: iter(dataset))
    with pytest.raises(ValueError, match="the columns of this streamed dataset are not known: pass features="):
        task.predict(unknown)
