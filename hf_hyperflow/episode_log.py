"""`episodes.parquet`: what every method reached on every episode of a benchmark, kept while it runs."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from .saving import CheckpointError, replaced

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

_SETTINGS = b"hf_hyperflow"


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
        table = _read(self.path)
        known = json.loads(table.schema.metadata[_SETTINGS])
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
        self.rows = table.to_pylist()

    def done(self, domain: str, n_shot: int | None, method: str) -> set[int]:
        """Indices of the episodes that are there."""
        key = (domain, n_shot, method)
        return {row["index"] for row in self.rows if (row["domain"], row["n_shot"], row["method"]) == key}

    def append(self, rows: list[dict]) -> None:
        """Add rows, in memory and on disk. The order of rows in the file does not depend on when they came.

        Raises:
            CheckpointError: the folder cannot be written.
        """
        self.rows = sorted([*self.rows, *rows], key=lambda r: (r["domain"], r["n_shot"] or 0, r["method"], r["index"]))
        schema = SCHEMA.with_metadata({_SETTINGS: json.dumps(self.settings).encode()})
        table = pa.Table.from_pylist(self.rows, schema)
        with replaced(self.path) as draft:
            pq.write_table(table, draft, write_page_checksum=True)


def _read(path: Path) -> pa.Table:
    try:
        table = pq.read_table(path, page_checksum_verification=True)
    except (pa.ArrowException, OSError) as error:
        raise CheckpointError(
            f"{path} is damaged ({error}). Restore it, or remove it to run its episodes again."
        ) from error
    if table.schema.remove_metadata() != SCHEMA or _SETTINGS not in (table.schema.metadata or {}):
        raise CheckpointError(f"{path} is not the record of a benchmark. Choose another folder for the results.")
    return table
