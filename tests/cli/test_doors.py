"""The commands whose work is done in other rooms."""

from __future__ import annotations

import pytest

from tests.cli.running import names


@pytest.mark.parametrize(
    ("command", "missing", "extra"),
    [
        ("quickstart", "rich", "benchmark"),
        ("quickstart", "sklearn", "benchmark"),
        ("benchmark", "matplotlib", "benchmark"),
        ("demo", "gradio", "demo"),
        ("demo", "matplotlib", "demo"),
    ],
)
def test_a_missing_extra_is_named(hyperflow, tmp_path, command, missing, extra):
    done = hyperflow(command, missing=missing)
    expected = f'error: the {command} needs {missing}, which is not installed: pip install "hf-hyperflow[{extra}]"\n'
    assert (done.code, done.out, done.err) == (1, "", expected)
    assert names(tmp_path) == set()
