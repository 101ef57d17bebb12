"""The figures of an integration report, drawn from its records."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hf_hyperflow.benchmark.figures import DPI
from hf_hyperflow.modeling.solvers import TABLEAUX

from .records import Records, column, get, select

#: The lists of records in `integration.json`, by name.
Report = dict[str, Records]

COLOURS = matplotlib.color_sequences["tab10"]
TEACHER = "black"
LINE_STYLES = ["-", "--", ":", "-."]


def draw_integration(report: Report, folder: Path) -> None:
    """Write `distance.png`, `cosine.png`, `loss.png` and `solvers.png`.

    Args:
        report: `arrival`, `along`, `teacher` and `solvers` of `training.card.integration_report`.
        folder: an existing one.
    """
    draw_distance(report).savefig(folder / "distance.png", dpi=DPI)
    draw_cosine(report).savefig(folder / "cosine.png", dpi=DPI)
    draw_loss(report).savefig(folder / "loss.png", dpi=DPI)
    draw_solvers(report).savefig(folder / "solvers.png", dpi=DPI)


def draw_distance(report: Report) -> Figure:
    """Distance of theta(1) to the recorded endpoint, relative to that of theta(0): a panel per set of tasks."""
    adapters, task_sets = _names(report, "adapter"), _names(report, "tasks")
    figure, axes = _panels(1, len(task_sets), 4.5, 1.6 + 0.6 * len(adapters))
    kinds = [
        ("distance", "o", "the flow from the adapter's start"),
        ("distance_from_start", "s", "the flow from the teacher's own start"),
        ("distance_of_mean", "|", "one displacement for all tasks"),
    ]
    for axis, tasks in zip(axes[0], task_sets, strict=True):
        for height, adapter in enumerate(reversed(adapters)):
            record = get(report["arrival"], adapter=adapter, tasks=tasks)
            for shift, (key, marker, _) in zip((0.2, 0, -0.2), kinds, strict=True):
                axis.errorbar(
                    record[key],
                    height + shift,
                    xerr=record[f"{key}_ci95"],
                    fmt=marker,
                    capsize=3,
                    markersize=5,
                    color="grey" if key == "distance_of_mean" else _colour(adapters.index(adapter)),
                )
        axis.axvline(1, color="grey", linewidth=0.8)
        axis.axvline(0, color=TEACHER, linewidth=0.8, linestyle=":")
        axis.set_ylim(-0.6, len(adapters) - 0.4)
        axis.set_yticks(range(len(adapters)), adapters[::-1] if axis is axes[0][0] else [])
        axis.set_title(_title(report["arrival"], tasks))
        axis.set_xlabel("distance to the teacher's endpoint\n(0: arrived, 1: not moved; 95 % interval)")
    handles = []
    for _, marker, label in kinds:
        handles += axes[0][0].plot([], [], marker, color="grey", label=label)
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    return figure


def draw_cosine(report: Report) -> Figure:
    """Cosine of predicted and recorded velocity, and below the speeds, along t: a column per set of tasks."""
    adapters, task_sets = _names(report, "adapter"), _names(report, "tasks")
    figure, (cosines, speeds) = _panels(2, len(task_sets), 4.5, 3.2)
    for cosine, speed, tasks in zip(cosines, speeds, task_sets, strict=True):
        for i, adapter in enumerate(adapters):
            records = select(report["along"], adapter=adapter, tasks=tasks)
            _draw_curve(cosine, records, "cosine_path", _colour(i), label=adapter)
            _draw_curve(cosine, records, "cosine_flow", _colour(i), linestyle="--")
            _draw_curve(speed, records, "speed", _colour(i))
            _draw_curve(speed, records, "recorded_speed", _colour(i), linestyle=":")
        cosine.set_title(_title(report["arrival"], tasks))
        cosine.axhline(0, color="grey", linewidth=0.8)
        speed.set_xlabel("t")
        speed.axvline(1, color="grey", linewidth=0.8, linestyle=":")
    cosines[0].set_ylabel("cosine to the recorded velocity\n(solid: on its path, dashed: on the flow)")
    speeds[0].set_ylabel("speed, teacher's way per unit of t\n(solid: flow, dotted: recorded)")
    figure.legend(*cosines[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    return figure


def draw_loss(report: Report) -> Figure:
    """Query loss and accuracy along the flow up to t = 1.5, and of the teacher's recorded points."""
    adapters, task_sets = _names(report, "adapter"), _names(report, "tasks")
    figure, (losses, accuracies) = _panels(2, len(task_sets), 4.5, 3.2)
    for loss, accuracy, tasks in zip(losses, accuracies, task_sets, strict=True):
        teacher = select(report["teacher"], tasks=tasks)
        for axis, key in ((loss, "loss"), (accuracy, "accuracy")):
            _draw_curve(axis, teacher, key, TEACHER, marker="o", label="teacher", band=False)
            for i, adapter in enumerate(adapters):
                records = select(report["along"], adapter=adapter, tasks=tasks)
                _draw_curve(axis, records, key, _colour(i), marker="o", label=adapter, band=False)
            axis.axvline(1, color="grey", linewidth=0.8, linestyle=":")
        loss.set_title(_title(report["arrival"], tasks))
        accuracy.set_xlabel("t")
    losses[0].set_ylabel("query loss")
    accuracies[0].set_ylabel("query accuracy, %")
    figure.legend(*losses[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    return figure


def draw_solvers(report: Report) -> Figure:
    """Where each solver arrives and how far that is from a fine RK4, against evaluations: a column per adapter."""
    adapters, task_sets = _names(report, "adapter"), _names(report, "tasks")
    figure, (distances, differences) = _panels(2, len(adapters), 4.5, 3.2)
    for distance, difference, adapter in zip(distances, differences, adapters, strict=True):
        for i, solver in enumerate(TABLEAUX):
            for j, tasks in enumerate(task_sets):
                records = select(report["solvers"], adapter=adapter, tasks=tasks, solver=solver)
                _draw_solver(distance, difference, records, color=_colour(i), linestyle=_line_style(j))
        distance.set_title(adapter)
        difference.set_yscale("log")
        difference.set_xlabel("evaluations of the drift network")
        for axis in (distance, difference):
            axis.set_xscale("log", base=2)
            axis.xaxis.set_major_formatter("{x:g}")
    distances[0].set_ylabel("distance to the teacher's endpoint")
    differences[0].set_ylabel("difference to a fine RK4")
    handles = []
    for i, solver in enumerate(TABLEAUX):
        handles += distances[0].plot([], [], marker=".", color=_colour(i), label=solver)
    for j, tasks in enumerate(task_sets):
        label = _title(report["solvers"], tasks)
        handles += distances[0].plot([], [], color="grey", linestyle=_line_style(j), label=label)
    figure.legend(handles=handles, loc="outside right upper", fontsize=8)
    return figure


def _draw_solver(distance: Axes, difference: Axes, records: Records, **style: Any) -> None:
    evaluations = column(records, "nfe")
    distance.plot(evaluations, column(records, "distance"), marker=".", **style)
    # A difference that was rounded to zero is drawn at the last digit, for the axis is logarithmic.
    difference.plot(evaluations, np.maximum(column(records, "difference"), 1e-5), marker=".", **style)


def _panels(rows: int, columns: int, width: float, height: float) -> tuple[Figure, list[list[Axes]]]:
    """A figure of panels, each with scales of its own; no window is opened."""
    figure = Figure(figsize=(width * columns + 1.5, height * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).tolist()
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _draw_curve(axis: Axes, records: Records, key: str, colour: Any, *, band: bool = True, **style: Any) -> None:
    """A curve along t where it is known, with its 95 % interval as a band."""
    measured = [record for record in records if record[key] is not None]
    times, values = column(measured, "t"), np.array(column(measured, key))
    axis.plot(times, values, color=colour, markersize=4, **style)
    if band:
        half_widths = np.array(column(measured, f"{key}_ci95"))
        low, high = values - half_widths, values + half_widths
        axis.fill_between(times, low, high, color=colour, alpha=0.15, linewidth=0)


def _colour(index: int) -> Any:
    return COLOURS[index % len(COLOURS)]


def _line_style(index: int) -> str:
    return LINE_STYLES[index % len(LINE_STYLES)]


def _names(report: Report, key: str) -> list[str]:
    """The names of the adapters or of the sets of tasks, in the order of the report."""
    return list(dict.fromkeys(column(report["arrival"], key)))


def _title(records: Records, tasks: str) -> str:
    return f"{tasks}, {select(records, tasks=tasks)[0]['n_tasks']} tasks"
