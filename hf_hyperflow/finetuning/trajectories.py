"""Recorded fine-tuning trajectories on disk: a `datasets` dataset of checked shards, and what training reads of it.

A folder (or Hub dataset) holds

    collection.json                    how it was collected, from what, on what, at what cost
    data/shard-00000.parquet           the rows of one group of tasks
    data/shard-00000.parquet.sha256    its checksum, as `sha256sum -c` reads it
    README.md                          the card, with what `datasets.load_dataset(folder)` needs

A shard counts only with its checksum: what was cut off in the middle of writing, or damaged later, is never used.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow
import torch

from ..data.domains import Domain
from ..data.episodes import Episode
from ..data.parquet import read_parquet
from ..data.tasks import TrainingTask
from ..modeling.fingerprint import fingerprints_match
from ..modeling.hub import fetch
from ..modeling.model_card import MARK, PAPER
from ..modeling.parameter_space import ParameterSpace
from ..modeling.peft_configs import config_to_dict
from ..modeling.saving import CheckpointError
from .shards import DATA, shard_path, shard_problem, totals

COLLECTION = "collection.json"


@dataclass(frozen=True)
class Trajectories:
    """What training needs of a collection; rows whose teacher diverged are left out.

    Attributes:
        tasks: one per row.
        times: `(n_points,)`, the recorded points on the clock of the flow, 0 to 1.
        deltas: `(n_rows, n_points, n_tokens, token_dim)` float16: theta minus the adapter's start.
        mask: `(n_tokens, token_dim)` bool, False where a row of theta is padded.
        diverged: how many rows were left out.
        collection: what `collection.json` says.
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
    """`(n_tokens, 1)` float32: root mean square of the endpoints' deltas in each token.

    Tokens that hardly ever move get a hundredth of the largest, so that they can be divided by.
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
    """Load a collection from a folder or the Hub; damaged and missing shards are named in a warning and left out.

    Args:
        source: a folder, or the Hub id of a dataset.
        space: the parameters that the flow moves.
        domains: where the images of the tasks come from; None: not checked.
        fingerprint: of the backbone (`hf_hyperflow.modeling.adapter.fingerprint`); None: not checked.

    Raises:
        CheckpointError: no collection there, or nothing of it is whole.
        ValueError: it is of another parameter space, of another backbone or of other images; the difference is named.
    """
    folder = fetch(source, COLLECTION, f"{DATA}/*", repo_type="dataset")
    collection = read_collection(folder)
    _require_same(collection, source, space, domains, fingerprint)
    wanted = range(collection["groups"])
    bad = {number: problem for number in wanted if (problem := shard_problem(folder, number)) is not None}
    if bad:
        warnings.warn(
            f"{source} lacks {len(bad)} of {len(wanted)} shards, and training goes on without them: "
            f"{'; '.join(bad.values())}. Run the command that collected it again: it makes what is missing.",
            stacklevel=2,
        )
    tables = [read_parquet(shard_path(folder, n), _NEEDED) for n in wanted if n not in bad]
    if not tables:
        raise CheckpointError(f"{source} has no whole shard. Run training/collect_trajectories.py on that folder.")
    if bad or not collection["totals"]:  # as it was collected so far
        collection["totals"] = totals(folder, collection["groups"])
    tasks, deltas, diverged = [], [], 0
    for table in tables:
        rows = table.drop_columns(["theta"]).to_pylist()
        kept = [i for i, row in enumerate(rows) if not row["diverged"]]
        tasks += [_task(rows[i]) for i in kept]
        deltas.append(_deltas(table, space)[kept])
        diverged += len(rows) - len(kept)
    times = torch.tensor(collection["times"])
    return Trajectories(tasks, times, torch.cat(deltas), space.mask, diverged, collection)


def read_collection(folder: str | os.PathLike) -> dict:
    """`collection.json` of a folder.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    path = Path(folder, COLLECTION)
    if not path.is_file():
        raise CheckpointError(f"{folder} holds no trajectories: there is no {COLLECTION} in it.")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not set(found) >= _KEYS:
            raise ValueError("it has not the keys of a collection")
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged ({error}). Download or collect it again.") from error
    return found


def describe_space(space: ParameterSpace) -> dict:
    """A parameter space for the record: trajectories of one do not fit another."""
    found = {
        "peft": config_to_dict(space.peft_config),
        "token_dim": space.token_dim,
        "frozen": space.frozen,
        "seed": space.seed,
        "n_parameters": space.n_parameters,
        "tensors": list(zip(space.names, space.shapes, strict=True)),
    }
    return json.loads(json.dumps(found))  # as it is read back


def describe_domain(domain: Domain, max_per_class: int | None) -> dict:
    """A domain for the record, with the SHA-256 of its labels and decoded images."""
    digest = hashlib.sha256(domain.labels.numpy().tobytes())
    digest.update(domain.images.contiguous().numpy())
    return {
        "name": domain.name,
        "classes": len(domain.class_names),
        "images": len(domain),
        "max_per_class": max_per_class,
        "sha256": digest.hexdigest(),
    }


