"""Contents of folders, encoded pictures, and damaged copies of files at places drawn from a seed."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import PIL.Image

from hf_hyperflow.modeling.checksums import MODEL_CHECKSUMS


def read_folder(folder: Path) -> dict[str, bytes]:
    """The content of every file below a folder, hidden ones included, by its path; a slash for every folder."""
    content = {}
    for path in sorted(folder.rglob("*")):
        content[str(path.relative_to(folder))] = path.read_bytes() if path.is_file() else b"/"
    return content


def encode_picture(picture: PIL.Image.Image, file_format: str = "PNG", **options: Any) -> bytes:
    """A picture as the bytes of a file."""
    buffer = io.BytesIO()
    picture.save(buffer, file_format, **options)
    return buffer.getvalue()


def flip_bit(content: bytes, position: int, bit: int) -> bytes:
    """The content with one bit of one byte flipped."""
    return content[:position] + bytes([content[position] ^ (1 << bit)]) + content[position + 1 :]


def flipped_bits(content: bytes, n: int, *, first: int = 0, last: int | None = None, seed: int = 0) -> Iterator[bytes]:
    """Copies with one flipped bit each: at both ends of `first..last`, and at `n` drawn places between them."""
    generator = random.Random(seed)
    last = len(content) - 1 if last is None else last
    for position in [first, last, *(generator.randint(first, last) for _ in range(n))]:
        yield flip_bit(content, position, generator.randrange(8))


def cut_ends(content: bytes, n: int, *, seed: int = 0) -> Iterator[bytes]:
    """Copies that end too early: empty, without the last byte, and `n` of drawn lengths."""
    generator = random.Random(seed)
    for length in [0, len(content) - 1, *(generator.randrange(len(content)) for _ in range(n))]:
        yield content[:length]


def header_length(content: bytes) -> int:
    """How many bytes of a safetensors file stand before its tensors."""
    return 8 + int.from_bytes(content[:8], "little")


def forget_digests(folder: Path) -> None:
    """Remove the digests of a saved adapter, so that what is changed then is found by other checks, or not at all."""
    (folder / MODEL_CHECKSUMS).unlink()
    path = folder / "config.json"
    config = json.loads(path.read_text())
    del config["weights_sha256"]
    path.write_text(json.dumps(config))
