"""Labelled images without a download: characters of many scripts, and handwritten digits.

    python -m training.demo.images --output_dir outputs/demo/data

The characters are drawn with the fonts that come with Matplotlib (DejaVu, STIX, Computer Modern). Each image has
another font, size, place, slant, stroke width, contrast and noise. The digits are scikit-learn's. Every script is a
domain of its own, a Parquet file with the columns `image` and `label` (the character): those in `train/` to train on,
those in `unseen/` to report on. Image i of a character depends on (seed, script, character, i) alone.
"""

from __future__ import annotations

import functools
import json
import unicodedata
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import matplotlib
import numpy as np
from datasets import ClassLabel, Dataset, Features, Image, disable_progress_bars
from matplotlib.ft2font import FT2Font
from PIL import Image as PILImage
from PIL import ImageDraw, ImageFont
from sklearn.datasets import load_digits

from hf_hyperflow.arguments import parse
from hf_hyperflow.modeling.atomic_file import atomic_file, write_json

#: Script -> its code points, of which `choose_characters` takes letters and symbols.
TRAINING_SCRIPTS = {
    "latin_capitals": range(0x41, 0x5B),
    "latin_small": range(0x61, 0x7B),
    "greek_capitals": range(0x391, 0x3AA),
    "greek_small": range(0x3B1, 0x3CA),
    "cyrillic": range(0x410, 0x430),
    "armenian": range(0x531, 0x557),
    "arabic": range(0x621, 0x64B),
    "hebrew": range(0x5D0, 0x5EB),
    "lao": range(0xE81, 0xEAF),
    "nko": range(0x7CA, 0x7EB),
    "canadian": range(0x1401, 0x1677),
    "fraktur": range(0x1D504, 0x1D538),
    "double_struck": range(0x1D538, 0x1D56C),
    "arrows": range(0x2190, 0x2200),
    "operators": range(0x2200, 0x2300),
    "shapes": range(0x25A0, 0x2600),
    "dingbats": range(0x2701, 0x27BF),
    "pictograms": range(0x2600, 0x26C4),
}
UNSEEN_SCRIPTS = {"georgian": range(0x10D0, 0x10F1), "tifinagh": range(0x2D30, 0x2D66)}
SCRIPTS = TRAINING_SCRIPTS | UNSEEN_SCRIPTS
DIGITS = "digits"

#: Unicode categories of letters and symbols.
CATEGORIES = ("Lu", "Ll", "Lo", "Sm", "So")
#: Pixels of an image's side.
SIDE = 64
#: Where a glyph is in its square of `2 * SIDE`, unless it is turned or moved.
CENTRE = slice(SIDE // 2, 3 * SIDE // 2)
#: Two characters look alike if less than this share of their ink is at different places.
DISTINCT = 0.1
#: Font files. Left out are those that draw something else at a letter's code point (`cmmi10`, `cmsy10`, `cmex10`), know
#: no Unicode (`STIXNonUni*`), hold pieces of large symbols (`STIXSiz*`, `*Display`) or boxes (`LastResort*`).
FONTS = ("DejaVuSans*", "DejaVuSerif*", "STIXGeneral*", "cmr10*", "cmss10*", "cmtt10*", "cmti10*", "cmb10*")


@dataclass
class Arguments:
    output_dir: str = field(metadata={"help": "folder for train/*.parquet and unseen/*.parquet"})
    max_classes: int = field(default=24, metadata={"help": "characters of a script, spread over all it has"})
    images_per_class: int = field(default=20, metadata={"help": "images of each character"})
    seed: int = field(default=0, metadata={"help": "of fonts, places, strokes and noise"})


@functools.cache
def find_fonts() -> dict[str, frozenset[str]]:
    """Font file -> the characters it has a glyph for."""
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    paths: set[Path] = set()
    for pattern in FONTS:
        paths.update(folder.glob(f"{pattern}.ttf"))
    fonts = {}
    for path in sorted(paths):
        if "Display" not in path.stem:
            fonts[str(path)] = frozenset(chr(code) for code in FT2Font(str(path)).get_charmap())
    return fonts


@functools.lru_cache(maxsize=1024)
def load_font(path: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.BASIC)


@functools.cache
def choose_characters(script: str, max_classes: int) -> list[str]:
    """At most `max_classes` characters of a script, evenly spread over its letters or symbols.

    Left out is what no font has, and what looks like an earlier one once size and place no longer count (■ and ◼).
    """
    inks: dict[str, np.ndarray] = {}
    for code in SCRIPTS[script]:
        character = chr(code)
        paths = fonts_with(character)
        if paths and unicodedata.category(character) in CATEGORIES:
            glyph = draw_glyph(character, paths[0], 0.75 * SIDE, stroke=0)
            ink = np.asarray(glyph, dtype=np.float32)[CENTRE, CENTRE]
            if all(_are_distinct(ink, other) for other in inks.values()):
                inks[character] = ink
    characters = list(inks)
    if len(characters) <= max_classes:
        return characters
    return [characters[i * len(characters) // max_classes] for i in range(max_classes)]


def _are_distinct(ink: np.ndarray, other: np.ndarray) -> bool:
    return abs(ink - other).sum() > DISTINCT * (ink + other).sum()


def fonts_with(character: str) -> list[str]:
    """The font files that have a character; the plainest, which has the shortest name, comes first."""
    return sorted((path for path, glyphs in find_fonts().items() if character in glyphs), key=len)


def draw_glyph(character: str, path: str, longest: float, stroke: int) -> PILImage.Image:
    """A character in white on black, in the middle of a square of `2 * SIDE`, its longer side `longest` pixels."""
    left, top, right, bottom = load_font(path, SIDE).getbbox(character)
    font = load_font(path, round(SIDE * longest / max(right - left, bottom - top)))
    left, top, right, bottom = font.getbbox(character, stroke_width=stroke)
    canvas = PILImage.new("L", (2 * SIDE, 2 * SIDE))
    place = (SIDE - (left + right) / 2, SIDE - (top + bottom) / 2)
    ImageDraw.Draw(canvas).text(place, character, fill=255, font=font, stroke_width=stroke)
    return canvas


def draw_image(character: str, generator: np.random.Generator) -> PILImage.Image:
    """A character in any font that has it, of random size, place, turn, slant, stroke, contrast and noise.

    Returns:
        A grey image of `SIDE` x `SIDE` pixels.
    """
    paths = fonts_with(character)
    path = paths[generator.integers(len(paths))]
    glyph = draw_glyph(character, path, generator.uniform(0.45, 0.75) * SIDE, int(generator.integers(2)))
    turn, slant = generator.normal(0, 0.1), generator.normal(0, 0.1)
    matrix = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]]) @ [[1, slant], [0, 1]]
    shift = np.full(2, SIDE) - matrix @ (np.full(2, SIDE / 2) + generator.uniform(-0.08, 0.08, 2) * SIDE)
    coefficients = np.column_stack([matrix, shift]).flatten().tolist()
    ink = np.asarray(
        glyph.transform((SIDE, SIDE), PILImage.Transform.AFFINE, coefficients, PILImage.Resampling.BICUBIC)
    )
    dark, light = generator.uniform(0, 90), generator.uniform(165, 255)
    paper, pen = (light, dark) if generator.random() < 0.7 else (dark, light)
    pixels = paper + (pen - paper) * (ink / 255) + generator.normal(0, generator.uniform(0, 12), ink.shape)
    return PILImage.fromarray(pixels.clip(0, 255).astype(np.uint8))


