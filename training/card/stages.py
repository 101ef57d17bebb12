"""Scripts of this folder run one after another, each shown as it could be typed."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
#: One progress bar per Parquet file would hide what is said.
QUIET = {"HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}


def run(short: dict[str, str], title: str, script: str, *options: object) -> None:
    """Announce a stage, show its command, run it, and say how long it took.

    Args:
        short: parts of commands -> how a shell would let one write them.

    Raises:
        SystemExit: it failed or was interrupted.
    """
    command = [sys.executable, str(HERE / script), *map(str, options)]
    shown = shlex.join(["python", f"training/{script}", *command[2:]])
    for part, pattern in short.items():
        shown = shown.replace(part, pattern)
    print(f"\n=== {title}\n$ {shown}", flush=True)
    started = time.monotonic()
    try:
        status = subprocess.run(command, check=False, env=os.environ | QUIET).returncode
    except KeyboardInterrupt:
        status = 130
    if status != 0:
        raise SystemExit(f"error: {script} ended with status {status}. The same command goes on where it was.")
    print(f"--- {time.monotonic() - started:.0f} s", flush=True)
