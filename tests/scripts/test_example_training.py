"""The example that trains on image folders from Python, on a tiny backbone and for two steps."""

from __future__ import annotations

import re

from hf_hyperflow import HyperFlowAdapter
from tests.helpers.training_runs import make_ground
from training.demo import train_on_folders


def test_two_folders_make_an_adapter(tmp_path, monkeypatch, capsys):
    ground, output = make_ground(tmp_path), tmp_path / "adapter"
    folders = [str(ground / "alpha"), str(ground / "beta")]
    options = ["--backbone", str(ground / "backbone"), "--output_dir", str(output), "--steps", "2"]
    monkeypatch.setattr("sys.argv", ["train_on_folders.py", *folders, *options])
    train_on_folders.main()

    said = capsys.readouterr().out
    assert re.search(r"^beta: direct transfer [\d.]+ %, HyperFlow [\d.]+ %\.$", said, re.MULTILINE)
    record = HyperFlowAdapter.from_pretrained(output).training_record
    assert record["arguments"]["dataset"] == ["alpha", "beta"]
    assert set(record["history"][-1]["beta"]) >= {"direct", "hyperflow", "difference", "flow"}
