"""The page as people meet it: served by `hyperflow demo` or as a Space, and opened in a browser."""

from __future__ import annotations

import json

import pytest

from tests.helpers.page import Page, Served, chromium, free_port
from tests.helpers.tiny import pictures, tiny_adapter, tiny_dinov2

COMMAND = "from hf_hyperflow.cli import main; main()"


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """An account `tiny` with the two models, and folders of pictures."""
    folder = tmp_path_factory.mktemp("demo")
    backbone = tiny_dinov2()
    tiny_adapter(backbone).save_pretrained(folder / "tiny" / "hyperflow-vit-s14-70")
    backbone.save_pretrained(folder / "tiny" / "vit-s14-focus-70")
    for seed, kind in enumerate(("support", "query")):
        for name, images in pictures(n_way=5, n_shot=3, seed=seed).items():
            for i, image in enumerate(images, start=1):
                image.save(folder / f"{kind}-{name}-{i}.png")
    (folder / "notes.png").write_text("these are notes, not a picture")
    return folder


@pytest.fixture(scope="session")
def url(folder):
    """Address of `hyperflow demo`."""
    port = free_port()
    models = ["--adapter", "tiny/hyperflow-vit-s14-70", "--backbone", "tiny/vit-s14-focus-70"]
    server = Served(folder / "demo.log", ["-c", COMMAND, "demo", *models, "--port", str(port)], folder)
    server.wait(f"http://127.0.0.1:{port}")
    yield f"http://127.0.0.1:{port}"
    server.stop()


@pytest.fixture(scope="session")
def browser(folder):
    with chromium(folder) as driver:
        yield driver


@pytest.fixture
def open_page(browser, url):
    """Opens the page afresh; at the end no traceback may be on it and no other host may have been asked."""
    browser.get_log("performance")
    pages = []

    def opened() -> Page:
        pages.append(Page(browser, url))
        return pages[-1]

    yield opened
    assert "Traceback" not in pages[-1].text()
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    assert any(address.startswith(url) for address in asked)
    own = (url, "data:", "blob:", "chrome:", "chrome-extension:")
    assert [address for address in asked if not address.startswith(own)] == []
