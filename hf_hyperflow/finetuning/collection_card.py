"""The dataset card of a collection of trajectories."""

from __future__ import annotations

from ..modeling.model_card import MARK, PAPER
from .collection import COLLECTION

_TEMPLATE = """\
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

{rows:,} few-shot tasks, each fine-tuned for {steps} steps ({diverged} of them diverged). The flow of {paper} is
trained to follow them. They were collected with `training/collect_trajectories.py` of hf_hyperflow; its arguments, the
domains with their checksums and the costs are in `{collection}`. Images are not stored: a row names its domain and the
rows of its images there.

```python
from datasets import load_dataset

trajectories = load_dataset("<this repository or folder>", split="train").with_format("torch")
trajectories[0]["theta"]  # ({n_points}, {n_parameters}): the adapter's numbers minus their start, float16
```

| | |
|---|---|
| Parameters | PEFT {peft_type}, {n_tensors} tensors, in the order of `parameter_space.tensors` |
| Recorded | at t = {times} |
| Domains | {domains} |
| Query accuracy | {start} % at the start, {end} % at the end |
| Cost | {hours:.3g} h on {device}, {flops:.3g} FLOPs, {megabytes:,.0f} MB |

`losses` has the loss before each step and after the last. `support_accuracy` (of augmented support images) and
`query_accuracy` are in %, at the recorded points. `seconds` and `flops` are a trajectory's share of its group's.
"""


def collection_card(collection: dict) -> str:
    """The README.md of a finished collection, from its `collection.json`."""
    totals, space = collection["totals"], collection["parameter_space"]
    domains = [f"{d['name']} ({d['classes']} classes, {d['images']} images)" for d in collection["domains"]]
    times = [f"{time:.3g}" for time in collection["times"]]
    return _TEMPLATE.format(
        mark=MARK,
        paper=PAPER,
        collection=COLLECTION,
        backbone=collection["backbone"]["name"],
        rows=totals["rows"],
        diverged=totals["diverged"],
        steps=collection["teacher"]["steps"],
        n_points=len(collection["times"]),
        n_parameters=space["n_parameters"],
        peft_type=space["peft"]["peft_type"],
        n_tensors=len(space["tensors"]),
        times=", ".join(times),
        domains=", ".join(domains),
        start=totals["query_accuracy"]["start"],
        end=totals["query_accuracy"]["end"],
        hours=totals["seconds"] / 3600,
        device=collection["hardware"]["device"],
        flops=totals["flops"],
        megabytes=totals["bytes"] / 1e6,
    )
