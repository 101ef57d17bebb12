"""The example that trains on image folders from Python, on a tiny backbone and for two steps."""

from __future__ import annotations

import re

import pytest

from hf_hyperflow import HyperFlowAdapter
from tests.helpers.tiny import tiny_dinov2, tiny_processor
from tests.helpers.training_runs import make_images
from training.demo import train_on_folders


@pytest.mark.slow
def test_two_folders_make_an_adapter(tmp_path, monkeypatch, capsys):
    tiny_dinov2(num_hidden_layers=6).save_pretrained(tmp_path / "backbone")
    tiny_processor().save_pretrained(tmp_path / "backbone")
    for seed, name in enumerate(("alpha", "beta")):
        make_images(tmp_path / name, n_classes=6, n_images=20, seed=seed)
    folders, output = [str(tmp_path / "alpha"), str(tmp_path / "beta")], tmp_path / "adapter"
    options = ["--backbone", str(tmp_path / "backbone"), "--output_dir", str(output), "--steps", "2"]
    monkeypatch.setattr("sys.argv", ["train_on_folders.py", *folders, *options])
    train_on_folders.main()

    said = capsys.readouterr().out
    assert re.search(r"^beta: direct transfer [\d.]+ %, HyperFlow [\d.]+ %\.$", said, re.MULTILINE)
    record = HyperFlowAdapter.from_pretrained(output).training_record
    assert record["arguments"]["dataset"] == ["alpha", "beta"]
    assert set(record["history"][-1]["beta"]) >= {"direct", "hyperflow", "difference", "flow"}
