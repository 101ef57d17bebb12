"""Files that ask their reader for more than it should give: each gives pixels or an `ImageError`, within limits."""

from __future__ import annotations

import io
import os
import socket
import struct
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL.features
import PIL.Image
import PIL.ImageOps
import pytest

from hf_hyperflow import ImageError
from hf_hyperflow.modeling.image_gate import MAX_BYTES
from hf_hyperflow.modeling.images import decode
from tests.helpers.files import encode_picture
from tests.helpers.limits import run_limited
from tests.helpers.special_images import (
    EPS,
    animation,
    bmp_header,
    gif_comment,
    gif_header,
    hidden_tags,
    jpeg2000_size,
    jpeg_header,
    jpeg_scans,
    jpeg_with_exif,
    large_jpeg,
    overlapping_tags,
    png,
    png_chunk,
    png_profile,
    png_text,
    tiff_strip,
    tiff_strips,
    tiff_tile,
    webp_canvas,
)
from tests.helpers.tiny import picture

needs_avif = pytest.mark.skipif(not PIL.features.check("avif"), reason="Pillow without AVIF")
needs_jpeg2000 = pytest.mark.skipif(not PIL.features.check("jpg_2000"), reason="Pillow without JPEG 2000")
pytestmark = pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")


class Outcome(NamedTuple):
    """What became of an image, its size or the error in words with its cause, and the seconds of processor time."""

    size: tuple[int, int] | None
    message: str
    cause: str
    seconds: float


def try_to_decode(image: object, name: str = "special") -> Outcome:
    start = time.process_time()
    size, message, cause = None, "", ""
    try:
        decoded = decode(image, name)
        assert decoded.mode == "RGB"
        size = decoded.size
    except ImageError as error:
        message, cause = str(error), type(error.__cause__).__name__
    return Outcome(size, message, cause, time.process_time() - start)


VERDICTS: Counter[str] = Counter()


@pytest.fixture(scope="module", autouse=True)
def printed_verdicts() -> Iterator[None]:
    """What became of all special images."""
    yield
    print(dict(VERDICTS))


def attempt(image: object, *, megabytes: int = 200, seconds: float = 60) -> Outcome:
    """Decode an image within limits; whatever is neither pixels nor an `ImageError` is raised."""
    outcome = run_limited(try_to_decode, image, megabytes=megabytes, seconds=seconds)
    VERDICTS["clear error" if outcome.size is None else "right"] += 1
    return outcome


def refuse(image: object, words: str) -> None:
    """Assert that an image is refused before any memory or time is spent on it."""
    outcome = attempt(image)
    assert outcome.size is None
    assert outcome.message.startswith("special")
    assert words in outcome.message
    assert outcome.cause != "MemoryError"
    assert outcome.seconds < 2


