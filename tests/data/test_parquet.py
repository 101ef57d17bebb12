from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hf_hyperflow.data.parquet import read_parquet


def test_tables_come_back_with_their_metadata(tmp_path):
    path = tmp_path / "a.parquet"
    table = pa.table({"name": ["a", "b"], "points": [[1, 2], []]}).replace_schema_metadata({"made": "here"})
    pq.write_table(table, path)
    found = read_parquet(path)
    assert found.equals(table)
    assert found.schema.metadata[b"made"] == b"here"
    assert read_parquet(str(path), ["points"]).to_pydict() == {"points": [[1, 2], []]}


def test_damaged_files(tmp_path):
    path = tmp_path / "a.parquet"
    with pytest.raises(OSError, match=r"a\.parquet"):
        read_parquet(path)
    path.write_bytes(b"PAR1 nothing of the kind")
    with pytest.raises(pa.ArrowException):
        read_parquet(path)
