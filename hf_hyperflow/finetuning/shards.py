"""The shards of a collection of trajectories: Parquet files that count only with their checksum beside them."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import pyarrow.parquet
import torch
from datasets import Array2D, Dataset, Features, List, Value

from ..data.parquet import read_parquet
from ..data.tasks import TrainingTask
from ..modeling.saving import atomic_file, sha256
from .teacher import Recording

DATA = "data"


def shard_path(folder: str | os.PathLike, number: int) -> Path:
    return Path(folder, DATA, f"shard-{number:05d}.parquet")


def _checksum_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def shard_problem(folder: str | os.PathLike, number: int) -> str | None:
    """What keeps a shard from being used, its file named; None: it is whole."""
    path = shard_path(folder, number)
    if not path.is_file():
        return f"{path.name} is missing"
    checksum = _checksum_path(path)
    if not checksum.is_file():
        return f"{path.name} has no checksum: it was not finished"
    if checksum.read_bytes() != _checksum_line(path).encode():
        return f"{path.name} is damaged: its SHA-256 is not the one noted when it was written"
    return None


def _checksum_line(path: Path) -> str:
    return f"{sha256(path)}  {path.name}\n"


def write_shard(folder: str | os.PathLike, number: int, columns: dict[str, list]) -> None:
    """Write a shard, then its checksum: killed at any moment, there is a whole shard or one that does not count.

    Raises:
        CheckpointError: it cannot be written (a full disk, say); what was there before still is.
    """
    path = shard_path(folder, number)
    _, n_points, n_parameters = columns["theta"].shape
    table = Dataset.from_dict(columns, features=_features(n_points, n_parameters)).with_format("arrow")[:]
    with atomic_file(path) as draft:
        pyarrow.parquet.write_table(table, draft)
    with atomic_file(_checksum_path(path)) as draft:
        draft.write_text(_checksum_line(path))


def shard_columns(
    tasks: list[TrainingTask], recording: Recording, mask: torch.Tensor, times: list[float], seconds: float, flops: int
) -> dict[str, list]:
    """The rows of a group of tasks; `seconds` and `flops` are those of one trajectory.

    `bytes` is the size of a row's theta.
    """
    episodes = [task.episode for task in tasks]
    n = len(tasks)
    theta = recording.deltas[:, :, mask].half().numpy()
    return {
        "index": [episode.index for episode in episodes],
        "domain": [episode.domain for episode in episodes],
        "classes": [episode.classes.tolist() for episode in episodes],
        "support": [episode.support.tolist() for episode in episodes],
        "support_labels": [episode.support_labels.tolist() for episode in episodes],
        "query": [episode.query.tolist() for episode in episodes],
        "query_labels": [episode.query_labels.tolist() for episode in episodes],
        "transform_seed": [task.transform_seed for task in tasks],
        "flip": [task.flip for task in tasks],
        "times": [times] * n,
        "theta": theta,
        "losses": recording.losses.tolist(),
        "support_accuracy": recording.support_accuracy.tolist(),
        "query_accuracy": recording.query_accuracy.tolist(),
        "diverged": recording.diverged.tolist(),
        "seconds": [seconds] * n,
        "flops": [flops] * n,
        "bytes": [theta[0].nbytes] * n,
    }


def _features(n_points: int, n_parameters: int) -> Features:
    whole, real = List(Value("int64")), List(Value("float32"))
    return Features(
        {
            "index": Value("int64"),
            "domain": Value("string"),
            "classes": whole,
            "support": whole,
            "support_labels": whole,
            "query": whole,
            "query_labels": whole,
            "transform_seed": Value("int64"),
            "flip": Value("bool"),
            "times": List(Value("float64")),
            "theta": Array2D((n_points, n_parameters), "float16"),
            "losses": real,
            "support_accuracy": real,
            "query_accuracy": real,
            "diverged": Value("bool"),
            "seconds": Value("float64"),
            "flops": Value("int64"),
            "bytes": Value("int64"),
        }
    )


def totals(folder: str | os.PathLike, groups: int) -> dict:
    """Sums over the whole shards of a collection (`bytes` on disk), and means of the rows that did not diverge."""
    names = ["diverged", "seconds", "flops", "query_accuracy", "losses"]
    paths = [shard_path(folder, n) for n in range(groups) if shard_problem(folder, n) is None]
    rows = [row for path in paths for row in read_parquet(path, names).to_pylist()]
    good = [row for row in rows if not row["diverged"]]
    ends = {"start": 0, "end": -1}
    return {
        "rows": len(rows),
        "diverged": len(rows) - len(good),
        "seconds": round(sum(row["seconds"] for row in rows), 3),
        "flops": sum(row["flops"] for row in rows),
        "bytes": sum(path.stat().st_size for path in paths),
        "query_accuracy": {k: _mean(row["query_accuracy"][i] for row in good) for k, i in ends.items()},
        "loss": {k: _mean(row["losses"][i] for row in good) for k, i in ends.items()},
    }


def _mean(values: Iterable[float]) -> float | None:
    values = list(values)
    return round(sum(values) / len(values), 4) if values else None
