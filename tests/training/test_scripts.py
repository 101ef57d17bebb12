"""The four scripts as they are typed."""

from __future__ import annotations

import pytest

from tests.helpers.training_runs import ON_CPU, run_command, run_here


@pytest.mark.slow
@pytest.mark.parametrize("script", sorted(ON_CPU))
def test_help_explains_every_argument(script):
    done = run_command(script, "--help")
    assert done.returncode == 0, done.stderr
    assert "--dataset" in done.stdout
    assert "usage: " + script in done.stdout


@pytest.mark.parametrize("script", sorted(ON_CPU))
def test_unknown_key_in_a_preset_is_named(script, tmp_path):
    (tmp_path / "preset.yaml").write_text("stepz: 3\n")
    done = run_here(script, "--config", tmp_path / "preset.yaml")
    assert done.exitcode == 2
    assert "stepz" in done.output
