"""`episodes.parquet`: what every method reached on every episode of a benchmark, kept while it runs."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from ..data.parquet import read_parquet
from ..modeling.saving import CheckpointError, atomic_file

EPISODES = "episodes.parquet"

SCHEMA = pa.schema(
    {
        "domain": pa.string(),
        "n_shot": pa.int32(),  # null in Meta-Dataset's protocol
        "method": pa.string(),
        "index": pa.int32(),
        "n_way": pa.int32(),
        "n_support": pa.int32(),
        "n_query": pa.int32(),
        "accuracy": pa.float64(),
    }
)

_SETTINGS, _DIGEST = b"hf_hyperflow", b"hf_hyperflow_sha256"


class EpisodeLog:
    """The episodes of a benchmark, on disk after every `append`, whole or as before.

    Args:
        folder: where `episodes.parquet` is or will be.
        settings: what the accuracies depend on beside the columns, ready for JSON; kept in the file.

    Attributes:
        rows: one dict per row, with the columns of `SCHEMA`.

    Raises:
        CheckpointError: the file is there and damaged, or of other settings; it is named, with what differs.
    """

    def __init__(self, folder: str | Path, settings: dict[str, object]):
        self.path = Path(folder) / EPISODES
        self.settings = json.loads(json.dumps(settings))
        self.rows: list[dict] = []
        if not self.path.exists():
            return
        known, rows = _read(self.path)
        different = [
            f"{key} was {known[key]} and is {value}"
            for key, value in self.settings.items()
            if key in known and known[key] != value
        ]
        if different:
            raise CheckpointError(
                f"{self.path} is of another benchmark: {'; '.join(different)}. Choose another folder for the results."
            )
        self.settings = known | self.settings
        self.rows = rows

    def done(self, domain: str, n_shot: int | None, method: str) -> set[int]:
        """Indices of the episodes that are there."""
        key = (domain, n_shot, method)
        return {row["index"] for row in self.rows if (row["domain"], row["n_shot"], row["method"]) == key}

    def append(self, rows: list[dict]) -> None:
        """Add rows, in memory and on disk. The order of rows in the file does not depend on when they came.

        Raises:
            CheckpointError: the folder cannot be written.
        """
        rows = [{name: row[name] for name in SCHEMA.names} for row in rows]  # in the order in which they are read again
        self.rows = sorted([*self.rows, *rows], key=lambda r: (r["domain"], r["n_shot"] or 0, r["method"], r["index"]))
        settings = json.dumps(self.settings)
        metadata = {_SETTINGS: settings, _DIGEST: _digest(settings, self.rows)}
        table = pa.Table.from_pylist(self.rows, SCHEMA.with_metadata(metadata))
        with atomic_file(self.path) as draft:
            pq.write_table(table, draft)


def _digest(settings: str, rows: list[dict]) -> str:
    return hashlib.sha256((settings + json.dumps(rows)).encode()).hexdigest()


def _read(path: Path) -> tuple[dict, list[dict]]:
    """Settings and rows, after a check that they are what was written."""
    try:
        table = read_parquet(path)
        metadata = table.schema.metadata or {}
        if _SETTINGS not in metadata:
            raise CheckpointError(f"{path} is not the record of a benchmark. Choose another folder for the results.")
        if not table.schema.remove_metadata().equals(SCHEMA):
            raise ValueError(f"its columns are {table.schema.names}")
        settings, rows = metadata[_SETTINGS].decode(), table.to_pylist()
        if metadata[_DIGEST].decode() != _digest(settings, rows):
            raise ValueError("its SHA-256 is not the one noted in it")
        return json.loads(settings), rows
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"{path} is damaged ({error}). Restore it, or remove it to run its episodes again."
        ) from error
