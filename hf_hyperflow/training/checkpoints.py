"""Checkpoints that are whole or not there: a run killed at any moment goes on from the last whole one; and its end."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors import SafetensorError

from hf_hyperflow import HyperFlowAdapter

from ..modeling.saving import CheckpointError, sha256

PROGRESS, CHECKSUMS = "progress.json", "checksums.json"


def save_checkpoint(
    accelerator: Accelerator, output: Path, step: int, progress: dict, total_limit: int | None = None
) -> None:
    """Write `output/checkpoint-<step>` with the accelerator's state and `progress`.

    It appears under its name when everything is in it. Then all but the last `total_limit` are removed (None: none),
    and those of later steps, which a run resumed from an earlier checkpoint has left behind.

    Raises:
        CheckpointError: it cannot be written (a full disk, say); the checkpoints before are untouched.
    """
    draft, final = output / "checkpoint.partial", output / f"checkpoint-{step}"
    if accelerator.is_main_process:
        shutil.rmtree(draft, ignore_errors=True)
    accelerator.wait_for_everyone()
    try:
        accelerator.save_state(str(draft))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            (draft / PROGRESS).write_text(json.dumps(progress | {"step": step}))
            digests = {path.name: sha256(path) for path in sorted(draft.iterdir())}
            (draft / CHECKSUMS).write_text(json.dumps(digests, indent=1))
            shutil.rmtree(final, ignore_errors=True)
            draft.rename(final)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch's writer raises RuntimeError on a full disk
        shutil.rmtree(draft, ignore_errors=True)
        raise CheckpointError(
            f"cannot write {final}: {error}. If the disk is full, make room or choose another --output_dir; what was "
            "saved before is untouched: go on from it with --resume_from_checkpoint latest."
        ) from error
    if accelerator.is_main_process:
        kept = [folder for folder in checkpoints(output) if step_of(folder) <= step]
        kept = kept if total_limit is None else kept[-total_limit:]
        for folder in checkpoints(output):
            if folder not in kept:
                shutil.rmtree(folder)
    accelerator.wait_for_everyone()


def load_checkpoint(accelerator: Accelerator, output: Path, resume: str | None) -> dict | None:
    """Restore a checkpoint and return its progress; None where training starts from the beginning.

    Args:
        resume: the folder of a checkpoint (or its name in `output`), or "latest": the last one of `output` that is
            whole; damaged ones are named and passed over, and without any checkpoint training starts. None starts
            training and wants an `output` without checkpoints.

    Raises:
        CheckpointError: the checkpoint asked for is missing or damaged, or none is whole; or there are some and it
            was not said whether to go on from them.
    """
    found = checkpoints(output)
    if resume is None:
        if found:
            raise CheckpointError(
                f"{output} holds checkpoints of an earlier run, the last of them {found[-1].name}. Go on from there "
                "with --resume_from_checkpoint latest, remove them, or choose another --output_dir."
            )
        return None
    if resume != "latest":
        folder = Path(resume) if Path(resume).is_dir() else output / resume
        if not folder.is_dir():
            names = ", ".join(f.name for f in found) or "none"
            raise CheckpointError(f"there is no checkpoint {resume}; in {output} there are: {names}.")
        problem = damage(folder)
        if problem:
            raise CheckpointError(f"{problem} Resume from another one, or from the last whole one with 'latest'.")
        return _restored(accelerator, folder)
    for folder in reversed(found):
        problem = damage(folder)
        if not problem:
            return _restored(accelerator, folder)
        accelerator.print(f"{problem} Passing it over.")
    if found:
        raise CheckpointError(f"no checkpoint in {output} is whole. Remove {', '.join(f.name for f in found)}.")
    accelerator.print(f"no checkpoint in {output} yet: starting from the beginning")
    return None


def checkpoints(output: Path) -> list[Path]:
    """The checkpoint folders of a run, the earliest first."""
    return sorted((f for f in output.glob("checkpoint-*") if f.name[11:].isdigit()), key=step_of)


def step_of(folder: Path) -> int:
    """The optimiser steps that were done when a checkpoint was written."""
    return int(folder.name.removeprefix("checkpoint-"))


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None: every file has the digest that was noted when it was written."""
    try:
        digests = json.loads((folder / CHECKSUMS).read_text())
        changed = [name for name, digest in digests.items() if sha256(folder / name) != digest]
    except (OSError, ValueError, AttributeError, TypeError) as error:
        return f"checkpoint {folder} is damaged or incomplete ({error})."
    return f"checkpoint {folder} is damaged: {', '.join(changed)} changed since it was written." if changed else None


def _restored(accelerator: Accelerator, folder: Path) -> dict:
    try:
        accelerator.load_state(str(folder))
    except (KeyError, RuntimeError, ValueError) as error:  # torch's loader raises RuntimeError for other shapes
        raise CheckpointError(
            f"{folder} does not fit this run: {error}. Give the arguments that it was started with, or choose another "
            "--output_dir."
        ) from error
    accelerator.print(f"going on from {folder}")
    return json.loads((folder / PROGRESS).read_text())


def save_adapter(adapter: HyperFlowAdapter, folder: str | Path) -> None:
    """Save matrices with half precision on disk (rounded once, here) and single in use: CPUs are slow in half."""
    rounded = {
        name: t.half() if t.is_floating_point() and t.ndim > 1 else t for name, t in adapter.state_dict().items()
    }
    adapter.config.dtype = torch.float32
    adapter.save_pretrained(folder, state_dict=rounded)
