"""What people call images, as `AdaptedTask` takes it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, IterableDatasetDict, Value

from hf_hyperflow import ImageError, SupportSetError
from tests.helpers.tiny import picture, write_pictures

LABELS = ["red", "red", "green", "green", "blue", "blue"]


@pytest.fixture
def task(adapter, backbone, support):
    return adapter.adapt(backbone, support)


@pytest.fixture
def images(support):
    return [image for shots in support.values() for image in shots]


@pytest.fixture
def dataset(images):
    features = Features({"id": Value("int64"), "photo": Image(), "label": ClassLabel(names=["a", "b"])})
    return Dataset.from_dict({"id": range(6), "photo": images, "label": [0, 1] * 3}, features=features)


def list_forms(images, support, dataset, tmp_path) -> dict[str, object]:
    """The same six images, as people hold them."""
    folder = write_pictures(tmp_path, support)
    return {
        "list": images,
        "tuple": tuple(images),
        "iterator": iter(images),
        "generator": (image for image in images),
        "array": np.stack([np.asarray(image) for image in images]),
        "pairs": list(zip(images, range(6), strict=True)),
        "pairs, one by one": zip(images, map(str, range(6)), strict=True),
        "dataset": dataset,
        "dataset without labels": dataset.select_columns("photo"),
        "dataset of tensors": dataset.with_format("torch"),
        "column": dataset["photo"],
        "one split": DatasetDict(test=dataset),
        "stream": dataset.to_iterable_dataset(),
        "one split of a stream": IterableDatasetDict(test=dataset.to_iterable_dataset()),
        "dict": support,
        "dict of folders": {name: folder / name for name in support},
        "dict of iterators": {name: iter(shots) for name, shots in support.items()},
    }


def test_all_forms_give_the_same_labels(task, images, support, dataset, tmp_path):
    expected = task.scores(images)
    assert task.predict(images) == LABELS
    for name, form in list_forms(images, support, dataset, tmp_path).items():
        torch.testing.assert_close(task.scores(form, batch_size=4), expected, msg=name)


def test_images_are_read_as_they_are_needed(task, backbone, images):
    n_read, at_each_run = 0, []

    def read():
        nonlocal n_read
        for image in images:
            n_read += 1
            yield image

    task.predict(images[0])  # computes the prototypes
    backbone.register_forward_pre_hook(lambda module, arguments: at_each_run.append(n_read))
    assert task.predict(read(), batch_size=2) == LABELS
    assert at_each_run == [2, 4, 6]


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ("nowhere/*.jpg", ImageError, r"there is no file nowhere/\*\.jpg"),
        (".", ImageError, r"^\. is a folder, not an image\. Give the images in it"),
        (5, ImageError, "^image 0 is a int, not an image"),
        (None, ImageError, "^image 0 is a NoneType, not an image"),
        ([picture(0), 5], ImageError, "^image 1 is a int, not an image"),
        ([picture(0), torch.zeros(3, 28, 28)], ImageError, "^image 1 is a tensor, not an image: give one tensor of"),
        ([{"photo": picture(0)}], ImageError, "^image 0 is a dict with the keys 'photo': give the image in it"),
        ([[picture(0), picture(1)]], SupportSetError, "the label of image 0 is a Image: give a name or an integer"),
        ({"red": "nowhere"}, SupportSetError, "class 'red' holds 'nowhere': there is no such folder"),
        ({"red": picture(0)}, SupportSetError, "class 'red' holds a Image: give a list of images"),
    ],
)
def test_what_are_no_images(task, given, error, message):
    for use in (task, task.predict, task.scores):
        with pytest.raises(error, match=message):
            use(given)


def test_an_unreadable_row_is_numbered(task):
    dataset = Dataset.from_dict(
        {"photo": [picture(0), {"bytes": b"x", "path": None}]}, features=Features(photo=Image())
    )
    with pytest.raises(ImageError, match=r"^row 1 cannot be read as an image"):
        task.predict(dataset)


def test_files_of_folders_that_are_no_images_are_left_out(task, support, tmp_path):
    write_pictures(tmp_path, support)
    (tmp_path / "green" / "notes.txt").write_text("no picture")
    with pytest.warns(UserWarning, match=r"left out: .*notes\.txt cannot be read as an image") as caught:
        assert task.predict({name: tmp_path / name for name in support}) == LABELS
    assert caught[0].filename == __file__


# Bad images, skipped on request


def test_a_bad_image_keeps_its_place(task, images, tmp_path):
    path = tmp_path / "cut.png"
    path.write_bytes(b"rubbish")
    given = [images[0], path, images[2], np.full((8, 8), np.nan), images[4]]
    expected = task.scores([images[0], images[2], images[4]])
    good, bad = [0, 2, 4], [1, 3]
    for batch_size in (1, 2, 64):
        with pytest.warns(UserWarning, match=r"cut\.png cannot be read as an image .* image 3 has NaN") as caught:
            scores = task.scores(given, batch_size=batch_size, skip_bad=True)
        assert caught[0].filename == __file__
        torch.testing.assert_close(scores[good], expected)
        assert scores[bad].isnan().all()
    with pytest.warns(UserWarning, match=r"^no scores for bad images: "):
        assert task.predict(given, skip_bad=True) == ["red", None, "green", None, "blue"]
    with pytest.warns(UserWarning, match=r"^no scores for bad images: "):
        answers = task(given, skip_bad=True, top_k=1)
    assert [None if answer is None else answer[0]["label"] for answer in answers] == [
        "red",
        None,
        "green",
        None,
        "blue",
    ]
    with pytest.raises(ImageError, match=r"cut\.png cannot be read as an image"):
        task.predict(given)


def test_a_single_bad_image_and_only_bad_images(task, tmp_path):
    for use in (task, task.predict):
        with pytest.warns(UserWarning, match="image 0 cannot be read"):
            assert use(b"rubbish", skip_bad=True) is None
        with pytest.warns(UserWarning, match=r"image 0 cannot be read .*nowhere\.png: there is no file"):
            assert use([b"rubbish", tmp_path / "nowhere.png"], skip_bad=True) == [None, None]


@pytest.mark.parametrize("n_bad", [1, 3, 5])
def test_bad_pixel_values_keep_their_place(task, pixels, n_bad):
    expected = task.predict(pixels)
    pixels[:n_bad] = float("nan")
    with pytest.warns(UserWarning, match=f"image {n_bad - 1} has NaN"):
        assert task.predict(pixels, skip_bad=True) == [None] * n_bad + expected[n_bad:]


def test_only_images_are_skipped(task, images):
    """Not what makes every image bad."""
    _ = task.prototypes
    task._scale = float("nan")
    with pytest.raises(ValueError, match="scale of this task has NaN"):
        task.predict(images, skip_bad=True)
