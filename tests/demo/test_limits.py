"""The page under attack: too much, too large, broken off. Through the page's functions, and from a real server."""

from __future__ import annotations

import http.client
import importlib.util
import json
import os
import signal
import struct
import subprocess
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from hf_hyperflow.demo.sessions import SharedModels
from hf_hyperflow.demo.uploads import MAX_CLASSES
from tests.helpers.tiny import picture, pictures, tiny_adapter, tiny_dinov2

needs_gradio = pytest.mark.skipif(not importlib.util.find_spec("gradio"), reason="gradio is not installed")
pytestmark = needs_gradio


def write_bomb(path: Path, width: int, height: int) -> Path:
    """A whole PNG of zeros in two colours; a few hundred kB that stand for as many pixels as asked."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    compressor, rows = zlib.compressobj(1), []
    row = bytes(1 + (width + 7) // 8)
    for _ in range(height):
        rows.append(compressor.compress(row))
    data = b"".join(rows) + compressor.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    chunks = [chunk(b"IHDR", header), chunk(b"IDAT", data), chunk(b"IEND", b"")]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pictures of three classes, a bomb and a text."""
    folder = tmp_path_factory.mktemp("visitors")
    for name, images in pictures(n_way=3, n_shot=2).items():
        for i, image in enumerate(images):
            image.save(folder / f"{name}-{i}.png")
    write_bomb(folder / "bomb.png", 20_000, 20_000)
    (folder / "notes.png").write_text("these are notes")
    return folder


@pytest.fixture(scope="module")
def handlers():
    from hf_hyperflow.demo.handlers import Handlers

    backbone = tiny_dinov2()
    return Handlers(SharedModels(tiny_adapter(backbone), backbone))


def rows(classes: dict[str, list[Path]]) -> list:
    """The values of the page's text boxes and galleries."""
    names: list = [*classes] + [""] * (MAX_CLASSES - len(classes))
    galleries: list = [[(str(path), None) for path in paths] for paths in classes.values()]
    return [*names, *galleries, *[None] * (MAX_CLASSES - len(classes))]


def test_twenty_images_a_class(handlers, folder):
    red, green = folder / "red-0.png", folder / "green-0.png"
    session, said, *_ = handlers.adapt(*rows({"red": [red] * 20, "green": [green]}))
    assert "from 21 images" in said
    assert "of 20 images" in handlers.predict(session, [(str(red), None)] * 20)
    assert "New images: there are 21 images, and at most 20" in handlers.predict(session, [(str(red), None)] * 21)
    session, said, *_ = handlers.adapt(*rows({"red": [red] * 21, "green": [green]}))
    assert session is None
    assert "there are 21 images, and at most 20" in said


def test_names_of_eighty_characters(handlers, folder):
    red, green = folder / "red-0.png", folder / "green-0.png"
    assert handlers.adapt(*rows({"x" * 80: [red], "green": [green]}))[0] is not None
    session, said, *_ = handlers.adapt(*rows({"red": [red], "y" * 81: [green]}))
    assert session is None
    assert "The name of class 2 is longer than 80 characters" in said
    assert "yyy" not in said


def test_a_bomb_is_refused_in_a_second(handlers, folder):
    red, bomb = folder / "red-0.png", folder / "bomb.png"
    assert bomb.stat().st_size < 2_000_000
    session = handlers.adapt(*rows({"red": [red], "green": [folder / "green-0.png"]}))[0]
    for attack in (
        lambda: handlers.adapt(*rows({"red": [red] * 19 + [bomb], "green": [red]}))[1],
        lambda: handlers.predict(session, [(str(bomb), None)]),
    ):
        start = time.monotonic()
        said = attack()
        assert time.monotonic() - start < 1
        assert "bomb.png" in said
        assert 'role="alert"' in said
        assert str(folder) not in said


