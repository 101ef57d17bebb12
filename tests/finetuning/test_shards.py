"""Shards: whole or of no account, readable by others, and added up."""

from __future__ import annotations

import subprocess

import pyarrow.parquet
import pytest

from hf_hyperflow.data.parquet import read_parquet
from hf_hyperflow.finetuning.shards import (
    TRAINING_COLUMNS,
    build_shard_columns,
    find_shard_problem,
    get_shard_path,
    read_shard,
    summarise_shards,
    write_shard,
)
from hf_hyperflow.modeling.saving import CheckpointError
from tests.helpers.recorded import TEACHER, random_recording


def test_checksums_are_those_of_sha256sum(collected):
    names = [f"{get_shard_path('.', number).name}.sha256" for number in range(3)]
    process = subprocess.run(["sha256sum", "-c", *names], cwd=collected.folder / "data", check=False)
    assert process.returncode == 0


@pytest.mark.parametrize("harm", ["flip a bit", "cut off", "lose", "no checksum"])
def test_damage_is_noticed(collected, harm):
    path = get_shard_path(collected.folder, 1)
    damage(path, harm)
    problems = [find_shard_problem(collected.folder, number) for number in range(3)]
    assert problems[0] is None
    assert problems[2] is None
    assert "shard-00001.parquet" in problems[1]


def damage(path, harm: str) -> None:
    data = bytearray(path.read_bytes())
    if harm == "flip a bit":
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    elif harm == "cut off":
        path.write_bytes(data[:100])
    elif harm == "lose":
        path.unlink()
    else:
        path.with_name(f"{path.name}.sha256").unlink()


def test_a_shard_is_a_row_for_each_task(collected, space):
    rows = read_parquet(get_shard_path(collected.folder, 1)).to_pylist()
    assert [row["index"] for row in rows] == [2, 3]
    for row, task in zip(rows, collected.tasks[2:4], strict=True):
        assert row["domain"] == task.episode.domain
        assert (row["transform_seed"], row["flip"]) == (task.transform_seed, task.flip)
        for name in ("classes", "support", "support_labels", "query", "query_labels"):
            assert row[name] == vars(task.episode)[name].tolist()
        assert row["times"] == TEACHER.times
        assert len(row["losses"]) == TEACHER.steps + 1
        assert len(row["support_accuracy"]) == len(row["query_accuracy"]) == 3
        assert (row["seconds"], row["flops"], row["bytes"]) == (0.5, 1000, 3 * space.n_parameters * 2)


def test_a_failed_write_leaves_what_was_there(collected, space, monkeypatch):
    path = get_shard_path(collected.folder, 0)
    before = path.read_bytes()
    columns = build_shard_columns(
        collected.tasks[:2], random_recording(space, 2, 9), space.mask, TEACHER.times, seconds=1, flops=1
    )

    def fail(table, path):
        path.write_bytes(b"PAR1")
        raise OSError("no space left on device")

    monkeypatch.setattr(pyarrow.parquet, "write_table", fail)
    with pytest.raises(CheckpointError, match="no space left"):
        write_shard(collected.folder, 0, columns)
    assert path.read_bytes() == before
    assert find_shard_problem(collected.folder, 0) is None
    assert not list(path.parent.glob(".*"))


def test_training_reads_what_it_needs(collected):
    assert sorted(read_shard(collected.folder, 0).column_names) == sorted(TRAINING_COLUMNS)


def test_shards_of_version_0_1_are_read(collected):
    path = get_shard_path(collected.folder, 0)
    expected = read_shard(collected.folder, 0)
    table = read_parquet(path)
    old = ["made_seed" if name == "transform_seed" else name for name in table.column_names]
    pyarrow.parquet.write_table(table.rename_columns(old), path)
    assert read_shard(collected.folder, 0).to_pydict() == expected.to_pydict()


def test_totals(collected):
    folder = collected.folder
    rows = []
    for number in range(3):
        rows += read_parquet(get_shard_path(folder, number)).to_pylist()
    del rows[3]  # diverged
    sums = summarise_shards(folder, 3)
    assert (sums["rows"], sums["diverged"], sums["seconds"], sums["flops"]) == (6, 1, 3.0, 6000)
    assert sums["bytes"] == sum(get_shard_path(folder, number).stat().st_size for number in range(3))
    for name, column in (("query_accuracy", "query_accuracy"), ("loss", "losses")):
        assert sums[name]["start"] == pytest.approx(sum(row[column][0] for row in rows) / 5, abs=1e-3)
        assert sums[name]["end"] == pytest.approx(sum(row[column][-1] for row in rows) / 5, abs=1e-3)


def test_totals_are_of_whole_shards(collected):
    damage(get_shard_path(collected.folder, 1), "cut off")
    sums = summarise_shards(collected.folder, 3)
    assert (sums["rows"], sums["diverged"], sums["flops"]) == (4, 0, 4000)
    for number in (0, 2):
        damage(get_shard_path(collected.folder, number), "lose")
    assert summarise_shards(collected.folder, 3)["query_accuracy"] == {"start": None, "end": None}
