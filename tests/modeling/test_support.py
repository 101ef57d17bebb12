from __future__ import annotations

import os
import sys
import warnings

import numpy as np
import PIL.Image
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value

from hf_hyperflow import ImageError, SupportSetError
from hf_hyperflow.modeling.support import SupportSet, image_folder, read_support
from tests.helpers.tiny import picture, pictures

FLAT = [("red", 0), ("red", 1), ("green", 0), ("green", 1), ("blue", 0), ("blue", 1)]


@pytest.fixture
def folder(support, tmp_path):
    for name, images in support.items():
        (tmp_path / "set" / name).mkdir(parents=True)
        for i, image in enumerate(images):
            image.save(tmp_path / "set" / name / f"{i}.png")
    return tmp_path / "set"


def dataset_of(support: dict, label: ClassLabel | Value | None = None) -> Dataset:
    names = list(support)
    label = label or ClassLabel(names=names)
    rows = {
        "image": [image for images in support.values() for image in images],
        "label": [
            names.index(n) if isinstance(label, ClassLabel) else n for n, images in support.items() for _ in images
        ],
    }
    return Dataset.from_dict(rows, features=Features({"image": Image(), "label": label}))


# Four forms


def test_a_dict_of_images(support, processor):
    data = read_support(support, processor)
    assert data.class_names == ["red", "green", "blue"]
    assert data.n_way == 3
    assert data.labels.tolist() == [0, 0, 1, 1, 2, 2]
    expected = processor([support[c][i] for c, i in FLAT], return_tensors="pt")["pixel_values"]
    assert torch.equal(data.pixel_values, expected)
    assert data.skipped == ()


def test_a_folder_equals_a_dict(support, folder, processor):
    for given in (folder, str(folder)):
        data = read_support(given, processor)
        assert data.class_names == ["blue", "green", "red"]
        expected = read_support({name: support[name] for name in sorted(support)}, processor)
        assert torch.equal(data.pixel_values, expected.pixel_values)
        assert torch.equal(data.labels, expected.labels)


def test_a_folder_with_other_things_in_it(folder, processor):
    expected = read_support(folder, processor)
    assert expected.skipped == ()
    (folder / "red" / "notes.txt").write_text("not a picture")
    (folder / "red" / ".hidden.png").write_text("not a picture")
    (folder / "red" / "Thumbs.db").write_text("not a picture")
    (folder / "red" / ".DS_Store").write_text("not a picture")
    (folder / "red" / "more").mkdir()
    (folder / ".cache").mkdir()
    (folder / "README.md").write_text("about it")
    picture(5).save(folder / "blue" / "9.JPG", "JPEG")
    data = read_support(folder, processor)
    assert data.class_names == expected.class_names
    assert len(data.labels) == len(expected.labels) + 1
    assert sorted(data.skipped) == [
        f"{folder / 'README.md'} is in no folder of a class.",
        f"{folder / 'red' / 'more'} is a folder in the folder of a class: what is in it is not read.",
        data.skipped[-1],
    ]
    assert data.skipped[-1].startswith(
        f"{folder / 'red' / 'notes.txt'} cannot be read as an image (it has no readable header of PNG"
    )


@pytest.mark.parametrize("name", ["9", "9.jfif", "9.jpe", "9.image", "9.heic", "9.PNG"])
def test_the_content_decides_what_is_an_image(folder, processor, name):
    """Whatever `predict` reads is read here too."""
    picture(5).save(folder / "blue" / name, "JPEG")
    data = read_support(folder, processor)
    assert (len(data.labels), data.skipped) == (7, ())
    assert str(folder / "blue" / name) in data.names


HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + b"\0" * 40


