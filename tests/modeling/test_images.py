from __future__ import annotations

import numpy as np
import PIL.Image
import pytest
import torch

from hf_hyperflow import ImageError
from hf_hyperflow.modeling.images import decode, process_images
from tests.helpers.files import encode_picture
from tests.helpers.tiny import picture, tiny_processor

RAMP = np.linspace(0, 1, 48).reshape(6, 8)


def array(image: PIL.Image.Image) -> np.ndarray:
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def forms(image: PIL.Image.Image, tmp_path) -> dict[str, object]:
    """The same picture in all the ways it can be given."""
    path = tmp_path / "picture.png"
    image.save(path)
    content = path.read_bytes()
    return {
        "PIL": image,
        "path": path,
        "str": str(path),
        "bytes": content,
        "bytes record": {"bytes": content, "path": None},
        "path record": {"bytes": None, "path": str(path)},
        "array": np.asarray(image),
        "float array": np.asarray(image) / 255,
        "float32 array": np.asarray(image, dtype=np.float32) / 255,
        "uint16 array": np.asarray(image).astype(np.uint16) * 257,
    }


def test_all_forms_give_the_same_pixels(tmp_path):
    image = picture(0)
    for form, given in forms(image, tmp_path).items():
        assert np.array_equal(array(decode(given, form)), np.asarray(image)), form


def test_palette():
    image = PIL.Image.fromarray((RAMP * 5).astype(np.uint8), mode="P")
    colours = [(10, 20, 30), (200, 0, 0), (0, 200, 0), (0, 0, 200), (255, 255, 0), (1, 2, 3)]
    image.putpalette([value for colour in colours for value in colour])
    expected = np.array(colours)[np.asarray(image)]
    assert np.array_equal(array(decode(image, "x")), expected)
    assert np.array_equal(array(decode(encode_picture(image, "GIF"), "x")), expected)


def test_transparent_palette_is_shown_on_white():
    image = PIL.Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 0, 0])
    image.putpixel((1, 0), 1)
    content = encode_picture(image, transparency=0)
    assert array(decode(content, "x")).tolist() == [[[255, 255, 255], [200, 0, 0]]]


def test_rgba_is_laid_on_white():
    image = PIL.Image.new("RGBA", (3, 1))
    image.putdata([(100, 50, 0, 255), (100, 50, 0, 0), (100, 50, 0, 128)])
    pixels = array(decode(image, "x"))[0]
    assert pixels[0].tolist() == [100, 50, 0]
    assert pixels[1].tolist() == [255, 255, 255]
    expected = (np.array([100, 50, 0]) * 128 + 255 * 127) / 255
    assert np.abs(pixels[2] - expected).max() <= 1
    assert np.array_equal(array(decode(np.asarray(image), "x"))[0], pixels)


def test_grey_with_alpha_is_laid_on_white():
    image = PIL.Image.new("LA", (2, 1))
    image.putdata([(90, 255), (90, 0)])
    assert array(decode(image, "x"))[0].tolist() == [[90] * 3, [255] * 3]


@pytest.mark.parametrize("mode", ["1", "L", "CMYK", "YCbCr", "HSV"])
def test_other_modes(mode):
    image = PIL.Image.fromarray((RAMP * 255).astype(np.uint8)).convert("RGB").convert(mode)
    assert np.array_equal(array(decode(image, "x")), np.asarray(image.convert("RGB")))


def test_grey_arrays():
    grey = (RAMP * 255).astype(np.uint8)
    expected = np.repeat(grey[:, :, None], 3, axis=2)
    assert np.array_equal(array(decode(grey, "x")), expected)
    assert np.array_equal(array(decode(grey[:, :, None], "x")), expected)


def test_16_bit_keeps_its_shades():
    values = (RAMP * 65535).round().astype(np.uint16)
    expected = np.repeat((values / 257).round().astype(int)[:, :, None], 3, axis=2)
    image = PIL.Image.fromarray(values)
    assert image.mode == "I;16"
    assert np.array_equal(array(decode(image, "x")), expected)
    assert np.array_equal(array(decode(encode_picture(image), "x")), expected)
    assert np.array_equal(array(decode(encode_picture(image, "TIFF"), "x")), expected)
    assert np.array_equal(array(decode(image.convert("I"), "x")), expected)
    assert np.array_equal(array(decode(values, "x")), expected)


@pytest.mark.parametrize("top", [1.0, 255.0, 65535.0])
def test_float_pictures_keep_their_shades(top):
    image = PIL.Image.fromarray((RAMP * top).astype(np.float32))
    assert image.mode == "F"
    expected = np.repeat((RAMP * 255)[:, :, None], 3, axis=2)
    assert np.abs(array(decode(image, "x")) - expected).max() <= 0.51
    assert np.abs(array(decode(encode_picture(image, "TIFF"), "x")) - expected).max() <= 0.51


def test_exif_orientation_is_followed_in_every_form(tmp_path):
    image = picture(0, size=(6, 4))
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to view
    path = tmp_path / "turned.png"
    image.save(path, exif=exif)
    expected = np.rot90(np.asarray(image), k=-1)
    for given in (path, path.read_bytes(), PIL.Image.open(path)):
        assert np.array_equal(array(decode(given, "x")), expected)


