"""What a task costs, as tables of a card, from the JSON of `hyperflow bench`."""

from __future__ import annotations

from typing import Any

from hf_hyperflow.benchmark.bench.records import format_size
from hf_hyperflow.benchmark.bench.task import ADAPT, FORWARD, INTEGRATE, NEXT_READY, READY
from hf_hyperflow.benchmark.methods import (
    BiasTuning,
    DirectTransfer,
    FullFineTuning,
    LogisticRegression,
    LoraTuning,
)

from .markdown import format_table

#: The number of images that a card tells the cost of.
N_IMAGES = 25

BIAS, FULL = BiasTuning.name, FullFineTuning.name

#: What a card tells of what was measured, and the words for it.
COST_LABELS = {
    FORWARD: "one forward pass over the images",
    DirectTransfer.name: DirectTransfer.label,
    LogisticRegression.name: LogisticRegression.label,
    INTEGRATE: "HyperFlow, the flow alone, of images that are encoded",
    ADAPT: "HyperFlow, the adaptation alone",
    READY: "**HyperFlow, ready to predict**",
    NEXT_READY: "HyperFlow, ready to predict, next task on the backbone",
    BIAS: BiasTuning.label,
    LoraTuning.name: LoraTuning.label,
    FULL: FullFineTuning.label,
}

#: Records by image size in words and by what they are of.
CostsBySize = dict[str, dict[str, dict[str, Any]]]


def group_by_size(cost: dict[str, Any]) -> CostsBySize:
    """The records of `N_IMAGES` images in full precision.

    Args:
        cost: the JSON of `hyperflow bench`.

    Raises:
        ValueError: it has no such records, or is something else.
    """
    costs: CostsBySize = {}
    for record in cost.get("records", []):
        if record["n_images"] == N_IMAGES and record["dtype"] == "float32" and record["work"] in COST_LABELS:
            costs.setdefault(format_size(record["size"]), {})[record["work"]] = record
    for size, records in costs.items():
        for work in (READY, FULL):
            if work not in records:
                raise ValueError(f"the costs at {size} have no record {work!r}: run `hyperflow bench` again.")
    if not costs:
        raise ValueError(f"the costs have no records of {N_IMAGES} images: give the JSON of `hyperflow bench`.")
    return costs


def build_cost_table(cost: dict[str, Any]) -> str:
    """Time, memory and operations until a task is ready; what was not measured is left out."""
    headings = [f"{N_IMAGES} images, 5 classes"]
    rows: dict[str, list[str]] = {}
    for size, records in group_by_size(cost).items():
        headings += [f"{size}: time", "memory", "FLOPs", "of full fine-tuning's time, memory"]
        full = records[FULL]
        for work, label in COST_LABELS.items():
            if work not in records:
                continue
            record = records[work]
            row = rows.setdefault(work, [label])
            row += [f"{record['seconds']:.3g} s", f"{record['peak_memory_mb']:,.0f} MB"]
            row.append(f"{record['flops'] / 1e9:,.0f} G")
            time_share = 100 * record["seconds"] / full["seconds"]
            memory_share = 100 * record["peak_memory_mb"] / full["peak_memory_mb"]
            row.append(f"{time_share:.3g} %, {memory_share:.3g} %")
    return format_table(headings, rows.values())


def build_speed_table(cost: dict[str, Any]) -> str:
    """Time and memory until a task is ready, at the first image size."""
    costs = group_by_size(cost)
    size = next(iter(costs))
    rows = []
    for work in (DirectTransfer.name, READY, BIAS, FULL):
        record = costs[size][work]
        rows.append([COST_LABELS[work], f"{record['seconds']:.3g} s", f"{record['peak_memory_mb']:,.0f} MB"])
    heading = f"{N_IMAGES} images of 5 classes at {size}, on {costs[size][READY]['device']}"
    return format_table([heading, "time", "peak memory"], rows)
