"""The commands whose work is done in other rooms."""

from __future__ import annotations

import pytest

from hf_hyperflow.cli.doors import _add_released_pair
from hf_hyperflow.demo.released import ADAPTER, BACKBONE, find_released
from tests.cli.running import names


@pytest.mark.parametrize(
    ("command", "missing", "extra"),
    [
        ("quickstart", "rich", "benchmark"),
        ("quickstart", "sklearn", "benchmark"),
        ("benchmark", "matplotlib", "benchmark"),
        ("bench", "matplotlib", "benchmark"),
        ("demo", "gradio", "demo"),
        ("demo", "matplotlib", "demo"),
    ],
)
def test_a_missing_extra_is_named(hyperflow, tmp_path, command, missing, extra):
    done = hyperflow(command, missing=missing)
    expected = f'error: the {command} needs {missing}, which is not installed: pip install "hf-hyperflow[{extra}]"\n'
    assert (done.code, done.out, done.err) == (1, "", expected)
    assert names(tmp_path) == set()


def test_the_benchmark_is_of_the_released_pair_if_no_adapter_is_named():
    pair = ["--adapter", str(find_released(ADAPTER)), "--backbone", str(find_released(BACKBONE))]
    assert _add_released_pair(["--dataset", "a"]) == ["--dataset", "a", *pair]
    assert _add_released_pair(["--backbone", "b"]) == ["--backbone", "b", *pair[:2]]
    for own in (["--adapter", "a"], ["--adapter=a"], ["--help"]):
        assert _add_released_pair(own) == own


def test_the_benchmark_starts_without_naming_models(hyperflow):
    done = hyperflow("benchmark", "--dataset", "nowhere.parquet", "--output_dir", "out")
    assert done.code == 1
    assert "nowhere.parquet" in done.err
