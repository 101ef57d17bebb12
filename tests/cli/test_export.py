"""`hyperflow export`."""

from __future__ import annotations

import pytest

from tests.cli.running import fails, names


@pytest.mark.slow
def test_export_writes_a_whole_folder(hyperflow, saved, tmp_path):
    pair = ["--adapter", saved / "adapter", "--backbone", saved / "backbone"]
    found = hyperflow("export", *pair, "--output_dir", "out", "--n_steps", "1")
    assert found.code == 0, found.err
    assert "python out/hyperflow_onnx.py adapt" in found.out
    assert names(tmp_path / "out") == {
        "adapt.onnx",
        "predict.onnx",
        "weights.bin",
        "hyperflow.json",
        "hyperflow_onnx.py",
    }


def test_what_export_refuses(hyperflow, saved, tmp_path):
    pair = ["--adapter", saved / "adapter", "--backbone", saved / "backbone"]
    fails(hyperflow("export", *pair, "--output", "out", "--solver", "dopri5"), "'dopri5' cannot be exported")
    fails(hyperflow("export", *pair, "--output", saved / "adapter"), "holds a model (config.json)")
    without = hyperflow("export", *pair, "--output", "out", missing="onnxscript")
    fails(without, 'the export needs onnxscript, which is not installed: pip install "hf-hyperflow[onnx]"')
    assert names(tmp_path) == set()
