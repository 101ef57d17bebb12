"""The demo as people meet it: in a browser, served by `hyperflow demo`."""

from __future__ import annotations

import importlib.util
import re
import shutil
import socket
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import PIL.Image
import pytest
import torch
import torch.nn.functional as F
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModel

from tests.helpers.page import REPOSITORY, Served, free_port, support_files
from tests.helpers.tiny import pictures, tiny_adapter, tiny_dinov2, tiny_processor

SPACE = REPOSITORY / "model_cards" / "space"

needs_gradio = pytest.mark.skipif(not importlib.util.find_spec("gradio"), reason="gradio is not installed")


@pytest.fixture(scope="module")
def space(folder):
    """The Space's `app.py`, started in a copy of its folder beside the account's models; `(server, url)`."""
    port = free_port()
    shutil.copy(SPACE / "app.py", folder)
    environment = {"SPACE_AUTHOR_NAME": "tiny", "GRADIO_SERVER_PORT": str(port)}
    server = Served(folder / "space.log", ["app.py"], folder, **environment)
    yield server, f"http://127.0.0.1:{port}"
    server.stop()


@pytest.fixture(scope="module")
def url(space, url):
    """Address of `hyperflow demo`; the Space starts meanwhile."""
    return url


def scores(model, prototypes, scale, files: list[Path]) -> torch.Tensor:
    """Scores of image files by nothing but transformers, peft and torch."""
    pixels = tiny_processor()([PIL.Image.open(f).convert("RGB") for f in files], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        features = model(pixels).last_hidden_state[:, 0]
    return (scale * F.normalize(features, dim=-1) @ prototypes.T).softmax(-1)


@needs_gradio
@pytest.mark.browser
def test_upload_adapt_predict_download(open_page, folder, browser):
    page = open_page()
    # One image per class: nothing can be left out, so the flow is followed to its end and the weights do differ.
    files = support_files(folder, "red", "green", "blue", n_shot=1)
    classes = {"red": files["red"], "green": files["green"], "<b>blue</b>": files["blue"]}
    message = page.adapt(classes)
    assert re.search(r"Ready after [\d.]+ m?s: 3 classes from 3 images, without gradients", message)
    assert "a second image" in message
    assert not page.all("#status svg")

    query = [folder / f"query-{name}-{i}.png" for name in ("red", "green", "blue") for i in (1, 2)]
    page.upload("queries", *query)
    assert "of 6 images" in page.message("predict", "results")
    shown = page.predictions()
    assert any(before != after for before, after in shown)
    best = [tuple(max(column, key=lambda name: float(column[name][:-1])) for column in row) for row in shown]
    truths = ["red", "", "green", "", "<b>blue</b>", "red"]
    for row, truth in enumerate(truths):
        page.choose_truth(row, truth)
    right = [sum(labels[when] == truth for labels, truth in zip(best, truths, strict=True)) for when in (0, 1)]
    assert page.said("results").startswith(f"{right[0]} of 4 right before, {right[1]} after. The adaptation changed")
    page.choose_truth(0, "")
    assert " of 3 right before" in page.said("results")

    page.press("download")
    archive = folder / "downloads" / "hyperflow-task.zip"
    page.wait(archive.is_file)
    with zipfile.ZipFile(archive) as file:
        assert file.testzip() is None
        file.extractall(folder / "unzipped")
    task = folder / "unzipped" / "hyperflow-task"
    saved, backbone = load_file(task / "prototypes.safetensors"), folder / "tiny" / "vit-s14-focus-70"
    plain = AutoModel.from_pretrained(backbone).eval()
    with torch.no_grad():
        pixels = [tiny_processor()(images, return_tensors="pt")["pixel_values"] for images in pictures(3, 1).values()]
        means = torch.stack([plain(p).last_hidden_state[:, 0].mean(0) for p in pixels])
    before = scores(plain, F.normalize(means, dim=-1), saved["scale"], query)
    after = scores(PeftModel.from_pretrained(plain, str(task)).eval(), saved["prototypes"], saved["scale"], query)
    for row, expected in zip(shown, zip(before, after, strict=True), strict=True):
        for column, values in zip(row, expected, strict=True):
            assert column == {list(classes)[i]: f"{values[i]:.0%}" for i in values.argsort(descending=True)}


@needs_gradio
@pytest.mark.browser
def test_bad_input_is_explained_on_the_page(open_page, folder):
    page = open_page()
    assert "Press Adapt first" in page.alert("predict", "results")
    assert "no images" in page.alert("adapt", "status")
    page.name_class(1, "red")
    assert "Class 'red' has no images" in page.alert("adapt", "status")
    page.upload("images-1", *support_files(folder, "red")["red"])
    assert "only one class, 'red'" in page.alert("adapt", "status")
    page.upload("images-2", folder / "support-green-1.png")
    assert "Class 2 has images but no name" in page.alert("adapt", "status")
    page.name_class(2, " red ")
    assert "Two classes are called 'red'" in page.alert("adapt", "status")
    page.name_class(2, "green")
    page.upload("images-2", folder / "notes.png")
    message = page.alert("adapt", "status")
    assert message.startswith("Class 'green': notes.png cannot be read as an image")
    assert "/" not in message  # where the server keeps it is nobody's business
    assert not page.all("#download")


@needs_gradio
@pytest.mark.browser
def test_a_bad_new_image_is_named(open_page, folder):
    page = open_page()
    page.adapt(support_files(folder, "red", "green"))
    assert "no new images" in page.alert("predict", "results")
    page.upload("queries", folder / "query-red-1.png", folder / "notes.png")
    assert page.alert("predict", "results").startswith("New images: notes.png cannot be read as an image")


@needs_gradio
@pytest.mark.browser
def test_two_windows_have_a_task_each(open_page, folder, browser):
    first = open_page()
    assert "2 classes" in first.adapt(support_files(folder, "red", "green"))
    window = browser.current_window_handle
    browser.switch_to.new_window("tab")
    try:
        second = open_page()
        assert "3 classes" in second.adapt(support_files(folder, "blue", "yellow", "violet"))
        second.upload("queries", folder / "query-red-1.png")
        second.message("predict", "results")
        [shown] = second.predictions()
        assert [set(column) for column in shown] == [{"blue", "yellow", "violet"}] * 2
    finally:
        browser.close()
        browser.switch_to.window(window)
    first.upload("queries", folder / "query-red-1.png")
    first.message("predict", "results")
    [shown] = first.predictions()
    assert [set(column) for column in shown] == [{"red", "green"}] * 2


@needs_gradio
def test_sessions_at_once_get_what_each_would_get_alone():
    from hf_hyperflow.demo.sessions import SharedModels

    backbone = tiny_dinov2()
    models = SharedModels(tiny_adapter(backbone), backbone)
    # Those of one image per class follow the flow to its end, the others as far as their images say.
    supports = [pictures(n_way=2 + i % 4, n_shot=1 + 2 * (i % 2), seed=i) for i in range(6)]
    query = [images[0] for images in pictures(n_way=5, n_shot=1, seed=9).values()]
    alone = [models.compare(models.adapt(support)[0], query) for support in supports]

    def visit(i: int) -> bool:
        session, archive = models.adapt(supports[i])
        return models.compare(session, query) == alone[i] and zipfile.is_zipfile(archive)

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(visit, [*range(6)] * 4))
    assert all(before != after for before, after in alone[::2])


