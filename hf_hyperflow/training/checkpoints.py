"""Checkpoints that are whole or not there, so that a run killed at any moment goes on from the last whole one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from transformers import PreTrainedModel

from ..modeling.checksums import CHECKSUMS, read_checksums, sha256
from ..modeling.saving import CheckpointError, atomic_folder, draft_of, exclusive, mark_removed, recover

PROGRESS = "progress.json"


@contextmanager
def exclusive_run(accelerator: Accelerator, output: Path) -> Iterator[None]:
    """Within, no other run on this machine writes to `output`. The main process holds the lock for all.

    Raises:
        CheckpointError: another run is writing there.
    """
    if accelerator.is_main_process:
        with exclusive(output):
            yield
    else:
        yield


def save_checkpoint(
    accelerator: Accelerator,
    output: Path,
    step: int,
    progress: dict[str, Any],
    total_limit: int | None = None,
) -> None:
    """Write `output/checkpoint-<step>` with the accelerator's state and `progress`, which JSON must be able to hold.

    The folder appears under its name once everything is in it and on the disk; it takes the place of one of the same
    name. In the same move all but the last `total_limit` checkpoints are removed (None removes none), and so are those
    of later steps, which a run left that was resumed from before them. After a kill or a power cut at any moment,
    either all of this has happened or nothing, once `load_checkpoint` or the next run has looked at the folder.

    Raises:
        CheckpointError: it cannot be written (a full disk, say); the earlier checkpoints are untouched.
    """
    final = output / f"checkpoint-{step}"
    try:
        with _shared_draft(accelerator, output) as draft:
            accelerator.save_state(str(draft / final.name))
            accelerator.wait_for_everyone()
            if accelerator.is_main_process:
                _complete(draft / final.name, step, progress)
                _mark_old_checkpoints(draft, output, step, total_limit)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch's writer raises RuntimeError on a full disk
        reason = error.__cause__ if isinstance(error, CheckpointError) and error.__cause__ else error
        raise CheckpointError(
            f"cannot write {final}: {reason}. If the disk is full, make room or choose another --output_dir; what was "
            "saved before is untouched: go on from it with --resume_from_checkpoint latest."
        ) from error
    accelerator.wait_for_everyone()


@contextmanager
def _shared_draft(accelerator: Accelerator, output: Path) -> Iterator[Path]:
    """Yield the draft of `atomic_folder` in every process. The main process makes it, and puts it in place."""
    if accelerator.is_main_process:
        with atomic_folder(output) as draft:
            accelerator.wait_for_everyone()
            yield draft
    else:
        accelerator.wait_for_everyone()
        yield draft_of(output)


def _complete(draft: Path, step: int, progress: dict[str, Any]) -> None:
    """Add progress and checksums to a checkpoint."""
    content = dict(progress)
    content["step"] = step
    (draft / PROGRESS).write_text(json.dumps(content))
    digests = {path.name: sha256(path) for path in sorted(draft.iterdir())}
    (draft / CHECKSUMS).write_text(json.dumps(digests, indent=1))


def _mark_old_checkpoints(draft: Path, output: Path, step: int, total_limit: int | None) -> None:
    """Note in the draft of checkpoint number `step` which checkpoints go when it comes."""
    steps = [get_step(folder) for folder in list_checkpoints(output)]
    kept = [number for number in steps if number < step]
    if total_limit is not None:
        kept = kept[max(0, len(kept) + 1 - total_limit) :]
    for number in steps:
        if number != step and number not in kept:
            mark_removed(draft, f"checkpoint-{number}")


def load_checkpoint(accelerator: Accelerator, output: Path, resume: str | None) -> dict[str, Any] | None:
    """Restore a checkpoint and return its progress; None where training starts from the beginning.

    One that a killed run had written, but not put in its place, is put there first.

    Args:
        resume: a checkpoint's folder, or its name in `output`. "latest" takes the last whole one in `output`, names
            the damaged ones that it passes over, and starts from the beginning where there is none at all. None
            starts from the beginning and wants an `output` without checkpoints.

    Raises:
        CheckpointError: the checkpoint that was asked for is missing, damaged or of another run; none is whole; or
            there are some, and `resume` is None.
    """
    if accelerator.is_main_process:
        recover(output)
    accelerator.wait_for_everyone()
    if resume is None:
        _require_no_checkpoints(output)
        return None
    if resume == "latest":
        return _load_latest(accelerator, output)
    folder = Path(resume)
    if not folder.is_dir():
        folder = output / resume
    if not folder.is_dir():
        names = ", ".join(path.name for path in list_checkpoints(output)) or "none"
        raise CheckpointError(f"there is no checkpoint {resume}; in {output} there are: {names}.")
    damage = find_damage(folder)
    if damage is not None:
        raise CheckpointError(f"{damage} Resume from another one, or from the last whole one with 'latest'.")
    return _restore(accelerator, folder)


def _require_no_checkpoints(output: Path) -> None:
    folders = list_checkpoints(output)
    if folders:
        raise CheckpointError(
            f"{output} holds checkpoints of an earlier run, the last of them {folders[-1].name}. Go on from there "
            "with --resume_from_checkpoint latest, remove them, or choose another --output_dir."
        )


def _load_latest(accelerator: Accelerator, output: Path) -> dict[str, Any] | None:
    folders = list_checkpoints(output)
    for folder in reversed(folders):
        damage = find_damage(folder)
        if damage is None:
            return _restore(accelerator, folder)
        accelerator.print(f"{damage} Passing it over.")
    if folders:
        names = ", ".join(folder.name for folder in folders)
        raise CheckpointError(f"no checkpoint in {output} is whole. Remove {names}.")
    accelerator.print(f"no checkpoint in {output} yet: starting from the beginning")
    return None


def list_checkpoints(output: Path) -> list[Path]:
    """The checkpoint folders of a run, the earliest first."""
    folders = [path for path in output.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    return sorted(folders, key=get_step)


def get_step(folder: Path) -> int:
    """The number of optimiser steps that were done when a checkpoint was written."""
    return int(folder.name.removeprefix("checkpoint-"))


def find_damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, in words; None if every file has the digest noted when it was written."""
    try:
        digests = read_checksums(folder / CHECKSUMS)
        changed = [name for name, digest in digests.items() if sha256(folder / name) != digest]
        if PROGRESS not in digests:
            raise ValueError(f"its {CHECKSUMS} does not name {PROGRESS}")
    except (OSError, ValueError) as error:
        return f"checkpoint {folder} is damaged or incomplete ({error})."
    if changed:
        return f"checkpoint {folder} is damaged: {', '.join(changed)} changed since it was written."
    return None


def _restore(accelerator: Accelerator, folder: Path) -> dict[str, Any]:
    try:
        accelerator.load_state(str(folder))
    except (KeyError, RuntimeError, ValueError) as error:  # torch's loader raises RuntimeError for other shapes
        raise CheckpointError(
            f"{folder} does not fit this run: {error}. Give the arguments that it was started with, or choose another "
            "--output_dir."
        ) from error
    accelerator.print(f"going on from {folder}")
    return json.loads((folder / PROGRESS).read_text())


def save_adapter(adapter: PreTrainedModel, folder: str | Path) -> None:
    """Save an adapter with its matrices in half precision. They are rounded once, here.

    Its config says float32, because CPUs are slow in half precision: so it is loaded.
    """
    rounded = {}
    for name, tensor in adapter.state_dict().items():
        is_matrix = tensor.is_floating_point() and tensor.ndim > 1
        rounded[name] = tensor.half() if is_matrix else tensor
    adapter.config.dtype = torch.float32
    adapter.save_pretrained(folder, state_dict=rounded)
