"""`hyperflow_onnx.py`: images become the same pixel values as with transformers."""

from __future__ import annotations

import numpy as np
import PIL.Image
import pytest
from transformers import BitImageProcessorPil, ViTImageProcessorPil

from hf_hyperflow.export.hyperflow_onnx import decode, list_folder, process
from hf_hyperflow.export.preprocessing import describe
from hf_hyperflow.modeling.images import decode as decode_with_torch
from hf_hyperflow.modeling.images import process_images
from hf_hyperflow.modeling.support import image_folder
from tests.helpers.tiny import picture, pictures, tiny_processor, write_pictures

PROCESSORS = [
    tiny_processor(),
    ViTImageProcessorPil(size={"height": 30, "width": 44}, image_mean=[0.5] * 3, image_std=[0.5] * 3, resample=2),
    BitImageProcessorPil(do_resize=False, crop_size={"height": 70, "width": 61}, do_normalize=False),
    BitImageProcessorPil(size={"height": 20, "width": 20}, do_center_crop=False, do_rescale=False, do_normalize=False),
]


@pytest.mark.parametrize("processor", PROCESSORS, ids=["crop", "square", "padding", "bytes"])
def test_pixel_values_are_those_of_the_image_processor(processor):
    preprocessing = describe(processor)
    for size in ((53, 32), (31, 200), (400, 301)):
        image = picture(1, size)
        pixel_values = process(image, preprocessing)
        assert np.array_equal(pixel_values, process_images([image], processor)[0])
        assert pixel_values.shape == (3, preprocessing["height"], preprocessing["width"])


def test_what_a_processor_may_not_do():
    with pytest.raises(ValueError, match="only resizing, cropping at the centre, rescaling and normalising"):
        describe(ViTImageProcessorPil(size={"longest_edge": 40, "shortest_edge": 30}))


def test_images_of_every_kind_are_read_alike(tmp_path):
    image = picture(2)
    grey = np.asarray(image.convert("L"))
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # lies on its side
    image.save(tmp_path / "turned.jpg", exif=exif)
    image.convert("CMYK").save(tmp_path / "cmyk.jpg")
    image.quantize(20).save(tmp_path / "palette.png", transparency=3)
    image.save(tmp_path / "first.gif", save_all=True, append_images=[picture(3)])
    PIL.Image.merge("RGBA", (*image.split(), PIL.Image.fromarray(grey))).save(tmp_path / "alpha.png")
    PIL.Image.fromarray(grey.astype(np.uint16) * 200).save(tmp_path / "sixteen.png")
    for scale in (1 / 255, 1, 257):
        PIL.Image.fromarray(grey.astype(np.float32) * scale).save(tmp_path / f"float{scale:.2f}.tif")
    paths = sorted(tmp_path.iterdir())
    assert len(paths) == 9
    for path in paths:
        expected = decode_with_torch(path, path.name)
        assert np.array_equal(decode(path), expected), path.name
    (tmp_path / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(ValueError, match=r"bad\.png cannot be read as an image"):
        decode(tmp_path / "bad.png")


def test_folders_are_read_alike(tmp_path):
    folder = write_pictures(tmp_path / "support", pictures())
    (folder / "red" / ".hidden.png").touch()
    (folder / "red" / "notes.txt").touch()
    (folder / "__MACOSX").mkdir()
    found = list_folder(folder)
    assert list(found.items()) == list(image_folder(folder).classes.items())
    with pytest.raises(ValueError, match="is not a folder"):
        list_folder(tmp_path / "nowhere")
