"""The example beside the released adapter, run as a script from another folder; on tiny models, for speed."""

from __future__ import annotations

import subprocess
import sys

import pytest
from safetensors.torch import load_file
from transformers import AutoModel

from tests.helpers.benchmark_runs import ENVIRONMENT, ROOT
from tests.helpers.tiny import tiny_adapter, tiny_dinov2

EXAMPLE = ROOT / "model_cards" / "hyperflow-vit-s14-70" / "example.py"


@pytest.mark.slow
def test_example(tmp_path):
    tiny_dinov2().save_pretrained(tmp_path / "backbone")
    tiny_adapter(AutoModel.from_pretrained(tmp_path / "backbone")).save_pretrained(tmp_path / "adapter")
    done = subprocess.run(
        [sys.executable, EXAMPLE, "--backbone", "backbone", "--adapter", "adapter", "--output_dir", "out/task"],
        cwd=tmp_path,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    said = {}
    for line in done.stdout.splitlines():
        key, colon, value = line.partition(": ")
        if colon:
            said[key] = value
    accuracies = {}
    for key in ("direct transfer", "HyperFlow", "8 steps", "pipeline", "after reset", "with peft"):
        accuracies[key] = float(said[key].removesuffix(" %"))
    # The same task through three doors, and the same backbone before and after it; two of 200 queries may be ties.
    assert accuracies["pipeline"] == pytest.approx(accuracies["HyperFlow"], abs=1)
    assert accuracies["with peft"] == pytest.approx(accuracies["HyperFlow"], abs=1)
    assert accuracies["after reset"] == pytest.approx(accuracies["direct transfer"], abs=1)
    assert min(accuracies.values()) > 12  # better than one in ten
    saved = load_file(tmp_path / "out/task/adapter_model.safetensors")
    assert max(tensor.abs().max().item() for tensor in saved.values()) > 1e-3  # the flow has moved something


def test_cells_are_marked():
    """Notebook programs split it into cells of text and code."""
    text = EXAMPLE.read_text()
    assert text.startswith("# %% [markdown]\n# # ")
    assert text.count("\n# %%\n") >= 6
