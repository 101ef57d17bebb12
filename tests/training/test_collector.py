"""`collect_trajectories.py`: killed, shared by processes, on damaged and full disks; the rows are always the same."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pyarrow.parquet
import pytest
import torch
from transformers import AutoModel, Dinov2Model

from hf_hyperflow.finetuning.trajectories import load_trajectories
from hf_hyperflow.modeling.fingerprint import compute_fingerprint
from hf_hyperflow.modeling.parameter_space import ParameterSpace
from hf_hyperflow.modeling.peft_configs import bias_config
from hf_hyperflow.training.collection_config import CollectionConfig
from tests.helpers.hub_server import Hub
from tests.helpers.training_runs import (
    TWO_PROCESSES,
    Finished,
    die_before_checksum,
    die_writing_shard,
    files_of_at_most,
    make_ground,
    run,
    run_command,
    run_here,
)

#: Says how many trajectories there are in the repository on the Hub.
LOAD = """
from transformers import AutoModel
from hf_hyperflow.modeling.parameter_space import ParameterSpace
from hf_hyperflow.modeling.peft_configs import bias_config
from hf_hyperflow.finetuning.trajectories import load_trajectories
backbone = AutoModel.from_pretrained({backbone!r})
space = ParameterSpace.from_backbone(backbone, bias_config(backbone, 2))
print(len(load_trajectories("alice/trajectories", space)))
"""


@pytest.fixture(scope="module")
def ground(tmp_path_factory) -> Path:
    return make_ground(tmp_path_factory.mktemp("collecting"))


def flags(ground: Path, output: Path, **changes: object) -> list[str]:
    """Four groups of three tasks."""
    settings = {
        "backbone": ground / "backbone",
        "output_dir": output,
        "n_trajectories": 12,
        "group_size": 3,
        "last_blocks": 2,
        "teacher_steps": 3,
        "n_points": 3,
        "mixed_precision": "no",
        "images_per_pass": 40,
    }
    settings.update(changes)
    arguments = ["--dataset", str(ground / "alpha"), str(ground / "beta")]
    for name, value in settings.items():
        arguments += [f"--{name}", str(value)]
    return arguments


def collect(ground: Path, output: Path, **changes: object) -> Finished:
    return run_here("collect_trajectories", *flags(ground, output, **changes))


def read_rows(folder: Path) -> list[dict]:
    """All rows in order, but for measured seconds."""
    rows = []
    for path in sorted((folder / "data").glob("*.parquet")):
        rows += pyarrow.parquet.read_table(path).drop_columns("seconds").to_pylist()
    return rows


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "data").iterdir())


def totals(folder: Path) -> dict:
    """What a collection says of itself, without what depends on the machine."""
    found = json.loads((folder / "collection.json").read_text())["totals"]
    found.pop("seconds")
    found.pop("bytes")
    return found


def assert_same_collection(folder: Path, whole: Path) -> None:
    assert read_rows(folder) == read_rows(whole)
    assert files(folder) == files(whole)
    assert totals(folder) == totals(whole)


@pytest.fixture(scope="module")
def whole(ground, tmp_path_factory) -> Path:
    """A collection made in one go by one process."""
    folder = tmp_path_factory.mktemp("whole") / "trajectories"
    done = collect(ground, folder)
    assert done.exitcode == 0, done.output
    assert "12 trajectories, 0 diverged" in done.output
    return folder


def test_a_collection_is_complete(ground, whole):
    assert files(whole) == sorted(f"shard-0000{n}.parquet{end}" for n in range(4) for end in ("", ".sha256"))
    rows = read_rows(whole)
    assert [row["index"] for row in rows] == list(range(12))
    for start in range(0, 12, 3):
        group = rows[start : start + 3]
        assert len({(len(row["classes"]), len(row["support"])) for row in group}) == 1
        assert len({row["flops"] for row in group}) == 1
    assert all(row["flops"] > 0 and len(row["losses"]) == 4 for row in rows)
    collection = json.loads((whole / "collection.json").read_text())
    assert str(ground) not in json.dumps(collection)  # names, not paths of this machine
    assert [domain["name"] for domain in collection["domains"]] == ["alpha", "beta"]
    assert collection["totals"]["rows"] == 12
    backbone = AutoModel.from_pretrained(ground / "backbone").eval()
    space = ParameterSpace.from_backbone(backbone, bias_config(backbone, 2))
    loaded = load_trajectories(whole, space, fingerprint=compute_fingerprint(backbone))
    assert loaded.deltas.shape == (12, 3, space.n_tokens, 24)


def damage(path: Path) -> None:
    """Change one byte."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 255
    path.write_bytes(data)


def test_what_is_missing_or_damaged_is_made_again_and_a_collection_is_extended(ground, whole, tmp_path):
    folder = shutil.copytree(whole, tmp_path / "trajectories")
    damage(folder / "data" / "shard-00000.parquet")
    (folder / "data" / "shard-00002.parquet.sha256").unlink()
    done = collect(ground, folder)
    assert done.exitcode == 0, done.output
    assert "shard-00000.parquet is damaged" in done.output
    assert "shard-00002.parquet has no checksum" in done.output
    assert_same_collection(folder, whole)
    done = collect(ground, folder, n_trajectories=13)
    assert done.exitcode == 0, done.output
    assert read_rows(folder)[:12] == read_rows(whole)
    assert len(read_rows(folder)) == 15  # groups are made whole


