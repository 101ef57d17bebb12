"""The command line: `hyperflow adapt`, `predict`, `info`, `push`, ...

What a command needs is imported when it runs, so that `--help` and mistyped options answer at once.
"""

from __future__ import annotations

import csv
import json
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .modeling.task import AdaptedTask

#: Images that are decoded and classified at once.
BATCH_SIZE = 64

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"max_content_width": 120},
)

Backbone = Annotated[str, typer.Option(help="Vision transformer the adapter was trained for: folder or Hub id.")]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Leave out images that cannot be read, naming them.")]


@app.callback()
def options(debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False) -> None:
    """Adapt vision transformers to your classes from a handful of images, without gradients.

    Errors exit with code 1, wrong usage with 2, Ctrl-C with 130. A folder is written whole or not at all.
    """


def main() -> None:
    """Entry point: an error is one line on stderr and exit code 1, with `--debug` a traceback."""
    warnings.simplefilter("ignore", FutureWarning)  # of one library to another: nothing a user can do
    warnings.showwarning = lambda message, *_: _say(f"warning: {message}")
    sys.stdout.reconfigure(errors="surrogateescape")  # names of files are printed as they are, UTF-8 or not
    try:
        app(prog_name="hyperflow")
    except Exception as error:
        if "--debug" in sys.argv[1:]:
            raise
        text = " ".join(str(error).split())
        known = isinstance(error, OSError | ValueError) and text
        _say(f"error: {text}" if known else f"error: {type(error).__name__}: {text} (hyperflow --debug shows where)")
        sys.exit(1)


@app.command()
def adapt(
    adapter: Annotated[str, typer.Option(help="HyperFlow adapter: folder or Hub id.")],
    backbone: Backbone,
    support: Annotated[Path, typer.Option(help="Folder with one folder of images per class.")],
    output: Annotated[Path, typer.Option(help="Folder for the adapted task.")],
    n_steps: Annotated[int | None, typer.Option(min=1, help="Solver steps; by default the adapter's.")] = None,
    solver: Annotated[
        str | None,
        typer.Option(
            help="euler, midpoint, heun, rk4; with torchdiffeq dopri5, dopri8, bosh3; default: the adapter's."
        ),
    ] = None,
    early_stopping: Annotated[
        bool,
        typer.Option("--early_stopping", help="Stop the flow where leave-one-out accuracy on the support is best."),
    ] = False,
    format: Annotated[
        str | None, typer.Option(help="'lora' saves biases as a LoRA adapter, for tools that know only LoRA.")
    ] = None,
    skip_bad: SkipBad = False,
) -> None:
    """Adapt a backbone to a folder of images and save the task, a plain PEFT adapter.

    Example: hyperflow adapt --adapter ADAPTER --backbone BACKBONE --support pets/ --output my-task,
    where pets/cat/ and pets/dog/ hold a few pictures each.
    """
    _set_up()
    from .info import size
    from .modeling.adapter import HyperFlowAdapter
    from .modeling.saving import CheckpointError, exclusive
    from .modeling.support import read_support

    if format not in (None, "lora"):
        raise typer.BadParameter("use 'lora', or leave it out.", param_hint="--format")
    if (output / "config.json").exists():
        raise CheckpointError(f"{output} holds a model (config.json): choose another folder for the task.")
    with exclusive(output):
        flow = HyperFlowAdapter.from_pretrained(adapter).eval()
        data = read_support(support, flow.processor, skip_bad=skip_bad)
        for reason in data.skipped:
            _say(f"skipped: {reason}")
        model = _load_backbone(backbone)
        start = time.perf_counter()
        task = flow.adapt(model, data, n_steps=n_steps, solver=solver, early_stopping=early_stopping)
        _ = task.prototypes
        seconds = time.perf_counter() - start
        task.save_pretrained(output, format=format)
    typer.echo(
        f"Adapted to {data.n_way} classes ({', '.join(data.class_names)}) from {len(data.labels)} images "
        f"in {seconds:.2f} s."
    )
    if task.stopping_point.accuracies:
        accuracies = task.stopping_point.accuracies
        typer.echo(
            f"The flow was followed to t = {task.stopping_point.time:.2f}: leave-one-out accuracy "
            f"{accuracies[task.stopping_point.time]:.1%}, without adapting {accuracies[0.0]:.1%}."
        )
    typer.echo(f"Saved {output} ({size(output)}). Next: hyperflow predict --task {output} IMAGE ...")


@app.command()
def predict(
    images: Annotated[list[str], typer.Argument(metavar="IMAGES...", help="Image files.")],
    task: Annotated[str, typer.Option(help="Adapted task: folder or Hub id.")],
    backbone: Annotated[
        str | None, typer.Option(help="Its backbone: folder or Hub id; by default the one that the task names.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV with a header.")] = False,
    top_k: Annotated[int, typer.Option(min=1, help="How many of the best classes to print for an image.")] = 1,
    skip_bad: SkipBad = False,
) -> None:
    """Classify images with an adapted task."""
    _set_up()
    if as_json and as_csv:
        raise typer.BadParameter("choose one of --json and --csv.")
    adapted = _load_task(task, backbone)
    results = list(_classify(adapted, images, top_k, skip_bad))
    if as_json:
        records = [{"image": image, "predictions": predictions} for image, predictions in results]
        typer.echo(json.dumps(records, indent=1))
    elif as_csv:
        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerow(["image", "rank", "label", "score"])
        for image, predictions in results:
            writer.writerows([image, i, p["label"], f"{p['score']:.6f}"] for i, p in enumerate(predictions, start=1))
    else:
        for image, predictions in results:
            typer.echo(f"{image}: " + ", ".join(f"{p['label']} {p['score']:.1%}" for p in predictions))


