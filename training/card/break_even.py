"""The offline cost of an adapter, and the number of tasks after which it breaks even with fine-tuning.

    python -m training.card.break_even --adapter ADAPTER --cost cost.json [--backbone BACKBONE] \
        --output_file offline_cost.json

A method that adapts by gradients costs nothing beforehand and much for every task. HyperFlow is the other way round. It
breaks even after `offline cost / (a task by the method - a task by HyperFlow)` tasks, rounded up.

The command reads the adapter's `training.json` (with the totals of the trajectories it was trained on), the JSON of
`hyperflow bench` and the backbone's `pretraining.json`. It prints Markdown.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hf_hyperflow.arguments import parse
from hf_hyperflow.benchmark.methods import HyperFlow
from hf_hyperflow.modeling.atomic_file import write_json
from hf_hyperflow.modeling.hub import fetch
from hf_hyperflow.modeling.saving import CheckpointError
from hf_hyperflow.modeling.training_section import list_runs, name_phase

from .cost_tables import BIAS, COST_LABELS, FULL, READY, group_by_size
from .markdown import format_table

UNITS = ("seconds", "flops")
#: What the records call HyperFlow, and what it is compared with.
HYPERFLOW = HyperFlow().name
RIVALS = (BIAS, FULL)


@dataclass
class Arguments:
    adapter: str = field(metadata={"help": "the HyperFlow adapter: Hub id or folder"})
    cost: str = field(metadata={"help": "the JSON of `hyperflow bench` for it"})
    output_file: str = field(metadata={"help": "JSON file to write"})
    backbone: str | None = field(default=None, metadata={"help": "its backbone: Hub id or folder"})


@dataclass(frozen=True)
class Stage:
    """A part of the work that was done before the first task.

    Attributes:
        stage: its name.
        hardware: the device in words.
        gpu: whether that is a GPU.
        seconds: of all processes together.
        flops: floating-point operations, None where they were not counted.
        trajectories: how many were recorded, or read in training.
        episodes: how many were run.
        recorded: whether this stage recorded its trajectories.
    """

    stage: str
    hardware: str
    gpu: bool
    seconds: float
    flops: float | None
    trajectories: int = 0
    episodes: int = 0
    recorded: bool = False


def compute_break_even(offline: float, rival: float, hyperflow: float) -> int | None:
    """The number of tasks n from which `offline + n * hyperflow <= n * rival`; None if there is no such number.

    All three have the same unit: seconds, or floating-point operations.
    """
    saved = rival - hyperflow
    return math.ceil(offline / saved) if saved > 0 else None


def compute_offline_cost(
    training: dict[str, Any], cost: dict[str, Any], backbone: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Offline cost and break-even, ready for JSON.

    Args:
        training: `training.json` of an adapter.
        cost: the JSON of `hyperflow bench` for the adapter.
        backbone: `pretraining.json` of its backbone. It is listed but counts for no break-even: every method, direct
            transfer included, needs the backbone.

    Returns:
        `offline`: the stages (see `Stage`); `total`: their sums without the backbone, and the `bytes` of stored
        trajectories; `break_even`: tasks in `seconds` and in `flops` for each image size of `cost` and each rival,
        None where it is never reached; `same_hardware`: whether all stages and `cost` name one device, without which
        seconds do not compare.

    Raises:
        ValueError: one of the files lacks what is needed; the message names it and what to do.
    """
    if "phases" not in training:
        raise ValueError("training.json has no `phases`: its version did not count the offline cost. Train again.")
    costs = group_by_size(cost)
    stages, stored_bytes = [], 0
    runs = list_runs(training)
    for number, run in enumerate(runs):
        for collection in (run.get("trajectories") or {}).get("collections", []):
            stages.append(_describe_collection(collection))
            stored_bytes += collection["totals"]["bytes"]
        for name, phase in run["phases"].items():
            stages.append(_describe_phase(name_phase(name, number, runs), phase, run["hardware"]))
    total = _add_up(stages)
    total["bytes"] = stored_bytes
    per_task: dict[str, Any] = {}
    tasks: dict[str, Any] = {}
    for size, rows in costs.items():
        per_task[size] = {HYPERFLOW: _select_units(rows[READY])}
        tasks[size] = {}
        for rival in RIVALS:
            per_task[size][rival] = _select_units(rows[rival])
            tasks[size][rival] = _compare_with(per_task[size][rival], per_task[size][HYPERFLOW], total)
    task_device = next(iter(costs.values()))[READY]["device"]
    backbone_stage = None
    if backbone is not None:
        backbone_stage = asdict(_describe_pretraining(backbone))
    return {
        "backbone": backbone_stage,
        "offline": [asdict(stage) for stage in stages],
        "total": total,
        "per_task": per_task,
        "per_task_hardware": task_device,
        "break_even": tasks,
        "same_hardware": all(stage.hardware == task_device for stage in stages),
    }


def _describe_collection(collection: dict[str, Any]) -> Stage:
    """The seconds of a collection are already those of all its processes together."""
    totals, hardware = collection["totals"], collection["hardware"]
    return Stage(
        stage=f"collecting {collection['name']}",
        hardware=hardware["device"],
        gpu=hardware["gpu"],
        seconds=totals["seconds"],
        flops=totals["flops"],
        trajectories=totals["rows"] - totals["diverged"],
        recorded=True,
    )


