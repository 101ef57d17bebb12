"""Downloads from hostile servers: real ones on 127.0.0.1, each of which ends by itself."""

from __future__ import annotations

import base64
import json
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import pytest

from hf_hyperflow import ImageError
from hf_hyperflow import download as download_module
from hf_hyperflow.download import MAX_BYTES, MAX_REDIRECTS, download, shorten

REPOSITORY = Path(__file__).resolve().parents[1]


class Handler(BaseHTTPRequestHandler):
    """Answers by the path: `/bytes/N`, `/drip`, `/drip-head`, `/silent`, `/endless`, `/huge`, `/cut`, `/to/URL`."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.server.paths.append(self.path)
        kind, _, rest = self.path[1:].partition("/")
        with suppress(OSError):  # the client may hang up
            self.answer(kind, rest)
        self.close_connection = True

    def answer(self, kind: str, rest: str) -> None:
        if kind == "bytes":
            self.start(200, {"Content-Length": rest})
            self.wfile.write(bytes(int(rest)))
        elif kind == "to":
            self.start(302, {"Location": unquote(rest), "Content-Length": "0"})
        elif kind == "huge":
            self.start(200, {"Content-Length": str(MAX_BYTES + 1)})
        elif kind == "cut":
            self.start(200, {"Content-Length": "100"})
            self.wfile.write(bytes(60))
        elif kind == "endless":
            self.start(200, {"Content-Type": "image/png"})
            for _ in range(400):
                self.wfile.write(bytes(1_000_000))
        elif kind in ("drip", "drip-head", "silent"):
            self.drip(kind)
        else:
            self.start(404, {"Content-Length": "0"})

    def start(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def drip(self, kind: str) -> None:
        """A byte every tenth of a second, for ten seconds: no single wait is long."""
        if kind == "drip":
            self.start(200, {"Content-Length": "100"})
        if kind == "drip-head":
            self.wfile.write(b"HTTP/1.1 200 OK\r\nX-Header: ")
        for _ in range(100):
            time.sleep(0.1)
            if kind != "silent":
                self.wfile.write(b"x")

    def log_message(self, *args: object) -> None:
        pass


@contextmanager
def serve(host: str = "127.0.0.1", port: int = 0) -> Iterator[ThreadingHTTPServer]:
    with ThreadingHTTPServer((host, port), Handler) as server:
        server.daemon_threads, server.paths = True, []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture(scope="module")
def site():
    with serve() as server:
        yield f"http://127.0.0.1:{server.server_address[1]}"


def refused(url: str, words: str, timeout: float = 10) -> float:
    """The download ends with an `ImageError` that names the URL and says `words`; returns the seconds it took."""
    start = time.monotonic()
    with pytest.raises(ImageError) as error:
        download(url, timeout)
    assert str(error.value).startswith(shorten(url))
    assert words in str(error.value)
    return time.monotonic() - start


def test_an_image_arrives_whole(site):
    assert download(f"{site}/bytes/200000", 10) == bytes(200_000)
    assert download(f"{site}/to/{site}/to//bytes/7", 10) == bytes(7)
    assert download("data:image/png;base64," + base64.b64encode(b"abc").decode(), 10) == b"abc"
    assert download("data:,a%20b", 10) == b"a b"


@pytest.mark.parametrize("kind", ["drip", "drip-head", "silent"])
def test_the_deadline_is_a_total(site, kind):
    assert refused(f"{site}/{kind}", "it takes longer than 0.6 s", timeout=0.6) < 1.5
    assert refused(f"{site}/to/{site}/{kind}", "it takes longer than 0.6 s", timeout=0.6) < 1.5


def test_no_thread_stays_behind(site):
    before = set(threading.enumerate())
    refused(f"{site}/drip", "it takes longer", timeout=0.3)
    behind = [thread for thread in set(threading.enumerate()) - before if "run" in thread.name]
    for thread in behind:
        thread.join(2)  # the server's threads have other names
        assert not thread.is_alive()


def test_a_name_that_is_never_found_does_not_hang(monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: time.sleep(5))
    assert refused("http://pictures.example/a.png", "it takes longer than 0.3 s", timeout=0.3) < 1


def test_sizes(site, monkeypatch):
    assert refused(f"{site}/huge", "it is larger than 50 MB") < 2
    refused(f"{site}/endless", "it is larger than 50 MB")
    refused(f"{site}/cut", "broke off 40 bytes before the end")
    monkeypatch.setattr(download_module, "MAX_BYTES", 1000)
    assert len(download(f"{site}/bytes/1000", 10)) == 1000
    refused(f"{site}/bytes/1001", "it is larger than")
    refused("data:," + "x" * 1001, "it is larger than")


def test_redirects_to_other_schemes(site, tmp_path):
    (tmp_path / "secret.png").write_bytes(b"secret")
    for target in (f"file://{tmp_path}/secret.png", "ftp://127.0.0.1/x", "data:,x", "gopher://x/"):
        scheme = target.partition(":")[0]
        refused(f"{site}/to/{target}", f"it redirects to '{scheme}', and only http and https are followed")


def test_redirects_without_end(site):
    with serve() as server:
        url = f"http://127.0.0.1:{server.server_address[1]}"
        refused(f"{url}/to/", f"it redirects more than {MAX_REDIRECTS} times")
        assert len(server.paths) == MAX_REDIRECTS + 1
    loop = f"{site}/bytes/1"
    for _ in range(MAX_REDIRECTS):
        loop = f"{site}/to/{loop}"
    assert download(loop, 10) == b"\0"
    refused(f"{site}/to/{loop}", "redirects more than")


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("http:///x.png", "it names no host"),
        ("http://127.0.0.1:99999/x.png", "ort out of range"),
        ("http://[::1/x.png", "Invalid IPv6 URL"),
        ("http://127.0.0.1:9/x.png", "refused"),
        ("http://no.such.host.invalid/x.png", ""),
        ("data:image/png;base64,A", "base64"),
    ],
)
def test_wrong_addresses(url, words):
    refused(url, words)


def test_a_password_is_not_repeated(site):
    with pytest.raises(ImageError, match="a user name or a password in it") as error:
        download(site.replace("http://", "http://me:secret@") + "/bytes/1", 10)
    assert "secret" not in str(error.value)


@pytest.mark.parametrize("name", ["pictures.example", "127.1", "2130706433", "0x7f.0.0.1"])
def test_a_name_may_not_stand_for_a_private_address(site, monkeypatch, name):
    """Whoever means the address writes it; a name of the internet has no business there."""
    port = int(site.rpartition(":")[2])
    infos = socket.getaddrinfo("127.0.0.1", port, type=socket.SOCK_STREAM)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: infos)
    refused(f"http://{name}:{port}/bytes/1", f"'{name}' is at a private address")
    assert download(f"{site}/bytes/1", 10) == b"\0"
    assert download(f"http://localhost:{port}/bytes/1", 10) == b"\0"


@pytest.mark.parametrize(
    ("addresses", "is_refused"),
    [
        (["10.0.0.1"], True),
        (["172.16.3.4"], True),
        (["192.168.1.1"], True),
        (["169.254.169.254"], True),
        (["100.64.0.1"], True),
        (["0.0.0.0"], True),
        (["224.0.0.1"], True),
        (["::1"], True),
        (["fe80::1%lo"], True),
        (["fd00::1"], True),
        (["::ffff:127.0.0.1"], True),
        (["2002:7f00:1::"], True),
        (["64:ff9b::7f00:1"], True),
        (["93.184.216.34", "127.0.0.1"], True),
        (["127.0.0.1", "93.184.216.34"], True),
        (["93.184.216.34"], False),
        (["2606:2800:220:1:248:1893:25c8:1946"], False),
    ],
)
def test_every_address_of_a_name_is_checked(monkeypatch, addresses, is_refused):
    infos = []
    for address in addresses:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        infos.append((family, socket.SOCK_STREAM, 6, "", (address, 9)))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: infos)
    with pytest.raises(ImageError) as error:
        download("http://pictures.example:9/a.png", 0.3)  # nothing listens, or there is no way
    assert ("is at a private address" in str(error.value)) == is_refused


def can_make_networks() -> bool:
    if shutil.which("unshare") is None or shutil.which("ip") is None:
        return False
    return subprocess.run(["unshare", "-rnm", "true"], capture_output=True).returncode == 0


# In a network of its own, 93.184.216.34 and 10.0.0.7 are this machine, and two names belong to them.
NETWORK = """
set -e
ip link set lo up
ip address add 93.184.216.34/32 dev lo
ip address add 10.0.0.7/32 dev lo
mount --bind {hosts} /etc/hosts
exec {python} {script}
"""
SCRIPT = """
import json, socket
from hf_hyperflow import ImageError
from hf_hyperflow.download import download
from tests.test_download import serve

