"""The figure of `hyperflow bench`: ratios in the first row, then a row per place."""

from __future__ import annotations

from collections.abc import Callable

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .records import LABELS, PARTS, RIVALS, CostRecord, CostTable, Place, TaskRatios, format_size
from .table import format_seconds
from .task import FORWARD, READY

#: The time in % of full fine-tuning that the HyperFlow paper reports for the adaptation alone (arXiv 2504.15323).
PAPER_TIME = 0.02

#: Colours of the parts of getting ready, the last one for all that is not measured apart.
PART_COLOURS = ("#b9c2cc", "#2f6fde", "#7fb2f0", "#5a6b7d", "#d98e32", "#e4e7eb")

#: The same of one forward pass and of HyperFlow; other methods have the third.
LIMIT_COLOUR, HYPERFLOW_COLOUR, RIVAL_COLOUR = "#9aa5b1", "#2f6fde", "#d98e32"

#: What is compared in the rows of places.
METHODS = (FORWARD, READY, *[rival.name for rival in RIVALS])

GREY_LINE = {"color": "grey", "linewidth": 0.8, "linestyle": "--", "zorder": 0}


def draw_costs(table: CostTable) -> Figure:
    """Ratios of all places above; below, for every place, where the time goes, and time and memory by method.

    Of several numbers of solver steps the middle one is drawn, and so is the middle number of images by method.
    """
    places = table.places()
    figure = Figure(figsize=(15, 3.6 * (1 + len(places))), layout="constrained")
    axes = figure.subplots(1 + len(places), 3, squeeze=False)
    colours = {place: matplotlib.colormaps["tab10"](number) for number, place in enumerate(places)}
    _draw_ready(axes[0, 0], table, colours)
    _draw_adaptation(axes[0, 1], table, colours)
    _draw_predictions(axes[0, 2], table, colours)
    for place, row in zip(places, axes[1:], strict=True):
        _draw_parts(row[0], table, place)
        _draw_methods(row[1], table, place, "seconds", lambda record: record.seconds)
        _draw_methods(row[2], table, place, "peak memory beyond the models, MB", lambda record: record.peak_memory_mb)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    return figure


def _choose_middle(values: list[int]) -> int:
    return values[len(values) // 2]


def _list_ratios(table: CostTable, place: Place) -> list[TaskRatios]:
    """Those of the middle number of steps, by number of images."""
    n_steps = _choose_middle(table.steps(place))
    return [ratios for ratios in table.task_ratios() if (ratios.place, ratios.n_steps) == (place, n_steps)]


def _draw_ready(axis: Axes, table: CostTable, colours: dict[Place, tuple]) -> None:
    for place, colour in colours.items():
        ratios = _list_ratios(table, place)
        images = [row.n_images for row in ratios]
        axis.plot(images, [row.ready for row in ratios], "o-", color=colour, label=_shorten(place))
        axis.plot(images, [row.next_ready for row in ratios], "o:", color=colour, markerfacecolor="white")
    axis.axhline(1, **GREY_LINE)
    axis.plot([], [], "o:", color="grey", markerfacecolor="white", label="the next task on the backbone")
    axis.set_title("ready to predict / one forward pass")
    axis.set_ylabel("times as long")
    axis.set_ylim(bottom=0)
    _scale_images(axis, table)
    axis.legend(fontsize=8, frameon=False)


def _draw_adaptation(axis: Axes, table: CostTable, colours: dict[Place, tuple]) -> None:
    for place, colour in colours.items():
        ratios = _list_ratios(table, place)
        images = [row.n_images for row in ratios]
        axis.plot(images, _to_percent([row.adapt_time for row in ratios]), "o-", color=colour)
        axis.plot(images, _to_percent([row.adapt_memory for row in ratios]), "s:", color=colour)
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
    """A line of dots per place and number of images at once."""
    rows = table.prediction_ratios()
    for height, row in enumerate(reversed(rows)):
        axis.plot(row.task, height, "o", color=colours[row.place])
        if row.merged is not None:
            axis.plot(row.merged, height, "o", color=colours[row.place], markerfacecolor="white")
    names = [f"{_shorten(row.place)}, {row.n_images} at once" for row in reversed(rows)]
    axis.set_yticks(range(len(rows)), names, fontsize=8)
    axis.set_ylim(-0.7, len(rows) - 0.3)
    axis.axvline(1, **GREY_LINE)
    axis.plot([], [], "o", color="grey", label="task")
    axis.plot([], [], "o", color="grey", markerfacecolor="white", label="merged task")
    axis.set_title("prediction / the backbone alone")
    axis.set_xlabel("times as long")
    axis.legend(fontsize=8, frameon=False)


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
    axis.margins(y=0.15)
    axis.set_title(f"{_shorten(place)}: parts of getting ready, {n_steps} solver steps", fontsize=10)
    axis.set_xlabel("support images")
    axis.set_ylabel("in forward passes over the images")
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
    axis: Axes, table: CostTable, place: Place, unit: str, measure: Callable[[CostRecord], float | None]
) -> None:
    """A bar per method, from the top, on a logarithmic scale."""
    n_images, n_steps = _choose_middle(table.images(place)), _choose_middle(table.steps(place))
    names, values, colours = [], [], []
    for work in METHODS:
        record = table.find(place, work, n_images, n_steps)
        value = None if record is None else measure(record)
        if value:
            names.append("HyperFlow, ready" if work == READY else LABELS[work])
            values.append(value)
            colours.append({FORWARD: LIMIT_COLOUR, READY: HYPERFLOW_COLOUR}.get(work, RIVAL_COLOUR))
    bars = axis.barh(names, values, color=colours)
    axis.bar_label(bars, fmt=format_seconds if unit == "seconds" else "{:,.0f}", padding=3, fontsize=8)
    axis.invert_yaxis()
    axis.set_xscale("log")
    axis.margins(x=0.25)
    axis.set_title(f"{_shorten(place)}: {n_images} images", fontsize=10)
    axis.set_xlabel(unit)


def _shorten(place: Place) -> str:
    return f"{place.backbone}, {format_size(place.size)}, {place.dtype}, {place.device}"


def _to_percent(ratios: list[float | None]) -> list[float | None]:
    return [None if ratio is None else 100 * ratio for ratio in ratios]


def _scale_images(axis: Axes, table: CostTable) -> None:
    """A logarithmic scale with a tick at every number of images."""
    images: set[int] = set()
    for place in table.places():
        images.update(table.images(place))
    axis.set_xscale("log")
    axis.set_xticks(sorted(images), [str(n) for n in sorted(images)])
    axis.minorticks_off()
    axis.set_xlabel("support images")
