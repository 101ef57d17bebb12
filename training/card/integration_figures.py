"""The figures of an integration report, drawn from its records."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hf_hyperflow.benchmark.figures import DPI
from hf_hyperflow.modeling.solvers import TABLEAUX

from .integration import Record

COLOURS = matplotlib.colormaps["tab10"].colors
TEACHER = "black"


def draw_integration(report: dict[str, list[Record]], folder: Path) -> None:
    """Write `distance.png`, `cosine.png`, `loss.png` and `solvers.png`.

    Args:
        report: `arrival`, `along`, `teacher` and `solvers` of `training/integration_report.py`.
        folder: is there.
    """
    for name, draw in {
        "distance": draw_distance,
        "cosine": draw_cosine,
        "loss": draw_loss,
        "solvers": draw_solvers,
    }.items():
        draw(report).savefig(folder / f"{name}.png", dpi=DPI)


def draw_distance(report: dict[str, list[Record]]) -> Figure:
    """Distance of theta(1) to the recorded endpoint, relative to that of theta(0): a panel per set of tasks."""
    adapters, sets = _names(report, "adapter"), _names(report, "tasks")
    figure, axes = _grid(1, len(sets), 4.5, 1.6 + 0.6 * len(adapters))
    kinds = {
        "distance": ("o", "the flow from the adapter's start"),
        "distance_from_start": ("s", "the flow from the teacher's own start"),
        "distance_of_mean": ("|", "one displacement for all tasks"),
    }
    for axis, tasks in zip(axes[0], sets, strict=True):
        for height, adapter in enumerate(reversed(adapters)):
            (record,) = _of(report["arrival"], adapter=adapter, tasks=tasks)
            for shift, (key, (marker, _)) in zip((0.2, 0, -0.2), kinds.items(), strict=True):
                colour = "grey" if key == "distance_of_mean" else COLOURS[adapters.index(adapter) % 10]
                style = {"fmt": marker, "capsize": 3, "markersize": 5, "color": colour}
                axis.errorbar(record[key], height + shift, xerr=record[f"{key}_ci95"], **style)
        axis.axvline(1, color="grey", linewidth=0.8)
        axis.axvline(0, color=TEACHER, linewidth=0.8, linestyle=":")
        axis.set_ylim(-0.6, len(adapters) - 0.4)
        axis.set_yticks(range(len(adapters)), adapters[::-1] if axis is axes[0][0] else [])
        axis.set_title(_title(report["arrival"], tasks))
        axis.set_xlabel("distance to the teacher's endpoint\n(0: arrived, 1: not moved; 95 % interval)")
    handles = [axes[0][0].plot([], [], marker, color="grey", label=label)[0] for marker, label in kinds.values()]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    return figure


def draw_cosine(report: dict[str, list[Record]]) -> Figure:
    """Cosine of predicted and recorded velocity, and below the speeds, along t: a column per set of tasks."""
    adapters, sets = _names(report, "adapter"), _names(report, "tasks")
    figure, axes = _grid(2, len(sets), 4.5, 3.2)
    for column, tasks in enumerate(sets):
        for i, adapter in enumerate(adapters):
            records = _of(report["along"], adapter=adapter, tasks=tasks)
            _line(axes[0][column], records, "cosine_path", COLOURS[i % 10], label=adapter)
            _line(axes[0][column], records, "cosine_flow", COLOURS[i % 10], linestyle="--")
            _line(axes[1][column], records, "speed", COLOURS[i % 10])
            _line(axes[1][column], records, "recorded_speed", COLOURS[i % 10], linestyle=":")
        axes[0][column].set_title(_title(report["arrival"], tasks))
        axes[0][column].axhline(0, color="grey", linewidth=0.8)
        axes[1][column].set_xlabel("t")
        axes[1][column].axvline(1, color="grey", linewidth=0.8, linestyle=":")
    axes[0][0].set_ylabel("cosine to the recorded velocity\n(solid: on its path, dashed: on the flow)")
    axes[1][0].set_ylabel("speed, teacher's way per unit of t\n(solid: flow, dotted: recorded)")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    return figure


def draw_loss(report: dict[str, list[Record]]) -> Figure:
    """Query loss and accuracy along the flow up to t = 1.5, and of the teacher's recorded points."""
    adapters, sets = _names(report, "adapter"), _names(report, "tasks")
    figure, axes = _grid(2, len(sets), 4.5, 3.2)
    for column, tasks in enumerate(sets):
        for row, key in enumerate(("loss", "accuracy")):
            axis = axes[row][column]
            _line(axis, _of(report["teacher"], tasks=tasks), key, TEACHER, marker="o", label="teacher", band=False)
            for i, adapter in enumerate(adapters):
                records = _of(report["along"], adapter=adapter, tasks=tasks)
                _line(axis, records, key, COLOURS[i % 10], marker="o", label=adapter, band=False)
            axis.axvline(1, color="grey", linewidth=0.8, linestyle=":")
        axes[0][column].set_title(_title(report["arrival"], tasks))
        axes[1][column].set_xlabel("t")
    axes[0][0].set_ylabel("query loss")
    axes[1][0].set_ylabel("query accuracy, %")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    return figure


