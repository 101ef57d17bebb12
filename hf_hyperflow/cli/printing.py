"""What the commands print: text that terminals and spreadsheets show and do not obey, beside the progress bar."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import unicodedata
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import typer
from rich.cells import cell_len
from tqdm import tqdm

from ..modeling.tokens import hide_tokens

#: Marks that turn the direction of the text that follows, so that it reads as another.
DIRECTION_MARKS = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"

#: What a cell of a table starts with that spreadsheets take for a formula.
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")


def write(text: str, *, to_stderr: bool = False) -> None:
    """Write a text as it is, at once. On a terminal, a progress bar makes room for it."""
    stream = sys.stderr if to_stderr else sys.stdout
    with tqdm.external_write_mode() if stream.isatty() else nullcontext():
        typer.echo(text, nl=False, err=to_stderr)


def print_line(text: str) -> None:
    """Print a line on stdout."""
    write(make_printable(text) + "\n")


def say(text: str) -> None:
    """Print a line on stderr, without the access tokens that it may hold."""
    write(make_printable(hide_tokens(text)) + "\n", to_stderr=True)


def make_printable(text: str) -> str:
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


def to_cell(name: str) -> str:
    """A name as a cell of a table that no spreadsheet takes for a formula."""
    apostrophe = "'" if name.startswith(FORMULA_STARTS) else ""
    return apostrophe + make_printable(name)


def quote(path: Path) -> str:
    """A path as it is typed into the shell of this system."""
    if os.name == "nt":
        return subprocess.list2cmdline([str(path)])
    return shlex.quote(str(path))


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Print rows of equally many cells in columns: the first column flush left, all others flush right."""
    rows = [[make_printable(cell) for cell in row] for row in rows]
    widths = [max(cell_len(cell) for cell in column) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = []
        for number, (cell, width) in enumerate(zip(row, widths, strict=True)):
            padding = " " * (width - cell_len(cell))
            cells.append(cell + padding if number == 0 else padding + cell)
        print_line("  ".join(cells).rstrip())


def hide_progress_bars() -> None:
    """No progress bars of the libraries where nobody watches."""
    from huggingface_hub.utils import disable_progress_bars
    from transformers.utils import logging

    if not sys.stderr.isatty():
        disable_progress_bars()
        logging.disable_progress_bar()