def test_heic_is_named_with_what_it_needs(folder, processor, monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    (folder / "blue" / "9.HEIC").write_bytes(HEIC)
    data = read_support(folder, processor)
    assert len(data.labels) == 6
    assert len(data.skipped) == 1
    assert data.skipped[0].startswith(f"{folder / 'blue' / '9.HEIC'} is a HEIC image")
    assert "pip install pillow-heif" in data.skipped[0]


def test_a_class_with_nothing_that_can_be_read(folder, processor, monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    for path in (folder / "blue").iterdir():
        path.unlink()
    (folder / "blue" / "9.heic").write_bytes(HEIC)
    message = r"class 'blue' has no images\. .*Left out: .*9\.heic is a HEIC image.*pip install pillow-heif"
    with pytest.raises(SupportSetError, match=message):
        read_support(folder, processor)


def test_adapting_warns_of_files_that_are_left_out(backbone, adapter, folder):
    (folder / "red" / "notes.txt").write_text("not a picture")
    with pytest.warns(UserWarning, match=r"1 files? of the support set .*red/notes\.txt cannot be read") as caught:
        adapter.adapt(backbone, folder)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapter.adapt(backbone, read_support(folder, adapter.processor))  # whoever reads it can see what was skipped


def test_a_pipe_in_a_folder_is_an_error(folder, processor):
    os.mkfifo(folder / "red" / "9.png")
    with pytest.raises(ImageError, match=r"9\.png cannot be read as an image \(it is not a regular file\)"):
        read_support(folder, processor)
    data = read_support(folder, processor, skip_bad=True)
    assert (len(data.labels), len(data.skipped)) == (6, 1)
    os.mkfifo(folder / "red" / "pipe")
    assert len(read_support(folder, processor, skip_bad=True).skipped) == 2


def test_many_large_images_are_processed_as_they_come(folder, processor, monkeypatch):
    expected = read_support(folder, processor)
    monkeypatch.setattr("hf_hyperflow.modeling.images.MAX_PIXELS", 3000)  # two images
    found = read_support(folder, processor)
    assert torch.equal(found.pixel_values, expected.pixel_values)
    assert torch.equal(found.labels, expected.labels)


@pytest.mark.parametrize("label", [None, Value("string")], ids=["ClassLabel", "strings"])
@pytest.mark.parametrize("form", [None, "torch", "numpy"])
def test_a_dataset_equals_a_dict(support, processor, label, form):
    support = {name: support[name] for name in sorted(support)}
    data = read_support(dataset_of(support, label).with_format(form), processor)
    expected = read_support(support, processor)
    assert data.class_names == expected.class_names
    assert torch.equal(data.pixel_values, expected.pixel_values)
    assert torch.equal(data.labels, expected.labels)


def test_pairs_equal_a_dict(support, processor):
    """Their classes are sorted, whatever order the pairs come in."""
    expected = read_support({name: support[name] for name in sorted(support)}, processor)
    named = [(image, name) for name, images in support.items() for image in images]
    numbered = [[image, np.int64(sorted(support).index(name))] for image, name in named]
    for pairs in (
        named,
        tuple(named),
        iter(named),
        (pair for pair in named),
        zip(*zip(*named, strict=True), strict=True),
    ):
        data = read_support(pairs, processor)
        assert data.class_names == ["blue", "green", "red"]
        order = data.labels.argsort(stable=True)
        assert torch.equal(data.pixel_values[order], expected.pixel_values)
    data = read_support(numbered, processor)
    assert data.class_names == ["0", "1", "2"]
    assert data.names == tuple(f"image {i}" for i in range(6))
    assert torch.equal(data.pixel_values[data.labels.argsort(stable=True)], expected.pixel_values)


def test_ten_numbered_classes_are_in_the_order_of_their_numbers(processor):
    data = read_support([(picture(i), i) for i in (10, 9, 2)], processor)
    assert data.class_names == ["2", "9", "10"]


def test_a_dict_of_folders_and_iterators_equals_a_dict_of_lists(support, folder, processor):
    (folder / "green" / "notes.txt").write_text("not a picture")
    given = {"red": folder / "red", "green": str(folder / "green"), "blue": iter(support["blue"])}
    data, expected = read_support(given, processor), read_support(support, processor)
    assert data.class_names == expected.class_names
    assert torch.equal(data.pixel_values, expected.pixel_values)
    assert data.names[3] == str(folder / "green" / "1.png")
    assert len(data.skipped) == 1
    assert "notes.txt cannot be read as an image" in data.skipped[0]


def test_a_dataset_that_holds_only_some_of_its_classes(support, processor):
    dataset = dataset_of(support).select([4, 0, 5])  # blue, red, blue
    data = read_support(dataset, processor)
    assert data.class_names == ["red", "blue"]
    assert data.labels.tolist() == [1, 0, 1]


def test_a_dataset_with_numbers_for_labels(support, processor):
    rows = {"picture": [image for images in support.values() for image in images], "label": [7, 7, 3, 3, 5, 5]}
    dataset = Dataset.from_dict(rows, features=Features({"picture": Image(), "label": Value("int64")}))
    data = read_support(dataset, processor)
    assert data.class_names == ["3", "5", "7"]
    assert data.labels.tolist() == [2, 2, 0, 0, 1, 1]


def test_tensors():
    pixel_values = torch.randn(4, 3, 28, 28)
    data = read_support((pixel_values, torch.tensor([5, 2, 5, 2])), None)
    assert torch.equal(data.pixel_values, pixel_values)
    assert data.labels.tolist() == [1, 0, 1, 0]
    assert data.class_names == ["2", "5"]
    assert read_support((pixel_values, [0, 0, 1, 1]), None).labels.tolist() == [0, 0, 1, 1]
    half = read_support((pixel_values.half(), [0, 0, 1, 1]), None)
    assert half.pixel_values.dtype == torch.float32


def test_a_support_set_is_taken_as_it_is(support, processor):
    data = read_support(support, processor)
    assert read_support(data, None) is data
    assert isinstance(data, SupportSet)


def test_mixed_sizes_and_modes(processor, tmp_path):
    path = tmp_path / "wide.png"
    picture(0, size=(90, 30)).save(path)
    first = [picture(1, size=(20, 50)).convert("P"), picture(2).convert("RGBA"), path, path.read_bytes()]
    second = [
        np.asarray(picture(3)),
        PIL.Image.fromarray(np.full((30, 30), 40000, dtype=np.uint16)),
        picture(4, (1, 1)),
    ]
    data = read_support({"first": first, "second": second}, processor)
    assert data.pixel_values.shape == (7, 3, 28, 28)
    assert data.pixel_values.isfinite().all()
    assert torch.equal(data.pixel_values[2], data.pixel_values[3])
    expected = processor([PIL.Image.new("RGB", (30, 30), (156, 156, 156))], return_tensors="pt")["pixel_values"]
    assert torch.equal(data.pixel_values[5:6], expected)


# Bad support sets


@pytest.mark.parametrize("empty", [{}, {"a": [], "b": []}], ids=["no classes", "no images"])
def test_no_images(processor, empty):
    with pytest.raises(SupportSetError, match="the support set has no images"):
        read_support(empty, processor)


def test_no_rows_and_no_tensors(support, processor):
    with pytest.raises(SupportSetError, match="the support set has no images"):
        read_support(dataset_of(support).select([]), processor)
    for labels in (torch.empty(0, dtype=torch.long), torch.empty(0), []):
        with pytest.raises(SupportSetError, match="the support set has no images"):
            read_support((torch.empty(0, 3, 28, 28), labels), None)


def test_an_empty_class(processor):
    with pytest.raises(SupportSetError, match="class 'dog' has no images"):
        read_support({"cat": [picture(0)], "dog": []}, processor)


def test_an_empty_class_folder(folder, processor):
    (folder / "violet").mkdir()
    with pytest.raises(SupportSetError, match="class 'violet' has no images"):
        read_support(folder, processor)


@pytest.mark.parametrize("n_shot", [1, 4])
def test_one_class_and_one_image(processor, n_shot):
    with pytest.raises(SupportSetError, match=r"only one class, 'red'\. Give at least two"):
        read_support(pictures(1, n_shot), processor)
    with pytest.raises(SupportSetError, match="only one class, '0'"):
        read_support((torch.zeros(n_shot, 3, 28, 28), torch.zeros(n_shot, dtype=torch.long)), None)


def test_images_that_are_not_in_a_list(processor):
    with pytest.raises(SupportSetError, match="class 'cat' holds a Image: give a list of images"):
        read_support({"cat": picture(0), "dog": [picture(1)]}, processor)
    with pytest.raises(SupportSetError, match=r"class 'cat' holds 'cat\.png': there is no such folder of images"):
        read_support({"cat": "cat.png", "dog": [picture(1)]}, processor)


@pytest.mark.parametrize("thing", [None, 3, b"bytes", picture(0), "tensors", "arrays"])
def test_what_is_no_support_set(processor, thing):
    if thing == "tensors":
        thing = torch.zeros(2, 3, 28, 28)
    elif thing == "arrays":
        thing = np.zeros((2, 28, 28, 3), dtype=np.uint8)
    with pytest.raises(SupportSetError, match=r"is not a support set\. Give a datasets\.Dataset, a dict"):
        read_support(thing, processor)


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([1, 2], r"item 0 is a int, not a pair \(image, label\)\. Give a datasets\.Dataset"),
        ((1, 2), r"item 0 is a int, not a pair"),
        ([(picture(0), 0), picture(1)], "item 1 is a Image, not a pair"),
        ([(picture(0), 0, 1)], "item 0 is a tuple, not a pair"),
        ([(picture(0), picture(1))], "the label of image 0 is a Image: give a name or an integer"),
        ([(picture(0), 0), (picture(1), 0.5)], "the label of image 1 is a float"),
        ([(picture(0), 0), (picture(1), "1")], "some labels are names and others are integers"),
        ([(picture(0), "a"), (picture(1), "a")], "there is only one class, 'a'"),
        (iter([]), "the support set has no images"),
    ],
)
def test_bad_pairs(processor, items, message):
    with pytest.raises(SupportSetError, match=message):
        read_support(items, processor)


