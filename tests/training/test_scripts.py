"""The four scripts: what they say of their arguments, and of a preset that does not fit."""

from __future__ import annotations

import pytest

from tests.helpers.training_runs import ON_CPU, run_command, run_here


@pytest.mark.parametrize("script", sorted(ON_CPU))
def test_help_explains_every_argument(script):
    done = run_here(script, "--help")
    assert done.exitcode == 0
    assert "--dataset" in done.output
    assert "--config" in done.output


@pytest.mark.slow
@pytest.mark.parametrize(
    "script", ["pretrain_backbone", "calibrate"]
)  # test_trainer and test_collector type the others
def test_as_it_is_typed(script):
    done = run_command(script, "--help")
    assert done.returncode == 0, done.stderr
    assert f"usage: {script}.py" in done.stdout


@pytest.mark.parametrize("script", sorted(ON_CPU))
def test_unknown_key_in_a_preset_is_named(script, tmp_path):
    (tmp_path / "preset.yaml").write_text("stepz: 3\n")
    done = run_here(script, "--config", tmp_path / "preset.yaml")
    assert done.exitcode == 2
    assert "stepz" in done.output
