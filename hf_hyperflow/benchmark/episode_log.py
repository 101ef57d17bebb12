"""`episodes.parquet`: what every method reached on every episode of a benchmark, kept while it runs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ..data.parquet import read_parquet
from ..modeling.atomic_file import atomic_file
from ..modeling.saving import CheckpointError

EPISODES = "episodes.parquet"

SCHEMA = pa.schema(
    {
        "domain": pa.string(),
        "n_shot": pa.int32(),  # null where shots vary
        "method": pa.string(),
        "index": pa.int32(),
        "n_way": pa.int32(),
        "n_support": pa.int32(),
        "n_query": pa.int32(),
        "accuracy": pa.float64(),
        "log_loss": pa.float64(),  # null, as the next, for methods without probabilities
        "confidence_gaps": pa.list_(pa.float64()),
    }
)

_SETTINGS, _DIGEST = b"hf_hyperflow", b"hf_hyperflow_sha256"


@dataclass(frozen=True)
class EpisodeResult:
    """A row of the log: what a method reached on an episode. Its fields are the columns of `SCHEMA`.

    Attributes:
        n_shot: None in protocols where shots vary.
        index: the number of the episode.
        accuracy: in %.
        log_loss, confidence_gaps: see `ScoreQuality`; None for methods without probabilities.
    """

    domain: str
    n_shot: int | None
    method: str
    index: int
    n_way: int
    n_support: int
    n_query: int
    accuracy: float
    log_loss: float | None = None
    confidence_gaps: tuple[float, ...] | None = None


class EpisodeLog:
    """The episodes of a benchmark. After every `append`, the file has all rows; if it fails, those from before.

    Args:
        folder: where `episodes.parquet` is or will be.
        settings: what the accuracies depend on beside the columns, ready for JSON; kept in the file.

    Attributes:
        rows: all rows, in the order of the file.

    Raises:
        CheckpointError: the file is damaged, of another version, or of other settings; the message names it, and what
            differs.
    """

    def __init__(self, folder: str | Path, settings: dict[str, Any]):
        self.path = Path(folder) / EPISODES
        self.settings = json.loads(json.dumps(settings))
        self.rows: list[EpisodeResult] = []
        if not self.path.exists():
            return
        settings_before, self.rows = _read(self.path)
        differences = []
        for key, value in self.settings.items():
            if key in settings_before and settings_before[key] != value:
                differences.append(f"{key} was {settings_before[key]} and is {value}")
        if differences:
            raise CheckpointError(
                f"{self.path} is of another benchmark: {'; '.join(differences)}. Choose another folder for the results."
            )
        self.settings = settings_before | self.settings

    def done(self, domain: str, n_shot: int | None, method: str) -> set[int]:
        """The numbers of the episodes that are there."""
        key = (domain, n_shot, method)
        return {row.index for row in self.rows if (row.domain, row.n_shot, row.method) == key}

    def append(self, rows: Iterable[EpisodeResult]) -> None:
        """Add rows, in memory and on disk. The order of rows in the file does not depend on when they came.

        Raises:
            CheckpointError: the folder cannot be written.
        """
        self.rows = sorted([*self.rows, *rows], key=lambda row: (row.domain, row.n_shot or 0, row.method, row.index))
        records = [asdict(row) for row in self.rows]
        settings = json.dumps(self.settings)
        metadata = {_SETTINGS: settings, _DIGEST: _compute_digest(settings, records)}
        table = pa.Table.from_pylist(records, SCHEMA.with_metadata(metadata))
        with atomic_file(self.path) as draft:
            pq.write_table(table, draft)


def _compute_digest(settings: str, records: list[dict]) -> str:
    return hashlib.sha256((settings + json.dumps(records)).encode()).hexdigest()


def _read(path: Path) -> tuple[dict[str, Any], list[EpisodeResult]]:
    """Settings and rows, after a check that they are what was written."""
    try:
        table = read_parquet(path)
        metadata = table.schema.metadata or {}
        if _SETTINGS not in metadata:
            raise CheckpointError(f"{path} is not the record of a benchmark. Choose another folder for the results.")
        if not table.schema.remove_metadata().equals(SCHEMA):
            raise CheckpointError(
                f"{path} was written by another version of hf_hyperflow: its columns are "
                f"{', '.join(table.schema.names)}. Choose another folder for the results."
            )
        settings, records = metadata[_SETTINGS].decode(), table.to_pylist()
        if metadata[_DIGEST].decode() != _compute_digest(settings, records):
            raise ValueError("its SHA-256 is not the one noted in it")
        return json.loads(settings), [_make_row(record) for record in records]
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"{path} is damaged ({error}). Restore it, or remove it to run its episodes again."
        ) from error


def _make_row(record: dict[str, Any]) -> EpisodeResult:
    row = EpisodeResult(**record)
    if row.confidence_gaps is None:
        return row
    return replace(row, confidence_gaps=tuple(row.confidence_gaps))