def test_images_without_a_processor(support):
    with pytest.raises(SupportSetError, match="images need an image processor"):
        read_support(support, None)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_tensors_with_nan_and_infinity(value):
    pixel_values = torch.zeros(4, 3, 28, 28)
    pixel_values[2, 1, 5, 6] = value
    with pytest.raises(SupportSetError, match="image 2 has NaN or infinite pixels"):
        read_support((pixel_values, torch.tensor([0, 0, 1, 1])), None)


def test_arrays_with_nan_are_named(processor):
    bad = np.full((8, 8, 3), np.nan)
    with pytest.raises(ImageError, match="image 1 of class 'dog' has NaN or infinite pixels"):
        read_support({"cat": [picture(0)], "dog": [picture(1), bad]}, processor)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([0, 0, 1, -1]), r"label -1 is out of range: labels are 0, 1, 2"),
        (torch.tensor([0.0, 0.0, 1.0, 1.0]), r"labels are torch\.float32 of shape \(4,\): give 4 integers"),
        (torch.tensor([0, 0, 1]), r"labels are torch\.int64 of shape \(3,\): give 4 integers"),
        (torch.tensor([[0, 0], [1, 1]]), r"of shape \(2, 2\): give 4 integers"),
        (torch.tensor(1), r"of shape \(\): give 4 integers"),
        (torch.tensor([True, True, False, False]), r"labels are torch\.bool"),
        (["cat", "cat", "dog", "dog"], r"labels are no tensor \(.*str.*\): give 4 integers"),
    ],
)
def test_bad_labels(labels, message):
    with pytest.raises(SupportSetError, match=message):
        read_support((torch.zeros(4, 3, 28, 28), labels), None)


