"""`hyperflow_web.js`: images become the same pixel values as with transformers, and only the pinned runtime is run.

What it computes is tested in test_exporting.py, with the exports that are made there.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from transformers import ViTImageProcessorPil

from hf_hyperflow.export.hyperflow_onnx import decode, process
from hf_hyperflow.export.preprocessing import describe
from tests.export.conftest import RUNTIME_VERSION, SOURCES
from tests.export.test_hyperflow_onnx import PROCESSORS
from tests.helpers.exported_page import ExportedPage
from tests.helpers.tiny import picture

pytestmark = pytest.mark.browser

#: Images that browsers may read otherwise than Pillow, by one grey level.
NEARLY_EQUAL = ("cmyk.jpg", "sixteen.png", "turned.jpg")

PIXELS = """
const [names, preprocessing, done] = arguments;
(async () => {
    const { decode, process } = await import("/pixels/hyperflow_web.js");
    const found = [];
    for (const name of names) {
        const image = await decode(await (await fetch(`/pixels/${name}`)).blob());
        found.push(preprocessing.map((steps) => [...process(image, steps)]));
    }
    return found;
})().then(done, (error) => done(error.message));
"""


def write_images(folder: Path) -> None:
    """Images of every kind that browsers read."""
    image, alpha = picture(2, (53, 32)), picture(3, (53, 32)).convert("L")
    turned = PIL.Image.Exif()
    turned[0x0112] = 6  # lies on its side
    image.save(folder / "small.png")
    image.save(folder / "turned.png", exif=turned)
    picture(1, (400, 301)).save(folder / "large.png")
    picture(1, (31, 200)).save(folder / "tall.webp", lossless=True)
    image.quantize(20).save(folder / "palette.gif")
    alpha.save(folder / "grey.png")
    image.save(folder / "turned.jpg", exif=turned, quality=90)
    image.convert("CMYK").save(folder / "cmyk.jpg", quality=90)
    PIL.Image.merge("RGBA", (*image.split(), alpha)).save(folder / "alpha.png")
    PIL.Image.fromarray(np.asarray(alpha).astype(np.uint16) * 257 + 90).save(folder / "sixteen.png")


def test_pixel_values_are_those_of_the_image_processor(served, browser):
    folder, url = served
    folder = folder / "pixels"
    folder.mkdir()
    write_images(folder)
    names = sorted(path.name for path in folder.iterdir())
    shutil.copy(SOURCES / "hyperflow_web.js", folder)
    lanczos = ViTImageProcessorPil(size={"height": 50, "width": 20}, resample=1)
    preprocessing = [describe(processor) for processor in (*PROCESSORS, lanczos)]
    browser.get(f"{url}/pixels")
    found = browser.execute_async_script(PIXELS, names, preprocessing)
    assert isinstance(found, list), found
    for name, values in zip(names, found, strict=True):
        image = decode(folder / name)
        for steps, pixels in zip(preprocessing, values, strict=True):
            expected = process(image, steps)
            found_values = np.float32(pixels).reshape(expected.shape)
            if name in NEARLY_EQUAL:
                assert np.allclose(found_values, expected, atol=0.02 if steps["scale"] else 1, rtol=0), name
            else:
                assert np.array_equal(found_values, expected), name


def test_only_the_pinned_runtime_is_run(served, browser):
    """Neither another one from the folder beside the page, nor any from an address that cannot be reached."""
    folder, url = served
    folder = folder / "other-runtime"
    (folder / "ort").mkdir(parents=True)
    for name in ("hyperflow_web.js", "index.html"):
        shutil.copy(SOURCES / name, folder)
    for name in ("hyperflow.json", "adapt.onnx", "predict.onnx", "weights.bin"):
        (folder / name).write_text("{}")
    (folder / "ort" / "ort.wasm.bundle.min.mjs").write_text("document.body.textContent = 'another version'")
    (folder / "ort" / "ort-wasm-simd-threaded.wasm").touch()
    for source in (f"{url}/other-runtime/ort/", "https://cdn.jsdelivr.net/npm/onnxruntime-web@"):
        said = ExportedPage(browser, f"{url}/other-runtime/").loaded
        assert said.startswith(f"onnxruntime-web {RUNTIME_VERSION} cannot be loaded from {source}")
        assert "npm package of exactly this version into a folder 'ort' beside this page." in said
        shutil.rmtree(folder / "ort", ignore_errors=True)
