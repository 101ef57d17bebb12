"""Where the curves of a run go: TensorBoard, Trackio or Weights & Biases, through Accelerate."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from accelerate import Accelerator
from accelerate.tracking import get_available_trackers

Tracker = Literal["none", "tensorboard", "trackio", "wandb"]
PROJECT = "hf_hyperflow"


def require_tracker(report_to: Tracker) -> None:
    """Check before any work that the package of a tracker is there; Accelerate would leave it out without a word.

    Raises:
        ImportError: it is not; the message says how to install it.
    """
    if report_to != "none" and report_to not in map(str, get_available_trackers()):
        raise ImportError(
            f"--report_to {report_to} needs the package {report_to}: pip install {report_to}, or --report_to none."
        )


def start_tracker(accelerator: Accelerator, arguments: dict) -> None:
    """Open the accelerator's tracker, if it has one, with the run's arguments as its hyperparameters."""
    plain = {key: value if isinstance(value, int | float | str) else str(value) for key, value in arguments.items()}
    accelerator.init_trackers(PROJECT, config=plain)


def flat(record: dict, prefix: str = "") -> dict[str, float]:
    """The numbers of a record of nested dicts, by names like `validation/scans/difference`."""
    found = {}
    for key, value in record.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{key}/")
        else:
            found[f"{prefix}{key}"] = value
    return found


def logging_folder(output: Path, report_to: Tracker) -> str | None:
    """Where TensorBoard writes; the others keep their own places."""
    return str(output / "logs") if report_to == "tensorboard" else None
