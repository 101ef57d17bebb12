"""The command line: `hyperflow adapt`, `predict`, `evaluate`, ...

Every command is a function in a file of its own or beside its kin. It imports what it needs when it runs, so that
`--help` and mistyped options are answered at once.
"""

from __future__ import annotations

import sys
import traceback
import warnings
from io import TextIOWrapper
from typing import Annotated

import typer

from ..modeling.version import __version__
from .adapt import adapt
from .doors import bench, benchmark, demo, quickstart
from .evaluate import evaluate
from .export import export
from .predict import predict
from .printing import print_line, say
from .saved import info, push
from .scale import scale

__all__ = ["app", "main"]


def _use_underscores(token: str) -> str:
    """Options are spelled as in Python and in the training scripts, `--n_steps`; `--n-steps` is the same option."""
    return token.replace("-", "_")


def _print_version(is_wanted: bool) -> None:
    if is_wanted:
        print_line(f"hyperflow {__version__}")
        raise typer.Exit


def hyperflow(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Adapt vision models to your classes from a handful of images, without gradients.

    The exit code is 1 after an error, 2 after wrong usage and 130 after Ctrl-C.
    """


app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"max_content_width": 120, "token_normalize_func": _use_underscores},
)
app.callback()(hyperflow)
for command in (adapt, predict, evaluate, info, push, export, quickstart):
    app.command()(command)
# These two parse their own options: lists such as `--n_shot 1 5 20` are beyond typer.
for own_parser in (benchmark, bench):
    app.command(add_help_option=False, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(
        own_parser
    )
app.command()(demo)
app.command()(scale)


def main() -> None:
    """Run the command line: an error is one line on stderr and exit code 1, with `--debug` a traceback."""
    warnings.simplefilter("ignore", FutureWarning)  # of one library to another: nothing a user can do
    warnings.showwarning = lambda message, *_: say(f"warning: {' '.join(str(message).split())}")
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape")  # names of files are printed as they are, UTF-8 or not
    try:
        app(prog_name="hyperflow")
    except Exception as error:
        if "--debug" in sys.argv[1:]:
            for line in traceback.format_exc().splitlines():
                say(line)
        else:
            say(f"error: {_explain(error)}")
        sys.exit(1)


def _explain(error: Exception) -> str:
    """An error in one line. An unexpected error comes with its type and the way to its traceback."""
    text = " ".join(str(error).split())
    is_expected = isinstance(error, OSError | ValueError | ImportError) and not isinstance(error, ModuleNotFoundError)
    if text and is_expected:
        return text
    return f"{type(error).__name__}: {text} (hyperflow --debug shows where)"
