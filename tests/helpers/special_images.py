"""Image files that ask their reader for more than it should give, made from scratch."""

from __future__ import annotations

import io
import struct
import zlib

import PIL.Image

from tests.helpers.files import encode_picture
from tests.helpers.tiny import picture


def png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, *, depth: int = 8, chunks: bytes = b"", pixels: bytes | None = None) -> bytes:
    """A grey PNG, all black. `pixels` are its compressed rows, for those that are too large to make."""
    if pixels is None:
        pixels = zlib.compress((b"\0" * (1 + width * depth // 8)) * height, 9)
    header = struct.pack(">IIBBBBB", width, height, depth, 0, 0, 0, 0)
    body = png_chunk(b"IHDR", header) + chunks + png_chunk(b"IDAT", pixels) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def png_text(megabytes: int) -> bytes:
    """A small PNG with a compressed text of many megabytes."""
    text = b"comment\0\0" + zlib.compress(b"a" * (megabytes * 2**20), 9)
    return png(8, 8, chunks=png_chunk(b"zTXt", text))


def png_profile(megabytes: int) -> bytes:
    """A small PNG with a compressed colour profile of many megabytes."""
    return png(8, 8, chunks=png_chunk(b"iCCP", b"icc\0\0" + zlib.compress(b"a" * (megabytes * 2**20), 9)))


def overlapping_tags(n_tags: int, n_bytes: int, *, big: bool = False) -> bytes:
    """A directory of EXIF tags which all claim the same bytes as their values."""
    if big:
        start, head, entry, after = struct.pack("<HHHHQ", 0x4949, 43, 8, 0, 16), "<Q", "<HHQQ", 8
    else:
        start, head, entry, after = struct.pack("<HHI", 0x4949, 42, 8), "<H", "<HHII", 4
    place = len(start) + struct.calcsize(head) + n_tags * struct.calcsize(entry) + after
    directory = bytearray(struct.pack(head, n_tags))
    for number in range(n_tags):
        directory += struct.pack(entry, 40_000 + number % 20_000, 7, n_bytes, place)
    return start + bytes(directory) + b"\0" * after + b"\0" * n_bytes


def hidden_tags(n_tags: int, n_bytes: int) -> bytes:
    """Overlapping tags in the Exif directory, which the first directory points at."""
    start = struct.pack("<HHI", 0x4949, 42, 8) + struct.pack("<H", 1) + struct.pack("<HHII", 0x8769, 4, 1, 26)
    place = 26 + 2 + 12 * n_tags + 4
    directory = bytearray(struct.pack("<H", n_tags))
    for number in range(n_tags):
        directory += struct.pack("<HHII", 40_000 + number, 7, n_bytes, place)
    return start + b"\0" * 4 + bytes(directory) + b"\0" * (4 + n_bytes)


def jpeg_with_exif(exif: bytes) -> bytes:
    """A JPEG whose EXIF record is spread over as many segments as it takes."""
    content = encode_picture(picture(0), "JPEG")
    segments = b""
    for start in range(0, len(exif), 65_000):
        payload = b"Exif\0\0" + exif[start : start + 65_000]
        segments += b"\xff\xe1" + struct.pack(">H", len(payload) + 2) + payload
    return content[:2] + segments + content[20:]  # without JFIF, so that the resolution is looked up in EXIF


def jpeg_scans(side: int, n_scans: int) -> bytes:
    """A large blank progressive JPEG with its last scan over and over."""
    content = encode_picture(PIL.Image.new("L", (side, side), 128), "JPEG", progressive=True)
    last = content.rindex(b"\xff\xda")
    return content[:-2] + content[last:-2] * n_scans + content[-2:]


def jpeg_header(width: int, height: int, *, progressive: bool = False) -> bytes:
    """A JPEG that says it is of another size than it is."""
    content = encode_picture(picture(0), "JPEG", progressive=progressive)
    place = content.index(b"\xff\xc2" if progressive else b"\xff\xc0") + 5
    return content[:place] + struct.pack(">HH", height, width) + content[place + 4 :]


def large_jpeg(width: int, height: int, mode: str = "L", **options: bool) -> bytes:
    """A JPEG in two colours, the left half black."""
    image = PIL.Image.new(mode, (width, height))
    image.paste("white", (width // 2, 0, width, height))
    return encode_picture(image, "JPEG", **options)


def tiff(tags: dict[int, tuple[int, int, int]], content: bytes = b"\0" * 64) -> bytes:
    """A TIFF of tags `number: (type, count, value)`, with content from byte 1024 on."""
    directory = struct.pack("<H", len(tags))
    for number, (kind, count, value) in sorted(tags.items()):
        directory += struct.pack("<HHII", number, kind, count, value)
    head = struct.pack("<HHI", 0x4949, 42, 8) + directory + b"\0" * 4
    return head.ljust(1024, b"\0") + content


def tiff_tile(side: int, content: bytes | None = None) -> bytes:
    """A TIFF of one pixel in a compressed tile of `side * side`, all black unless its content is given."""
    if content is None:
        content = zlib.compress(b"\0" * (side * side), 9)
    tags = {256: 1, 257: 1, 258: 8, 259: 8, 262: 1, 277: 1, 322: side, 323: side, 324: 1024, 325: len(content)}
    return tiff({number: (4, 1, value) for number, value in tags.items()}, content)


def tiff_strip(n_rows: int) -> bytes:
    """A TIFF of one row whose only strip is said to have many."""
    content = zlib.compress(b"\0" * (8 * n_rows), 9)
    tags = {256: 8, 257: 1, 258: 8, 259: 8, 262: 1, 273: 1024, 277: 1, 278: n_rows, 279: len(content)}
    return tiff({number: (4, 1, value) for number, value in tags.items()}, content)


def tiff_strips(n_strips: int) -> bytes:
    """A TIFF of 8 x 8 pixels in millions of strips."""
    tags = {256: 8, 257: 8, 258: 8, 259: 1, 262: 1, 277: 1, 278: 1}
    entries = {number: (4, 1, value) for number, value in tags.items()}
    entries[273] = (4, n_strips, 1024)
    return tiff(entries, b"\0" * (4 * n_strips))


def gif_header(width: int, height: int) -> bytes:
    return (
        b"GIF89a"
        + struct.pack("<HHBBB", width, height, 0, 0, 0)
        + b"\x2c"
        + b"\0" * 4
        + struct.pack("<HHBB", width, height, 0, 2)
        + b"\x02\x4c\x01\0\x3b"
    )


def gif_comment(n_pieces: int) -> bytes:
    """A GIF with a comment in many pieces of 255 bytes."""
    content = gif_header(4, 4)
    return content[:13] + b"\x21\xfe" + (b"\xff" + b"x" * 255) * n_pieces + b"\0" + content[13:]


def webp_canvas(width: int, height: int, exif: bytes = b"") -> bytes:
    """A WebP of one pixel on a large canvas, with an EXIF record."""

    def size(value: int) -> bytes:
        return struct.pack("<I", value - 1)[:3]

    def chunk(kind: bytes, content: bytes) -> bytes:
        return kind + struct.pack("<I", len(content)) + content + b"\0" * (len(content) % 2)

    pixel = encode_picture(PIL.Image.new("RGB", (1, 1)), "WEBP", lossless=True)[12:]
    flags = 2 | (8 if exif else 0)
    frame = b"\0" * 6 + size(1) + size(1) + b"\0" * 4 + pixel
    chunks = chunk(b"VP8X", bytes([flags, 0, 0, 0]) + size(width) + size(height)) + chunk(b"ANIM", b"\0" * 6)
    chunks += chunk(b"ANMF", frame)
    if exif:
        chunks += chunk(b"EXIF", exif)
    return b"RIFF" + struct.pack("<I", len(chunks) + 4) + b"WEBP" + chunks


def bmp_header(width: int, height: int, compression: int = 0) -> bytes:
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, compression, 0, 0, 0, 2, 0)
    return b"BM" + struct.pack("<IHHI", 14 + 40 + 8, 0, 0, 14 + 40 + 8) + header + b"\0" * 72


def jpeg2000_size(side: int) -> bytes:
    return encode_picture(PIL.Image.new("RGB", (side, side)), "JPEG2000")


def animation(n_frames: int, file_format: str) -> bytes:
    frames = [PIL.Image.new("L", (64, 64), i % 256) for i in range(n_frames)]
    buffer = io.BytesIO()
    frames[0].save(buffer, file_format, save_all=True, append_images=frames[1:])
    return buffer.getvalue()


#: PostScript that makes a file, if anything draws it.
EPS = b"""%!PS-Adobe-3.0 EPSF-3.0
%%BoundingBox: 0 0 20 20
%%EndComments
(drawn.txt) (w) file closefile showpage
%%EOF
"""