def draw_solvers(report: dict[str, list[Record]]) -> Figure:
    """Where each solver arrives and how far that is from a fine RK4, against evaluations: a column per adapter."""
    adapters, sets = _names(report, "adapter"), _names(report, "tasks")
    figure, axes = _grid(2, len(adapters), 4.5, 3.2)
    styles = ["-", "--", ":", "-."]
    for column, adapter in enumerate(adapters):
        for i, solver in enumerate(TABLEAUX):
            for j, tasks in enumerate(sets):
                records = _of(report["solvers"], adapter=adapter, tasks=tasks, solver=solver)
                evaluations = [r["nfe"] for r in records]
                style = {"marker": ".", "color": COLOURS[i], "linestyle": styles[j % 4]}
                label = solver if column == j == 0 else None
                axes[0][column].plot(evaluations, [r["distance"] for r in records], label=label, **style)
                # What rounds to zero is as near as it is told.
                axes[1][column].plot(evaluations, [max(r["difference"], 1e-5) for r in records], **style)
        axes[0][column].set_title(adapter)
        axes[1][column].set_yscale("log")
        axes[1][column].set_xlabel("evaluations of the drift network")
        for axis in (axes[0][column], axes[1][column]):
            axis.set_xscale("log", base=2)
            axis.xaxis.set_major_formatter("{x:g}")
    axes[0][0].set_ylabel("distance to the teacher's endpoint")
    axes[1][0].set_ylabel("difference to a fine RK4")
    handles, labels = axes[0][0].get_legend_handles_labels()
    for j, tasks in enumerate(sets):
        handles.append(axes[0][0].plot([], [], color="grey", linestyle=styles[j % 4])[0])
        labels.append(_title(report["solvers"], tasks))
    figure.legend(handles, labels, loc="outside right upper", fontsize=8)
    return figure


def _grid(rows: int, columns: int, width: float, height: float) -> tuple[Figure, list[list[Axes]]]:
    """A figure of panels with scales of their own across columns; no window is opened."""
    figure = Figure(figsize=(width * columns + 1.5, height * rows), layout="constrained")
    axes = [list(row) for row in figure.subplots(rows, columns, squeeze=False)]
    for axis in (axis for row in axes for axis in row):
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _line(axis: Axes, records: list[Record], key: str, colour: object, *, band: bool = True, **style: object) -> None:
    """A curve along t where it is known, with its 95 % interval as a band."""
    records = [r for r in records if r[key] is not None]
    t = [r["t"] for r in records]
    values, halves = (np.array([r[name] for r in records]) for name in (key, f"{key}_ci95"))
    axis.plot(t, values, color=colour, markersize=4, **style)
    if band:
        axis.fill_between(t, values - halves, values + halves, color=colour, alpha=0.15, linewidth=0)


def _names(report: dict[str, list[Record]], key: str) -> list[str]:
    return list(dict.fromkeys(record[key] for record in report["arrival"]))


def _title(records: list[Record], tasks: str) -> str:
    return f"{tasks}, {_of(records, tasks=tasks)[0]['n_tasks']} tasks"


def _of(records: list[Record], **values: object) -> list[Record]:
    """Records with these values."""
    return [r for r in records if all(r[key] == value for key, value in values.items())]