looked_up = []
getaddrinfo = socket.getaddrinfo

def counted(host, *args, **kwargs):
    looked_up.append(host)
    return getaddrinfo(host, *args, **kwargs)

socket.getaddrinfo = counted
outcomes = {}

def attempt(name, url):
    looked_up.clear()
    try:
        outcomes[name] = [len(download(url, 10)), list(looked_up)]
    except ImageError as error:
        outcomes[name] = [str(error), list(looked_up)]

with serve("93.184.216.34", 8001) as public, serve("10.0.0.7", 8002) as private:
    there, inside = "http://public.example:8001", "http://10.0.0.7:8002"
    attempt("public", f"{there}/bytes/5")
    attempt("public to public", f"{there}/to/{there}/bytes/5")
    attempt("public to private name", f"{there}/to/http://private.example:8002/bytes/5")
    attempt("public to private address", f"{there}/to/{inside}/bytes/5")
    attempt("public to public to private", f"{there}/to/{there}/to/{inside}/bytes/5")
    attempt("public to localhost", f"{there}/to/http://localhost:8002/bytes/5")
    attempt("private name", "http://private.example:8002/bytes/5")
    attempt("private", f"{inside}/bytes/5")
    attempt("private to private", f"{inside}/to/{inside}/bytes/5")
    attempt("private to public", f"{inside}/to/{there}/bytes/5")
    attempt("private to public to private", f"{inside}/to/{there}/to/{inside}/bytes/5")
    outcomes["asked the private server"] = private.paths
