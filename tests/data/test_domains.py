"""Labelled image datasets from any source, the processor's work on them, and what is said of bad ones."""

from __future__ import annotations

import numpy as np
import PIL.Image
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from transformers import ViTImageProcessorPil

from hf_hyperflow import ImageError
from hf_hyperflow.data.domains import Domain, join_domains, load_domain, normalise, open_dataset, resize_images
from hf_hyperflow.modeling.dataset_images import find_columns
from tests.helpers.tiny import picture, tiny_processor

PICTURES = [picture(i, size) for i, size in enumerate([(40, 30), (30, 44), (28, 28), (60, 60), (33, 90), (36, 36)])]
LABELS = [0, 1, 1, 0, 2, 1]
NAMES = ["cat", "dog", "owl"]


@pytest.fixture
def dataset():
    features = Features({"image": Image(), "label": ClassLabel(names=NAMES)})
    return Dataset.from_dict({"image": PICTURES, "label": LABELS}, features=features)


def test_a_parquet_file(dataset, processor, tmp_path):
    path = tmp_path / "animals.parquet"
    dataset.to_parquet(path)
    for source in (path, str(path)):
        domain = load_domain(source, processor)
        assert domain.name == "animals"
        assert domain.class_names == NAMES
        assert domain.labels.tolist() == LABELS
        assert torch.equal(domain.images, resize_images(PICTURES, processor))
    assert domain.images.dtype == torch.uint8
    assert len(domain) == 6


def test_a_dataset_in_memory_and_one_saved_to_disk(dataset, processor, tmp_path):
    expected = load_domain(dataset, processor, name="animals")
    assert expected.name == "animals"
    dataset.save_to_disk(tmp_path / "one")
    DatasetDict({"train": dataset, "test": dataset.select([0])}).save_to_disk(tmp_path / "two")
    for form in (dataset.with_format("torch"), dataset.with_format("numpy"), tmp_path / "one", tmp_path / "two"):
        domain = load_domain(form, processor)
        assert torch.equal(domain.images, expected.images)
        assert torch.equal(domain.labels, expected.labels)
        assert domain.class_names == NAMES
    assert len(open_dataset(tmp_path / "two", split="test")) == 1


def test_an_image_folder(dataset, processor, tmp_path):
    for i, (image, label) in enumerate(zip(PICTURES, LABELS, strict=True)):
        (tmp_path / "animals" / NAMES[label]).mkdir(parents=True, exist_ok=True)
        image.save(tmp_path / "animals" / NAMES[label] / f"{i}.png")
    domain = load_domain(tmp_path / "animals", processor)
    expected = load_domain(dataset, processor)
    assert domain.name == "animals"
    assert domain.class_names == NAMES
    order = np.argsort(LABELS, kind="stable")
    assert domain.labels.tolist() == [LABELS[i] for i in order]
    assert torch.equal(domain.images, expected.images[order])


@pytest.mark.parametrize("label", [Value("string"), Value("int64")])
def test_labels_that_are_no_class_labels(processor, label):
    values = [{0: "cat", 1: "dog", 2: "owl"}[i] if label.dtype == "string" else 10 + i for i in LABELS]
    features = Features({"picture": Image(), "label": label})
    domain = load_domain(Dataset.from_dict({"picture": PICTURES, "label": values}, features=features), processor)
    assert domain.labels.tolist() == LABELS
    assert domain.class_names == (NAMES if label.dtype == "string" else ["10", "11", "12"])


PROCESSORS = {
    "resize and crop": tiny_processor,
    "resize to a square": lambda: ViTImageProcessorPil(size={"height": 28, "width": 28}),
    "bicubic, other rescale": lambda: ViTImageProcessorPil(
        size={"height": 20, "width": 28},
        resample=3,
        rescale_factor=1 / 127.5,
        image_mean=[1, 1, 1],
        image_std=[1, 1, 1],
    ),
}


@pytest.mark.parametrize("make", PROCESSORS.values(), ids=PROCESSORS)
def test_resize_then_normalise_is_what_the_processor_does(make):
    processor = make()
    expected = processor(PICTURES, return_tensors="pt")["pixel_values"]
    images = resize_images(PICTURES, processor)
    assert images.dtype == torch.uint8
    for pixels in (images, images.float()):
        pixel_values = normalise(pixels, processor)
        assert pixel_values.dtype == expected.dtype == torch.float32
        torch.testing.assert_close(pixel_values, expected, rtol=0, atol=1e-6)


