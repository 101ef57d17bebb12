"""Checks of the metadata of image files, whose readers would take memory and time out of all proportion to the file."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

from PIL.JpegImagePlugin import MARKER

#: The header of a file may be read in this many pieces.
MAX_READS = 10_000

#: The numbers in a directory of tags, which Python unpacks one by one, may take this many bytes.
MAX_NUMBERS = 8 * 2**20

#: EXIF in the text of a PNG, in hexadecimal, may have this many characters. The EXIF of a JPEG has half as many bytes.
MAX_RAW_PROFILE = 150_000

#: Tags that hold the place of a further directory of tags: Exif, GPS and Interoperability.
_SUBDIRECTORIES = (0x8769, 0x8825, 0xA005)

#: The size of one value of each type of tag; the types in `_PLAIN_BYTES` are not unpacked.
_TYPE_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8}
_PLAIN_BYTES = (1, 2, 6, 7)


class MetadataError(ValueError):
    """An image file that would take memory or time out of all proportion, or that is in no known format."""


class _Tag(NamedTuple):
    """An entry in a directory of tags: its number, its type, how many bytes its values take, and where they are."""

    number: int
    kind: int
    size: int
    place: int


def require_small_tags(content: bytes) -> None:
    """Check that the tags of a TIFF file or an EXIF record do not share their bytes.

    Pillow copies the values of each tag, so 65,535 tags that all claim the same megabyte would fill 64 GB.

    Raises:
        MetadataError: the values take more than twice the bytes that are there, or there are millions of numbers.
    """
    order = ">" if content.startswith(b"MM") else "<"
    is_big = content[2:4] in (b"+\0", b"\0+")
    if len(content) < 16:
        return
    start = struct.unpack_from(f"{order}Q" if is_big else f"{order}I", content, 8 if is_big else 4)[0]
    places, visited = [start], set()
    while places:
        place = places.pop()
        if place in visited:
            continue
        visited.add(place)
        n_bytes = n_numbers = 0
        for tag in _read_directory(content, place, order, is_big):
            n_bytes += tag.size
            if tag.kind not in _PLAIN_BYTES:
                n_numbers += tag.size
            if tag.number in _SUBDIRECTORIES:
                places.append(tag.place)
            if n_bytes > 2 * len(content) + 2**20 or n_numbers > MAX_NUMBERS:
                raise MetadataError("its tags claim more bytes than the file has")


def _read_directory(content: bytes, place: int, order: str, is_big: bool) -> Iterator[_Tag]:
    """Yield the tags of the directory at a place, up to the first one that does not lie within the content."""
    head = struct.Struct(f"{order}Q" if is_big else f"{order}H")
    entry = struct.Struct(f"{order}HHQQ" if is_big else f"{order}HHII")
    if place + head.size > len(content):
        return
    (n_tags,) = head.unpack_from(content, place)
    if n_tags > MAX_READS:
        raise MetadataError(f"it has {n_tags} tags")
    inline = 8 if is_big else 4
    for i in range(n_tags):
        position = place + head.size + i * entry.size
        if position + entry.size > len(content):
            return
        number, kind, count, value = entry.unpack_from(content, position)
        size = count * _TYPE_SIZES.get(kind, 0)
        if size > inline and value + size > len(content):
            return
        if number in _SUBDIRECTORIES and kind == 3 and order == ">":
            value >>= 8 * (inline - 2)  # a short number stands at the front of its field
        yield _Tag(number, kind, size, value)


def join_exif(content: bytes) -> bytes:
    """The EXIF record of a JPEG as Pillow joins it from all the segments before the image; empty if there is none."""
    record = b""
    position = 2
    for _ in range(MAX_READS):
        position = content.find(b"\xff", position)
        marker = int.from_bytes(content[position : position + 2], "big")
        if position < 0 or position + 4 > len(content) or marker == 0xFFDA:
            break
        if marker == 0xFFFF:
            position += 1
            continue
        if marker not in MARKER or MARKER[marker][2] is None:  # a marker that stands alone
            position += 2
            continue
        end = position + 2 + max(2, int.from_bytes(content[position + 2 : position + 4], "big"))
        segment = content[position + 4 : end]
        if marker == 0xFFE1 and segment.startswith(b"Exif\0\0"):
            record += segment[6:]
        position = end
    return record