REFUSED = {
    "a million pixels wide": (lambda: png(1_000_000, 1), "1000000 x 1 pixels, one side more than 50 times the other"),
    "16 bit": (lambda: png(13_000, 13_000, depth=16, pixels=b""), "13000 x 13000 pixels, more than the limit of 64"),
    "huge PNG": (lambda: png(100_000, 100_000, pixels=b""), "more than 64 million pixels"),
    "text of a PNG": (lambda: png_text(64), "Decompressed data too large"),
    "profile of a PNG": (lambda: png_profile(64), "Decompressed data too large"),
    "tags of a PNG": (lambda: png(8, 8, chunks=png_chunk(b"eXIf", overlapping_tags(5000, 500_000))), "its tags claim"),
    "tags of a JPEG": (lambda: jpeg_with_exif(overlapping_tags(5000, 500_000)), "its tags claim more bytes"),
    "hidden tags": (lambda: jpeg_with_exif(hidden_tags(5000, 500_000)), "its tags claim more bytes"),
    "tags of a WebP": (lambda: webp_canvas(8, 8, overlapping_tags(5000, 500_000)), "its tags claim more bytes"),
    "tags of a TIFF": (lambda: overlapping_tags(5000, 500_000), "its tags claim more bytes"),
    "tags of a BigTIFF": (lambda: overlapping_tags(5000, 500_000, big=True), "its tags claim more bytes"),
    "many tags": (lambda: overlapping_tags(60_000, 1), "it has 60000 tags"),
    "strips of a TIFF": (lambda: tiff_strips(4_000_000), "its tags claim more bytes"),
    "tile of a TIFF": (lambda: tiff_tile(20_000, b""), "special: a tile has 20000 x 20000 pixels"),
    "huge JPEG": (lambda: jpeg_header(65_000, 65_000), "65000 x 65000 pixels, more than the limit of 256 million"),
    "large JPEG": (lambda: jpeg_header(12_000, 12_000, progressive=True), "more than the limit of 128 million"),
    "short JPEG": (lambda: jpeg_header(9000, 9000), "9000 x 9000 pixels are not in "),
    "scans of a JPEG": (lambda: jpeg_scans(2000, 400), "passes over 2000 x 2000 pixels"),
    "huge GIF": (lambda: gif_header(65_535, 65_535), "more than 64 million pixels"),
    "comment of a GIF": (lambda: gif_comment(40_000), "its header has more than 10000 parts"),
    "canvas of a WebP": (lambda: webp_canvas(12_000, 12_000), "special"),
    "canvas of 2 GB": (lambda: webp_canvas(16_383, 16_383), "special"),
    "huge BMP": (lambda: bmp_header(2**31 - 1, 2**31 - 1), "more than 64 million pixels"),
    "upside down": (lambda: bmp_header(13_000, -13_000), "13000 x 13000 pixels"),
    "BMP in Python": (lambda: bmp_header(7900, 7900, compression=1), "more than the limit of 2 million"),
    "huge PPM": (lambda: b"P6\n1000000000 1000000000\n255\n", "more than 64 million pixels"),
    "PPM in Python": (lambda: b"P5 3000 3000 100 " + b"\1" * 9_000_000, "more than the limit of 2 million"),
    "PPM of text": (lambda: b"P2 3000 3000 255 " + b"1 " * 9_000_000, "more than the limit of 2 million"),
    "PostScript": (lambda: EPS, "it has no readable header of PNG, JPEG, WEBP"),
    "empty": (lambda: b"", "it has no readable header of PNG"),
}


@pytest.mark.parametrize(("make", "words"), REFUSED.values(), ids=REFUSED)
def test_what_would_take_too_much_is_refused(make, words):
    refuse(make(), words)


@pytest.mark.slow
@needs_jpeg2000
def test_large_jpeg_2000():
    refuse(jpeg2000_size(4100), "4100 x 4100 pixels, more than the limit of 16 million")


def test_a_file_of_a_terabyte(tmp_path):
    path = tmp_path / "special.png"
    with path.open("wb") as file:
        file.write(encode_picture(picture(0)))
        file.truncate(2**40)
    refuse(path, f"has 1,099,511,627,776 bytes, more than the limit of {MAX_BYTES:,}")


READ = {
    "frames of a GIF": (lambda: animation(400, "GIF"), (64, 64)),
    "frames of a PNG": (lambda: animation(400, "PNG"), (64, 64)),
    "frames of a WebP": (lambda: animation(100, "WEBP"), (64, 64)),
    "frames of a TIFF": (lambda: animation(400, "TIFF"), (64, 64)),
    "a strip of many rows": (lambda: tiff_strip(10_000_000), (8, 1)),
    "1 to 50": (lambda: png(5000, 100), (5000, 100)),
}


@pytest.mark.parametrize(("make", "size"), READ.values(), ids=READ)
def test_what_looks_like_too_much_and_is_not(make, size):
    outcome = attempt(make())
    assert outcome.size == size, outcome.message
    assert outcome.seconds < 2


