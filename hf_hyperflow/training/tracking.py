"""What a run says: its curves in TensorBoard, Trackio or Weights & Biases (through Accelerate), its data in a line."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from accelerate import Accelerator
from accelerate.tracking import get_available_trackers

from ..data.domains import Domain

Tracker = Literal["none", "tensorboard", "trackio", "wandb"]
PROJECT = "hf_hyperflow"


def require_tracker(report_to: Tracker) -> None:
    """Check that the package of a tracker is installed. Accelerate would leave the tracker out without a word.

    Raises:
        ImportError: it is not; the message has the command that installs it.
    """
    if report_to == "none" or report_to in map(str, get_available_trackers()):
        return
    package = '"hf-hyperflow[train]"' if report_to == "tensorboard" else report_to
    raise ImportError(
        f"--report_to {report_to} needs the package {report_to}: pip install {package}, or --report_to none."
    )


def start_tracker(accelerator: Accelerator, arguments: dict[str, Any]) -> None:
    """Open the accelerator's tracker, if it has one, with the run's arguments as its hyperparameters."""
    plain = {}
    for name, value in arguments.items():
        plain[name] = value if isinstance(value, int | float | str) else str(value)
    accelerator.init_trackers(PROJECT, config=plain)


def list_domains(domains: list[Domain]) -> str:
    """Domains by name, with the numbers of their classes and images: "photos (10/200), drawings (5/95)"."""
    return ", ".join(f"{domain.name} ({len(domain.class_names)}/{len(domain)})" for domain in domains)


def flatten(record: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers of a record of nested dicts, under names like `validation/scans/difference`."""
    numbers: dict[str, float] = {}
    for name, value in record.items():
        if isinstance(value, dict):
            numbers.update(flatten(value, f"{prefix}{name}/"))
        else:
            numbers[f"{prefix}{name}"] = value
    return numbers


def get_logging_folder(output: Path, report_to: Tracker) -> str | None:
    """The folder that TensorBoard writes to; the other trackers have their own places."""
    return str(output / "logs") if report_to == "tensorboard" else None
