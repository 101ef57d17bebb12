"""Checkpoints that are whole or not there: a run killed at any moment goes on from the last whole one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from accelerate import Accelerator


def save_checkpoint(accelerator: Accelerator, output: Path, step: int, progress: dict) -> None:
    """Write `output/checkpoint-<step>` with the accelerator's state and `progress`, then remove older ones."""
    draft, final = output / "checkpoint.partial", output / f"checkpoint-{step}"
    if accelerator.is_main_process:
        shutil.rmtree(draft, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(draft))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        (draft / "progress.json").write_text(json.dumps(progress | {"step": step}))
        shutil.rmtree(final, ignore_errors=True)
        draft.rename(final)
        for old in output.glob("checkpoint-*"):
            if old != final:
                shutil.rmtree(old)
    accelerator.wait_for_everyone()


def load_checkpoint(accelerator: Accelerator, output: Path) -> dict | None:
    """Restore the last whole checkpoint of `output` and return its progress; None if there is none."""
    found = sorted(output.glob("checkpoint-*"), key=lambda folder: int(folder.name.split("-")[1]))
    if not found:
        return None
    accelerator.load_state(str(found[-1]))
    return json.loads((found[-1] / "progress.json").read_text())