@pytest.mark.parametrize(
    ("sides", "size"), [((12_000, 9000), (3000, 2250)), ((30_000, 3000), (15_000, 1500))], ids=["108 MP", "long"]
)
def test_large_photos_take_little_memory(sides, size):
    outcome = attempt(large_jpeg(*sides))
    assert outcome.size == size, outcome.message


@needs_avif
@pytest.mark.parametrize("orientation", [1, 6])
def test_tags_of_an_avif_are_not_read(orientation):
    """AVIF is turned by a record of its own, so its EXIF record is not needed."""
    image = picture(0, size=(40, 20))
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    plain = decode(encode_picture(image, "AVIF", speed=10, exif=exif), "plain")
    assert plain.size == ((20, 40) if orientation == 6 else (40, 20))
    outcome = attempt(
        encode_picture(image, "AVIF", speed=10, exif=overlapping_tags(5000, 500_000)),
    )
    assert outcome.size == (40, 20)


LARGEST = {
    "8 bit": (lambda: png(8000, 8000), (8000, 8000)),
    "16 bit": (lambda: png(8000, 8000, depth=16), (8000, 8000)),
    "alpha": (lambda: encode_picture(PIL.Image.new("RGBA", (8000, 8000)), "PNG", compress_level=1), (8000, 8000)),
    "float": (lambda: encode_picture(PIL.Image.new("F", (8000, 8000)), "TIFF", compression="tiff_lzw"), (8000, 8000)),
    "CMYK": (lambda: encode_picture(PIL.Image.new("CMYK", (8000, 8000)), "JPEG"), (4000, 4000)),
    "JPEG": (lambda: encode_picture(PIL.Image.new("RGB", (8000, 8000)), "JPEG"), (4000, 4000)),
    "WebP": (lambda: webp_canvas(8000, 8000), (8000, 8000)),
    "tile": (lambda: tiff_tile(8000), (1, 1)),
    "text": (lambda: b"P2 1400 1400 255 " + b"1 " * 1_960_000, (1400, 1400)),
    "long JPEG": (lambda: jpeg_scans(7900, 10), (3950, 3950)),
    "largest JPEG": (lambda: large_jpeg(16_000, 16_000), (4000, 4000)),
    "largest progressive": (lambda: large_jpeg(12_000, 10_600, "RGB", progressive=True), (3000, 2650)),
}


@pytest.mark.slow
@pytest.mark.parametrize(("make", "size"), LARGEST.values(), ids=LARGEST)
def test_the_largest_images(make, size):
    outcome = attempt(make(), megabytes=1200)
    assert outcome.size == size, outcome.message


@pytest.mark.slow
@needs_jpeg2000
def test_the_largest_jpeg_2000():
    outcome = attempt(jpeg2000_size(4000), megabytes=1200)
    assert outcome.size == (4000, 4000), outcome.message


# What is not a regular file


def make_fifo(path: Path) -> None:
    os.mkfifo(path)


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


def make_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("make", [make_fifo, make_socket, make_device])
def test_only_regular_files_are_opened(tmp_path, make):
    make(tmp_path / "s.png")
    refuse(tmp_path / "s.png", "it is not a regular file")


def test_a_folder_is_said_to_be_one(tmp_path):
    refuse(tmp_path, "is a folder, not an image. Give the images in it.")


def test_a_loop_of_links_and_a_link_to_nowhere(tmp_path):
    loop, dangling = tmp_path / "loop.png", tmp_path / "dangling.png"
    loop.symlink_to(loop)
    dangling.symlink_to(tmp_path / "nothing.png")
    refuse(loop, "cannot be read as an image")
    refuse(dangling, "there is no file")


def test_a_link_to_an_image_is_followed(tmp_path):
    picture(0).save(tmp_path / "a.png")
    (tmp_path / "b.png").symlink_to(tmp_path / "a.png")
    assert np.array_equal(decode(tmp_path / "b.png", "b"), picture(0))


