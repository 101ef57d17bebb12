"""Class names and images as a person gives them to the page."""

from __future__ import annotations

from pathlib import Path
from typing import TypeAlias

import PIL.Image

from ..modeling.images import ImageError, decode

#: Rows of the page; the command line takes any number of classes.
MIN_CLASSES, MAX_CLASSES = 2, 10

#: Images of a class, and new images.
MAX_IMAGES = 20

#: Characters of the name of a class.
MAX_NAME_LENGTH = 80

#: The value of a Gradio gallery: `(path, caption)` of each file.
Files: TypeAlias = list[tuple[str, str | None]]


class PageError(ValueError):
    """Something that a person gave cannot be used; the message is shown on the page."""


def read_files(files: Files) -> list[PIL.Image.Image]:
    """The images of a gallery.

    Raises:
        PageError: there are more than `MAX_IMAGES`, or a file is not an image; it is named as the person knows it.
    """
    if len(files) > MAX_IMAGES:
        raise PageError(f"there are {len(files)} images, and at most {MAX_IMAGES} are read. Remove some.")
    images = []
    for path, _ in files:
        name = Path(path).name
        try:
            images.append(decode(path, name))
        except ImageError as error:
            raise PageError(str(error).replace(path, name)) from error
    return images


def read_classes(names: list[str | None], galleries: list[Files | None]) -> dict[str, list[PIL.Image.Image]]:
    """Class names and images of the rows of the page; rows with neither are passed over.

    Raises:
        PageError: images without a class name, a name without images or of more than `MAX_NAME_LENGTH` characters, two
            rows of one name, more than `MAX_IMAGES` images, a file that is no image.
    """
    classes: dict[str, list[PIL.Image.Image]] = {}
    for row, (typed, files) in enumerate(zip(names, galleries, strict=True), start=1):
        name = (typed or "").strip()
        if not name and not files:
            continue
        if not name:
            raise PageError(f"Class {row} has images but no name. Give it one.")
        if len(name) > MAX_NAME_LENGTH:
            raise PageError(f"The name of class {row} is longer than {MAX_NAME_LENGTH} characters. Shorten it.")
        if not files:
            raise PageError(f"Class {name!r} has no images. Give it at least one, or clear its name.")
        if name in classes:
            raise PageError(f"Two classes are called {name!r}. Rename one, or put their images together.")
        try:
            classes[name] = read_files(files)
        except PageError as error:
            raise PageError(f"Class {name!r}: {error}") from error
    return classes