@pytest.mark.parametrize(
    "pixel_values",
    [torch.zeros(4, 28, 28), torch.zeros(4, 1, 28, 28), torch.zeros(4, 3, 28, 28, dtype=torch.uint8)],
    ids=["three dimensions", "one channel", "bytes"],
)
def test_bad_pixel_values(pixel_values):
    with pytest.raises(SupportSetError, match=r"pixel_values are torch\.\w+ of shape .*: give floats of shape"):
        read_support((pixel_values, torch.tensor([0, 0, 1, 1])), None)


@pytest.mark.parametrize("label", [-1, None])
def test_a_dataset_with_a_label_out_of_range(support, processor, label):
    rows = {"image": support["red"] + support["blue"], "label": [0, 1, label, 1]}
    features = Features({"image": Image(), "label": ClassLabel(names=["red", "blue"])})
    with pytest.raises(SupportSetError, match=f"row 2 has label {label}, out of range for the 2 classes of column"):
        read_support(Dataset.from_dict(rows, features=features), processor)


def test_a_dataset_with_a_missing_name(support, processor):
    rows = {"image": support["red"] + support["blue"], "label": ["red", None, "blue", "blue"]}
    features = Features({"image": Image(), "label": Value("string")})
    with pytest.raises(SupportSetError, match="row 1 has no label in column 'label'"):
        read_support(Dataset.from_dict(rows, features=features), processor)