# No program is started


@pytest.fixture
def ghostscript(tmp_path, monkeypatch) -> Path:
    """A file that appears when Ghostscript is started."""
    started = tmp_path / "started"
    program = tmp_path / "bin" / "gs"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ntouch {started}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)
    return started


def test_postscript_starts_no_program(tmp_path, ghostscript):
    path = tmp_path / "innocent.png"
    path.write_bytes(EPS)
    for given in (path, EPS, {"bytes": EPS, "path": None}, PIL.Image.open(path)):
        with pytest.raises(ImageError, match=r"^innocent\.png"):
            decode(given, "innocent.png")
    assert not ghostscript.exists()
    PIL.Image.open(path)  # so that the test would notice: Pillow itself does start it
    with pytest.raises(OSError, match=r"."):
        PIL.Image.open(path).load()
    assert ghostscript.exists()


# The same gate for what is given directly


@pytest.mark.parametrize("shape", [(1, 60), (60, 1)])
def test_sides_of_what_is_given_directly(shape):
    grey = np.zeros(shape, dtype=np.uint8)
    for given in (
        grey,
        grey / 255,
        grey.astype(np.uint16),
        PIL.Image.fromarray(grey),
        encode_picture(PIL.Image.fromarray(grey)),
    ):
        with pytest.raises(ImageError, match="one side more than 50 times the other"):
            decode(given, "strip")


def test_pixels_of_what_is_given_directly():
    grey = np.broadcast_to(np.uint8(0), (8001, 8000))  # takes one byte
    refuse(grey, "8000 x 8001 pixels, more than the limit of 64 million")
    refuse(PIL.Image.open(io.BytesIO(png(9000, 9000, pixels=b""))), "9000 x 9000 pixels")


# What Pillow reads today


def test_large_jpegs_are_reduced_and_others_keep_their_pixels():
    stripes = np.zeros((4200, 4300), dtype=np.uint8)
    stripes[:, ::2] = 255
    large = PIL.Image.fromarray(stripes)
    assert decode(encode_picture(large, "JPEG"), "x").size == (2150, 2100)
    assert decode(encode_picture(large, "PNG", compress_level=1), "x").size == (4300, 4200)
    narrow = encode_picture(large.crop((0, 0, 4300, 4096)), "JPEG")
    with PIL.Image.open(io.BytesIO(narrow)) as expected:
        assert np.array_equal(decode(narrow, "x"), expected.convert("RGB"))


def test_a_lying_height():
    """A JPEG that says it is longer than it is ends early."""
    outcome = attempt(jpeg_header(40, 1000))
    assert outcome.size == (40, 1000) or outcome.message.startswith("special cannot be read as an image")


def test_heic_without_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    content = struct.pack(">I", 24) + b"ftypheic" + b"\0" * 4 + b"mif1heic" + b"\0" * 40
    with pytest.raises(
        ImageError, match=r"^x\.heic is a HEIC image, which needs another package: pip install pillow-heif"
    ):
        decode(content, "x.heic")


def test_heic():
    pytest.importorskip("pillow_heif").register_heif_opener()
    image = PIL.Image.fromarray(np.kron(np.asarray(picture(0, size=(6, 4))), np.ones((16, 16, 1), dtype=np.uint8)))
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    upright, turned = encode_picture(image, "HEIF", quality=95), encode_picture(image, "HEIF", quality=95, exif=exif)
    assert np.abs(np.asarray(decode(upright, "x")).astype(int) - np.asarray(image)).mean() < 8
    with PIL.Image.open(io.BytesIO(turned)) as opened:
        assert np.array_equal(decode(turned, "x"), PIL.ImageOps.exif_transpose(opened))
    bomb = encode_picture(image, "HEIF", quality=95, exif=overlapping_tags(5000, 500_000))
    assert attempt(bomb).size == (96, 64)
