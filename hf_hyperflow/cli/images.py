"""Finds the images that a command is given, and decodes them as they are needed, going on over bad ones."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import PIL.Image
from tqdm import tqdm

from ..info import list_names
from ..modeling.images import IMAGE_SUFFIXES, ImageError, decode, why_no_image
from ..modeling.support import list_visible
from .printing import say

#: Images that are decoded and classified at once. More are hardly faster, and the first result comes later.
BATCH_SIZE = 16


class ImageReader:
    """Decodes images, names those that cannot be read, and counts both.

    Attributes:
        skip_bad: whether images that cannot be read are no error.
        n_good, n_bad: how many images could be read so far, and how many could not.
    """

    def __init__(self, skip_bad: bool):
        self.skip_bad = skip_bad
        self.n_good = 0
        self.n_bad = 0

    def report(self, problem: str) -> None:
        """Name an image that cannot be read on stderr, and count it."""
        self.n_bad += 1
        say(f"{'skipped' if self.skip_bad else 'error'}: {problem}")

    def find(self, arguments: Sequence[str]) -> list[str]:
        """The files of arguments that are files, folders or patterns such as `photos/*.jpg`.

        What is in a folder is found at any depth. A pattern is for shells that do not expand it, as on Windows. Files
        of a folder that are no images are named, and that is no error.
        """
        files: list[str] = []
        for argument in arguments:
            matches = [argument]
            if not os.path.lexists(argument) and glob.has_magic(argument):
                matches = sorted(glob.glob(argument, recursive=True))
                if not matches:
                    self.report(f"no file is named like {argument}.")
            found: dict[str, None] = {}  # `photos/**` matches a folder and what is in it
            for match in matches:
                names = self._find_in_folder(match) if os.path.isdir(match) else [match]
                found.update(dict.fromkeys(names))
            files += found
        return files

    def _find_in_folder(self, folder: str) -> list[str]:
        images: list[str] = []
        others: list[str] = []
        try:
            for path in _walk(Path(folder)):
                is_image = path.suffix.lower() in IMAGE_SUFFIXES or why_no_image(path) is None
                (images if is_image else others).append(str(path))
        except OSError as error:  # a folder that may not be listed
            self.report(f"{folder}: {error}.")
        if others:
            say(f"left out, no images: {list_names(others)}")
        if not images:
            self.report(f"the folder {folder} has no images.")
        return images

    def read(self, files: Sequence[str]) -> Iterator[dict[int, PIL.Image.Image]]:
        """Yield the images that can be read in batches, by their position in `files`: a file may be named twice."""
        with tqdm(total=len(files), unit="image", disable=None, leave=False) as progress:
            for start in range(0, len(files), BATCH_SIZE):
                numbers = range(start, min(start + BATCH_SIZE, len(files)))
                decoded = {}
                for number in numbers:
                    try:
                        decoded[number] = decode(files[number], files[number])
                    except ImageError as error:
                        self.report(str(error))
                self.n_good += len(decoded)
                if decoded:
                    yield decoded
                progress.update(len(numbers))

    def require_all(self) -> None:
        """Raise an error at the end of the work if there was nothing to do or something was left out.

        Raises:
            ImageError: no image could be read, or one could not without `skip_bad`.
        """
        if not self.n_good:
            raise ImageError("none of the images can be read.")
        if self.n_bad and not self.skip_bad:
            bad = "1 file or folder" if self.n_bad == 1 else f"{self.n_bad} files or folders"
            good = "1 image was" if self.n_good == 1 else f"{self.n_good} images were"
            raise ImageError(f"{bad} could not be read, see above. {good} read; with --skip_bad that is no error.")


def _walk(folder: Path) -> Iterator[Path]:
    """The files in a folder and in the folders in it, sorted. Links to folders are not followed: they can go round."""
    for path in list_visible(folder):
        if not path.is_dir():
            yield path
        elif not path.is_symlink():
            yield from _walk(path)