def test_a_dataset_without_the_columns(support, processor):
    with pytest.raises(ValueError, match=r"no image column: its columns are .*label"):
        read_support(Dataset.from_dict({"label": [0, 1]}), processor)
    with pytest.raises(ValueError, match=r"no label column: its columns are .*image"):
        read_support(dataset_of(support).remove_columns("label"), processor)


# Unreadable files


def test_an_unreadable_file_is_named(folder, processor):
    bad = folder / "green" / "1.png"
    bad.write_bytes(bad.read_bytes()[:100])
    with pytest.raises(ImageError, match=rf"{bad} cannot be read as an image"):
        read_support(folder, processor)
    with pytest.raises(ImageError, match=rf"{bad} cannot be read as an image"):
        read_support({"a": [picture(0)], "b": [str(bad)]}, processor)


def test_a_missing_file_is_named(folder, processor):
    with pytest.raises(ImageError, match=r"there is no file .*7\.png"):
        read_support({"a": [picture(0)], "b": [folder / "green" / "7.png"]}, processor)


def test_an_unreadable_row_is_numbered(support, processor):
    rows = {"image": [{"bytes": b"rubbish", "path": None}] * 2, "label": [0, 1]}
    features = Features({"image": Image(), "label": ClassLabel(names=["a", "b"])})
    with pytest.raises(ImageError, match="row 0 cannot be read as an image"):
        read_support(Dataset.from_dict(rows, features=features), processor)


def test_skip_bad_leaves_out_what_cannot_be_read(folder, processor):
    expected = read_support(folder, processor)
    (folder / "green" / "1.png").write_bytes(b"rubbish")
    data = read_support(folder, processor, skip_bad=True)
    kept = [i for i in range(6) if i != 3]
    assert torch.equal(data.pixel_values, expected.pixel_values[kept])
    assert torch.equal(data.labels, expected.labels[kept])
    assert len(data.skipped) == 1
    assert str(folder / "green" / "1.png") in data.skipped[0]


def test_skip_bad_does_not_lose_a_class(folder, processor):
    for path in (folder / "green").iterdir():
        path.write_bytes(b"rubbish")
    with pytest.raises(SupportSetError, match="class 'green' has no images"):
        read_support(folder, processor, skip_bad=True)


def test_no_such_folder_and_a_folder_without_classes(tmp_path, processor):
    with pytest.raises(FileNotFoundError, match="nowhere is not a folder"):
        read_support(tmp_path / "nowhere", processor)
    picture(0).save(tmp_path / "0.png")
    with pytest.raises(SupportSetError, match="put the images of each class in a folder of its name"):
        image_folder(tmp_path)


def test_a_folder_as_it_comes_out_of_a_zip_file(folder, processor, tmp_path):
    """The classes one folder deeper, and what macOS adds."""
    (folder / "__MACOSX" / "red").mkdir(parents=True)
    (folder / "__MACOSX" / "red" / "._0.png").write_bytes(b"attributes")
    data = read_support(folder, processor)
    assert data.class_names == ["blue", "green", "red"]
    assert data.skipped == (f"{folder / '__MACOSX'} is no class: macOS puts it into zip files.",)
    inner = tmp_path / "outer" / "pets"
    inner.parent.mkdir()
    folder.rename(inner)
    with pytest.raises(SupportSetError, match=f"outer has a single folder, {inner}, .* If those are the classes, give"):
        read_support(tmp_path / "outer", processor)