def script_images(script: str, arguments: Arguments) -> Iterator[tuple[PILImage.Image, str]]:
    """Images of a script's characters, each with its character."""
    for character in choose_characters(script, arguments.max_classes):
        for i in range(arguments.images_per_class):
            key = [arguments.seed, *script.encode(), ord(character), i]
            yield draw_image(character, np.random.default_rng(key)), character


def digit_images(arguments: Arguments) -> Iterator[tuple[PILImage.Image, str]]:
    """The first of scikit-learn's handwritten digits of each class (8 x 8 pixels, enlarged)."""
    digits = load_digits()
    for value in range(10):
        for pixels in digits.images[digits.target == value][: arguments.images_per_class]:
            small = PILImage.fromarray((pixels * (255 / 16)).round().astype(np.uint8))
            yield small.resize((SIDE, SIDE), PILImage.Resampling.BICUBIC), str(value)


def write_domain(path: Path, images: Iterator[tuple[PILImage.Image, str]]) -> None:
    """Write labelled images as a Parquet file, whole or not at all, and print what it holds."""
    pictures, labels = zip(*images, strict=True)
    names = list(dict.fromkeys(labels))
    features = Features({"image": Image(), "label": ClassLabel(names=names)})
    indices = [names.index(label) for label in labels]
    dataset = Dataset.from_dict({"image": list(pictures), "label": indices}, features=features)
    with atomic_file(path) as draft:
        dataset.to_parquet(str(draft))
    print(f"{path}: {len(names)} classes, {len(pictures)} images", flush=True)


def main(argv: list[str] | None = None) -> None:
    arguments = parse(Arguments, argv)
    disable_progress_bars()
    folder = Path(arguments.output_dir)
    scripts = {folder / "train" / f"{script}.parquet": script for script in TRAINING_SCRIPTS}
    for script in (*UNSEEN_SCRIPTS, DIGITS):
        scripts[folder / "unseen" / f"{script}.parquet"] = script
    settings = asdict(arguments)
    settings["output_dir"] = folder.name
    record_file = folder / "made.json"  # written last: the files that it describes are complete
    if (
        record_file.exists()
        and json.loads(record_file.read_text()) == settings
        and all(path.exists() for path in scripts)
    ):
        print(f"{folder} is complete")
        return
    for path, script in scripts.items():
        images = digit_images(arguments) if script == DIGITS else script_images(script, arguments)
        write_domain(path, images)
    write_json(record_file, settings)


if __name__ == "__main__":
    main()
