"""Adapts to classes of your own and classifies images with ONNX Runtime: no PyTorch is needed.

This file lies beside `adapt.onnx`, `predict.onnx`, `weights.bin` and `hyperflow.json`. It needs numpy, Pillow and
onnxruntime, and nothing else.

    python hyperflow_onnx.py adapt pets/ --task my-task.npz     # pets/cat/ and pets/dog/ hold a few images each
    python hyperflow_onnx.py predict a.jpg b.jpg --task my-task.npz

In Python:

    model = HyperFlow("folder of this file")
    task = model.adapt({"cat": ["tom.jpg"], "dog": ["rex.jpg"]})  # or the path of a folder like pets/
    task.predict(["a.jpg", "b.jpg"])  # ["cat", "dog"]
    task.save("my-task.npz")
    model.load_task("my-task.npz").scores(["a.jpg"])  # probabilities (n_images, n_classes)
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageOps

try:
    import onnxruntime
except ImportError as error:
    raise ImportError("hyperflow_onnx.py needs onnxruntime: pip install onnxruntime") from error

#: Files with these endings are images when a folder is read.
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")

#: What `Task.predict` answers for an image of none of the classes.
NONE_OF_THESE = "none of these"

#: How many images are classified at a time.
BATCH_SIZE = 64

#: JPEGs with both sides longer than this are decoded at a half or less; the shorter side keeps half of it.
REDUCED_FROM = 4096


class HyperFlow:
    """An exported adapter with its backbone.

    Args:
        folder: where the files of the export are; by default the folder of this file.
        threads: how many threads ONNX Runtime may use; 0 lets it choose.
        providers: where it runs, see the documentation of ONNX Runtime.
    """

    def __init__(
        self,
        folder: str | os.PathLike = Path(__file__).parent,
        *,
        threads: int = 0,
        providers: Sequence[str] = ("CPUExecutionProvider",),
    ):
        self.folder = Path(folder)
        self.settings = json.loads((self.folder / "hyperflow.json").read_text(encoding="utf-8"))
        self._threads = threads
        self._providers = list(providers)
        self._sessions: dict[str, onnxruntime.InferenceSession] = {}

    def adapt(self, support: str | os.PathLike | Mapping[str, Iterable[Any]]) -> Task:
        """Learn the classes of a support set.

        Args:
            support: a folder with one folder of images per class, or a dict of class names to images (paths or PIL
                images). Classes may have different numbers of images.

        Raises:
            ValueError: there are fewer than two classes, a class has no images, or an image cannot be read.
        """
        if not isinstance(support, Mapping):
            support = list_folder(support)
        pixel_values, labels = [], []
        for label, (name, images) in enumerate(support.items()):
            processed = [self.process(image) for image in images]
            if not processed:
                raise ValueError(f"class {name!r} has no images. Give it at least one, or leave it out.")
            pixel_values += processed
            labels += [label] * len(processed)
        if len(support) < 2:
            raise ValueError("there are fewer than two classes: telling classes apart is the task.")
        return self.adapt_pixels(np.stack(pixel_values), np.array(labels), list(support))

    def adapt_pixels(self, pixel_values: np.ndarray, labels: np.ndarray, class_names: list[str]) -> Task:
        """`adapt` for pixel values `(n, 3, height, width)` float32 and labels `(n,)` in 0..len(class_names)-1."""
        one_hot = np.eye(len(class_names), dtype=np.float32)[labels]
        arrays = self.run("adapt", {"pixel_values": pixel_values, "one_hot": one_hot})
        if not all(np.isfinite(array).all() for array in arrays.values()):
            raise ValueError("the images make values that are not finite: look for strange ones among them.")
        return Task(self, class_names, arrays)

    def process(self, image: Any) -> np.ndarray:
        """Pixel values `(3, height, width)` of a path or a PIL image, as the graphs read them."""
        return process(decode(image), self.settings["preprocessing"])

    def run(self, graph: str, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The outputs of "adapt" or "predict" by their names. The graph is loaded when it is first run."""
        if graph not in self._sessions:
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = self._threads
            options.log_severity_level = 3  # it warns of what it cannot compute in advance
            path = str(self.folder / f"{graph}.onnx")
            self._sessions[graph] = onnxruntime.InferenceSession(path, options, self._providers)
        session = self._sessions[graph]
        names = [output.name for output in session.get_outputs()]
        return dict(zip(names, session.run(names, inputs), strict=True))

    def load_task(self, path: str | os.PathLike) -> Task:
        """A task that `Task.save` wrote.

        Raises:
            ValueError: it was made with another export.
        """
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        if str(arrays.pop("export")) != self.settings["export"]:
            raise ValueError(f"{path} was made with another export than that in {self.folder}: adapt again.")
        return Task(self, arrays.pop("class_names").tolist(), arrays)


