"""The command line: `hyperflow adapt`, `predict`, `info`, `push`, ...

A command imports what it needs when it runs, so that `--help` and mistyped options are answered at once.
"""

from __future__ import annotations

import csv
import json
import sys
import time
import traceback
import unicodedata
import warnings
from dataclasses import asdict, dataclass
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .extras import require_extra
from .modeling.tokens import hide_tokens

if TYPE_CHECKING:
    import PIL.Image
    from transformers import PreTrainedModel

    from .modeling.support import SupportSet
    from .modeling.task import AdaptedTask

#: Images that are decoded and classified at once.
BATCH_SIZE = 64

#: Marks that turn the direction of the text that follows, so that it reads as another.
DIRECTION_MARKS = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"

#: What a cell of a table starts with that spreadsheets take for a formula.
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")


def _use_underscores(token: str) -> str:
    """Options are spelled as in Python and in the training scripts, `--n_steps`; `--n-steps` is the same option."""
    return token.replace("-", "_")


app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"max_content_width": 120, "token_normalize_func": _use_underscores},
)

Backbone = Annotated[str, typer.Option(help="Vision transformer that the adapter was trained for: folder or Hub id.")]
SkipBad = Annotated[bool, typer.Option("--skip_bad", help="Leave out images that cannot be read, naming them.")]


@dataclass(frozen=True)
class Result:
    """What `predict` prints of an image: its best classes, `{"label", "score"}` each, best first."""

    image: str
    predictions: list[dict]


@app.callback()
def options(debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False) -> None:
    """Adapt vision transformers to your classes from a handful of images, without gradients.

    The exit code is 1 after an error, 2 after wrong usage and 130 after Ctrl-C.
    """


def main() -> None:
    """Run the command line: an error is one line on stderr and exit code 1, with `--debug` a traceback."""
    warnings.simplefilter("ignore", FutureWarning)  # of one library to another: nothing a user can do
    warnings.showwarning = lambda message, *_: _say(f"warning: {' '.join(str(message).split())}")
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape")  # names of files are printed as they are, UTF-8 or not
    try:
        app(prog_name="hyperflow")
    except Exception as error:
        if "--debug" in sys.argv[1:]:
            for line in traceback.format_exc().splitlines():
                _say(line)
        else:
            _say(f"error: {_explain(error)}")
        sys.exit(1)


@app.command()
def adapt(
    adapter: Annotated[str, typer.Option(help="HyperFlow adapter: folder or Hub id.")],
    backbone: Backbone,
    support: Annotated[Path, typer.Option(help="Folder with one folder of images per class.")],
    output: Annotated[Path, typer.Option("--output_dir", "--output", help="Folder for the adapted task.")],
    n_steps: Annotated[
        int | None, typer.Option("--n_steps", min=1, help="Solver steps; by default the adapter's.")
    ] = None,
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
    skip_bad: SkipBad = False,
) -> None:
    """Adapt a backbone to a folder of images and save the task, a plain PEFT adapter.

    Example: hyperflow adapt --adapter ADAPTER --backbone BACKBONE --support pets/ --output_dir my-task,
    where pets/cat/ and pets/dog/ hold a few pictures each.
    """
    _hide_progress_bars()
    from .modeling.adapter import HyperFlowAdapter
    from .modeling.saving import CheckpointError, exclusive
    from .modeling.support import read_support

    if format not in (None, "lora"):
        raise typer.BadParameter(f"{format!r} is unknown: use 'lora', or leave it out.", param_hint="--format")
    if (output / "config.json").exists():
        raise CheckpointError(f"{output} holds a model (config.json): choose another folder for the task.")
    with exclusive(output):
        flow = HyperFlowAdapter.from_pretrained(adapter).eval()
        images = read_support(support, flow.processor, skip_bad=skip_bad)
        for reason in images.skipped:
            _say(f"skipped: {reason}")
        model = _load_backbone(backbone)
        start = time.perf_counter()
        task = flow.adapt(model, images, n_steps=n_steps, solver=solver, early_stopping=early_stopping)
        _ = task.prototypes  # computed on first use, which belongs to the time
        seconds = time.perf_counter() - start
        task.save_pretrained(output, format=format)
    _print_adapted(task, images, seconds, output)


