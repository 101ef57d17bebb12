"""`hyperflow predict`: the classes of images, printed as they come."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from .options import SkipBad, Task, TaskBackbone, Views
from .printing import hide_progress_bars, print_line, to_cell, write

if TYPE_CHECKING:
    from ..modeling.task import AdaptedTask
    from .images import ImageReader


@dataclass(frozen=True)
class Result:
    """What is printed of an image: its best classes, `{"label", "score"}` each, best first."""

    image: str
    predictions: list[dict]


@dataclass(frozen=True)
class Answer:
    """How an image is answered; the fields are arguments of `AdaptedTask.__call__`."""

    top_k: int
    views: int
    reject: bool


def predict(
    images: Annotated[
        list[str],
        typer.Argument(
            metavar="IMAGES...", help="Image files, folders of images at any depth, or quoted patterns like 'a/*.jpg'."
        ),
    ],
    task: Task,
    backbone: TaskBackbone = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON list, with an image on each of its lines.")
    ] = False,
    as_csv: Annotated[
        bool,
        typer.Option(
            "--csv",
            help="Print CSV with a header. A name that spreadsheets would take for a formula (it starts with = + - @, "
            "tab or return) gets an apostrophe in front. --json has all names as they are.",
        ),
    ] = False,
    top_k: Annotated[int, typer.Option("--top_k", min=1, help="How many of the best classes to print per image.")] = 1,
    views: Views = 1,
    reject: Annotated[
        bool,
        typer.Option("--reject", help="Answer 'none of these' for images that are probably of none of the classes."),
    ] = False,
    skip_bad: SkipBad = False,
) -> None:
    """Classify images with an adapted task.

    Results are printed as they come. An image that cannot be read is named on stderr, the others are classified, and
    the exit code is 1.
    """
    if as_json and as_csv:
        raise typer.BadParameter("choose one of --json and --csv.")
    hide_progress_bars()
    from .images import ImageReader
    from .loading import load_task

    adapted = load_task(task, backbone)
    if reject:
        adapted.require_rejection()  # before anything is printed
    reader = ImageReader(skip_bad)
    results = _classify(adapted, reader, reader.find(images), Answer(top_k, views, reject))
    if as_json:
        print_json(results)
    elif as_csv:
        print_csv(results)
    else:
        print_lines(results)
    reader.require_all()


def _classify(task: AdaptedTask, reader: ImageReader, files: list[str], answer: Answer) -> Iterator[Result]:
    """Yield the best classes of each image that can be read."""
    for decoded in reader.read(files):
        predictions = task(list(decoded.values()), top_k=answer.top_k, views=answer.views, reject=answer.reject)
        for number, best in zip(decoded, predictions, strict=True):
            yield Result(files[number], best)


def print_json(results: Iterable[Result]) -> None:
    """Print results as one JSON list, which is whole even after an error in the middle of the work."""
    separator = "[\n"
    try:
        for result in results:
            write(separator + json.dumps(asdict(result)))
            separator = ",\n"
    finally:
        write("[]\n" if separator == "[\n" else "\n]\n")


def print_csv(results: Iterable[Result]) -> None:
    """Print results as CSV, a line per class of an image."""
    write(_to_csv("image", "rank", "label", "score"))
    for result in results:
        for rank, prediction in enumerate(result.predictions, start=1):
            image, label = to_cell(result.image), to_cell(prediction["label"])
            write(_to_csv(image, str(rank), label, f"{prediction['score']:.6f}"))


def _to_csv(*cells: str) -> str:
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow(cells)
    return line.getvalue()


def print_lines(results: Iterable[Result]) -> None:
    """Print a line per image."""
    for result in results:
        classes = ", ".join(f"{p['label']} {p['score']:.1%}" for p in result.predictions)
        print_line(f"{result.image}: {classes}")
