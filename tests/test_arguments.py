from __future__ import annotations

import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parent.parent / "training"))

from hf_hyperflow.arguments import parse
from hf_hyperflow.training import collector as collect_trajectories
from hf_hyperflow.training import config as drift_arguments
from hf_hyperflow.training import pretraining as pretrain_backbone

CONFIGS = Path(__file__).parent.parent / "training/configs"
#: Whose presets they are, by the beginning of their names.
PRESETS = {
    "hyperflow-": drift_arguments.Arguments,
    "matched-": drift_arguments.Arguments,
    "trajectories-": collect_trajectories.Arguments,
    "vit-": pretrain_backbone.Arguments,
}


@dataclass
class Arguments:
    backbone: str = field(metadata={"help": "required"})
    steps: int = 3


@pytest.fixture
def preset(tmp_path):
    path = tmp_path / "preset.yaml"
    path.write_text("backbone: from-preset\nsteps: 7\n")
    return path


@pytest.mark.parametrize("form", ["--config {}", "--config={}"])
def test_flags_override_the_preset_and_the_preset_the_defaults(preset, form):
    config = form.format(preset).split()
    assert parse(Arguments, config) == Arguments("from-preset", 7)
    assert parse(Arguments, [*config, "--steps", "9"]) == Arguments("from-preset", 9)
    assert parse(Arguments, ["--backbone", "given"]) == Arguments("given", 3)


@pytest.mark.parametrize("config", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_our_presets(config):
    (kind,) = (kind for start, kind in PRESETS.items() if config.name.startswith(start))
    needed = ["--dataset", "a.parquet", "--output_dir", "out"]
    if config.name.startswith("matched-"):
        needed += ["--trajectories", "rows"]
    arguments = parse(kind, ["--config", str(config), *needed])
    assert all(vars(arguments)[key] == value for key, value in yaml.safe_load(config.read_text()).items())


@pytest.mark.parametrize(
    ("text", "word"),
    [
        (None, "No such file"),
        ("- a\n- b\n", "not a list of"),
        ("steps: [1\n", "cannot read the preset"),
        ("stepz: 4\nbackbone: b\n", r"unknown keys \['stepz'\]"),
        ("steps: 4\n", "backbone"),
    ],
)
def test_a_preset_that_cannot_be_used_is_named(tmp_path, capsys, text, word):
    path = tmp_path / "bad.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(SystemExit) as stopped:
        parse(Arguments, ["--config", str(path)])
    assert stopped.value.code == 2
    assert re.search(word, capsys.readouterr().err)
