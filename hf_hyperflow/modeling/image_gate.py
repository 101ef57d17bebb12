"""The gate for image files: what kind of file is read and how large an image may be, before anything is decoded."""

from __future__ import annotations

import io
import os
import re
import stat
from pathlib import Path

import PIL.Image
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.TiffImagePlugin import TiffImageFile

from .image_metadata import (
    MAX_RAW_PROFILE,
    MAX_READS,
    MetadataError,
    join_exif,
    require_small_tags,
)

#: The formats that are read, as Pillow names them, where it can. EPS, for which it starts a program, is not among them.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF", "HEIF")

#: Files, and encoded images in memory, may be this large.
MAX_BYTES = 256 * 2**20

#: An image may have this many pixels when it is decoded.
MAX_PIXELS = 64 * 10**6

#: A JPEG, which can be reduced while it is decoded, may have this many before. If it is stored in several passes, its
#: reader keeps 6 bytes of each pixel until the last one, so that it may have fewer.
MAX_PIXELS_JPEG = 256 * 10**6
MAX_PIXELS_PROGRESSIVE = 128 * 10**6

#: A whole JPEG has at least one bit for each block of 64 pixels.
MAX_PIXELS_PER_BYTE = 8 * 64

#: JPEG 2000, of which a pixel takes ten times the memory of others, may have this many.
MAX_PIXELS_JPEG2000 = 16 * 10**6

#: Encodings that Pillow decodes in Python, one value after the other, may have this many: text, mostly.
MAX_PIXELS_IN_PYTHON = 2 * 10**6

#: A JPEG may take this many passes over an image of `MAX_PIXELS`, a smaller one more. Most have one, others ten.
MAX_SCANS = 20

#: The longer side of an image may be this many times the shorter one.
MAX_RATIO = 50

#: JPEGs with both sides longer than this are reduced while they are decoded. The shorter side keeps half of it. Those
#: with more than `MAX_PIXELS` are reduced in any case.
REDUCED_FROM = 4 * 1024

_TRANSPOSITIONS = {
    2: PIL.Image.Transpose.FLIP_LEFT_RIGHT,
    3: PIL.Image.Transpose.ROTATE_180,
    4: PIL.Image.Transpose.FLIP_TOP_BOTTOM,
    5: PIL.Image.Transpose.TRANSPOSE,
    6: PIL.Image.Transpose.ROTATE_270,
    7: PIL.Image.Transpose.TRANSVERSE,
    8: PIL.Image.Transpose.ROTATE_90,
}
_ORIENTATION = 0x0112

#: How a JPEG and a pass over its image begin.
_JPEG, _SCAN = b"\xff\xd8", b"\xff\xda"

_TILE_WIDTH, _TILE_LENGTH = 0x0142, 0x0143

#: The entry of an EXIF record in the list of the items of a HEIC or AVIF file.
_HEIF_EXIF = re.compile(rb"(infe.{8}(?:..)?)Exif", re.DOTALL)


class ImageError(ValueError):
    """An image that cannot be read; the message names it."""


def read_file(path: str | os.PathLike, name: str) -> bytes:
    """The content of a regular file. Nothing else is opened, so that no pipe, socket or device is waited for.

    Raises:
        ImageError: there is no such file, it is not a regular one, or it is larger than `MAX_BYTES`.
        OSError, ValueError: it cannot be opened.
    """
    try:
        _require_regular_file(os.stat(path), name)
        with open(path, "rb", opener=_open_without_waiting) as file:
            status = os.fstat(file.fileno())
            _require_regular_file(status, name)  # another file may have taken its place
            _require_length(status.st_size, name)
            return file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise ImageError(f"{name}: there is no file {Path(path)}.") from None


def _open_without_waiting(path: str, flags: int) -> int:
    if os.name == "posix":
        flags |= os.O_NONBLOCK
    return os.open(path, flags)


def _require_regular_file(status: os.stat_result, name: str) -> None:
    if stat.S_ISDIR(status.st_mode):
        raise ImageError(f"{name} is a folder, not an image. Give the images in it.")
    if not stat.S_ISREG(status.st_mode):
        raise ImageError(f"{name} cannot be read as an image (it is not a regular file). Replace or remove it.")


def _require_length(n_bytes: int, name: str) -> None:
    if n_bytes > MAX_BYTES:
        raise ImageError(f"{name} has {n_bytes:,} bytes, more than the limit of {MAX_BYTES:,}. Make it smaller.")


def require_size(width: int, height: int, name: str, limit: int = MAX_PIXELS) -> None:
    """Check the size of an image before its pixels are touched.

    Raises:
        ImageError: it has more pixels than the limit, or its sides differ by more than a factor of `MAX_RATIO`.
    """
    if width * height > limit:
        raise ImageError(
            f"{name} has {width} x {height} pixels, more than the limit of {limit // 10**6} million. Make it smaller."
        )
    if max(width, height) > MAX_RATIO * min(width, height):
        raise ImageError(
            f"{name} has {width} x {height} pixels, one side more than {MAX_RATIO} times the other. Crop it."
        )


