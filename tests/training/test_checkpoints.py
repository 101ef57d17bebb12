"""Checkpoints of a small real model: kept, rotated, damaged, refused."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator

from hf_hyperflow.modeling.saving import CheckpointError
from hf_hyperflow.training.checkpoints import load_checkpoint, save_checkpoint


class Run:
    """A model of one number; `value` is what a checkpoint restores."""

    def __init__(self):
        self.accelerator = Accelerator(cpu=True)
        model = torch.nn.Linear(1, 1, bias=False)
        self.model = self.accelerator.prepare(model)

    @property
    def value(self) -> float:
        return self.model.weight.item()

    @value.setter
    def value(self, number: float) -> None:
        with torch.no_grad():
            self.model.weight.fill_(number)


@pytest.fixture
def saved(tmp_path):
    """Checkpoints 1, 2 and 3 with as many in the model, and a run that is at none of them."""
    run = Run()
    for step in (1, 2, 3):
        run.value = float(step)
        save_checkpoint(run.accelerator, tmp_path, step, {"note": f"at {step}"})
    run.value = 0.0
    return run


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_latest_is_the_last(saved, tmp_path):
    progress = load_checkpoint(saved.accelerator, tmp_path, "latest")
    assert saved.value == 3.0
    assert (progress["step"], progress["note"]) == (3, "at 3")


@pytest.mark.parametrize("by_name", [True, False])
def test_a_checkpoint_by_its_name_or_folder(saved, by_name, tmp_path):
    resume = "checkpoint-1" if by_name else str(tmp_path / "checkpoint-1")
    assert load_checkpoint(saved.accelerator, tmp_path, resume)["step"] == 1
    assert saved.value == 1.0


def test_limit_keeps_the_last_and_drops_those_of_a_later_time(saved, tmp_path):
    save_checkpoint(saved.accelerator, tmp_path, 4, {}, 2)
    assert names(tmp_path) == ["checkpoint-3", "checkpoint-4"]
    save_checkpoint(saved.accelerator, tmp_path, 3, {}, 2)  # of a run resumed from before
    assert names(tmp_path) == ["checkpoint-3"]


def test_ten_comes_after_nine(saved, tmp_path):
    for step in (9, 10):
        saved.value = float(step)
        save_checkpoint(saved.accelerator, tmp_path, step, {}, 1)
    assert names(tmp_path) == ["checkpoint-10"]


def damage(folder, how: str) -> str:
    """Damage a checkpoint and return what the complaint must hold."""
    if how == "truncated weights":
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-1])
    elif how == "another number":
        path = folder / "progress.json"
        path.write_text(path.read_text().replace("3", "7"))
    elif how == "missing file":
        path = folder / "model.safetensors"
        path.unlink()
    else:
        path = folder / "checksums.json"
        path.write_text(path.read_text()[:-9])
        return "damaged or incomplete"
    return path.name


@pytest.mark.parametrize("how", ["truncated weights", "another number", "missing file", "cut checksums"])
def test_damage_is_named_and_the_one_before_taken(saved, how, tmp_path, capsys):
    said = damage(tmp_path / "checkpoint-3", how)
    assert load_checkpoint(saved.accelerator, tmp_path, "latest")["step"] == 2
    assert saved.value == 2.0
    printed = capsys.readouterr().out
    assert "checkpoint-3" in printed
    assert said in printed
    with pytest.raises(CheckpointError, match=r"checkpoint-3.*Resume from another one"):
        load_checkpoint(saved.accelerator, tmp_path, "checkpoint-3")


def test_nothing_whole_is_an_error(saved, tmp_path):
    for step in (1, 2, 3):
        damage(tmp_path / f"checkpoint-{step}", "missing file")
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* is whole"):
        load_checkpoint(saved.accelerator, tmp_path, "latest")
    assert saved.value == 0.0


def test_unknown_checkpoint_lists_what_there_is(saved, tmp_path):
    with pytest.raises(CheckpointError, match=r"no checkpoint checkpoint-7.*checkpoint-1, checkpoint-2, checkpoint-3"):
        load_checkpoint(saved.accelerator, tmp_path, "checkpoint-7")


def test_an_earlier_run_is_not_overwritten_unasked(saved, tmp_path):
    with pytest.raises(CheckpointError, match=r"checkpoint-3.*--resume_from_checkpoint latest"):
        load_checkpoint(saved.accelerator, tmp_path, None)
    assert load_checkpoint(saved.accelerator, tmp_path / "empty", None) is None
    assert load_checkpoint(saved.accelerator, tmp_path / "empty", "latest") is None