def test_the_given_picture_is_left_as_it_was(tmp_path):
    image = picture(0).convert("RGBA")
    before = image.tobytes()
    decode(image, "x")
    assert (image.mode, image.tobytes()) == ("RGBA", before)


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "TIFF", "WEBP", "BMP", "PPM"])
def test_truncated_files(tmp_path, file_format):
    """More of them, and files with flipped bits, are in tests/robustness."""
    content = encode_picture(picture(0), file_format)
    path = tmp_path / f"cut.{file_format.lower()}"
    path.write_bytes(content[: len(content) // 2])
    for given in (path, content[: len(content) // 2]):
        with pytest.raises(ImageError, match=r"^cut cannot be read as an image \(.+\)\. Replace or remove it\.$"):
            decode(given, "cut")


def test_text_that_calls_itself_a_picture(tmp_path):
    path = tmp_path / "notes.png"
    path.write_text("no picture")
    with pytest.raises(ImageError, match=r"notes\.png cannot be read as an image"):
        decode(path, str(path))


def test_a_missing_file_and_a_folder(tmp_path):
    with pytest.raises(ImageError, match=r"there is no file .*nowhere\.png"):
        decode(tmp_path / "nowhere.png", "nowhere")
    with pytest.raises(ImageError, match="somewhere is a folder, not an image"):
        decode(tmp_path, "somewhere")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity(value):
    pixels = np.full((4, 4, 3), 0.5)
    pixels[1, 2, 0] = value
    with pytest.raises(ImageError, match=r"^broken has NaN or infinite pixels"):
        decode(pixels, "broken")
    with pytest.raises(ImageError, match=r"^broken .*NaN or infinite pixels"):
        decode(PIL.Image.fromarray(pixels[:, :, 0].astype(np.float32)), "broken")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (np.full((4, 4), 1.5), "floats outside 0..1"),
        (np.full((4, 4), -0.1), "floats outside 0..1"),
        (np.zeros((4, 4), dtype=np.int64), "dtype int64"),
        (np.zeros((4, 4), dtype=bool), "dtype bool"),
        (np.zeros(4, dtype=np.uint8), r"shape \(4,\)"),
        (np.zeros((3, 4, 5), dtype=np.uint8), r"shape \(3, 4, 5\): give \(height, width\)"),
        (np.zeros((4, 4, 2), dtype=np.uint8), r"shape \(4, 4, 2\)"),
        (np.zeros((0, 4, 3), dtype=np.uint8), r"shape \(0, 4, 3\)"),
        (17, "is a int, not an image"),
        (None, "is a NoneType, not an image"),
        ({"bytes": None, "path": None}, "is a NoneType, not an image"),
    ],
)
def test_what_is_no_image(given, message):
    with pytest.raises(ImageError, match=f"^thing .*{message}"):
        decode(given, "thing")


def test_strips_make_no_difference(monkeypatch):
    """Large images are converted a few rows at a time."""
    generator = np.random.default_rng(0)
    grey = generator.integers(0, 65536, (40, 30)).astype(np.uint16)
    colours = generator.integers(0, 256, (40, 30, 4)).astype(np.uint8)
    palette = PIL.Image.fromarray(colours[:, :, :3]).quantize(16)
    given = [
        grey,
        grey / 65535,
        PIL.Image.fromarray(grey),
        PIL.Image.fromarray(grey.astype(np.float32)),
        PIL.Image.fromarray(grey.astype(np.float32) - 30_000),
        PIL.Image.fromarray(colours),
        PIL.Image.fromarray(colours).convert("LA"),
        encode_picture(palette, transparency=3),
        encode_picture(PIL.Image.fromarray(colours[:, :, :3]), transparency=tuple(map(int, colours[0, 0, :3]))),
    ]
    whole = [array(decode(image, "x")) for image in given]
    monkeypatch.setattr("hf_hyperflow.modeling.images._STRIP_PIXELS", 100)
    for image, expected in zip(given, whole, strict=True):
        assert np.array_equal(array(decode(image, "x")), expected)


def test_every_shade_of_16_bits():
    shades = np.arange(65536).reshape(256, 256)
    expected = np.repeat((shades / 257).round().astype(int)[:, :, None], 3, axis=2)
    for given in (shades.astype(np.uint16), PIL.Image.fromarray(shades.astype(np.uint16))):
        assert np.array_equal(array(decode(given, "x")), expected)


def test_images_are_processed_as_they_come(monkeypatch):
    """The result is that of all images at once."""
    processor = tiny_processor()
    images = [picture(i, size=(30 + i, 40)) for i in range(7)]
    expected = processor(images, return_tensors="pt")["pixel_values"]
    assert torch.equal(process_images(images, processor), expected)
    monkeypatch.setattr("hf_hyperflow.modeling.images.MAX_PIXELS", 3000)
    assert torch.equal(process_images(iter(images), processor), expected)
    assert process_images([], processor).shape[0] == 0