def open_image(content: bytes, name: str) -> ImageFile:
    """Read the header of an encoded image; its pixels are still to be decoded.

    A large JPEG will be decoded at a half, a quarter or an eighth of its size, see `REDUCED_FROM`.

    Raises:
        ImageError: it is larger than one of the limits above, or it is a HEIC image and pillow-heif is not installed.
        MetadataError: its metadata would take memory or time out of all proportion.
        Exception: whatever Pillow raises if the header is damaged or of no format in `FORMATS`.
    """
    _require_length(len(content), name)
    if content.startswith(_JPEG):
        require_small_tags(join_exif(content))
    if content.startswith((b"II", b"MM")):
        require_small_tags(content)
    if content[4:8] == b"ftyp":
        content = _prepare_heif(content, name)
    file = _EncodedImage(content)
    if content.startswith(_JPEG):
        image: ImageFile = JpegImageFile(file)  # `PIL.Image.open` refuses those of 179 megapixels
        file.end_header()
        _require_jpeg_limits(image, content, name)
        _reduce(image)
        return image
    PIL.Image.init()
    formats = [known for known in FORMATS if known in PIL.Image.OPEN]
    try:
        image = PIL.Image.open(file, formats=formats)
    except PIL.Image.DecompressionBombError as error:
        raise ImageError(
            f"{name} has more than {MAX_PIXELS // 10**6} million pixels ({error}). Make it smaller."
        ) from None
    except PIL.UnidentifiedImageError:
        raise MetadataError(f"it has no readable header of {', '.join(formats)}") from None
    file.end_header()
    _require_limits(image, name)
    return image


def _require_limits(image: ImageFile, name: str) -> None:
    """Raise an error if decoding the image would take too much memory or time."""
    limit = MAX_PIXELS
    if image.format == "JPEG2000":
        limit = MAX_PIXELS_JPEG2000
    elif image.tile and image.tile[0][0] in PIL.Image.DECODERS:
        limit = MAX_PIXELS_IN_PYTHON
    require_size(*image.size, name, limit)
    if isinstance(image, TiffImageFile) and _TILE_WIDTH in image.tag_v2:
        require_size(image.tag_v2[_TILE_WIDTH], image.tag_v2.get(_TILE_LENGTH, 1), f"{name}: a tile")


def _require_jpeg_limits(image: ImageFile, content: bytes, name: str) -> None:
    """Raise an error if decoding a JPEG would take too much memory or time, although it is reduced."""
    limit = MAX_PIXELS_JPEG if _has_one_pass(image, content) else MAX_PIXELS_PROGRESSIVE
    require_size(*image.size, name, limit)
    n_pixels = image.width * image.height
    if n_pixels > max(MAX_PIXELS, MAX_PIXELS_PER_BYTE * len(content)):
        raise MetadataError(f"{image.width} x {image.height} pixels are not in {len(content):,} bytes")
    n_passes = content.count(_SCAN)
    if n_passes * n_pixels > MAX_SCANS * MAX_PIXELS:
        raise MetadataError(f"it takes {n_passes} passes over {image.width} x {image.height} pixels")


def _has_one_pass(image: ImageFile, content: bytes) -> bool:
    """Whether a JPEG whose header was read has all of its colours, in full precision, in one pass over the image."""
    n_colours = len(image.getbands())
    assert image.fp is not None
    start = content[: image.fp.tell()].rfind(_SCAN)
    return "progressive" not in image.info and start >= 0 and content[start + 4] == n_colours


def _reduce(image: ImageFile) -> None:
    """Have a large JPEG decoded at a half, a quarter or an eighth of its size."""
    shorter = min(image.size)
    if shorter > REDUCED_FROM:
        image.draft(None, (REDUCED_FROM // 2, REDUCED_FROM // 2))
    elif image.width * image.height > MAX_PIXELS:
        image.draft(None, (shorter // 2, shorter // 2))


class _EncodedImage(io.BytesIO):
    """An encoded image whose header can only be read in `MAX_READS` pieces.

    Pillow joins the comment of a GIF from pieces of 255 bytes, in a time that grows with the square of their number.
    """

    def __init__(self, content: bytes):
        super().__init__(content)
        self._reads_left = MAX_READS
        self._in_header = True

    def read(self, size: int | None = -1) -> bytes:
        if self._in_header:
            self._reads_left -= 1
            if self._reads_left < 0:
                raise MetadataError(f"its header has more than {MAX_READS} parts")
        return super().read(size)

    def end_header(self) -> None:
        """The header is read; what follows may be read in any number of pieces."""
        self._in_header = False


def _prepare_heif(content: bytes, name: str) -> bytes:
    """Make Pillow ready for a HEIC image, and hide the EXIF record of a HEIC or AVIF image from it.

    These images are turned by a record of their own, not by EXIF, whose tags Pillow would copy unchecked.

    Raises:
        ImageError: it is a HEIC image, and pillow-heif is not installed.
    """
    if content[8:12] not in (b"avif", b"avis"):
        try:
            from pillow_heif import register_heif_opener
        except ImportError:
            raise ImageError(
                f"{name} is a HEIC image, which needs another package: pip install pillow-heif, or convert it to JPEG."
            ) from None
        register_heif_opener()
    return _HEIF_EXIF.sub(rb"\1none", content)


def turn_upright(image: PIL.Image.Image) -> PIL.Image.Image:
    """The decoded image as its EXIF orientation says that it is to be seen.

    Raises:
        MetadataError: its EXIF record would take memory out of all proportion.
    """
    exif = image.info.get("exif")
    if isinstance(exif, bytes):
        require_small_tags(exif.removeprefix(b"Exif\0\0"))
    if len(image.info.get("Raw profile type exif", "")) > MAX_RAW_PROFILE:
        raise MetadataError(f"its EXIF record has more than {MAX_RAW_PROFILE:,} characters")
    method = _TRANSPOSITIONS.get(image.getexif().get(_ORIENTATION, 1))
    return image if method is None else image.transpose(method)
