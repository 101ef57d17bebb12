"""Command-line arguments: flags over presets over defaults, our presets, and what a run's record says of them."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml

from hf_hyperflow.arguments import describe_arguments, exit_on_error, make_parser, parse
from hf_hyperflow.modeling.saving import CheckpointError
from hf_hyperflow.training import DriftTrainingConfig
from hf_hyperflow.training.collection_config import CollectionConfig
from hf_hyperflow.training.pretraining import PretrainingConfig

CONFIGS = Path(__file__).parents[1] / "training" / "configs"
#: Which script a preset is for, by the beginning of its name.
PRESETS = {
    "convnext-": PretrainingConfig,
    "hyperflow-": DriftTrainingConfig,
    "matched-": DriftTrainingConfig,
    "trajectories-": CollectionConfig,
    "vit-": PretrainingConfig,
}


@dataclass
class Arguments:
    backbone: str = field(metadata={"help": "required"})
    steps: int = field(default=3, metadata={"help": "how many"})
    norms: bool = True


@pytest.fixture
def preset(tmp_path):
    path = tmp_path / "preset.yaml"
    path.write_text("backbone: from-preset\nsteps: 7\n")
    return path


@pytest.mark.parametrize("form", ["--config {}", "--config={}"])
def test_flags_override_the_preset_and_the_preset_the_defaults(preset, form):
    config = form.format(preset).split()
    assert parse(Arguments, config) == Arguments("from-preset", 7)
    assert parse(Arguments, [*config, "--steps", "9", "--no_norms"]) == Arguments("from-preset", 9, False)
    assert parse(Arguments, ["--backbone", "given"]) == Arguments("given", 3)


def test_dashes_are_underscores():
    common = ["--backbone", "b", "--dataset", "d", "--output_dir", "o"]
    underscores = parse(DriftTrainingConfig, [*common, "--last_blocks", "2", "--no_lda"])
    dashes = parse(
        DriftTrainingConfig, ["--backbone", "b", "--dataset", "d", "--output-dir", "o", "--last-blocks", "2"]
    )
    assert (underscores.last_blocks, underscores.lda) == (2, False)
    assert (dashes.last_blocks, dashes.lda, dashes.output_dir) == (2, True, "o")


def test_our_presets_are_all_there():
    assert {path.name.partition("-")[0] + "-" for path in CONFIGS.glob("*.yaml")} == set(PRESETS)


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


def test_a_choice_of_a_preset_is_checked(tmp_path, capsys):
    path = tmp_path / "bad.yaml"
    path.write_text("interpolant: spline\nbackbone: b\noutput_dir: o\ndataset: [d]\n")
    with pytest.raises(SystemExit):
        parse(DriftTrainingConfig, ["--config", str(path)])
    assert re.search("interpolant is 'spline', choose from .*piecewise", capsys.readouterr().err)


def test_a_record_names_files_without_their_place(tmp_path):
    (tmp_path / "photos.parquet").touch()
    (tmp_path / "backbone").mkdir()
    config = DriftTrainingConfig(
        backbone=str(tmp_path / "backbone"),
        dataset=[str(tmp_path / "photos.parquet"), "alice/drawings"],
        output_dir=str(tmp_path / "out"),
        lda=False,
    )
    record = describe_arguments(config)
    assert (record["backbone"], record["dataset"]) == ("backbone", ["photos", "alice/drawings"])
    assert record["lda"] is False
    assert "output_dir" not in record
    assert str(tmp_path) not in str(record)


def test_errors_of_the_user_end_in_one_line():
    for error in (ValueError("bad number"), CheckpointError("bad number"), ImportError("bad number")):
        with pytest.raises(SystemExit, match=r"^error: bad number$"), exit_on_error():
            raise error
    with pytest.raises(ZeroDivisionError), exit_on_error():
        raise ZeroDivisionError


def test_help_names_defaults_where_there_are_some():
    text = " ".join(make_parser(Arguments).format_help().split())
    assert "required (default" not in text
    assert "(default: 3)" in text
    assert "None" not in make_parser(DriftTrainingConfig).format_help()
