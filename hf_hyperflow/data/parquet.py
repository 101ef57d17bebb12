"""Reading Parquet files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pyarrow
import pyarrow.parquet


def read_parquet(path: str | Path, columns: Sequence[str] | None = None) -> pyarrow.Table:
    """A Parquet file, or some of its columns, as a table; columns that the file does not have are passed over.

    Raises:
        pyarrow.ArrowException, OSError: the file is missing, damaged or of another format.
    """
    # Not pyarrow.parquet.read_table: the threads of its scanner can outlive the reading, and a program that ends soon
    # afterwards is then aborted, after all its work (apache/arrow#34314).
    with pyarrow.parquet.ParquetFile(path) as file:
        return file.read(columns=columns, use_threads=False)
