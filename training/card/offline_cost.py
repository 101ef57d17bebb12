"""The bill: what it took to make an adapter, and after how many tasks it has paid for itself.

A method that adapts by gradients costs nothing beforehand and much for every task, HyperFlow the other way round. It
has paid for itself after `offline / (method's cost of a task - HyperFlow's cost of a task)` tasks, rounded up.
"""

from __future__ import annotations

import math

#: Columns and rows of the JSON of `training/benchmark_cost.py`.
UNITS = ("seconds", "flops")
HYPERFLOW, RIVALS = "hyperflow ready", ("bias fine-tuning", "full fine-tuning")


def break_even(offline: float, rival: float, hyperflow: float) -> int | None:
    """After how many tasks `offline + n * hyperflow` is no more than `n * rival`; None: never.

    All three in the same unit: seconds, or floating-point operations.
    """
    saved = rival - hyperflow
    return math.ceil(offline / saved) if saved > 0 else None


def bill(training: dict, cost: dict, backbone: dict | None = None) -> dict:
    """The whole bill, ready for JSON.

    Args:
        training: `training.json` of an adapter.
        cost: the JSON of `training/benchmark_cost.py` for the adapter.
        backbone: `pretraining.json` of its backbone. It is listed but not part of any break-even: every method, direct
            transfer included, needs the backbone.

    Returns:
        `offline`: one entry per stage with `stage`, `hardware`, `seconds` (of all processes together), `flops`,
        `trajectories` and `episodes`; `total`: their sums without the backbone, and `bytes` of stored trajectories;
        `break_even`: for each image size of `cost` and each rival, tasks in `seconds` and in `flops`, None: never;
        `same_hardware`: whether all stages and `cost` name one device, without which seconds do not compare.

    Raises:
        ValueError: one of the files has not what is needed; the message names it and what to do.
    """
    if "phases" not in training:
        raise ValueError(
            "training.json has no `phases`: it was written by a version that did not count the offline cost. "
            "Train again with training/train_drift.py."
        )
    sizes = [size for size, rows in cost.items() if isinstance(rows, dict) and HYPERFLOW in rows]
    if not sizes:
        raise ValueError(f"the costs have no row {HYPERFLOW!r}: give the JSON of training/benchmark_cost.py.")
    collections = (training.get("trajectories") or {}).get("collections", [])
    stages = [_collected(collection) for collection in collections]
    stages += [_trained(name, phase, training["hardware"]) for name, phase in training["phases"].items()]
    total = {key: sum(stage[key] for stage in stages) for key in ("seconds", "flops", "episodes")}
    total["trajectories"] = sum(stage["trajectories"] for stage in stages if stage["recorded"])
    total["bytes"] = sum(collection["totals"]["bytes"] for collection in collections)
    per_task = {size: {m: {u: cost[size][m][u] for u in UNITS} for m in (HYPERFLOW, *RIVALS)} for size in sizes}
    tasks = {
        size: {r: {u: break_even(total[u], methods[r][u], methods[HYPERFLOW][u]) for u in UNITS} for r in RIVALS}
        for size, methods in per_task.items()
    }
    devices = {stage["hardware"] for stage in stages} | {cost.get("hardware", "unknown")}
    return {
        "backbone": None if backbone is None else _pretrained(backbone),
        "offline": stages,
        "total": total,
        "per_task": per_task,
        "per_task_hardware": cost.get("hardware", "unknown"),
        "break_even": tasks,
        "same_hardware": len(devices) == 1,
    }


def _stage(name: str, hardware: dict, seconds: float, flops: float | None, **counts: object) -> dict:
    entry = {"stage": name, "hardware": hardware["device"], "gpu": hardware["gpu"], "seconds": seconds, "flops": flops}
    return entry | {"trajectories": 0, "episodes": 0, "recorded": False} | counts


def _collected(collection: dict) -> dict:
    """A collection's seconds are those of all its processes together already."""
    totals = collection["totals"]
    name = f"collecting {collection['name']}"
    return _stage(
        name,
        collection["hardware"],
        totals["seconds"],
        totals["flops"],
        trajectories=totals["rows"] - totals["diverged"],
        recorded=True,
    )


def _trained(name: str, phase: dict, hardware: dict) -> dict:
    """A phase's seconds are wall-clock: its processes ran side by side."""
    seconds = phase["seconds"] * hardware["processes"]
    counts = {"trajectories": phase.get("rows", 0), "episodes": phase.get("episodes", 0)}
    return _stage(name, hardware, seconds, phase["flops"], **counts)


def _pretrained(record: dict) -> dict:
    """The backbone's own training. Older records have seconds only, which begin anew where a run was resumed."""
    if "phases" in record:
        phase = record["phases"]["pretraining"]
        return _trained("pretraining the backbone", phase, record["hardware"])
    clock = [entry["seconds"] for entry in record["history"] if "seconds" in entry]
    seconds = sum(now for now, after in zip(clock, [*clock[1:], -1], strict=True) if after < now)
    return _stage("pretraining the backbone", {"device": "not recorded", "gpu": False}, seconds, None)


def bill_markdown(found: dict) -> str:
    """The bill as two Markdown tables and what they mean in words."""
    lines = ["| stage | hardware | hours | FLOPs | trajectories | episodes |", "|---|---|---|---|---|---|"]
    stages = ([found["backbone"]] if found["backbone"] else []) + found["offline"]
    for stage in stages:
        lines.append(
            f"| {stage['stage']} | {stage['hardware']} | {_hours(stage['seconds'])} | {_flops(stage['flops'])} | "
            f"{_count(stage['trajectories'])} | {_count(stage['episodes'])} |"
        )
    total = found["total"]
    without = " (without the backbone, which every method needs)" if found["backbone"] else ""
    lines += [
        f"| **offline cost**{without} | | **{_hours(total['seconds'])}** | **{_flops(total['flops'])}** | "
        f"{total['trajectories']:,} recorded | {total['episodes']:,} |",
        "",
        f"Stored trajectories: {total['bytes'] / 1e6:,.1f} MB.",
        "",
        "| images | against | a task with it | a task with HyperFlow | paid for itself in time | in FLOPs |",
        "|---|---|---|---|---|---|",
    ]
    for size, rivals in found["break_even"].items():
        own = found["per_task"][size][HYPERFLOW]
        for rival, tasks in rivals.items():
            other = found["per_task"][size][rival]
            lines.append(
                f"| {size} | {rival} | {_task(other)} | {_task(own)} | {_tasks(tasks['seconds'])} | "
                f"{_tasks(tasks['flops'])} |"
            )
    if len(found["break_even"]) > 1:
        lines += [
            "",
            "The offline cost is that of the image size the adapter was trained at; lines of other sizes say what the "
            "same offline cost would be worth there.",
        ]
    if not found["same_hardware"]:
        lines += [
            "",
            f"Not all times were measured on one machine (those per task: {found['per_task_hardware']}): the "
            "break-even in time holds for this mixture only, that in FLOPs anywhere.",
        ]
    return "\n".join(lines) + "\n"


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:.2f} h"


def _flops(flops: float | None) -> str:
    return "not recorded" if flops is None else f"{flops / 1e12:,.1f} T"


def _count(number: int) -> str:
    return f"{number:,}" if number else ""


def _task(cost: dict) -> str:
    return f"{cost['seconds']:.3g} s, {cost['flops'] / 1e9:,.0f} G"


def _tasks(number: int | None) -> str:
    return "never" if number is None else f"after {number:,} tasks"
