"""A served page, and what a person does on it in a browser."""

from __future__ import annotations

import base64
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --window-size=1200,900 --hide-scrollbars "
    "--use-fake-device-for-media-stream --use-fake-ui-for-media-stream "
    # A mouse, which headless Chromium has not, so that the page is the one of a desktop.
    "--blink-settings=primaryHoverType=2,availableHoverTypes=2,primaryPointerType=4,availablePointerTypes=4"
)


class Served:
    """A server in a process of its own."""

    def __init__(self, log: Path, command: list[str], cwd: Path, **environment: str):
        self.log = log
        own = {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(REPOSITORY)}
        with log.open("w") as file:
            self.process = subprocess.Popen(
                [sys.executable, *command], cwd=cwd, env=os.environ | own | environment, stdout=file, stderr=file
            )

    def wait(self, url: str) -> str:
        """The page at `url`, as soon as there is one."""
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                with urllib.request.urlopen(url) as answer:
                    return answer.read().decode()
            except OSError:
                time.sleep(0.2)
        raise AssertionError(f"nothing is served at {url}:\n{self.log.read_text()}")

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(20)


@contextmanager
def chromium(folder: Path) -> Iterator:
    """Headless Chromium with a profile of its own in a folder, or a skip that says what is not installed."""
    if not shutil.which("chromium") or not shutil.which("chromedriver"):
        pytest.skip("chromium and chromedriver are not installed (Debian: chromium, chromium-driver)")
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for flag in (*FLAGS.split(), f"--user-data-dir={folder / 'profile'}"):
        options.add_argument(flag)
    options.add_experimental_option("prefs", {"download.default_directory": str(folder / "downloads")})
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        yield driver
    finally:
        driver.quit()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Page:
    """What a person does on the page."""

    def __init__(self, browser, url: str):
        self.browser, self.url = browser, url
        self.appear(1280, 900)
        browser.get(url)
        self.wait(lambda: self.all("#queries input[type=file]"))
        self.wait(lambda: not self.all(".wrap.translucent"))  # Gradio's veil while the page is being set up
        self.wait(lambda: self.all("[aria-label='New images: Choose images']"))  # the page's own script has run

    def appear(self, width: int, height: int, *, dark: bool = False) -> None:
        """Change the size of the window and the colour scheme of the system."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        self.browser.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": width < 500})

    def shoot(self, path: Path) -> None:
        """Write a picture of the whole page, as far as it fits into a picture."""
        size = self.browser.execute_cdp_cmd("Page.getLayoutMetrics", {})["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": min(size["height"], 8000), "scale": 1}
        options = {"captureBeyondViewport": True, "clip": clip}
        picture = self.browser.execute_cdp_cmd("Page.captureScreenshot", options)["data"]
        path.write_bytes(base64.b64decode(picture))

    def wait(self, condition, seconds: float = 60):
        deadline = time.monotonic() + seconds
        while not (found := condition()):
            assert time.monotonic() < deadline, f"still waiting; the page says: {self.text()}"
            time.sleep(0.05)
        return found

    def all(self, selector: str) -> list:
        return self.browser.find_elements("css selector", selector)

    def text(self) -> str:
        return self.browser.find_element("css selector", "body").text

    def press(self, name: str) -> None:
        """Press a button of this id, when nothing lies over it."""
        center = "arguments[0].scrollIntoView({block: 'center'})"
        button = self.wait(lambda: self.all(f"#{name}"))[0]
        self.browser.execute_script(center, button)
        self.wait(button.is_enabled)
        button.click()

    def click(self, selector: str) -> None:
        """Click on the first element of this selector that is shown."""
        shown = self.wait(lambda: [element for element in self.all(selector) if element.is_displayed()])
        self.browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", shown[0])
        shown[0].click()

    def name_class(self, row: int, name: str) -> None:
        box = self.wait(lambda: self.all(f"#name-{row} :is(input, textarea)"))[0]
        box.clear()
        box.send_keys(name)

    def upload(self, gallery: str, *files: Path) -> None:
        before = len(self.all(f"#{gallery} .thumbnail-item"))
        self.all(f"#{gallery} input[type=file]")[0].send_keys("\n".join(map(str, files)))
        self.wait(lambda: len(self.all(f"#{gallery} .thumbnail-item")) == before + len(files))

    def adapt(self, classes: dict[str, list[Path]]) -> str:
        """Fill in the rows from the top, press Adapt and return what the page says."""
        for row, (name, files) in enumerate(classes.items(), start=1):
            if row > 2:
                self.press("add-class")
            self.name_class(row, name)
            if files:
                self.upload(f"images-{row}", *files)
        return self.message("adapt", "status")

    def message(self, button: str, place: str) -> str:
        """Press a button and return the message at a place of the page as soon as it is another one."""
        old = self.said(place)
        self.press(button)
        return self.wait(lambda: (new := self.said(place)) != old and new)

    def said(self, place: str) -> str:
        script = f"return document.querySelector('#{place} [role]')?.innerText"
        return self.browser.execute_script(script) or ""

    def alert(self, button: str, place: str) -> str:
        message = self.message(button, place)
        assert self.all(f"#{place} [role=alert]"), f"not an alert: {message}"
        return message

    def choose_truth(self, row: int, name: str) -> None:
        """Say which class the new image in a row of the results is; an empty name takes it back."""
        script = "arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('change', {bubbles: true}))"
        self.browser.execute_script(script, self.all(".hf-results select")[row], name)

    def thumbnails(self, gallery: str) -> int:
        """How many images a gallery shows."""
        return len(self.all(f"#{gallery} .thumbnail-item"))

    def names(self) -> list[str]:
        """The names of the classes that are shown."""
        script = "return [...document.querySelectorAll('[id^=name-] :is(input, textarea)')].map((box) => box.value)"
        return self.browser.execute_script(script)

    def drop(self, place: str, *paths: Path) -> None:
        """Drop files or folders on a place of the page."""
        [element, *_] = self.all(place)
        self.browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
        box = self.browser.execute_script(
            "const r = arguments[0].getBoundingClientRect(); return [r.x + r.width / 2, r.y + r.height / 2]", element
        )
        data = {"items": [], "files": [str(path) for path in paths], "dragOperationsMask": 1}
        for kind in ("dragEnter", "dragOver", "drop"):
            event = {"type": kind, "x": box[0], "y": box[1], "data": data}
            self.browser.execute_cdp_cmd("Input.dispatchDragEvent", event)

    def predictions(self) -> list[tuple[dict[str, str], dict[str, str]]]:
        """Label to score of each image, before and after."""
        rows = self.wait(lambda: self.all(".hf-results tbody tr"))
        cells = [[cell.text.splitlines() for cell in row.find_elements("css selector", "td")] for row in rows]
        return [tuple(dict(zip(lines[:6:2], lines[1:6:2], strict=True)) for lines in row) for row in cells]


def support_files(folder: Path, *names: str, n_shot: int = 3) -> dict[str, list[Path]]:
    return {name: [folder / f"support-{name}-{i}.png" for i in range(1, n_shot + 1)] for name in names}
