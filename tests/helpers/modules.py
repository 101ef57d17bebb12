"""Modules run as they are typed, in a Python of their own: `python -m training.card.build ...`."""

from __future__ import annotations

import subprocess
import sys

from tests.helpers.benchmark_runs import ENVIRONMENT, ROOT


def module_command(module: str, *arguments: object) -> list[str]:
    return [sys.executable, "-m", module, *(str(argument) for argument in arguments)]


def run_module(module: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run `python -m module ...` to its end, from the root of the repository."""
    command = module_command(module, *arguments)
    return subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False)
