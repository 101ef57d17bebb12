from __future__ import annotations

import base64
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import PIL.Image
import pytest
import torch
from transformers import pipeline
from transformers.pipelines import get_supported_tasks
from transformers.pipelines.pt_utils import KeyDataset

import hf_hyperflow
from hf_hyperflow import AdaptedTask, CheckpointError, ImageError, IncompatibleBackboneError, SupportSetError
from tests.helpers.tiny import Snapshot, pictures, tiny_resnet, write_pictures

TASK = "few-shot-image-classification"


@pytest.fixture
def classify(backbone, adapter, support):
    return pipeline(TASK, model=backbone, adapter=adapter, support=support, device="cpu")


@pytest.fixture
def images():
    """Seven pictures of different sizes."""
    found = [image for images in pictures(n_way=3, n_shot=3, seed=3).values() for image in images][:7]
    return [image.resize((40 + 9 * i, 70 - 5 * i)) for i, image in enumerate(found)]


@pytest.fixture
def site(tmp_path):
    """The address of a web server for `tmp_path`."""

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=tmp_path)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def same(predictions: list[dict], expected: list[dict]) -> None:
    """The same scores of the same labels, best first; not bit for bit, for the size of a batch matters to the last."""
    values = [prediction["score"] for prediction in predictions]
    assert values == sorted(values, reverse=True)
    scores = {prediction["label"]: prediction["score"] for prediction in predictions}
    assert scores == pytest.approx({e["label"]: e["score"] for e in expected}, abs=1e-5)


@pytest.mark.parametrize("batch_size", [1, 3, 7, 64])
def test_predictions_are_those_of_the_task(classify, images, backbone, adapter, support, batch_size):
    found = classify(images, batch_size=batch_size)
    assert len(found) == 7
    for prediction, expected in zip(found, adapter.adapt(backbone, support)(images), strict=True):
        same(prediction, expected)


def test_images_go_through_the_backbone_in_batches(classify, images, backbone):
    sizes = []
    classify(images[0])  # computes the prototypes
    handle = backbone.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    classify(images, batch_size=3)
    handle.remove()
    assert sizes == [3, 3, 1]


def test_every_kind_of_image_is_the_same_image(classify, images, tmp_path, site):
    path = tmp_path / "a b.png"
    images[1].save(path)
    data = "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
    expected = classify(images[1])
    kinds = [path, str(path), f"{site}/a%20b.png", data, path.read_bytes(), np.asarray(images[1])]
    for kind in [*kinds, np.asarray(images[1]) / 255]:
        same(classify(kind), expected)
    for found in classify(kinds, batch_size=4):
        same(found, expected)


def test_a_transparent_picture_is_the_same_by_path_and_by_url(classify, tmp_path, site):
    pixels = np.random.default_rng(0).integers(0, 256, (30, 30, 4), dtype=np.uint8)
    PIL.Image.fromarray(pixels, "RGBA").save(tmp_path / "logo.png")
    same(classify(f"{site}/logo.png"), classify(tmp_path / "logo.png"))


def test_a_generator_and_a_dataset_are_streamed(classify, images):
    expected = classify(images)
    for found in (classify(image for image in images), classify(KeyDataset([{"x": i} for i in images], "x"))):
        assert not isinstance(found, list)
        for prediction, other in zip(found, expected, strict=True):
            same(prediction, other)


def test_top_k(classify, images, backbone, adapter):
    whole = classify(images[0])
    assert {p["label"] for p in whole} == {"red", "green", "blue"}
    assert [p["score"] for p in whole] == sorted((p["score"] for p in whole), reverse=True)
    assert sum(p["score"] for p in whole) == pytest.approx(1)
    assert classify(images[0], top_k=1) == whole[:1]
    assert classify(images[0], top_k=9) == whole
    assert classify([images[0]], top_k=2) == [whole[:2]]
    narrow = pipeline(TASK, model=backbone, adapter=adapter, support=pictures(n_way=3), top_k=1, device="cpu")
    assert len(narrow(images[0])) == 1


def test_from_folders(classify, images, backbone, adapter, support, tmp_path):
    classify.adapted.reset()
    backbone.save_pretrained(tmp_path / "backbone")
    adapter.save_pretrained(tmp_path / "adapter")
    write_pictures(tmp_path / "support", support)
    loaded = pipeline(
        TASK, model=str(tmp_path / "backbone"), adapter=tmp_path / "adapter", support=tmp_path / "support", device="cpu"
    )
    expected = pipeline(TASK, model=backbone, adapter=adapter, support=support, device="cpu")(images)
    for found, prediction in zip(loaded(images), expected, strict=True):
        same(found, prediction)


def test_options_of_adapt(backbone, adapter, support):
    exact = pipeline(TASK, model=backbone, adapter=adapter, support=support, n_steps=3, solver="rk4", device="cpu")
    expected = adapter.adapt(backbone, support, n_steps=3, solver="rk4")
    assert torch.equal(exact.adapted.theta, expected.theta)
    assert exact.adapted.nfe == 12
    stopped = pipeline(TASK, model=backbone, adapter=adapter, support=support, early_stopping=True, device="cpu")
    assert stopped.adapted.stopping_point == adapter.adapt(backbone, support, early_stopping=True).stopping_point
    spoiled = {name: [*shots, b"not an image"] for name, shots in support.items()}
    with pytest.raises(ImageError, match="image 2 of class 'red'"):
        pipeline(TASK, model=backbone, adapter=adapter, support=spoiled, device="cpu")
    skipped = pipeline(TASK, model=backbone, adapter=adapter, support=spoiled, skip_bad=True, device="cpu")
    assert torch.equal(skipped.adapted.theta, adapter.adapt(backbone, support).theta)


