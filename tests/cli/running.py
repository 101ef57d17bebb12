"""Runs commands of the command line as people do, every one in a process of its own."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

from hf_hyperflow import cli


@dataclass
class Outcome:
    code: int
    out: str
    err: str


class Command:
    """`hyperflow ...` in a process forked from one that has imported the package: that takes seconds."""

    _context = multiprocessing.get_context("forkserver")
    _context.set_forkserver_preload(
        ["hf_hyperflow.cli", "hf_hyperflow.info", "transformers.models.dinov2.modeling_dinov2", "pydantic"]
    )

    def __init__(self, folder: Path, *arguments: str | Path, missing: str | None = None, seconds: float = 60):
        self.seconds = seconds
        self.output = folder / f"output-{len(list(folder.glob('output-*')))}"
        self.output.mkdir()
        arguments = ["hyperflow", *map(str, arguments)]
        self.process = self._context.Process(target=run, args=(self.output, folder, arguments, missing))
        self.process.start()

    def end(self) -> Outcome:
        self.process.join(self.seconds)
        out, err = [(self.output / name).read_bytes().decode(errors="replace") for name in ("out", "err")]
        return Outcome(self.process.exitcode, out, err)


def run(output: Path, cwd: Path, arguments: list[str], missing: str | None) -> None:
    for stream, name in ((sys.stdout, "out"), (sys.stderr, "err")):
        os.dup2(os.open(output / name, os.O_WRONLY | os.O_CREAT), stream.fileno())
    os.chdir(cwd)
    sys.argv = arguments
    signal.signal(signal.SIGINT, signal.default_int_handler)  # tests started in the background inherit that it is off
    if missing is not None:
        forget("hf_hyperflow.benchmark", "hf_hyperflow.demo", missing)
        sys.modules[missing] = None  # what makes an import fail
    cli.main()


def forget(*packages: str) -> None:
    """Another test of this process may have started the server that this process is forked from, with more imported."""
    for name in list(sys.modules):
        if name.startswith(packages):
            del sys.modules[name]


def fails(outcome: Outcome, *words: str | Path) -> None:
    """One line on stderr, after warnings if any, that says `words`; nothing on stdout, exit code 1."""
    assert outcome.code == 1, outcome
    assert outcome.out == ""
    *warnings, error = outcome.err.splitlines()
    assert all(line.startswith("warning: ") for line in warnings), outcome.err
    assert error.startswith("error: ")
    for word in words:
        assert str(word) in error


def names(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir() if not p.name.startswith("output-")}