def _require_same(
    collection: dict,
    source: object,
    space: ParameterSpace,
    domains: list[Domain] | None,
    fingerprint: list[float] | None,
) -> None:
    there, here = collection["parameter_space"], describe_space(space)
    if there != here:
        different = sorted(key for key in {**there, **here} if there.get(key) != here.get(key))
        raise ValueError(
            f"the trajectories of {source} are of another parameter space ({', '.join(different)} differ): "
            f"{there['n_parameters']} parameters of {there['peft']['peft_type']} in {len(there['tensors'])} tensors, "
            f"here {here['n_parameters']} of {here['peft']['peft_type']} in {len(here['tensors'])}. Train with the "
            "backbone and the parameter set they were collected with, or collect anew."
        )
    expected = collection["backbone"]["fingerprint"]
    if fingerprint is not None and not fingerprints_match(expected, fingerprint):
        raise ValueError(
            f"the trajectories of {source} were collected on {collection['backbone']['name']}, and this backbone has "
            f"other weights (fingerprint {fingerprint}, expected {expected}). Use that backbone, or collect anew."
        )
    if domains is None:
        return
    given = {domain.name: domain for domain in domains}
    for recorded in collection["domains"]:
        name = recorded["name"]
        if name not in given:
            raise ValueError(
                f"the trajectories of {source} need the domain {name!r}, and the domains given are {sorted(given)}. "
                "Give all datasets they were collected from, with the same --holdout."
            )
        found = describe_domain(given[name], recorded["max_per_class"])
        if found["sha256"] != recorded["sha256"]:
            raise ValueError(
                f"domain {name!r} is not the one that the trajectories of {source} were collected from: it has "
                f"{found['images']} images of {found['classes']} classes, theirs {recorded['images']} of "
                f"{recorded['classes']} (max_per_class {recorded['max_per_class']}), or other pixels. Give the same "
                "dataset, --max_per_class, --holdout and image processor, or collect anew."
            )


#: What every `collection.json` has.
_KEYS = {"arguments", "teacher", "times", "backbone", "parameter_space", "domains", "groups", "totals"}
#: The columns that training reads.
_NEEDED = ["index", "domain", "classes", "support", "support_labels", "query", "query_labels", "transform_seed", "flip"]
_NEEDED += ["diverged", "theta"]


def _task(row: dict) -> TrainingTask:
    keys = ("classes", "support", "support_labels", "query", "query_labels")
    indices = {key: torch.tensor(row[key]) for key in keys}
    return TrainingTask(Episode(row["domain"], row["index"], **indices), row["transform_seed"], row["flip"])


def _deltas(table: pyarrow.Table, space: ParameterSpace) -> torch.Tensor:
    """The column `theta` with its padding put back: `(n, n_points, n_tokens, token_dim)` float16."""
    column = table["theta"].combine_chunks()
    storage = column.storage if isinstance(column, pyarrow.ExtensionArray) else column
    flat = storage.flatten().flatten().to_numpy(zero_copy_only=False).astype(np.float16, copy=False)
    theta = torch.from_numpy(flat.copy()).view(len(table), -1, space.n_parameters)
    deltas = torch.zeros(*theta.shape[:2], *space.mask.shape, dtype=torch.float16)
    deltas[:, :, space.mask] = theta
    return deltas


CARD = """\
---
configs:
- config_name: default
  data_files:
  - split: train
    path: data/*.parquet
tags:
- hyperflow
- few-shot-learning
---

{mark}

# Fine-tuning trajectories of {backbone}

{rows:,} few-shot tasks, each fine-tuned for {steps} steps ({diverged} diverged): what the flow of
{paper} is matched to. Collected with `training/collect_trajectories.py` of hf_hyperflow; recipe, domains, checksums
and costs are in `{collection}`. Images are not stored: a row names its domain and the rows of its images there.

```python
from datasets import load_dataset

trajectories = load_dataset("<this repository or folder>", split="train").with_format("torch")
trajectories[0]["theta"]  # ({n_points}, {n_parameters}): the adapter's numbers minus its start, stored as float16
```

| | |
|---|---|
| Parameters | PEFT {peft_type}, {n_tensors} tensors, in the order of `parameter_space.tensors` |
| Recorded | at t = {times} |
| Domains | {domains} |
| Query accuracy | {start} % at the start, {end} % at the end |
| Cost | {hours:.3g} h on {device}, {flops:.3g} FLOPs, {megabytes:,.0f} MB |

`losses` are those before each step and after the last; `support_accuracy` (of augmented support images) and
`query_accuracy` are in %, at the recorded points. `seconds` and `flops` are a trajectory's share of its group's.
"""


def collection_card(collection: dict) -> str:
    """The README.md of a finished collection."""
    done, space = collection["totals"], collection["parameter_space"]
    return CARD.format(
        mark=MARK,
        paper=PAPER,
        collection=COLLECTION,
        backbone=collection["backbone"]["name"],
        rows=done["rows"],
        diverged=done["diverged"],
        steps=collection["teacher"]["steps"],
        n_points=len(collection["times"]),
        n_parameters=space["n_parameters"],
        peft_type=space["peft"]["peft_type"],
        n_tensors=len(space["tensors"]),
        times=", ".join(f"{time:.3g}" for time in collection["times"]),
        domains=", ".join(f"{d['name']} ({d['classes']} classes, {d['images']} images)" for d in collection["domains"]),
        start=done["query_accuracy"]["start"],
        end=done["query_accuracy"]["end"],
        hours=done["seconds"] / 3600,
        device=collection["hardware"]["device"],
        flops=done["flops"],
        megabytes=done["bytes"] / 1e6,
    )
