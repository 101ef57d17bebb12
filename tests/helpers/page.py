"""A served page, and what a person does on it in a browser."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --window-size=1200,900 --hide-scrollbars "
    "--use-fake-device-for-media-stream --use-fake-ui-for-media-stream"
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


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Page:
    """What a person does on the page."""

    def __init__(self, browser, url: str, width: int = 1200, height: int = 900):
        self.browser, self.url = browser, url
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        browser.get(url)
        self.wait(lambda: self.all("#queries input[type=file]"))
        self.wait(lambda: not self.all(".wrap.translucent"))  # Gradio's veil while the page is being set up

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

    def predictions(self) -> list[tuple[dict[str, str], dict[str, str]]]:
        """Label to score of each image, before and after."""
        rows = self.wait(lambda: self.all(".hf-results tbody tr"))
        cells = [[cell.text.splitlines() for cell in row.find_elements("css selector", "td")] for row in rows]
        return [tuple(dict(zip(lines[:6:2], lines[1:6:2], strict=True)) for lines in row) for row in cells]


def support_files(folder: Path, *names: str, n_shot: int = 3) -> dict[str, list[Path]]:
    return {name: [folder / f"support-{name}-{i}.png" for i in range(1, n_shot + 1)] for name in names}
