"""The example beside the released adapter, run as a script from another folder; on tiny models, for speed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from transformers import AutoModel

from tests.helpers.tiny import tiny_adapter, tiny_dinov2

EXAMPLE = Path(__file__).resolve().parent.parent / "model_cards" / "hyperflow-vit-s14-70" / "example.py"


def test_example(tmp_path):
    tiny_dinov2().save_pretrained(tmp_path / "backbone")
    tiny_adapter(AutoModel.from_pretrained(tmp_path / "backbone")).save_pretrained(tmp_path / "adapter")
    found = subprocess.run(
        [sys.executable, EXAMPLE, "--backbone", "backbone", "--adapter", "adapter", "--output", "out/task"],
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stderr
    said = dict(line.split(": ", 1) for line in found.stdout.splitlines() if ": " in line)
    # The same task through three doors, and the same backbone before and after it.
    assert said["HyperFlow"] == said["pipeline"] == said["with peft"]
    assert said["after reset"] == said["direct transfer"] != said["HyperFlow"]
    for value in (said["direct transfer"], said["HyperFlow"], said["8 steps"]):
        assert 10 < float(value.removesuffix(" %")) <= 100  # better than one in ten
    assert (tmp_path / "out/task/adapter_model.safetensors").is_file()


def test_cells_are_marked():
    """Notebook programs split it into cells of text and code."""
    text = EXAMPLE.read_text()
    assert text.startswith("# %% [markdown]\n# # ")
    assert text.count("\n# %%\n") >= 6
