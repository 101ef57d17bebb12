"""Reading Parquet files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pyarrow
import pyarrow.parquet


def read_parquet(path: str | Path, columns: Sequence[str] | None = None) -> pyarrow.Table:
    """A Parquet file, or some of its columns, as a table.

    Read in this thread: those of Arrow's scanner (`pyarrow.parquet.read_table`) can outlive the reading, and where a
    program ends soon after it they abort it, all its work being done (apache/arrow#34314).

    Raises:
        pyarrow.ArrowException, OSError: it is no such file or damaged.
    """
    with pyarrow.parquet.ParquetFile(path) as file:
        return file.read(columns=columns, use_threads=False)
