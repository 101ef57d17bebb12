"""`hyperflow adapt`: from a folder of images to a saved task."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .options import Adapter, AdaptViews, Backbone, SkipBad
from .printing import hide_progress_bars, print_line, quote, say

if TYPE_CHECKING:
    from ..modeling.support import SupportSet
    from ..modeling.task import AdaptedTask


def adapt(
    support: Annotated[Path, typer.Option(help="Folder with one folder of images per class.")],
    output: Annotated[Path, typer.Option("--output_dir", "--output", help="Folder for the adapted task.")],
    adapter: Adapter = None,
    backbone: Backbone = None,
    n_steps: Annotated[
        int | None,
        typer.Option("--n_steps", min=0, help="Solver steps; by default the adapter's. 0 is the same as --no_flow."),
    ] = None,
    no_flow: Annotated[
        bool, typer.Option("--no_flow", help="Leave the backbone as it is: the closed-form head alone classifies.")
    ] = False,
    solver: Annotated[
        str | None,
        typer.Option(
            help="euler, midpoint, heun, rk4; with torchdiffeq dopri5, dopri8, bosh3; by default the adapter's."
        ),
    ] = None,
    early_stopping: Annotated[
        bool,
        typer.Option("--early_stopping", help="Stop the flow where leave-one-out accuracy on the support is best."),
    ] = False,
    format: Annotated[
        str | None, typer.Option(help="'lora' saves biases as a LoRA adapter, for tools that know only LoRA.")
    ] = None,
    views: AdaptViews = None,
    skip_bad: SkipBad = False,
) -> None:
    """Adapt a backbone to a folder of images and save the task, a plain PEFT adapter.

    Example: hyperflow adapt --support pets/ --output_dir my-task, where pets/cat/ and pets/dog/ hold a few images.
    """
    if format not in (None, "lora"):
        raise typer.BadParameter(f"{format!r} is unknown: use 'lora', or leave it out.", param_hint="--format")
    if no_flow or n_steps == 0:
        n_steps = _require_no_flow(n_steps, solver, early_stopping)
    hide_progress_bars()
    from ..modeling.saving import exclusive
    from ..modeling.support import read_support
    from .loading import choose_backbone, load_adapter, load_backbone

    _require_folders(support, output)
    with exclusive(output):
        flow = load_adapter(adapter)
        images = read_support(support, flow.processor, skip_bad=skip_bad)
        for reason in images.skipped:
            say(f"skipped: {reason}")
        model = load_backbone(backbone or choose_backbone(adapter, flow))
        start = time.perf_counter()
        task = flow.adapt(model, images, n_steps=n_steps, solver=solver, early_stopping=early_stopping, views=views)
        _ = task.prototypes  # computed on first use, which belongs to the time
        seconds = time.perf_counter() - start
        task.save_pretrained(output, format=format)
    _print_adapted(task, images, seconds, output)


def _require_no_flow(n_steps: int | None, solver: str | None, early_stopping: bool) -> int:
    """The number of steps without the flow.

    Raises:
        BadParameter: options of the flow were given, too.
    """
    if n_steps:
        raise typer.BadParameter("without the flow there are no steps.", param_hint="--n_steps")
    if solver is not None or early_stopping:
        raise typer.BadParameter("without the flow there is nothing to solve or to stop: leave it out.")
    return 0


def _require_folders(support: Path, output: Path) -> None:
    """Check that the support set is a folder of images and that the output is a folder apart from it.

    Raises:
        CheckpointError: it is not, or the output holds a model.
    """
    from ..modeling.saving import CheckpointError
    from .loading import A_TASK, IMAGES, has_images, identify, require_apart

    swapped = ""
    if output.is_dir() and has_images(output):
        swapped = f" {output} holds images: were --support and --output_dir mixed up?"
    if not support.is_dir():
        raise CheckpointError(
            f"there is no folder {support}. Give a folder with one folder of images per class.{swapped}"
        )
    found = identify(support)
    if found not in (None, IMAGES):
        raise CheckpointError(f"{support} is {found}, not {IMAGES}.{swapped}")
    require_apart(output, support, "the task")
    if (output / "config.json").exists():
        raise CheckpointError(f"{output} holds a model (config.json): choose another folder for the task.")
    for path in support.iterdir():
        if path.is_dir() and identify(path) == A_TASK:
            raise CheckpointError(f"{path} is {A_TASK}, not a class of {support}: put it elsewhere.")


def _print_adapted(task: AdaptedTask, images: SupportSet, seconds: float, folder: Path) -> None:
    from ..info import format_size, list_names

    classes = f"{images.n_way} classes ({list_names(images.class_names)})"
    print_line(f"Adapted to {classes} from {len(images.labels)} images in {seconds:.2f} s.")
    stopping_point = task.stopping_point
    if task.nfe == 0:
        print_line("The flow was left out: the head alone classifies.")
    elif stopping_point is not None and stopping_point.accuracies:
        accuracies = stopping_point.accuracies
        print_line(
            f"The flow was followed to t = {stopping_point.time:.2f}: leave-one-out accuracy "
            f"{accuracies[stopping_point.time]:.1%}, without adapting {accuracies[0.0]:.1%}."
        )
    print_line(f"Saved {folder} ({format_size(folder)}). Next: hyperflow predict --task {quote(folder)} IMAGE ...")
