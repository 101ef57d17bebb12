"""All the ways in which images come to the page and leave it again, in a browser."""

from __future__ import annotations

import importlib.util
import shutil

import pytest

from tests.helpers.page import support_files

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not importlib.util.find_spec("gradio"), reason="gradio is not installed"),
]

COLOURS = ("red", "green", "blue")


@pytest.fixture(scope="module")
def classes(folder):
    """A folder with three folders of images, one of them with more than are read, and with what is no image."""
    classes = folder / "classes"
    for name, n_images in {"Äpfel & <b>": 2, "green": 3, "many": 23}.items():
        (classes / name).mkdir(parents=True)
        for i in range(n_images):
            shutil.copy(
                folder / f"support-{'green' if name == 'green' else 'red'}-{i % 3 + 1}.png", classes / name / f"{i}.png"
            )
    (classes / "__MACOSX" / "green").mkdir(parents=True)
    shutil.copy(folder / "support-red-1.png", classes / "__MACOSX" / "green" / "._0.png")
    (classes / "green" / "notes.txt").write_text("no image")
    return classes


def test_a_folder_of_classes_is_opened_or_dropped(open_page, classes):
    page = open_page()
    page.press("folder")
    page.wait(lambda: page.all("#folder-chooser"))[0].send_keys(str(classes))
    page.wait(lambda: page.thumbnails("images-3") == 20)
    assert page.names() == ["Äpfel & <b>", "green", "many"]
    assert [page.thumbnails(f"images-{row}") for row in (1, 2)] == [2, 3]
    assert page.said("said") == "Images of class 3: at most 20 images. Of these 23, the first 20 were taken."
    page.drop("#class-3", classes / "green")
    page.wait(lambda: page.said("said") == "Images of class 3: at most 20 images. There is no room for more.")
    assert page.thumbnails("images-3") == 20
    assert "3 classes from 25 images" in page.message("adapt", "status")

    page = open_page()
    page.name_class(1, "mine")
    page.drop("#class-2", classes / "green")
    page.wait(lambda: page.thumbnails("images-2") == 3)
    assert page.names() == ["mine", "green"]
    page.drop("h1", classes)
    page.wait(lambda: page.thumbnails("images-5") == 20)
    assert page.names() == ["mine", "green", "Äpfel & <b>", "green", "many"]
    page.drop("#queries", classes / "green", classes / "Äpfel & <b>")
    page.wait(lambda: page.thumbnails("queries") == 5)


def test_images_are_dropped_pasted_and_taken(open_page, folder, classes, browser):
    page = open_page()
    page.drop("#class-1", folder / "support-red-1.png", folder / "support-red-2.png")
    page.wait(lambda: page.thumbnails("images-1") == 2)
    page.drop("#class-1", folder / "support-red-3.png")
    page.wait(lambda: page.thumbnails("images-1") == 3)
    page.drop("#class-1", classes / "green" / "notes.txt")
    page.wait(lambda: page.said("said") == "There are no images among these.")
    page.drop("h1", folder / "support-red-3.png")
    page.wait(lambda: page.said("said") == "Drop images on a class.")

    page.name_class(2, "pasted")  # what was typed in last is where it goes
    browser.execute_async_script(
        """const [done] = arguments, transfer = new DataTransfer();
        const canvas = Object.assign(document.createElement("canvas"), {width: 9, height: 9});
        canvas.toBlob((blob) => {
            transfer.items.add(new File([blob], "image.png", {type: "image/png"}));
            document.activeElement.dispatchEvent(
                new ClipboardEvent("paste", {clipboardData: transfer, bubbles: true, cancelable: true}));
            done();
        });"""
    )
    page.wait(lambda: page.thumbnails("images-2") == 1)
    assert page.said("said") == "Pasted into Images of class 2."

    page.click("#queries [aria-label$='Capture from camera']")
    page.click("#queries [title='grant webcam access'] button")
    is_playing = (
        "const video = document.querySelector('#queries video'); return video?.videoWidth && video.readyState > 2"
    )
    page.wait(lambda: browser.execute_script(is_playing))
    page.click("#queries .button-wrap button")
    page.wait(lambda: page.thumbnails("queries") == 1)


def test_a_class_is_removed_and_all_is_started_again(open_page, folder):
    page = open_page()
    files = support_files(folder, "red", "green", "blue")
    page.adapt(files | {"blue": files["blue"][:1]})
    page.upload("queries", folder / "query-red-1.png")
    page.message("predict", "results")
    page.press("remove-2")
    page.wait(lambda: page.names() == ["red", "blue"])
    assert page.thumbnails("images-2") == 1
    assert "2 classes from 4 images" in page.message("adapt", "status")
    page.press("remove-1")
    page.wait(lambda: page.names() == ["blue", ""])
    page.press("start-again")
    page.wait(lambda: page.names() == ["", ""])
    assert not page.all(".thumbnail-item")
    assert not page.all("#download")
    assert page.said("status") == page.said("results") == ""
    assert "Press Adapt first" in page.alert("predict", "results")


def test_a_page_without_a_camera_offers_none(open_page, browser):
    """A page that is not served over HTTPS, or a machine without a camera."""
    page = open_page()
    assert page.wait(lambda: [b for b in page.all("[aria-label$='Capture from camera']") if b.is_displayed()])
    without = "Object.defineProperty(navigator, 'mediaDevices', {value: undefined})"
    added = browser.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": without})
    try:
        page = open_page()
        assert not [button for button in page.all("[aria-label$='Capture from camera']") if button.is_displayed()]
    finally:
        browser.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", added)
