"""Commands that run one after another, each shown as it could be typed."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping

#: `datasets` would draw one progress bar per Parquet file and push everything else off the screen.
QUIET = {"HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}


def run(title: str, module: str, *options: object, abbreviations: Mapping[str, str] | None = None) -> None:
    """Announce a stage, show its command, run `python -m module ...` and say how long it took.

    Args:
        abbreviations: long parts of a command, and the shorter pattern that a shell would let one type for each.

    Raises:
        SystemExit: the stage failed or was interrupted.
    """
    arguments = [str(option) for option in options]
    command = shlex.join(["python", "-m", module, *arguments])
    for part, pattern in (abbreviations or {}).items():
        command = command.replace(part, pattern)
    print(f"\n=== {title}\n$ {command}", flush=True)
    started = time.monotonic()
    environment = os.environ.copy()
    environment.update(QUIET)
    try:
        status = subprocess.run([sys.executable, "-m", module, *arguments], check=False, env=environment).returncode
    except KeyboardInterrupt:
        status = 130
    if status != 0:
        raise SystemExit(f"error: {module} ended with status {status}. Run the same command again to go on.")
    print(f"--- {time.monotonic() - started:.0f} s", flush=True)
