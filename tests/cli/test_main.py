"""The command line as a whole: as it is installed, its help, its options and its errors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from peft import PeftModel
from transformers import AutoModel

from hf_hyperflow import __version__
from tests.cli.running import Command, names


@pytest.mark.slow
def test_the_installed_command(saved, tmp_path):
    """From pictures to predictions, as typed into a shell."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    hyperflow = [Path(sys.executable).with_name("hyperflow")]
    module = [sys.executable, "-m", "hf_hyperflow"]

    def shell(command: list[str | Path], *arguments: str | Path) -> str:
        done = subprocess.run([*command, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stderr == "", "no progress bars where nobody watches"
        return done.stdout

    said = shell(
        hyperflow,
        *("adapt", "--adapter", saved / "adapter", "--backbone", saved / "backbone"),
        *("--support", saved / "pictures", "--output_dir", "my task", "--early_stopping"),
    )
    assert "Adapted to 3 classes (blue, green, red) from 9 images in " in said
    assert "leave-one-out accuracy" in said
    assert "Saved my task" in said
    assert "Next: hyperflow predict --task 'my task' IMAGE ..." in said
    model = PeftModel.from_pretrained(AutoModel.from_pretrained(saved / "backbone"), tmp_path / "my task")
    assert model.peft_config["default"].peft_type == "BEFT"
    images = sorted((saved / "new").iterdir())
    records = json.loads(shell(module, "predict", "--task", "my task", "--json", "--top_k", "2", *images))
    assert len(records) == 3
    for record in records:
        assert record["predictions"][0]["label"] == Path(record["image"]).stem
        assert len(record["predictions"]) == 2


def test_dashes_are_underscores(hyperflow, adapting, tmp_path):
    """`--n-steps` is `--n_steps`; names of files and folders keep their dashes."""
    arguments = ["--n-steps", "2", "--output-dir", "my-task", "--skip-bad", "--early-stopping"]
    done = hyperflow(*adapting, *arguments)
    assert done.code == 0, done.err
    assert names(tmp_path) == {"my-task"}
    done = hyperflow("predict", "--task", "my-task", "--top-k=2", "--json", adapting[-1] / "red" / "0.png")
    [record] = json.loads(done.out)
    assert len(record["predictions"]) == 2
    said = hyperflow("adapt", "--help").out
    for option in ("--n_steps", "--skip_bad", "--early_stopping", "--output_dir"):
        assert option in said
    assert "--n-steps" not in said


def test_wrong_usage(hyperflow, adapting, saved, tmp_path):
    image = saved / "new/red.png"
    for arguments, words in [
        (["adap"], "No such command"),
        (["adapt", "--adapter", "x"], "Missing option"),
        ([*adapting, "--output", "task", "--format", "onnx"], "'lora'"),
        ([*adapting, "--output", "task", "--n_steps", "-1"], "n_steps"),
        ([*adapting, "--output", "task", "--no_flow", "--n_steps", "2"], "no steps"),
        ([*adapting, "--output", "task", "--n_steps", "0", "--early_stopping"], "nothing to solve or to stop"),
        (["predict", "--task", saved / "task"], "IMAGES"),
        (["predict", "--task", saved / "task", "--json", "--csv", image], "--json and --csv"),
        (["predict", "--task", saved / "task", "--top_k", "0", image], "top_k"),
        (["evaluate", "--task", saved / "task", "--picture", "a.xyz", saved / "pictures"], "a.xyz is of no format"),
    ]:
        found = hyperflow(*arguments)
        assert found.code == 2, found
        assert words in found.err
        assert "Traceback" not in found.err
    assert names(tmp_path) == set()


def test_help_everywhere(hyperflow):
    commands = ["adapt", "predict", "evaluate", "info", "push", "quickstart", "benchmark", "bench", "demo"]
    top = hyperflow("--help")
    assert top.code == 0
    assert all(command in top.out for command in commands)
    for command in commands:
        found = hyperflow(command, "--help")
        assert found.code == 0
        assert f"hyperflow {command}" in found.out
        assert "--help" in found.out
    assert "Usage" in hyperflow().out + hyperflow().err


def test_version(hyperflow):
    assert hyperflow("--version").out == f"hyperflow {__version__}\n"


def test_debug_shows_where(hyperflow, saved):
    found = hyperflow("--debug", "predict", "--task", "./nowhere", "a.png")
    assert found.code == 1
    assert "Traceback (most recent call last)" in found.err
    assert "CheckpointError: there is no folder ./nowhere" in found.err


@pytest.mark.slow
def test_the_released_pair_is_the_default(saved, hyperflow, tmp_path):
    """Without the flow and with it; the task finds the backbone again from another folder."""
    for name, options in (("flow", ()), ("head", ("--no_flow",))):
        done = hyperflow("adapt", "--support", saved / "pictures", "--output_dir", name, *options)
        assert done.code == 0, done.err
        assert ("The flow was left out" in done.out) == (name == "head")
    (tmp_path / "elsewhere").mkdir()
    predicting = ["predict", "--json", saved / "new", "--task"]
    flow, head = [Command(tmp_path / "elsewhere", *predicting, tmp_path / name).end() for name in ("flow", "head")]
    for done in (flow, head):
        assert done.code == 0, done.err
        assert [record["predictions"][0]["label"] for record in json.loads(done.out)] == ["blue", "green", "red"]
    assert flow.out != head.out
