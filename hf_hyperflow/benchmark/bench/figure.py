"""The figure of `hyperflow bench`: ratios in the first row, then a row per place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D

from .records import LABELS, PARTS, RIVALS, CostRecord, CostTable, Place, TaskRatios, format_size
from .table import format_seconds, format_steps
from .task import FORWARD, READY

#: The time in % of full fine-tuning that the HyperFlow paper reports for the adaptation alone (arXiv 2504.15323).
PAPER_TIME = 0.02

#: Colours of the parts of getting ready, the last one for all that is not measured apart.
PART_COLOURS = ("#b9c2cc", "#2f6fde", "#7fb2f0", "#5a6b7d", "#d98e32", "#e4e7eb")

#: The same of one forward pass, of HyperFlow, and of all other methods.
METHOD_COLOURS = {FORWARD: "#9aa5b1", READY: "#2f6fde"}
RIVAL_COLOUR = "#d98e32"

#: Short words for these two.
METHOD_LABELS = {FORWARD: "one forward pass", READY: "HyperFlow, ready"}

#: What is compared in the rows of places.
METHODS = (FORWARD, READY, *[rival.name for rival in RIVALS])

GREY_LINE: dict[str, Any] = {"color": "grey", "linewidth": 0.8, "linestyle": "--", "zorder": 0}


def draw_costs(table: CostTable) -> Figure:
    """Ratios of all places above; below, for every place, where the time goes, and time and memory by method.

    Of several numbers of solver steps the middle one is drawn, and so is the middle number of images by method.
    """
    places = [place for place in table.places() if table.steps(place)]
    names, common = name_places(places)
    figure = Figure(figsize=(15, 4.2 + 3.4 * len(places)), layout="constrained")
    rows = figure.subfigures(1 + len(places), 1, squeeze=False, height_ratios=[4.2, *[3.4] * len(places)])[:, 0]
    rows[0].suptitle(f"Getting ready and predicting: {common}", fontweight="bold")
    _draw_ratios(rows[0], table, names)
    for place, row in zip(places, rows[1:], strict=True):
        row.suptitle(names[place], fontweight="bold")
        axes = row.subplots(1, 3)
        n_images = _choose_middle(table.images(place))
        _draw_parts(axes[0], table, place)
        _draw_methods(axes[1], table, place, lambda record: record.seconds, format_seconds)
        axes[1].set(title=f"time, {n_images} images", xlabel="seconds")
        _draw_methods(axes[2], table, place, lambda record: record.peak_memory_mb, "{:,.0f} MB")
        axes[2].set(title=f"peak memory, {n_images} images", xlabel="MB beyond the models")
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.title.set_fontsize(11)
    return figure


def name_places(places: Sequence[Place]) -> tuple[dict[Place, str], str]:
    """What tells the places apart, by place, and what they have in common, in words. The backbone is always named."""
    words = {place: (format_size(place.size), place.dtype, place.device) for place in places}
    names = {place: place.backbone for place in places}
    common = []
    for column in zip(*words.values(), strict=True):
        if len(set(column)) == 1:
            common.append(column[0])
            continue
        for place, word in zip(places, column, strict=True):
            names[place] += f", {word}"
    return names, ", ".join(common)


def _draw_ratios(figure: SubFigure, table: CostTable, names: dict[Place, str]) -> None:
    """What everything is measured for, with a colour per place."""
    axes = figure.subplots(1, 3)
    colours = {place: matplotlib.colormaps["tab10"](number % 10) for number, place in enumerate(names)}
    _draw_ready(axes[0], table, colours)
    _draw_adaptation(axes[1], table, colours)
    _draw_predictions(axes[2], table, colours)
    handles = [Line2D([], [], color=colours[place], linewidth=4, label=name) for place, name in names.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False)


def _choose_middle(values: list[int]) -> int:
    return values[(len(values) - 1) // 2]


def _list_ratios(table: CostTable, place: Place) -> list[TaskRatios]:
    """Those of the middle number of steps, by number of images."""
    n_steps = _choose_middle(table.steps(place))
    return [ratios for ratios in table.task_ratios() if (ratios.place, ratios.n_steps) == (place, n_steps)]


def _draw_ready(axis: Axes, table: CostTable, colours: dict[Place, tuple]) -> None:
    for place, colour in colours.items():
        ratios = _list_ratios(table, place)
        images = [row.n_images for row in ratios]
        axis.plot(images, _to_array([row.ready for row in ratios]), "o-", color=colour)
        axis.plot(images, _to_array([row.next_ready for row in ratios]), "o:", color=colour, markerfacecolor="white")
    axis.axhline(1, **GREY_LINE)
    axis.plot([], [], "o-", color="grey", label="first task on a backbone")
    axis.plot([], [], "o:", color="grey", markerfacecolor="white", label="next task")
    axis.set_title("ready to predict / one forward pass over the images")
    axis.set_ylabel("times as long")
    axis.set_ylim(0, 1.1 * axis.dataLim.ymax)
    _scale_images(axis, table)
    axis.legend(fontsize=8, frameon=False)


def _draw_adaptation(axis: Axes, table: CostTable, colours: dict[Place, tuple]) -> None:
    for place, colour in colours.items():
        ratios = _list_ratios(table, place)
        images = [row.n_images for row in ratios]
        axis.plot(images, 100 * _to_array([row.adapt_time for row in ratios]), "o-", color=colour)
        axis.plot(images, 100 * _to_array([row.adapt_memory for row in ratios]), "s:", color=colour)
    axis.plot([], [], "o-", color="grey", label="time")
    axis.plot([], [], "s:", color="grey", label="peak memory")
    axis.axhline(PAPER_TIME, **GREY_LINE, label=f"the paper's time, {PAPER_TIME} %")
    axis.set_title("adaptation alone / full fine-tuning")
    axis.set_ylabel("%")
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter("{x:g}")
    _scale_images(axis, table)
    axis.legend(fontsize=8, frameon=False)


def _draw_predictions(axis: Axes, table: CostTable, colours: dict[Place, tuple]) -> None:
    """A line of dots per number of images at once and place."""
    rows = [row for row in table.prediction_ratios() if row.place in colours]
    rows.sort(key=lambda row: row.n_images)
    rows.reverse()  # the first is at the top
    for height, row in enumerate(rows):
        axis.plot(row.task, height, "o", color=colours[row.place])
        if row.merged is not None:
            axis.plot(row.merged, height, "o", color=colours[row.place], markerfacecolor="white")
    axis.set_yticks(range(len(rows)), ["1 image" if row.n_images == 1 else f"{row.n_images} images" for row in rows])
    axis.set_ylim(-0.7, 1.1 * len(rows) + 0.2)  # with room for the legend
    axis.axvline(1, **GREY_LINE)
    axis.plot([], [], "o", color="grey", label="task")
    axis.plot([], [], "o", color="grey", markerfacecolor="white", label="merged task")
    axis.set_title("prediction / the backbone alone")
    axis.set_xlabel("times as long")
    axis.margins(x=0.2)
    axis.legend(fontsize=8, frameon=False, loc="upper right", ncols=2)


def _draw_parts(axis: Axes, table: CostTable, place: Place) -> None:
    """Bars of the parts of getting ready for the first task, one over another, in units of one forward pass."""
    n_steps = _choose_middle(table.steps(place))
    images = [n for n in table.images(place) if _find_parts(table, place, n, n_steps)]
    bottoms = [0.0] * len(images)
    for part, colour in zip((*PARTS, "rest"), PART_COLOURS, strict=True):
        heights = [_find_parts(table, place, n, n_steps)[part] for n in images]
        label = LABELS[part].partition(":")[0] if part in LABELS else "checks and the rest"
        axis.bar([str(n) for n in images], heights, bottom=bottoms, color=colour, label=label, width=0.6)
        bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
    axis.axhline(1, **GREY_LINE)
    axis.set_ylim(0, 1.15 * max(1.0, *bottoms))
    axis.set_title(f"parts of getting ready, {format_steps(n_steps)}")
    axis.set_xlabel("support images")
    axis.set_ylabel("forward passes")
    axis.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5), reverse=True)


def _find_parts(table: CostTable, place: Place, n_images: int, n_steps: int) -> dict[str, float]:
    """The time of each part over that of one forward pass, and of the rest; empty if they were not measured."""
    forward, ready = table.find(place, FORWARD, n_images), table.find(place, READY, n_images, n_steps)
    if forward is None or ready is None:
        return {}
    shares = {}
    for part in PARTS:
        record = table.find(place, part, n_images, n_steps)
        assert record is not None
        shares[part] = record.seconds / forward.seconds
    shares["rest"] = max(0.0, ready.seconds / forward.seconds - sum(shares.values()))
    return shares


def _draw_methods(
    axis: Axes,
    table: CostTable,
    place: Place,
    measure: Callable[[CostRecord], float | None],
    style: str | Callable[[float], str],
) -> None:
    """A bar per method, from the top, on a logarithmic scale.

    Args:
        measure: takes a record and gives the length of its bar.
        style: how the length is written beside it.
    """
    n_images, n_steps = _choose_middle(table.images(place)), _choose_middle(table.steps(place))
    names, values, colours = [], [], []
    for work in METHODS:
        record = table.find(place, work, n_images, n_steps)
        value = None if record is None else measure(record)
        if value:
            names.append(METHOD_LABELS.get(work, LABELS[work]))
            values.append(value)
            colours.append(METHOD_COLOURS.get(work, RIVAL_COLOUR))
    bars = axis.barh(names, values, color=colours)
    axis.bar_label(bars, fmt=style, padding=3, fontsize=8)
    axis.invert_yaxis()
    axis.set_xscale("log")
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_formatter("")
    axis.margins(x=0.25)


def _to_array(ratios: list[float | None]) -> np.ndarray:
    """The ratios as floats, NaN where there is none: a line has a gap there."""
    return np.array(ratios, dtype=float)


def _scale_images(axis: Axes, table: CostTable) -> None:
    """A logarithmic scale with a tick at every number of images."""
    images: set[int] = set()
    for place in table.places():
        images.update(table.images(place))
    axis.set_xscale("log")
    axis.set_xticks(sorted(images), [str(n) for n in sorted(images)])
    axis.minorticks_off()
    axis.set_xlabel("support images")