@app.command()
def predict(
    images: Annotated[list[str], typer.Argument(metavar="IMAGES...", help="Image files.")],
    task: Annotated[str, typer.Option(help="Adapted task: folder or Hub id.")],
    backbone: Annotated[
        str | None, typer.Option(help="Its backbone: folder or Hub id; by default the one that the task names.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    as_csv: Annotated[
        bool,
        typer.Option(
            "--csv",
            help="Print CSV with a header. A name that spreadsheets would take for a formula (it starts with = + - @, "
            "tab or return) gets an apostrophe in front. --json has all names as they are.",
        ),
    ] = False,
    top_k: Annotated[int, typer.Option("--top_k", min=1, help="How many of the best classes to print per image.")] = 1,
    skip_bad: SkipBad = False,
) -> None:
    """Classify images with an adapted task."""
    _hide_progress_bars()
    if as_json and as_csv:
        raise typer.BadParameter("choose one of --json and --csv.")
    adapted = _load_task(task, backbone)
    # All images are classified before anything is printed: after an error, stdout is empty.
    results = _classify(adapted, images, top_k, skip_bad)
    if as_json:
        _print_json(results)
    elif as_csv:
        _print_csv(results)
    else:
        _print_lines(results)


@app.command()
def info(name: Annotated[str, typer.Argument(metavar="DIR_OR_HUB_ID", help="An adapter or an adapted task.")]) -> None:
    """Say what an adapter or an adapted task is, after checking that its files are whole."""
    _hide_progress_bars()
    from .info import describe

    rows = asdict(describe(name))
    width = max(len(key) for key in rows)
    for key, value in rows.items():
        label = key.replace("_", " ")
        _print(f"{label:<{width}}  {value}")


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of an adapter or an adapted task.")],
    repo_id: Annotated[str, typer.Argument(metavar="REPO_ID", help="'owner/name', or 'name' for one of your own.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    revision: Annotated[
        str | None, typer.Option(help="Branch to push to, made if it is not there; by default main.")
    ] = None,
) -> None:
    """Push an adapter or an adapted task to the Hugging Face Hub, as one commit.

    Log in with `hf auth login` first, or set HF_TOKEN.
    """
    _hide_progress_bars()
    from .info import describe
    from .modeling.hub import push_folder
    from .modeling.saving import CheckpointError

    if not folder.is_dir():
        raise CheckpointError(f"there is no folder {folder} to push.")
    kind = describe(folder).kind
    commit = push_folder(folder, repo_id, private=private or None, revision=revision)
    _print(hide_tokens(f"Pushed the {kind} in {folder}: {commit.commit_url}"))


@app.command()
def quickstart(
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON and nothing else.")] = False,
    output: Annotated[
        Path, typer.Option("--output_dir", "--output", help="Folder for the picture and the task.")
    ] = Path("outputs/quickstart"),
) -> None:
    """Adapt the released backbone to ten handwritten digits and compare with fine-tuning, in about a minute."""
    _hide_progress_bars()
    with require_extra("benchmark", "the quickstart"):
        from .demo.quickstart import run
    run(output, as_json=as_json)


@app.command(add_help_option=False, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def benchmark(context: typer.Context) -> None:
    """Compare direct transfer, HyperFlow and fine-tuning on the same few-shot episodes, with what they cost."""
    _hide_progress_bars()
    with require_extra("benchmark", "the benchmark"):
        from .benchmark.runner import main
    main(context.args)  # lists such as `--n_shot 1 5 20` are beyond typer, so the benchmark parses its own options


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
    _hide_progress_bars()
    with require_extra("demo", "the demo"):
        from .demo.app import main as serve
    serve(adapter, backbone, host, port)


def _print(text: str) -> None:
    typer.echo(_make_printable(text))


def _say(text: str) -> None:
    typer.echo(_make_printable(hide_tokens(text)), err=True)


def _make_printable(text: str) -> str:
    """The text in one line that terminals print and do not obey. Bytes of file names that are no UTF-8 are left."""
    is_of_bytes = _survives_bytes(text)
    characters = []
    for character in text:
        kind = unicodedata.category(character)
        is_hidden = kind in ("Cc", "Zl", "Zp") or character in DIRECTION_MARKS
        if is_hidden or (kind == "Cs" and not is_of_bytes):
            character = character.encode("unicode_escape").decode()
        characters.append(character)
    return "".join(characters)


def _survives_bytes(text: str) -> bool:
    """Whether surrogates in the text stand for bytes that are no UTF-8, as in the name of a file."""
    try:
        return text.encode("utf-8", "surrogateescape").decode("utf-8", "surrogateescape") == text
    except UnicodeEncodeError:
        return False


def _explain(error: Exception) -> str:
    """An error in one line. An unexpected error comes with its type and the way to its traceback."""
    text = " ".join(str(error).split())
    is_expected = isinstance(error, OSError | ValueError | ImportError) and not isinstance(error, ModuleNotFoundError)
    if text and is_expected:
        return text
    return f"{type(error).__name__}: {text} (hyperflow --debug shows where)"


def _hide_progress_bars() -> None:
    """No progress bars of the libraries where nobody watches."""
    from huggingface_hub.utils import disable_progress_bars
    from transformers.utils import logging

    if not sys.stderr.isatty():
        disable_progress_bars()
        logging.disable_progress_bar()


def _load_backbone(name: str) -> PreTrainedModel:
    """A backbone from a folder or the Hub, in evaluation mode."""
    from transformers import AutoModel

    from .modeling.adapter import HyperFlowAdapter
    from .modeling.hub import within_deadline
    from .modeling.saving import CheckpointError

    try:
        model = within_deadline(lambda: AutoModel.from_pretrained(name))
    except Exception as error:  # what transformers raises for a bad folder is of many kinds
        raise CheckpointError(
            f"cannot load the backbone {name}: {str(error) or type(error).__name__}. "
            "If the model lies elsewhere, name it with --backbone."
        ) from error
    if isinstance(model, HyperFlowAdapter):
        raise CheckpointError(f"{name} is a HyperFlow adapter, not a backbone: give the model it was trained for.")
    return model.eval()


def _load_task(name: str, backbone: str | None) -> AdaptedTask:
    """A saved task on its backbone, by default the one that its PEFT config names."""
    from .modeling.task import AdaptedTask

    return AdaptedTask.from_pretrained(name, _load_backbone(backbone or _read_backbone_name(name)))


def _read_backbone_name(task: str) -> str:
    from .modeling.checksums import CHECKSUMS
    from .modeling.hub import fetch
    from .modeling.saving import CheckpointError, reading
    from .modeling.task_files import read_task

    with reading(fetch(task, "*.json")) as folder:
        if not (folder / CHECKSUMS).is_file():
            raise CheckpointError(f"{task} is not an adapted task: it has no {CHECKSUMS}.")
    name = read_task(task).peft_config.base_model_name_or_path
    if not name:
        raise CheckpointError(
            f"{task} does not name its backbone, the model that it was made with: give it with --backbone."
        )
    return name


def _classify(task: AdaptedTask, images: list[str], top_k: int, skip_bad: bool) -> list[Result]:
    """The best classes of each image that can be read."""
    from tqdm import tqdm

    from .modeling.images import ImageError

    results = []
    with tqdm(total=len(images), unit="image", disable=None, leave=False) as progress:
        for start in range(0, len(images), BATCH_SIZE):
            batch = images[start : start + BATCH_SIZE]
            decoded = _decode_images(batch, skip_bad)
            predictions = task(list(decoded.values()), top_k=top_k)
            for number, best in zip(decoded, predictions, strict=True):
                results.append(Result(batch[number], best))
            progress.update(len(batch))
    if not results:
        raise ImageError("none of the images can be read.")
    return results


def _decode_images(names: list[str], skip_bad: bool) -> dict[int, PIL.Image.Image]:
    """The images that can be read, by their position in `names`: one file may be named twice."""
    from .modeling.images import ImageError, decode

    decoded = {}
    for number, name in enumerate(names):
        try:
            decoded[number] = decode(name, name)
        except ImageError as error:
            if not skip_bad:
                raise
            _say(f"skipped: {error}")
    return decoded


def _print_adapted(task: AdaptedTask, images: SupportSet, seconds: float, folder: Path) -> None:
    from .info import format_size

    classes = f"{images.n_way} classes ({', '.join(images.class_names)})"
    _print(f"Adapted to {classes} from {len(images.labels)} images in {seconds:.2f} s.")
    stopping_point = task.stopping_point
    if stopping_point is not None and stopping_point.accuracies:
        accuracies = stopping_point.accuracies
        _print(
            f"The flow was followed to t = {stopping_point.time:.2f}: leave-one-out accuracy "
            f"{accuracies[stopping_point.time]:.1%}, without adapting {accuracies[0.0]:.1%}."
        )
    _print(f"Saved {folder} ({format_size(folder)}). Next: hyperflow predict --task {folder} IMAGE ...")


def _print_json(results: list[Result]) -> None:
    typer.echo(json.dumps([asdict(result) for result in results], indent=1))


def _print_csv(results: list[Result]) -> None:
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(["image", "rank", "label", "score"])
    for result in results:
        for rank, prediction in enumerate(result.predictions, start=1):
            image, label = _to_cell(result.image), _to_cell(prediction["label"])
            writer.writerow([image, rank, label, f"{prediction['score']:.6f}"])


def _to_cell(name: str) -> str:
    """A name as a cell of a table that no spreadsheet takes for a formula."""
    apostrophe = "'" if name.startswith(FORMULA_STARTS) else ""
    return apostrophe + _make_printable(name)


def _print_lines(results: list[Result]) -> None:
    for result in results:
        classes = ", ".join(f"{p['label']} {p['score']:.1%}" for p in result.predictions)
        _print(f"{result.image}: {classes}")
