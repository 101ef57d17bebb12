"""Recorded fine-tuning trajectories: a `datasets` dataset of checked shards on disk, and what training reads of it.

A folder (or Hub dataset) holds

    collection.json                    how it was collected, from what, with what and at what cost
    data/shard-00000.parquet           the rows of one group of tasks
    data/shard-00000.parquet.sha256    its checksum, as `sha256sum -c` reads it
    README.md                          the card, with what `datasets.load_dataset(folder)` needs

A shard counts only with its checksum, so that a shard that was cut off in writing or damaged later is never used.
"""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow
import torch

from ..data.domains import Domain
from ..data.episodes import Episode
from ..data.tasks import TrainingTask
from ..modeling.hub import fetch
from ..modeling.parameter_space import ParameterSpace
from ..modeling.saving import CheckpointError
from .collection import COLLECTION, check_backbone, check_domains, check_space, read_collection
from .shards import DATA, find_shard_problem, read_shard, summarise_shards


@dataclass(frozen=True)
class Trajectories:
    """What training needs of a collection; rows whose teacher diverged are left out.

    Attributes:
        tasks: one per row.
        times: `(n_points,)`, the recorded points on the clock of the flow, 0 to 1.
        deltas: `(n_rows, n_points, n_tokens, token_dim)` float16, theta minus the adapter's start.
        mask: `(n_tokens, token_dim)` bool, False where a row of theta is padded.
        diverged: how many rows were left out.
        collection: the content of `collection.json`.
    """

    tasks: list[TrainingTask]
    times: torch.Tensor
    deltas: torch.Tensor
    mask: torch.Tensor
    diverged: int
    collection: dict

    def __len__(self) -> int:
        return len(self.tasks)


def measure_token_scale(trajectories: Trajectories) -> torch.Tensor:
    """How far each token moves, `(n_tokens, 1)` float32: the root mean square of the endpoints' deltas in it.

    The scale is made to divide by. Tokens that hardly ever move therefore get a hundredth of the largest scale.
    """
    end = trajectories.deltas[:, -1].float()
    scale = (end.square().sum(dim=(0, 2)) / (len(end) * trajectories.mask.sum(dim=1))).sqrt()
    return scale.clamp(min=0.01 * scale.max()).unsqueeze(1)


def load_trajectories(
    source: str | os.PathLike,
    space: ParameterSpace,
    *,
    domains: list[Domain] | None = None,
    fingerprint: list[float] | None = None,
) -> Trajectories:
    """Load a collection from a folder or the Hub; a warning names the shards that are damaged or missing.

    Args:
        source: a folder, or the Hub id of a dataset.
        space: the parameters that the flow moves.
        domains: where the images of the tasks come from; None: that is not checked.
        fingerprint: of the backbone, see `hf_hyperflow.modeling.fingerprint`; None: it is not checked.

    Raises:
        CheckpointError: there is no collection, or it has no whole shard.
        ValueError: it is of another parameter space, of another backbone or of other images; the message says what
            differs.
    """
    folder = fetch(source, COLLECTION, f"{DATA}/*", repo_type="dataset")
    collection = read_collection(folder)
    check_space(collection, source, space)
    if fingerprint is not None:
        check_backbone(collection, source, fingerprint)
    if domains is not None:
        check_domains(collection, source, domains)
    numbers = _find_whole_shards(folder, collection["groups"], source)
    # Either it is not finished, or not all of what it says is there.
    if not collection["totals"] or len(numbers) < collection["groups"]:
        collection["totals"] = summarise_shards(folder, collection["groups"])
    tasks: list[TrainingTask] = []
    deltas, diverged = [], 0
    for number in numbers:
        table = read_shard(folder, number)
        rows = table.drop_columns(["theta"]).to_pylist()
        kept = [i for i, row in enumerate(rows) if not row["diverged"]]
        tasks += [_read_task(rows[i]) for i in kept]
        deltas.append(_read_deltas(table, space)[kept])
        diverged += len(rows) - len(kept)
    times = torch.tensor(collection["times"])
    return Trajectories(tasks, times, torch.cat(deltas), space.mask, diverged, collection)


def _find_whole_shards(folder: Path, groups: int, source: str | os.PathLike) -> list[int]:
    """The numbers of the whole shards, with a warning about the others; CheckpointError if there is none."""
    whole, problems = [], []
    for number in range(groups):
        problem = find_shard_problem(folder, number)
        if problem is None:
            whole.append(number)
        else:
            problems.append(problem)
    if problems:
        warnings.warn(
            f"{source} lacks {len(problems)} of {groups} shards, and training goes on without them: "
            f"{'; '.join(problems)}. Run the command that collected it again: it makes what is missing.",
            stacklevel=3,
        )
    if not whole:
        raise CheckpointError(f"{source} has no whole shard. Run training/collect_trajectories.py on that folder.")
    return whole


def _read_task(row: dict) -> TrainingTask:
    episode = Episode(
        domain=row["domain"],
        index=row["index"],
        classes=torch.tensor(row["classes"]),
        support=torch.tensor(row["support"]),
        support_labels=torch.tensor(row["support_labels"]),
        query=torch.tensor(row["query"]),
        query_labels=torch.tensor(row["query_labels"]),
    )
    return TrainingTask(episode, row["transform_seed"], row["flip"])


def _read_deltas(table: pyarrow.Table, space: ParameterSpace) -> torch.Tensor:
    """The column `theta` with its padding put back: `(n, n_points, n_tokens, token_dim)` float16."""
    column = table["theta"].combine_chunks()
    storage = column.storage if isinstance(column, pyarrow.ExtensionArray) else column
    flat = storage.flatten().flatten().to_numpy(zero_copy_only=False).astype(np.float16, copy=False)
    theta = torch.from_numpy(flat.copy()).view(len(table), -1, space.n_parameters)
    deltas = torch.zeros(*theta.shape[:2], *space.mask.shape, dtype=torch.float16)
    deltas[:, :, space.mask] = theta
    return deltas
