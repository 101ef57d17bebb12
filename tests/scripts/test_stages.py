"""Stages are shown as they could be typed, and a stage that fails ends the whole."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest

from training.card import stages


@pytest.fixture
def commands(monkeypatch):
    """The commands that would be run; those with `--fail` fail, those with `--interrupt` are interrupted."""
    commands: list[list[str]] = []

    def run(command: list[str], **_: object) -> SimpleNamespace:
        commands.append(command)
        if "--interrupt" in command:
            raise KeyboardInterrupt
        return SimpleNamespace(returncode=3 if "--fail" in command else 0)

    monkeypatch.setattr(subprocess, "run", run)
    return commands


def test_a_command_is_shown_as_it_could_be_typed(commands, capsys):
    files = ["a b.parquet", "c.parquet"]
    stages.run("Title", "some.module", "--dataset", *files, "--n", 3, abbreviations={"'a b.parquet' c.parquet": "*"})
    assert commands == [[sys.executable, "-m", "some.module", "--dataset", *files, "--n", "3"]]
    assert "=== Title\n$ python -m some.module --dataset * --n 3\n" in capsys.readouterr().out


@pytest.mark.parametrize(("flag", "status"), [("--fail", 3), ("--interrupt", 130)])
def test_a_stage_that_fails_ends_the_whole(commands, flag, status):
    with pytest.raises(SystemExit, match=rf"error: some\.module ended with status {status}\. Run the same command"):
        stages.run("Title", "some.module", flag)