def test_an_error_of_one_request_leaves_the_lock_free(handlers, folder, monkeypatch):
    """Also an unexpected one, in the middle of adapting."""
    classes = rows({"red": [folder / "red-0.png"], "green": [folder / "green-0.png"]})
    session = handlers.adapt(*classes)[0]
    query = [(str(folder / "red-1.png"), None)]
    expected = handlers.predict(session, query)
    with monkeypatch.context() as broken:
        broken.setattr(handlers.models.adapter.task_encoder, "forward", lambda *inputs: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            handlers.adapt(*classes)
    assert handlers.predict(session, query) == expected
    assert handlers.adapt(*classes)[0] is not None


# Over HTTP


@pytest.fixture(scope="module")
def page():
    """The address of the page, served by this process."""
    from hf_hyperflow.demo.app import build_demo, launch
    from tests.helpers.page import free_port

    backbone = tiny_dinov2()
    served, port = build_demo(tiny_adapter(backbone), backbone), free_port()
    launch(served, "127.0.0.1", port)
    yield f"http://127.0.0.1:{port}"
    served.close()


def post(url: str, path: str, body: bytes | object, visitor: str, kind: str = "application/json") -> tuple[int, str]:
    """The status and the body of the answer to a visitor whose address a proxy noted."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=30)
    headers = {"X-Forwarded-For": visitor, "Content-Type": kind}
    connection.request("POST", path, body, headers)
    with connection.getresponse() as answer:
        status, text = answer.status, answer.read().decode()
    connection.close()
    return status, text


UPLOAD = "multipart/form-data; boundary=xxx"


def upload(content: bytes) -> bytes:
    head = b'--xxx\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n'
    return head + b"Content-Type: image/png\r\n\r\n" + content + b"\r\n--xxx--\r\n"


def test_uploads_of_a_visitor_are_bounded(page, monkeypatch):
    import hf_hyperflow.demo.limits as limits

    monkeypatch.setattr(limits, "UPLOAD_BYTES", 1_000_000)
    half = upload(bytes(400_000))
    path = "/gradio_api/upload"
    assert post(page, path, half, "198.51.100.1", UPLOAD)[0] == 200
    assert post(page, path, half, "198.51.100.1", UPLOAD)[0] == 200
    status, said = post(page, path, half, "198.51.100.1", UPLOAD)
    assert (status, said) == (429, "You have uploaded a lot. Wait some minutes, then go on.")
    assert post(page, path, half, "198.51.100.2", UPLOAD)[0] == 200, "others can go on"
    unknown = iter([upload(b"x")])  # sent in chunks: nobody knows how much is to come
    assert post(page, path, unknown, "198.51.100.1", UPLOAD)[0] == 411
    for _ in range(4):
        assert post(page, path, half, "127.0.0.1", UPLOAD)[0] == 200, "this machine has no limits"


def test_a_file_of_more_than_20_mb_is_refused(page):
    status, said = post(page, "/gradio_api/upload", upload(bytes(21_100_000)), "198.51.100.3", UPLOAD)
    assert status == 413
    assert "maximum allowed size" in said


def test_runs_of_a_visitor_are_bounded(page, monkeypatch):
    import hf_hyperflow.demo.limits as limits

    monkeypatch.setattr(limits, "RUNS", 3)
    join = json.dumps({"fn_index": 99, "data": [], "session_hash": "s"})
    statuses = []
    for visitor in ("198.51.100.4",) * 5 + ("2001:db8::1", "2001:db8::2", "2001:db8::3", "2001:db8::4"):
        statuses.append(post(page, "/gradio_api/queue/join", join, visitor)[0] == 429)
    assert statuses == [False] * 3 + [True] * 2 + [False] * 3 + [True], "an IPv6 visitor has a whole /64"
    assert post(page, "/gradio_api/call/adapt", "{}", "198.51.100.4")[0] == 429


def test_nobody_passes_the_queue(page):
    """The models are not to be had by a request that does not wait for its turn."""
    body = json.dumps({"data": [None] * 20, "session_hash": "s"})
    for path in ("/gradio_api/run/adapt", "/gradio_api/api/adapt"):
        status, said = post(page, path, body, "198.51.100.5")
        assert status >= 400, said


class Visitor:
    """Somebody on the page, by Gradio's client."""

    def __init__(self, url: str):
        from gradio_client import Client

        self.client = Client(url, verbose=False)

    def adapt(self, classes: dict[str, list[Path]]) -> str:
        from gradio_client import handle_file

        names, galleries = rows(classes)[:10], rows(classes)[10:]
        files = []
        for gallery in galleries:
            files.append([{"image": handle_file(path), "caption": None} for path, _ in gallery or []])
        return self.client.predict(*names, *files, api_name="/adapt")[0]

    def predict(self, *paths: Path) -> str:
        from gradio_client import handle_file

        return self.client.predict(
            [{"image": handle_file(path), "caption": None} for path in paths], api_name="/predict"
        )


ATTACKER = """
import sys
from pathlib import Path
from tests.demo.test_limits import Visitor, rows
url, folder = sys.argv[1], Path(sys.argv[2])
visitor = Visitor(url)
print("there", flush=True)
while True:
    visitor.adapt({"red": [folder / "red-0.png"] * 20, "green": [folder / "green-0.png"] * 20})
    print("adapted", flush=True)
"""


@pytest.mark.slow
def test_one_visitor_does_not_stop_another(page, folder):
    """While one sends a bomb after the other and another is killed in the middle of adapting."""
    classes = {name: [folder / f"{name}-0.png", folder / f"{name}-1.png"] for name in ("red", "green", "blue")}
    alone = Visitor(page)
    assert "3 classes from 6 images" in alone.adapt(classes)
    expected = alone.predict(folder / "red-1.png", folder / "blue-1.png")
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", ATTACKER, page, str(folder)]
    attacker = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert attacker.stdout.readline() == "there\n"
        bomber, victim = Visitor(page), Visitor(page)
        with ThreadPoolExecutor(1) as pool:
            attack = pool.submit(bomb, bomber, folder)
            assert "3 classes from 6 images" in victim.adapt(classes)
            assert attacker.stdout.readline() == "adapted\n"
            attacker.send_signal(signal.SIGKILL)  # with the next request on its way or in the works
            for _ in range(2):
                assert victim.predict(folder / "red-1.png", folder / "blue-1.png") == expected
                assert "3 classes from 6 images" in victim.adapt(classes)
            assert all("bomb.png" in said for said in attack.result())
        assert alone.predict(folder / "red-1.png", folder / "blue-1.png") == expected
    finally:
        attacker.kill()
        attacker.wait()
        attacker.stdout.close()


def bomb(visitor: Visitor, folder: Path) -> list[str]:
    said = []
    for _ in range(3):
        said.append(visitor.adapt({"red": [folder / "bomb.png"], "green": [folder / "notes.png"]}))
    return said


def test_an_allowance_grows_back():
    from hf_hyperflow.demo.limits import Allowance

    allowance = Allowance(10, 0.5)
    assert allowance.take(10)
    assert not allowance.take(1)
    time.sleep(0.2)
    assert allowance.take(3)
    assert not allowance.take(10)


def test_a_session_keeps_no_images(handlers):
    session = handlers.models.adapt(pictures(n_way=2, n_shot=2))[0]
    assert session.before._support is None
    assert session.after._support is None
    assert session.before([picture(0)])