@needs_gradio
def test_a_taken_port_is_named(folder):
    from hf_hyperflow.demo.app import main

    models = folder / "tiny"
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=rf"cannot listen on 127.0.0.1, port {port}"):
            main(str(models / "hyperflow-vit-s14-70"), str(models / "vit-s14-focus-70"), port=port)


@needs_gradio
@pytest.mark.slow
def test_the_space_serves_the_page(space):
    server, address = space
    assert "HyperFlow: your classes" in server.wait(address)


def test_the_space_needs_what_the_page_needs():
    """Spaces install Gradio themselves, and the page there is started without the command line."""
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11 reads TOML")
    card = (SPACE / "README.md").read_text()
    front_matter = yaml.safe_load(card.split("---")[1])
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    extra = project["optional-dependencies"]["demo"]
    (gradio,) = (requirement for requirement in extra if requirement.startswith("gradio"))
    page = [requirement for requirement in extra if requirement not in (gradio, "hf-hyperflow[cli]")]
    assert (SPACE / "requirements.txt").read_text().splitlines() == [*project["dependencies"], *page]
    assert front_matter["sdk"] == "gradio"
    assert (SPACE / front_matter["app_file"]).is_file()
    least = re.search(r"gradio>=(\d+)", gradio)[1]
    assert int(front_matter["sdk_version"].split(".")[0]) >= int(least)