print(json.dumps(outcomes))
"""


@pytest.mark.slow
@pytest.mark.skipif(
    not can_make_networks(),
    reason="this machine does not make networks of one's own (unshare -rnm)",
)
def test_from_a_public_address_to_a_private_one(tmp_path):
    (tmp_path / "hosts").write_text("93.184.216.34 public.example\n10.0.0.7 private.example\n127.0.0.1 localhost\n")
    (tmp_path / "script.py").write_text(SCRIPT)
    places = {"hosts": tmp_path / "hosts", "python": sys.executable, "script": tmp_path / "script.py"}
    command = ["unshare", "-rnm", "sh", "-c", NETWORK.format(**places)]
    environment = {"PYTHONPATH": str(REPOSITORY), "PATH": "/usr/bin:/bin:/usr/sbin:/sbin", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    outcomes = json.loads(done.stdout.splitlines()[-1])
    asked = outcomes.pop("asked the private server")
    assert len(asked) == 5, "a request per time that the URL was given with its address, and redirects of its own"
    for name, (outcome, looked_up) in outcomes.items():
        if name in ("public", "public to public", "private", "private to private", "private to public"):
            assert outcome == 5, name
        else:
            assert "is at a private address" in outcome, name
        assert len(looked_up) == name.count(" to ") + 1, "each host is looked up once: what is checked is what is used"