def test_max_per_class(dataset, processor):
    domain = load_domain(dataset, processor, max_per_class=1)
    assert domain.labels.tolist() == [0, 1, 2]
    assert torch.equal(domain.images, load_domain(dataset, processor).images[[0, 1, 4]])


def test_max_per_class_beyond_what_there_is(dataset, processor):
    assert torch.equal(load_domain(dataset, processor, max_per_class=9).images, load_domain(dataset, processor).images)


def test_more_than_a_chunk(processor):
    features = Features({"image": Image(), "label": ClassLabel(names=["a", "b"])})
    shades = [PIL.Image.new("L", (4, 4), i % 256) for i in range(515)]
    dataset = Dataset.from_dict({"image": shades, "label": [i % 2 for i in range(515)]}, features=features)
    domain = load_domain(dataset, processor)
    assert domain.images[:, 0, 0, 0].tolist() == [i % 256 for i in range(515)]


def test_images_of_each_class():
    labels = torch.tensor([0, 1, 1, 0, 3, 1])
    domain = Domain("gap", torch.zeros(6, 3, 1, 1, dtype=torch.uint8), labels, ["a", "b", "none", "d", "none either"])
    assert [i.tolist() for i in domain.indices_by_class()] == [[0, 3], [1, 2, 5], [], [4], []]
    assert domain.class_sizes().tolist() == [2, 3, 0, 1, 0]
    assert domain.classes_with(1) == [0, 1, 3]
    assert domain.classes_with(3) == [1]
    assert domain.classes_with(4) == []


def test_select_classes(dataset, processor):
    domain = load_domain(dataset, processor)
    part = domain.select_classes([2, 0], name="part")
    assert part.name == "part"
    assert part.class_names == ["owl", "cat"]
    assert part.labels.tolist() == [1, 1, 0]
    assert torch.equal(part.images, domain.images[[0, 3, 4]])
    assert domain.select_classes([1]).name == domain.name


def test_joined(dataset, processor):
    domain = load_domain(dataset, processor)
    both = join_domains([domain, domain], "both")
    assert len(both) == 12
    assert both.name == "both"
    assert both.class_names == NAMES
    assert both.labels.tolist() == LABELS + LABELS
    assert torch.equal(both.images, domain.images.repeat(2, 1, 1, 1))
    with pytest.raises(ValueError, match="part and dataset have different classes"):
        join_domains([domain, domain.select_classes([0, 1], name="part")], "both")


def test_nothing_there(tmp_path, processor):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.parquet is not a file"):
        load_domain(tmp_path / "nowhere.parquet", processor)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.parquet is not a file"):
        open_dataset(tmp_path / "nowhere.parquet")
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        open_dataset(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        open_dataset("./nowhere")


def test_columns_are_missing(dataset):
    assert find_columns(dataset) == ("image", "label")
    with pytest.raises(ValueError, match=r"no image column: its columns are .*'label'.*Cast one with"):
        find_columns(dataset.remove_columns("image"))
    with pytest.raises(ValueError, match=r"no label column: its columns are .*'image'"):
        find_columns(dataset.remove_columns("label"))


def test_a_row_that_cannot_be_read_is_named(dataset, processor):
    records = dataset.cast_column("image", Image(decode=False))["image"][:]
    records[4] = {"bytes": records[4]["bytes"][:50], "path": None}
    damaged = Dataset.from_dict({"image": records, "label": LABELS}, features=dataset.features)
    with pytest.raises(ImageError, match="row 4 of dataset cannot be read as an image"):
        load_domain(damaged, processor)


def test_a_dataset_without_rows(dataset, processor):
    with pytest.raises(ValueError, match=r"dataset has no rows\."):
        load_domain(dataset.select([]), processor)


@pytest.mark.parametrize("label", [-1, None])
def test_a_row_without_a_class_is_named(dataset, processor, label):
    labels = [0, 1, 1, label, 2, 1]
    unlabelled = Dataset.from_dict({"image": PICTURES, "label": labels}, features=dataset.features)
    with pytest.raises(ValueError, match=f"row 3 of dataset has label {label}, none of the 3 classes"):
        load_domain(unlabelled, processor)


def test_a_row_without_a_name_of_a_class_is_named(processor):
    features = Features({"image": Image(), "label": Value("string")})
    names = ["cat", "dog", "dog", None, "owl", "dog"]
    unlabelled = Dataset.from_dict({"image": PICTURES, "label": names}, features=features)
    with pytest.raises(ValueError, match="row 3 of pets has label None, none of the 3 classes"):
        load_domain(unlabelled, processor, name="pets")