def _describe_phase(name: str, phase: dict[str, Any], hardware: dict[str, Any]) -> Stage:
    """The seconds of a phase are wall-clock: its processes ran side by side."""
    return Stage(
        stage=name,
        hardware=hardware["device"],
        gpu=hardware["gpu"],
        seconds=phase["seconds"] * hardware["processes"],
        flops=phase["flops"],
        trajectories=phase.get("rows", 0),
        episodes=phase.get("episodes", 0),
    )


def _describe_pretraining(record: dict[str, Any]) -> Stage:
    """The backbone's own training."""
    name = "pretraining the backbone"
    if "phases" in record:
        return _describe_phase(name, record["phases"]["pretraining"], record["hardware"])
    # Older records have a clock only, which begins anew wherever the run was resumed: add up its last readings.
    seconds = last_reading = 0
    for entry in record["history"]:
        reading = entry.get("seconds", last_reading)
        if reading < last_reading:
            seconds += last_reading
        last_reading = reading
    seconds += last_reading
    return Stage(stage=name, hardware="not recorded", gpu=False, seconds=seconds, flops=None)


def _add_up(stages: list[Stage]) -> dict[str, float]:
    """Sums over the stages; trajectories are counted where they were recorded."""
    total: dict[str, float] = {"seconds": 0.0, "flops": 0.0, "episodes": 0, "trajectories": 0}
    for stage in stages:
        assert stage.flops is not None, "only the backbone's training may be uncounted"
        total["seconds"] += stage.seconds
        total["flops"] += stage.flops
        total["episodes"] += stage.episodes
        if stage.recorded:
            total["trajectories"] += stage.trajectories
    return total


def _select_units(row: dict[str, float]) -> dict[str, float]:
    return {unit: row[unit] for unit in UNITS}


def _compare_with(
    rival: dict[str, float], hyperflow: dict[str, float], total: dict[str, float]
) -> dict[str, int | None]:
    return {unit: compute_break_even(total[unit], rival[unit], hyperflow[unit]) for unit in UNITS}


def format_offline_cost(record: dict[str, Any]) -> str:
    """The offline cost and the break-even as two Markdown tables, with notes on how to read them."""
    parts = [_build_stages_table(record)]
    parts.append(f"Stored trajectories: {record['total']['bytes'] / 1e6:,.1f} MB.")
    parts.append(_build_break_even_table(record))
    if len(record["break_even"]) > 1:
        parts.append(
            "The offline cost is that of the image size the adapter was trained at. Rows of other sizes tell when that "
            "same offline cost would break even there."
        )
    if not record["same_hardware"]:
        parts.append(
            f"Not all times were measured on one machine (those per task: {record['per_task_hardware']}). The "
            "break-even in time holds for this mixture only, the one in FLOPs anywhere."
        )
    return "\n\n".join(parts) + "\n"


def _build_stages_table(record: dict[str, Any]) -> str:
    stages = list(record["offline"])
    if record["backbone"]:
        stages.insert(0, record["backbone"])
    rows = []
    for stage in stages:
        row = [stage["stage"], stage["hardware"], _format_hours(stage["seconds"]), _format_flops(stage["flops"])]
        rows.append([*row, _format_count(stage["trajectories"]), _format_count(stage["episodes"])])
    total = record["total"]
    title = "**offline cost**"
    if record["backbone"]:
        title += " (without the backbone, which every method needs)"
    sums = [f"**{_format_hours(total['seconds'])}**", f"**{_format_flops(total['flops'])}**"]
    rows.append([title, "", *sums, f"{total['trajectories']:,} recorded", f"{total['episodes']:,}"])
    return format_table(["stage", "hardware", "hours", "FLOPs", "trajectories", "episodes"], rows)


def _build_break_even_table(record: dict[str, Any]) -> str:
    rows = []
    for size, rivals in record["break_even"].items():
        own = record["per_task"][size][HYPERFLOW]
        for rival, tasks in rivals.items():
            other = record["per_task"][size][rival]
            row = [size, COST_LABELS[rival], _format_cost(other), _format_cost(own)]
            row += [_format_tasks(tasks["seconds"]), _format_tasks(tasks["flops"])]
            rows.append(row)
    headings = ["images", "against", "a task with it", "a task with HyperFlow", "break-even in time", "in FLOPs"]
    return format_table(headings, rows)


def _format_hours(seconds: float) -> str:
    return f"{seconds / 3600:.2f} h"


def _format_flops(flops: float | None) -> str:
    return "not recorded" if flops is None else f"{flops / 1e12:,.1f} T"


def _format_count(number: int) -> str:
    return f"{number:,}" if number else ""


def _format_cost(cost: dict[str, float]) -> str:
    return f"{cost['seconds']:.3g} s, {cost['flops'] / 1e9:,.0f} G"


def _format_tasks(number: int | None) -> str:
    return "never" if number is None else f"after {number:,} tasks"


def read_json(path: Path) -> dict[str, Any]:
    """The content of a JSON file.

    Raises:
        ValueError: it is missing or no JSON; it is named.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error


def main(argv: list[str] | None = None) -> None:
    arguments = parse(Arguments, argv)
    try:
        training = read_json(fetch(arguments.adapter, "training.json") / "training.json")
        backbone = None
        if arguments.backbone is not None:
            backbone = read_json(fetch(arguments.backbone, "pretraining.json") / "pretraining.json")
        record = compute_offline_cost(training, read_json(Path(arguments.cost)), backbone)
        write_json(arguments.output_file, record)
    except KeyError as error:
        raise SystemExit(f"error: one of the files has no {error}: it was written by something else.") from error
    except (CheckpointError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error
    print(format_offline_cost(record))


if __name__ == "__main__":
    main()