@app.command()
def info(name: Annotated[str, typer.Argument(metavar="DIR_OR_HUB_ID", help="An adapter or an adapted task.")]) -> None:
    """Say what an adapter or an adapted task is, after checking that its files are whole."""
    _set_up()
    from .info import describe

    properties = describe(name)
    width = max(map(len, properties))
    for key, value in properties.items():
        typer.echo(f"{key:<{width}}  {value}")


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of an adapter or an adapted task.")],
    repo_id: Annotated[str, typer.Argument(metavar="REPO_ID", help="'owner/name', or 'name' for one of your own.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to push to; made if need be. Default: main.")] = None,
) -> None:
    """Push an adapter or an adapted task to the Hugging Face Hub, as one commit.

    Log in with `hf auth login` first, or set HF_TOKEN.
    """
    _set_up()
    from .info import describe
    from .modeling.hub import push_folder
    from .modeling.saving import CheckpointError

    if not folder.is_dir():
        raise CheckpointError(f"there is no folder {folder} to push.")
    what = describe(folder)["what"]
    commit = push_folder(folder, repo_id, private=private or None, revision=revision)
    typer.echo(f"Pushed the {what} in {folder}: {commit.commit_url}")


@app.command()
def quickstart(
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON and nothing else.")] = False,
    output: Annotated[Path | None, typer.Option(help="Folder for the picture and the task.")] = None,
) -> None:
    """Adapt the released backbone to ten handwritten digits and compare with fine-tuning, in about a minute."""
    _set_up()
    from .demo.quickstart import run

    run(json_output=as_json, output=output)


@app.command(add_help_option=False, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def benchmark(context: typer.Context) -> None:
    """Compare direct transfer, HyperFlow and fine-tuning on the same few-shot episodes, with what they cost."""
    _set_up()
    from .benchmark.runner import main

    main(context.args)  # lists such as `--n_shot 1 5 20` are beyond typer: the arguments are those of the script


@app.command()
def demo(
    adapter: Annotated[
        str | None, typer.Option(help="HyperFlow adapter: folder or Hub id; by default the released one.")
    ] = None,
    backbone: Annotated[
        str | None, typer.Option(help="Its backbone: folder or Hub id; by default the released one.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for every network interface.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 7860,
) -> None:
    """Serve a page on which to adapt to classes of your own and to compare before and after."""
    _set_up()
    try:
        from .demo.app import main as serve
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        raise OSError("the demo needs Gradio, which is not installed: pip install hf-hyperflow[demo]") from error
    serve(adapter, backbone, host, port)


def _say(text: str) -> None:
    typer.echo(text, err=True)


def _set_up() -> None:
    """No progress bars where nobody watches."""
    from huggingface_hub.utils import disable_progress_bars
    from transformers.utils import logging

    if not sys.stderr.isatty():
        disable_progress_bars()
        logging.disable_progress_bar()


def _load_backbone(name: str) -> PreTrainedModel:
    """A backbone from a folder or the Hub, in evaluation mode."""
    from transformers import AutoModel

    from .modeling.adapter import HyperFlowAdapter
    from .modeling.saving import CheckpointError

    try:
        model = AutoModel.from_pretrained(name)
    except Exception as error:  # what transformers raises for a bad folder is of many kinds
        raise CheckpointError(f"cannot load the backbone {name}: {str(error) or type(error).__name__}") from error
    if isinstance(model, HyperFlowAdapter):
        raise CheckpointError(f"{name} is a HyperFlow adapter, not a backbone: give the model it was trained for.")
    return model.eval()


def _load_task(name: str, backbone: str | None) -> AdaptedTask:
    """A saved task on its backbone, by default the one that its PEFT config names."""
    from .modeling.hub import fetch
    from .modeling.saving import CheckpointError
    from .modeling.task import AdaptedTask

    if backbone is None:
        config = fetch(name, "*.json") / "adapter_config.json"
        if not config.is_file():
            raise CheckpointError(f"{name} is not an adapted task: it has no adapter_config.json.")
        backbone = json.loads(config.read_text()).get("base_model_name_or_path")
        if not backbone:
            raise CheckpointError(f"{name} does not name its backbone: give it with --backbone.")
    return AdaptedTask.from_pretrained(name, _load_backbone(backbone))


def _classify(
    task: AdaptedTask, images: list[str], top_k: int, skip_bad: bool
) -> Iterator[tuple[str, list[dict[str, str | float]]]]:
    """Name and best classes of each image that can be read."""
    from tqdm import tqdm

    from .modeling.images import ImageError, decode

    n_read = 0
    with tqdm(total=len(images), unit="image", disable=None, leave=False) as progress:
        for start in range(0, len(images), BATCH_SIZE):
            names, decoded = [], []
            for name in images[start : start + BATCH_SIZE]:
                try:
                    decoded.append(decode(name, name))
                    names.append(name)
                except ImageError as error:
                    if not skip_bad:
                        raise
                    _say(f"skipped: {error}")
                progress.update()
            n_read += len(names)
            yield from zip(names, task(decoded, top_k=top_k), strict=True)
    if not n_read:
        raise ImageError("none of the images can be read.")
