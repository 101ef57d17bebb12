"""`hyperflow export`; what it writes is tested in tests/export."""

from __future__ import annotations

from tests.cli.running import fails, names


def test_what_export_refuses(hyperflow, saved, tmp_path):
    pair = ["--adapter", saved / "adapter", "--backbone", saved / "backbone"]
    fails(hyperflow("export", *pair, "--output", "out", "--solver", "dopri5"), "'dopri5' cannot be exported")
    fails(hyperflow("export", *pair, "--output", saved / "adapter"), "holds a model (config.json)")
    without = hyperflow("export", *pair, "--output", "out", missing="onnxscript")
    fails(without, 'the export needs onnxscript, which is not installed: pip install "hf-hyperflow[onnx]"')
    assert names(tmp_path) == set()
