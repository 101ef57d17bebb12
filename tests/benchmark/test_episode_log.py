from __future__ import annotations

import dataclasses

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hf_hyperflow.benchmark.episode_log import SCHEMA, EpisodeLog, EpisodeResult
from hf_hyperflow.modeling.saving import CheckpointError


def row(index: int, method: str = "direct", domain: str = "a", n_shot: int | None = 5) -> EpisodeResult:
    return EpisodeResult(domain, n_shot, method, index, n_way=5, n_support=25, n_query=75, accuracy=0.1 * index)


def test_appended_rows_are_there_in_an_order_of_their_own(tmp_path):
    log = EpisodeLog(tmp_path / "new", {"seed": 0})
    log.append([row(2), row(0)])
    log.append([row(1), row(0, "bias"), row(0, n_shot=None)])
    again = EpisodeLog(tmp_path / "new", {"seed": 0})
    assert again.rows == log.rows
    assert [(r.n_shot, r.method, r.index) for r in again.rows] == [
        (None, "direct", 0),
        (5, "bias", 0),
        (5, "direct", 0),
        (5, "direct", 1),
        (5, "direct", 2),
    ]
    assert again.done("a", 5, "direct") == {0, 1, 2}
    assert again.done("a", None, "direct") == {0}
    assert again.done("b", 5, "direct") == set()
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["episodes.parquet"]


def test_the_columns_are_the_fields_of_a_row():
    assert [field.name for field in dataclasses.fields(EpisodeResult)] == SCHEMA.names


def test_scores_are_kept_where_there_are_some(tmp_path):
    gaps = tuple(i / 70 for i in range(10))
    EpisodeLog(tmp_path, {}).append([row(0), dataclasses.replace(row(1), log_loss=1 / 3, confidence_gaps=gaps)])
    without, scored = EpisodeLog(tmp_path, {}).rows
    assert (without.log_loss, without.confidence_gaps) == (None, None)
    assert (scored.log_loss, scored.confidence_gaps) == (1 / 3, gaps)


def test_a_table_of_a_version_without_scores(tmp_path):
    EpisodeLog(tmp_path, {}).append([row(0)])
    path = tmp_path / "episodes.parquet"
    pq.write_table(pq.read_table(path).drop_columns(["log_loss", "confidence_gaps"]), path)
    with pytest.raises(
        CheckpointError, match=r"by another version of hf_hyperflow: its columns are domain, .*accuracy\."
    ):
        EpisodeLog(tmp_path, {})


def test_settings_that_differ_are_named_and_new_ones_added(tmp_path):
    EpisodeLog(tmp_path, {"seed": 0, "domain a": "x"}).append([row(0)])
    with pytest.raises(CheckpointError, match=r"of another benchmark: seed was 0 and is 1; domain a was x and is y"):
        EpisodeLog(tmp_path, {"seed": 1, "domain a": "y"})
    EpisodeLog(tmp_path, {"seed": 0, "domain b": "z"}).append([row(0, domain="b")])
    with pytest.raises(CheckpointError, match="domain a was x and is y"):
        EpisodeLog(tmp_path, {"domain a": "y"})
    with pytest.raises(CheckpointError, match="domain b was z and is y"):
        EpisodeLog(tmp_path, {"domain b": "y"})


def test_another_table(tmp_path):
    pq.write_table(pa.table({"x": [1]}), tmp_path / "episodes.parquet")
    with pytest.raises(CheckpointError, match="is not the record of a benchmark"):
        EpisodeLog(tmp_path, {})


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("in the way")
    log = EpisodeLog(tmp_path / "file", {})
    with pytest.raises(CheckpointError, match=r"cannot write .*file/episodes\.parquet"):
        log.append([row(0)])
