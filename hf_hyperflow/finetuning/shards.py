"""The shards of a collection of trajectories: Parquet files that count only with their checksum beside them."""

from __future__ import annotations

import os
from collections import defaultdict
from pathlib import Path
from typing import Any

import pyarrow.parquet
import torch
from datasets import Array2D, Dataset, Features, List, Value

from ..data.parquet import read_parquet
from ..data.tasks import TrainingTask
from ..modeling.atomic_file import atomic_file
from ..modeling.checksums import sha256
from .teacher import Recording

#: The folder of the shards inside that of the collection.
DATA = "data"

#: The columns that training reads.
TRAINING_COLUMNS = (
    "index",
    "domain",
    "classes",
    "support",
    "support_labels",
    "query",
    "query_labels",
    "transform_seed",
    "flip",
    "diverged",
    "theta",
)

#: What version 0.1 called the column `transform_seed`.
_OLD_TRANSFORM_SEED = "made_seed"


def get_shard_path(folder: str | os.PathLike, number: int) -> Path:
    return Path(folder, DATA, f"shard-{number:05d}.parquet")


def _checksum_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def _checksum_line(path: Path) -> str:
    """What `sha256sum` would print for the file."""
    return f"{sha256(path)}  {path.name}\n"


def find_shard_problem(folder: str | os.PathLike, number: int) -> str | None:
    """Why a shard cannot be used, with the name of its file; None if it is whole."""
    path = get_shard_path(folder, number)
    if not path.is_file():
        return f"{path.name} is missing"
    checksum = _checksum_path(path)
    if not checksum.is_file():
        return f"{path.name} has no checksum: it was not finished"
    if checksum.read_bytes() != _checksum_line(path).encode():
        return f"{path.name} is damaged: its SHA-256 is not the one noted when it was written"
    return None


def write_shard(folder: str | os.PathLike, number: int, columns: dict[str, Any]) -> None:
    """Write a shard, and then its checksum.

    Where the process is killed at any moment, the shard is either whole or does not count.

    Args:
        columns: see `build_shard_columns`.

    Raises:
        CheckpointError: it cannot be written (the disk is full, say); what was there before still is.
    """
    path = get_shard_path(folder, number)
    _, n_points, n_parameters = columns["theta"].shape
    table = Dataset.from_dict(columns, features=_features(n_points, n_parameters)).with_format("arrow")[:]
    with atomic_file(path) as draft:
        pyarrow.parquet.write_table(table, draft)
    with atomic_file(_checksum_path(path)) as draft:
        draft.write_text(_checksum_line(path))


def read_shard(folder: str | os.PathLike, number: int) -> pyarrow.Table:
    """The columns of a whole shard that training reads."""
    table = read_parquet(get_shard_path(folder, number), [*TRAINING_COLUMNS, _OLD_TRANSFORM_SEED])
    # Collections recorded by version 0.1 can be trained on: only the name of this column differs.
    names = table.column_names
    if _OLD_TRANSFORM_SEED in names:
        names[names.index(_OLD_TRANSFORM_SEED)] = "transform_seed"
    return table.rename_columns(names)


def build_shard_columns(
    tasks: list[TrainingTask], recording: Recording, mask: torch.Tensor, times: list[float], seconds: float, flops: int
) -> dict[str, Any]:
    """The rows of a group of tasks, by column.

    Args:
        mask: `(n_tokens, token_dim)` bool; only the numbers of theta where it is True are stored.
        times: of the recorded points, 0 to 1.
        seconds, flops: what one trajectory cost.
    """
    n = len(tasks)
    theta = recording.deltas[:, :, mask].half().numpy()
    columns: dict[str, Any] = _task_columns(tasks)
    columns["times"] = [times] * n
    columns["theta"] = theta
    columns["losses"] = recording.losses.tolist()
    columns["support_accuracy"] = recording.support_accuracy.tolist()
    columns["query_accuracy"] = recording.query_accuracy.tolist()
    columns["diverged"] = recording.diverged.tolist()
    columns["seconds"] = [seconds] * n
    columns["flops"] = [flops] * n
    columns["bytes"] = [theta[0].nbytes] * n
    return columns


def _task_columns(tasks: list[TrainingTask]) -> dict[str, list]:
    columns: dict[str, list] = defaultdict(list)
    for task in tasks:
        episode = task.episode
        columns["index"].append(episode.index)
        columns["domain"].append(episode.domain)
        columns["classes"].append(episode.classes.tolist())
        columns["support"].append(episode.support.tolist())
        columns["support_labels"].append(episode.support_labels.tolist())
        columns["query"].append(episode.query.tolist())
        columns["query_labels"].append(episode.query_labels.tolist())
        columns["transform_seed"].append(task.transform_seed)
        columns["flip"].append(task.flip)
    return columns


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


def summarise_shards(folder: str | os.PathLike, groups: int) -> dict:
    """What the whole shards of a collection hold and cost.

    Returns:
        The number of `rows` and how many of them `diverged`; the sums of `seconds` and `flops`; the `bytes` on disk;
        and for `query_accuracy` (in %) and `loss` the means at the `start` and the `end` of the trajectories that did
        not diverge, None if there are none.
    """
    rows, n_bytes = [], 0
    for number in range(groups):
        if find_shard_problem(folder, number) is None:
            path = get_shard_path(folder, number)
            rows += read_parquet(path, ["diverged", "seconds", "flops", "query_accuracy", "losses"]).to_pylist()
            n_bytes += path.stat().st_size
    seconds, flops = 0.0, 0
    for row in rows:
        seconds += row["seconds"]
        flops += row["flops"]
    whole = [row for row in rows if not row["diverged"]]
    return {
        "rows": len(rows),
        "diverged": len(rows) - len(whole),
        "seconds": round(seconds, 3),
        "flops": flops,
        "bytes": n_bytes,
        "query_accuracy": _average_ends(whole, "query_accuracy"),
        "loss": _average_ends(whole, "losses"),
    }


def _average_ends(rows: list[dict], column: str) -> dict[str, float | None]:
    """The means of the first and of the last values of a column of lists."""
    if not rows:
        return {"start": None, "end": None}
    start = end = 0.0
    for row in rows:
        start += row[column][0]
        end += row[column][-1]
    return {"start": round(start / len(rows), 4), "end": round(end / len(rows), 4)}