@dataclass
class Task:
    """What was learned of the classes of one support set.

    Attributes:
        model: the export that it was made with.
        class_names: the classes in the order of the scores.
        arrays: the weights of the adapter (`theta`), the class prototypes and the numbers that make scores of them.
    """

    model: HyperFlow
    class_names: list[str]
    arrays: dict[str, np.ndarray]

    def scores(self, images: Sequence[Any]) -> np.ndarray:
        """Probabilities `(n, n_classes)` of images, which are paths or PIL images."""
        scores, _ = self._score(images)
        return scores

    def known_scores(self, images: Sequence[Any]) -> np.ndarray | None:
        """Probabilities `(n,)` that images are of one of the classes at all; None if the export cannot tell."""
        _, known = self._score(images)
        return known

    def predict(self, images: Sequence[Any], *, reject: bool = False) -> list[str]:
        """The most likely class of each image; with `reject`, `NONE_OF_THESE` where it is likely of none of them."""
        return [label for label, _ in self.classify(images, reject=reject)]

    def classify(self, images: Sequence[Any], *, reject: bool = False) -> list[tuple[str, float]]:
        """What `predict` answers for each image, and how probable that is."""
        scores, known = self._score(images)
        if reject and known is None:
            raise ValueError("this export cannot tell images of none of the classes.")
        results = []
        for number, row in enumerate(scores):
            if reject and known is not None and known[number] < 0.5:
                results.append((NONE_OF_THESE, 1 - float(known[number])))
            else:
                results.append((self.class_names[row.argmax()], float(row.max())))
        return results

    def score_pixels(self, pixel_values: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Scores `(n, n_classes)` and, if there are any, `known_scores` `(n,)` of `(n, 3, height, width)` float32."""
        outputs = self.model.run("predict", {"pixel_values": pixel_values, **self.arrays})
        return outputs["scores"], outputs.get("known")

    def _score(self, images: Sequence[Any]) -> tuple[np.ndarray, np.ndarray | None]:
        scores = [np.zeros((0, len(self.class_names)), dtype=np.float32)]
        known = [np.zeros(0, dtype=np.float32)]
        for start in range(0, len(images), BATCH_SIZE):
            batch = np.stack([self.model.process(image) for image in images[start : start + BATCH_SIZE]])
            batch_scores, batch_known = self.score_pixels(batch)
            scores.append(batch_scores)
            if batch_known is not None:
                known.append(batch_known)
        if "rejection" not in self.arrays:
            return np.concatenate(scores), None
        return np.concatenate(scores), np.concatenate(known)

    def save(self, path: str | os.PathLike) -> None:
        """Write the task to a file, whole or not at all, for `HyperFlow.load_task`."""
        draft = Path(f"{path}.draft")
        arrays: dict[str, Any] = dict(self.arrays)
        arrays["class_names"] = np.array(self.class_names)
        arrays["export"] = np.array(self.model.settings["export"])
        with open(draft, "wb") as file:
            np.savez(file, **arrays)
        os.replace(draft, path)


def list_folder(folder: str | os.PathLike) -> dict[str, list[Path]]:
    """The images of each class of a folder with one folder per class, sorted. Hidden files are passed over.

    Raises:
        ValueError: there is no such folder.
    """
    if not Path(folder).is_dir():
        raise ValueError(f"{folder} is not a folder. Give a folder with one folder of images per class.")
    classes = {}
    for path in _list_visible(Path(folder)):
        if path.is_dir():
            classes[path.name] = [image for image in _list_visible(path) if image.suffix.lower() in IMAGE_SUFFIXES]
    return classes


def _list_visible(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.iterdir()) if not path.name.startswith(".") and path.name != "__MACOSX"]


def decode(image: Any) -> PIL.Image.Image:
    """A path or a PIL image as upright RGB: alpha is laid on white, greys of 16 bits are brought to 8.

    Raises:
        ValueError: it cannot be read; the message names it.
    """
    if isinstance(image, PIL.Image.Image):
        return _to_rgb(PIL.ImageOps.exif_transpose(image))
    try:
        with PIL.Image.open(image) as opened:
            if opened.format == "JPEG" and min(opened.size) > REDUCED_FROM:
                opened.draft(None, (REDUCED_FROM // 2, REDUCED_FROM // 2))
            opened.load()
            return _to_rgb(PIL.ImageOps.exif_transpose(opened))
    except Exception as error:  # the readers of damaged files raise whatever they stumble over
        raise ValueError(f"{image} cannot be read as an image ({error}). Replace or remove it.") from error


def _to_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    if image.mode == "F":
        image = _scale_floats(image)
    elif image.mode in ("I;16", "I;16B", "I;16L", "I"):
        values = np.asarray(image).astype(np.int32).clip(0, 65535)
        image = PIL.Image.fromarray(((values + 128) // 257).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        layer = image.convert("RGBA")
        white = PIL.Image.new("RGBA", layer.size, (255, 255, 255, 255))
        image = PIL.Image.alpha_composite(white, layer)
    return image.convert("RGB")


def _scale_floats(image: PIL.Image.Image) -> PIL.Image.Image:
    """A grey image of floats in 0..1, 0..255 or 0..65535 with 8 bits."""
    values = np.asarray(image, dtype=np.float64)
    if not np.isfinite(values).all():
        raise ValueError("it has NaN or infinite pixels")
    white = 65535.0
    if values.max() <= 255:
        white = 255.0 if values.max() > 1 else 1.0
    return PIL.Image.fromarray((values.clip(0, white) * (255.0 / white)).round().astype(np.uint8))


def process(image: PIL.Image.Image, preprocessing: dict[str, Any]) -> np.ndarray:
    """Pixel values `(3, height, width)` float32 of an RGB image, as the backbone's image processor makes them.

    Args:
        image: in RGB.
        preprocessing: of `hyperflow.json`. Steps that are null are left out.
    """
    size = preprocessing["size"]
    if size is not None:
        image = image.resize(_get_size(image, size), resample=preprocessing["resample"])
    if preprocessing["crop"] is not None:
        height, width = preprocessing["crop"]
        left, top = (image.width - width) // 2, (image.height - height) // 2
        image = image.crop((left, top, left + width, top + height))  # black beyond the image
    pixels = np.asarray(image)
    if preprocessing["scale"] is not None:
        pixels = pixels.astype(np.float64) * preprocessing["scale"]
    pixels = pixels.astype(np.float32)
    if preprocessing["mean"] is not None:
        pixels = (pixels - np.float32(preprocessing["mean"])) / np.float32(preprocessing["std"])
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _get_size(image: PIL.Image.Image, size: int | list[int]) -> tuple[int, int]:
    """Width and height from [height, width], or from the length of the shorter side."""
    if isinstance(size, list):
        return size[1], size[0]
    longer = int(size * max(image.size) / min(image.size))
    return (size, longer) if image.width <= image.height else (longer, size)


def _iterate_images(paths: Sequence[str]) -> Iterator[Path]:
    """Yield files, and the images in folders at any depth."""
    for path in map(Path, paths):
        if not path.is_dir():
            yield path
            continue
        for image in sorted(path.rglob("*")):
            if image.suffix.lower() in IMAGE_SUFFIXES and not image.name.startswith("."):
                yield image


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `adapt` or `predict` on the command line."""
    parser = argparse.ArgumentParser(description="Adapt to a few labelled images, and classify others.")
    commands = parser.add_subparsers(dest="command", required=True)
    adapt = commands.add_parser("adapt", help="learn the classes of a folder and save them")
    adapt.add_argument("support", help="a folder with one folder of images per class")
    predict = commands.add_parser("predict", help="print the class of each image and its probability")
    predict.add_argument("images", nargs="+", help="files or folders")
    predict.add_argument("--reject", action="store_true", help=f"answer {NONE_OF_THESE!r} where that is more likely")
    for command in (adapt, predict):
        command.add_argument("--task", required=True, help="the file of the learned classes, such as my-task.npz")
        command.add_argument("--model", default=Path(__file__).parent, help="the folder of the export")
    options = parser.parse_args(arguments)
    try:
        model = HyperFlow(options.model)
        if options.command == "adapt":
            task = model.adapt(options.support)
            task.save(options.task)
            print(f"Saved {options.task}: {len(task.class_names)} classes ({', '.join(task.class_names)}).")
            return
        task = model.load_task(options.task)
        images = list(_iterate_images(options.images))
        for image, (label, score) in zip(images, task.classify(images, reject=options.reject), strict=True):
            print(f"{image}\t{label}\t{score:.4f}")
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
