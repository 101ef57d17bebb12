"""`hyperflow evaluate`: how many images of a folder a task classifies right, beside direct transfer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..extras import require_extra
from .options import SkipBad, Task, TaskBackbone
from .printing import hide_progress_bars, print_line, say, write

if TYPE_CHECKING:
    from ..modeling.task import AdaptedTask
    from .confusion import Confusion
    from .images import ImageReader

#: Formats of the picture.
PICTURES = (".png", ".pdf", ".svg", ".jpg")


@dataclass(frozen=True)
class LabelledFiles:
    """The images of a folder with one folder per class.

    Attributes:
        files: paths of the images.
        labels: the number of the class of each, in the order of the task's classes.
        unknown_classes: folders in it that are no class of the task; their images are left out.
        missing_classes: classes of the task of which it has no images.
    """

    files: list[str]
    labels: list[int]
    unknown_classes: list[str]
    missing_classes: list[str]


def evaluate(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder with one folder of images per class.")],
    task: Task,
    backbone: TaskBackbone = None,
    support: Annotated[
        Path | None,
        typer.Option(help="The folder that the task was adapted to; with it, direct transfer is evaluated as well."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables; accuracies are in %.")] = False,
    picture: Annotated[
        Path | None, typer.Option(help="Also draw the confusion matrix to this file (.png, .pdf, .svg or .jpg).")
    ] = None,
    skip_bad: SkipBad = False,
) -> None:
    """Count how many images of labelled folders a task classifies right: in all, per class, and what is taken for what.

    Take images that the task has not been adapted to. The mean over classes counts every class the same, however many
    images it has. An image that cannot be read is named on stderr, the others are counted, and the exit code is 1.
    """
    if picture is not None and picture.suffix.lower() not in PICTURES:
        raise typer.BadParameter(f"{picture} is of no format known: {', '.join(PICTURES)}.", param_hint="--picture")
    hide_progress_bars()
    from .images import ImageReader
    from .loading import load_task

    _require_folders(folder, support, picture)
    tasks = {"adapted task": load_task(task, backbone)}
    class_names = tasks["adapted task"].class_names
    labelled = _list_files(folder, class_names)
    if support is not None:
        tasks["direct transfer"] = _build_direct_transfer(tasks["adapted task"], task, support, skip_bad)
        _warn_of_seen_images(labelled.files, support)
    reader = ImageReader(skip_bad)
    confusions = _count(tasks, reader, labelled)
    if not reader.n_good:
        reader.require_all()  # there is nothing to print
    if as_json:
        _print_json(confusions, labelled)
    else:
        _print_report(confusions, labelled, has_direct=support is not None)
    if picture is not None:
        _draw(confusions, picture)
    reader.require_all()


def _require_folders(folder: Path, support: Path | None, picture: Path | None) -> None:
    from .loading import IMAGES, require_apart, require_kind

    for images in (folder, support):
        if images is None:
            continue
        if not images.is_dir():
            raise FileNotFoundError(f"there is no folder {images}. Give a folder with one folder of images per class.")
        require_kind(str(images), IMAGES)
        if picture is not None:
            require_apart(picture, images, "the picture")


def _list_files(folder: Path, class_names: list[str]) -> LabelledFiles:
    """The images of the classes of a task. What is left out is said on stderr.

    Raises:
        SupportSetError: no image is of a class of the task, or the folder is of no such kind, see `image_folder`.
    """
    from ..info import list_names
    from ..modeling.support import SupportSetError, image_folder

    found = image_folder(folder)
    for reason in found.skipped:
        say(f"skipped: {reason}")
    unknown = [name for name in found.classes if name not in class_names]
    files: list[str] = []
    labels: list[int] = []
    for number, name in enumerate(class_names):
        images = found.classes.get(name, [])
        files += map(str, images)
        labels += [number] * len(images)
    known = f"The task's classes are: {list_names(class_names)}."
    if not files:
        raise SupportSetError(
            f"no folder in {folder} has images and the name of a class of the task. It has: "
            f"{list_names(list(found.classes))}. {known}"
        )
    if unknown:
        say(f"left out, no classes of the task: {list_names(unknown)}. {known}")
    missing = [name for name in class_names if not found.classes.get(name)]
    if missing:
        say(f"classes without images in {folder}, which are not counted: {list_names(missing)}.")
    return LabelledFiles(files, labels, unknown, missing)


def _build_direct_transfer(adapted: AdaptedTask, name: str, support: Path, skip_bad: bool) -> AdaptedTask:
    """The baseline for a saved task: the backbone as it is, and cosines with the class means of the support images.

    Args:
        adapted: the task, loaded.
        name: its folder or Hub id.
        support: the folder that it was adapted to.
        skip_bad: see `read_support`.

    Raises:
        SupportSetError: the support set has other classes than the task, or see `read_support`.
    """
    import torch

    from ..modeling.backbones import SplitBackbone
    from ..modeling.calibration import COSINE_SCALE
    from ..modeling.prototypes import unit_means
    from ..modeling.support import SupportSetError, read_support
    from ..modeling.task import AdaptedTask
    from ..modeling.task_files import read_task
    from ..modeling.trunks import eval_mode

    images = read_support(support, adapted.processor, skip_bad=skip_bad)
    for reason in images.skipped:
        say(f"skipped: {reason}")
    if set(images.class_names) != set(adapted.class_names):
        differing = sorted(set(images.class_names) ^ set(adapted.class_names))
        raise SupportSetError(
            f"{support} is not what the task was adapted to, it has other classes (differing: "
            f"{', '.join(differing[:5])}). Give the same folder as to `hyperflow adapt`."
        )
    split = SplitBackbone(adapted.backbone, 0, read_task(name).pooling)
    injection = adapted.space.inject(adapted.backbone)
    with torch.no_grad(), injection.using(injection.start), eval_mode(adapted.backbone):
        dtype = next(adapted.backbone.parameters()).dtype
        features = split.forward_features(images.pixel_values.to(dtype)).float()
    order = [images.class_names.index(name) for name in adapted.class_names]
    return AdaptedTask(
        split=split,
        space=adapted.space,
        theta=injection.start,
        class_names=adapted.class_names,
        scale=COSINE_SCALE,
        processor=adapted.processor,
        prototypes=unit_means(features, images.labels)[order],
    )


def _warn_of_seen_images(files: Sequence[str], support: Path) -> None:
    """Say so if images to evaluate are those that the task was adapted to."""
    inside = support.resolve()
    n_seen = sum(inside in Path(file).resolve().parents for file in files)
    if n_seen:
        say(f"warning: {n_seen} of the images are in {support}. The task has seen them, so their accuracy says little.")


def _count(tasks: dict[str, AdaptedTask], reader: ImageReader, labelled: LabelledFiles) -> list[Confusion]:
    """The confusion matrix of each task on the images that can be read."""
    import numpy as np

    from ..modeling.images import process_images
    from .confusion import Confusion

    processor = tasks["adapted task"].processor
    if processor is None:
        raise ValueError("the task was saved without an image processor: it classifies tensors in Python only.")
    confusions = []
    for name, task in tasks.items():
        n_way = len(task.class_names)
        confusions.append(Confusion(name, task.class_names, np.zeros((n_way, n_way), dtype=np.int64)))
    for decoded in reader.read(labelled.files):
        true = [labelled.labels[number] for number in decoded]
        pixel_values = process_images(decoded.values(), processor)
        for task, confusion in zip(tasks.values(), confusions, strict=True):
            predicted = task.logits(pixel_values).argmax(-1).tolist()
            np.add.at(confusion.counts, (true, predicted), 1)
    return confusions


def _print_json(confusions: list[Confusion], labelled: LabelledFiles) -> None:
    adapted, *others = confusions
    report = {
        "labels": adapted.class_names,
        "adapted_task": adapted.to_dict(),
        "direct_transfer": others[0].to_dict() if others else None,
        "unknown_classes": labelled.unknown_classes,
        "missing_classes": labelled.missing_classes,
    }
    write(json.dumps(report, indent=1) + "\n")


def _print_report(confusions: list[Confusion], labelled: LabelledFiles, *, has_direct: bool) -> None:
    from .confusion import print_confusions

    print_confusions(confusions)
    if not has_direct:
        print_line("")
        print_line("To compare with direct transfer, add --support and the folder that the task was adapted to.")


def _draw(confusions: list[Confusion], picture: Path) -> None:
    with require_extra("benchmark", "the picture"):
        from .confusion import draw_confusions

        figure = draw_confusions(confusions)
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=140, bbox_inches="tight")
    say(f"Picture: {picture}")