def test_saving_saves_the_task(classify, images, backbone, tmp_path):
    expected = classify(images[:2])
    classify.save_pretrained(tmp_path / "task")
    classify.adapted.reset()
    loaded = AdaptedTask.from_pretrained(tmp_path / "task", backbone)
    for found, prediction in zip(loaded(images[:2]), expected, strict=True):
        same(found, prediction)


def test_a_saved_task_classifies_as_it_did(classify, images, backbone, tmp_path):
    expected = classify(images)
    classify.save_pretrained(tmp_path / "task")
    classify.adapted.reset()
    backbone.save_pretrained(tmp_path / "backbone")
    for model, saved_task in ((backbone, tmp_path / "task"), (str(tmp_path / "backbone"), str(tmp_path / "task"))):
        loaded = pipeline(TASK, model=model, saved_task=saved_task, device="cpu")
        assert loaded.adapted.class_names == ["red", "green", "blue"]
        for found, prediction in zip(loaded(images, batch_size=3), expected, strict=True):
            same(found, prediction)


def test_what_is_no_saved_task(classify, backbone, adapter, support, tmp_path):
    classify.save_pretrained(tmp_path / "task")
    saved = {"model": backbone, "saved_task": tmp_path / "task", "device": "cpu"}
    for options in ({"adapter": adapter}, {"support": support}, {"n_steps": 0}, {"skip_bad": True}):
        with pytest.raises(TypeError, match="a saved task is adapted already: give saved_task without"):
            pipeline(TASK, **saved, **options)
    with pytest.raises(TypeError, match="A task in memory classifies by itself"):
        pipeline(TASK, model=backbone, saved_task=classify.adapted, device="cpu")
    adapter.save_pretrained(tmp_path / "adapter")
    for folder, message in (("adapter", "holds no readable HyperFlow task"), ("nowhere", "there is no folder")):
        with pytest.raises(CheckpointError, match=message):
            pipeline(TASK, model=backbone, saved_task=tmp_path / folder, device="cpu")
    classify.adapted.processor = None
    classify.save_pretrained(tmp_path / "blind")
    with pytest.raises(ValueError, match="without an image processor"):
        pipeline(TASK, model=backbone, saved_task=tmp_path / "blind", device="cpu")


@pytest.mark.parametrize("option", [{"top_k": -1}, {"top_k": 0}, {"batch_size": 0}, {"batch_size": -2}])
def test_counts_below_one(classify, images, option):
    ((name, count),) = option.items()
    for inputs in (images[0], images):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, not {count}"):
            classify(inputs, **option)


def test_no_time_for_an_address(classify):
    for timeout in (0, -1):
        with pytest.raises(ValueError, match=f"timeout must be a number of seconds above 0, not {timeout}"):
            classify("https://example.org/x.png", timeout=timeout)


def test_tuples_and_no_images(classify, images):
    assert classify([]) == classify(()) == []
    assert classify(tuple(images[:2])) == classify(images[:2])


def test_reset_gives_the_backbone_back(backbone, adapter, support, images):
    before = Snapshot(backbone)
    classify = pipeline(TASK, model=backbone, adapter=adapter, support=support, device="cpu")
    classify(images, batch_size=4)
    classify.adapted.reset()
    before.assert_unchanged()


def test_bad_images_are_named(classify, images, tmp_path, site):
    (tmp_path / "text.png").write_text("no picture")
    for bad, words in [
        (tmp_path / "text.png", "text.png cannot be read as an image"),
        (str(tmp_path / "nowhere.png"), "nowhere.png: there is no file"),
        (f"{site}/text.png", f"{site}/text.png cannot be read as an image"),
        (f"{site}/nowhere.png", f"{site}/nowhere.png cannot be fetched .*404"),
        ("http://127.0.0.1:9/x.png", "http://127.0.0.1:9/x.png cannot be fetched"),
        ("data:image/png;base64,AAAA", "data:image/png;base64,AAAA cannot be read"),
        (np.full((8, 8), np.nan), "an image has NaN"),
        (7, "an image is a int, not an image"),
    ]:
        with pytest.raises(ImageError, match=words):
            classify([images[0], bad], batch_size=2)


def test_what_cannot_be_adapted(backbone, adapter, support):
    with pytest.raises(SupportSetError, match="only one class"):
        pipeline(TASK, model=backbone, adapter=adapter, support={"red": support["red"]}, device="cpu")
    with pytest.raises(IncompatibleBackboneError, match="this ResNetModel is not the backbone of the adapter"):
        pipeline(TASK, model=tiny_resnet(), adapter=adapter, support=support, device="cpu")
    with pytest.raises(TypeError, match="'adapter' and 'support'"):
        pipeline(TASK, model=backbone, device="cpu")
    adapter.processor = None
    with pytest.raises(ValueError, match="without an image processor"):
        pipeline(TASK, model=backbone, adapter=adapter, support=support, device="cpu")


def test_importing_the_package_registers_it():
    assert TASK in get_supported_tasks()
    assert hf_hyperflow.FewShotImageClassificationPipeline.__name__ in hf_hyperflow.__all__
