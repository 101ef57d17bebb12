"""Image files with flipped bits and cut ends: they give pixels or an `ImageError` that names them."""

from __future__ import annotations

import contextlib
import random
import warnings

import PIL.Image
import pytest

from hf_hyperflow import ImageError
from hf_hyperflow.modeling.images import decode
from tests.helpers.files import encode_picture, flipped_bits
from tests.helpers.tiny import picture

pytestmark = pytest.mark.slow

FORMATS = ["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP", "PPM"]


def decode_or_refuse(content: bytes) -> None:
    with contextlib.suppress(ImageError):
        assert decode(content, "damaged").mode == "RGB"


@pytest.mark.parametrize("file_format", FORMATS)
def test_flipped_bits(file_format):
    content = encode_picture(picture(0, size=(20, 16)), file_format)
    head = min(64, len(content)) - 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for damaged in [*flipped_bits(content, 60, last=head), *flipped_bits(content, 120, seed=1)]:
            decode_or_refuse(damaged)


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "TIFF", "WEBP", "BMP", "PPM"])
def test_cut_ends(file_format, tmp_path):
    content = encode_picture(picture(0), file_format)
    path = tmp_path / f"cut.{file_format.lower()}"
    generator = random.Random(0)
    lengths = [0, 1, 20, len(content) - 40, *(generator.randrange(len(content) - 40) for _ in range(20))]
    for length in lengths:
        path.write_bytes(content[:length])
        for given in (path, content[:length]):
            with pytest.raises(ImageError, match=r"^cut cannot be read as an image \(.+\)\. Replace or remove it\.$"):
                decode(given, "cut")


def test_damaged_exif():
    exif = PIL.Image.Exif()
    exif[0x0112], exif[0x010E], exif[0x011A] = 6, "a picture", (72, 1)
    content = encode_picture(picture(0, size=(8, 8)), "JPEG", exif=exif)
    start, end = content.index(b"Exif"), content.index(b"a picture")
    generator = random.Random(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for position in range(start, end):
            for value in generator.sample(range(256), 12):
                decode_or_refuse(content[:position] + bytes([value]) + content[position + 1 :])