@pytest.mark.slow
def test_killed_at_any_moment_it_resumes_with_the_same_rows(ground, whole, tmp_path):
    output = tmp_path / "trajectories"
    for fault, kept in ((partial(die_writing_shard, 1), 1), (partial(die_before_checksum, 2), 2)):
        killed = run("collect_trajectories", *flags(ground, output), fault=fault, log=tmp_path / "log")
        assert killed.exitcode == -signal.SIGKILL, killed.output
        assert sum(name.endswith(".sha256") for name in files(output)) == kept
    resumed = run("collect_trajectories", *flags(ground, output), log=tmp_path / "log")
    assert resumed.exitcode == 0, resumed.output
    assert "shard-00002.parquet has no checksum" in resumed.output
    assert_same_collection(output, whole)


@pytest.mark.slow
def test_two_processes_make_what_one_makes(ground, whole, tmp_path):
    command = [*flags(ground, tmp_path), "--cpu", "true"]
    done = run_command("collect_trajectories", *command, launcher=TWO_PROCESSES)
    assert done.returncode == 0, done.stderr
    assert_same_collection(tmp_path, whole)


@pytest.mark.slow
@pytest.mark.hub
def test_a_finished_collection_is_pushed_and_loaded_from_the_hub(ground, whole, tmp_path):
    folder = shutil.copytree(whole, tmp_path / "trajectories")
    command = [*flags(ground, folder, n_trajectories=13, push_to_hub="alice/trajectories"), "--cpu", "true"]
    with Hub() as hub:
        environment = {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(ground / "home"),
            "HF_TOKEN": "hf_alice",
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }
        done = run_command("collect_trajectories", *command, **environment)
        assert done.returncode == 0, done.stderr
        pushed = hub.files("alice/trajectories")
        loaded = subprocess.run(
            [sys.executable, "-c", LOAD.format(backbone=str(ground / "backbone"))],
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            check=False,
        )
        assert not hub.unknown
    assert set(pushed) - {".gitattributes"} == {f"data/{n}" for n in files(folder)} | {"README.md", "collection.json"}
    assert pushed["data/shard-00004.parquet"] == (folder / "data" / "shard-00004.parquet").read_bytes()
    assert loaded.stdout.strip() == "15", loaded.stderr


@pytest.mark.slow
def test_a_full_disk_leaves_nothing_half_written(ground, tmp_path):
    output = tmp_path / "trajectories"
    # The log is a file, too, and the bar is written to it.
    full = partial(files_of_at_most, 16384)
    done = run("collect_trajectories", *flags(ground, output, group_size=6), fault=full, log=tmp_path / "log")
    assert done.exitcode == 1
    last = done.output.strip().splitlines()[-1]
    assert last.startswith("error: cannot write")
    assert str(output) in last
    assert "when there is room, the same command goes on" in last
    assert files(output) == []


def test_too_few_images_are_named(ground, tmp_path):
    (tmp_path / "empty").mkdir()
    for c in range(2):
        shutil.copytree(ground / "alpha" / f"class{c}", tmp_path / "small" / f"class{c}")
    for name, expected in (
        ("empty", "empty, a domain of at least 3 classes of 9 images"),
        ("small", "needs 3 classes of 9"),
    ):
        arguments = flags(ground, tmp_path / "out")
        arguments[1:3] = [str(tmp_path / name)]
        done = run_here("collect_trajectories", *arguments)
        assert done.exitcode == 1
        assert expected in done.output
    assert not (tmp_path / "out").exists()


def test_a_collection_of_other_settings_or_images_is_refused(ground, whole):
    for changes, expected in (
        ({"seed": 1}, "holds other trajectories: arguments.seed differ"),
        ({"max_per_class": 12}, "holds other trajectories: arguments.max_per_class, domains differ"),
        ({"noise": 0.1}, "holds other trajectories: arguments.noise, teacher.noise differ"),
    ):
        done = collect(ground, whole, **changes)
        assert done.exitcode == 1
        assert expected in done.output
    assert len(read_rows(whole)) == 12


def test_the_backbone_may_move_and_must_not_change(ground, whole, tmp_path):
    other = shutil.copytree(ground / "backbone", tmp_path / "backbone")
    folder = shutil.copytree(whole, tmp_path / "trajectories")
    assert "wrote" in collect(ground, folder, backbone=other).output
    backbone = Dinov2Model.from_pretrained(other)
    torch.nn.init.constant_(backbone.encoder.layer[0].norm1.weight, 3.0)
    backbone.save_pretrained(other)
    done = collect(ground, folder, backbone=other)
    assert done.exitcode == 1
    assert "the backbone's weights differ" in done.output


def test_bad_settings_are_named(ground, tmp_path):
    done = collect(ground, tmp_path / "out", parameters="prompt")
    assert done.exitcode == 2
    assert "argument --parameters: invalid choice: 'prompt'" in done.output
    done = collect(ground, tmp_path / "out", group_size=0)
    assert done.exitcode == 1
    assert "--group_size must be at least 1, not 0" in done.output
    with pytest.raises(ValueError, match="--n_trajectories must be at least 1"):
        CollectionConfig("backbone", ["images"], str(tmp_path), n_trajectories=0)


@pytest.mark.parametrize("parameters", ["lora", "layernorm"])
def test_other_parameters_and_a_teacher_that_diverges(ground, tmp_path, parameters):
    done = collect(ground, tmp_path, parameters=parameters, n_trajectories=3, learning_rate=1e30)
    assert done.exitcode == 0, done.output
    assert "3 trajectories, 3 diverged" in done.output
    assert all(row["diverged"] for row in read_rows(tmp_path))
    names = [name for name, _ in json.loads((tmp_path / "collection.json").read_text())["parameter_space"]["tensors"]]
    assert all(("lora" in name) == (parameters == "lora") for name in names)
