"""The figures of a benchmark, drawn from its results."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Protocol, TypeVar

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .methods import list_labels
from .records import Estimate, FlowRecord, MeanRecord, Record, Results
from .results import REFERENCE, average_estimates, group_by

DPI = 140


class HasShots(Protocol):
    """A record of any kind."""

    @property
    def n_shot(self) -> int | None: ...


HasShotsT = TypeVar("HasShotsT", bound=HasShots)


@dataclass(frozen=True)
class Style:
    """How a method is drawn: its colour in matplotlib's form, and its marker."""

    colour: tuple[float, ...]
    marker: str


def choose_styles(methods: Iterable[str]) -> dict[str, Style]:
    """A style for every method. Where the colours are used up, they begin anew with another marker."""
    styles = []
    for marker in "os^Dv":
        for name in ("tab10", "Dark2"):
            colour_map = matplotlib.colormaps[name]
            for i in range(colour_map.N):
                styles.append(Style(colour_map(i), marker))
    return dict(zip(methods, cycle(styles), strict=False))


STYLES = choose_styles(list_labels())


def draw_figures(results: Results, folder: Path) -> None:
    """Write `accuracy_cost.png`, `gain.png`, `shots.png` and, where the flow was followed, `flow.png`.

    Args:
        folder: is there.
    """
    draw_accuracy_cost(results).savefig(folder / "accuracy_cost.png", dpi=DPI)
    draw_gain(results).savefig(folder / "gain.png", dpi=DPI)
    draw_shots(results).savefig(folder / "shots.png", dpi=DPI)
    if results.flow:
        draw_flow(results).savefig(folder / "flow.png", dpi=DPI)


def draw_accuracy_cost(results: Results) -> Figure:
    """Mean accuracy over domains against the mean time to get ready for a task, one panel per number of shots.

    The intervals are those of the difference to direct transfer.
    """
    means_by_shots = _group_by_shots(results.means)
    records_by_method = group_by(results.records, lambda record: (record.n_shot, record.method))
    figure, axes = _make_panels(len(means_by_shots), 4.5, 4)
    legend = Legend()
    for axis, (n_shot, means) in zip(axes, means_by_shots.items(), strict=True):
        all_seconds = []
        for mean in means:
            seconds = _list_seconds(records_by_method[n_shot, mean.method])
            all_seconds += seconds
            if seconds:
                axis.errorbar(
                    np.mean(seconds),
                    _comparable_accuracy(mean, means),
                    yerr=mean.diff_ci95 or 0,
                    fmt=STYLES[mean.method].marker,
                    capsize=3,
                    color=STYLES[mean.method].colour,
                    label=legend.label_once(mean.method),
                )
        _scale_seconds(axis, all_seconds)
        axis.set_title(_title(n_shot))
        axis.set_xlabel("seconds to get ready for a task")
    axes[0].set_ylabel("accuracy, % (mean over domains)")
    figure.legend(loc="outside right upper", fontsize=8)
    return figure


def draw_gain(results: Results) -> Figure:
    """Gain over direct transfer of every domain, with intervals: a panel per number of shots, a colour per method."""
    records = [record for record in results.records if record.diff_vs_direct is not None]
    records_by_shots = _group_by_shots(records) or {None: []}
    domains = sorted(group_by(records, lambda record: record.domain), reverse=True)
    methods = _list_methods(records)
    height = 1.2 + 0.14 * max(3, len(methods)) * max(2, len(domains))
    figure, axes = _make_panels(len(records_by_shots), 4.5, height)
    legend = Legend()
    for axis, (n_shot, with_shots) in zip(axes, records_by_shots.items(), strict=True):
        for record in with_shots:
            # The methods of a domain lie below each other, around its tick.
            shift = 0.8 * ((len(methods) - 1) / 2 - methods.index(record.method)) / len(methods)
            axis.errorbar(
                record.diff_vs_direct or 0,
                domains.index(record.domain) + shift,
                xerr=record.diff_ci95 or 0,
                fmt=STYLES[record.method].marker,
                markersize=4,
                capsize=2,
                color=STYLES[record.method].colour,
                label=legend.label_once(record.method),
            )
        axis.axvline(0, color="grey", linewidth=0.8)
        axis.set_yticks(range(len(domains)), domains if axis is axes[0] else [])
        axis.set_title(_title(n_shot))
        axis.set_xlabel("minus direct transfer, points (95 % interval)")
    if methods:
        figure.legend(loc="outside right upper", fontsize=8)
    return figure


def draw_shots(results: Results) -> Figure:
    """Mean accuracy against the number of shots, over the domains that have all of them."""
    all_shots = list(_group_by_shots(results.records))
    records_by_domain = group_by(results.records, lambda record: (record.domain, record.n_shot))
    complete = _list_complete_domains(results.records)
    figure, (axis,) = _make_panels(1, 8, 4)
    for method in _list_methods(results.records):
        titles, heights = [], []
        for n_shot in all_shots:
            accuracies = []
            for domain in complete:
                in_domain = records_by_domain[domain, n_shot]
                for record in in_domain:
                    if record.method == method:
                        accuracies.append(_comparable_accuracy(record, in_domain))
            if len(accuracies) == len(complete) > 0:
                titles.append(_title(n_shot))
                heights.append(np.mean(accuracies))
        style = STYLES[method]
        axis.plot(titles, heights, f"{style.marker}-", color=style.colour, label=list_labels()[method])
    axis.set_ylabel(f"accuracy, % (mean over {len(complete)} domains)")
    figure.legend(loc="outside right upper", fontsize=8)
    return figure


def draw_flow(results: Results) -> Figure:
    """Gain over direct transfer along the flow, and at its end with other numbers of solver steps.

    The mean over domains has its 95 % interval as a band; every number of shots has a colour.
    """
    figure, (time_axis, steps_axis) = _make_panels(2, 5, 4)
    records_by_kind = group_by(results.flow, lambda record: record.along)
    along_steps = records_by_kind.get("steps", [])
    _draw_gain_along(time_axis, records_by_kind.get("t", []))
    _draw_gain_along(steps_axis, along_steps)
    time_axis.set_xlabel("t along the flow")
    time_axis.axvline(1, color="grey", linewidth=0.8, linestyle=":")
    time_axis.set_ylabel("minus direct transfer, points")
    time_axis.legend(fontsize=8)
    steps_axis.set_xlabel("solver steps to t = 1")
    steps_axis.set_xscale("log", base=2)
    steps = sorted(group_by(along_steps, lambda record: record.value))
    steps_axis.set_xticks(steps, [f"{n:g}" for n in steps])
    return figure


def _draw_gain_along(axis: Axes, records: list[FlowRecord]) -> None:
    for n_shot, with_shots in _group_by_shots(records).items():
        records_by_value = group_by(with_shots, lambda record: record.value)
        values = sorted(records_by_value)
        gains, low, high = [], [], []
        for value in values:
            group = records_by_value[value]
            differences = [Estimate(r.diff_vs_direct, r.diff_ci95, r.diff_n_episodes) for r in group]
            difference = average_estimates(differences)
            gain, half_width = difference.mean or 0.0, difference.ci95 or 0.0
            gains.append(gain)
            low.append(gain - half_width)
            high.append(gain + half_width)
        (line,) = axis.plot(values, gains, "o-", label=_title(n_shot))
        axis.fill_between(values, low, high, color=line.get_color(), alpha=0.15)
    axis.axhline(0, color="grey", linewidth=0.8)


class Legend:
    """The methods' labels, each once for all panels of a figure."""

    def __init__(self) -> None:
        self._used: set[str] = set()

    def label_once(self, method: str) -> str | None:
        """The label of a method, None if it was given before."""
        if method in self._used:
            return None
        self._used.add(method)
        return list_labels()[method]


def _make_panels(n: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """A figure of `n` panels side by side, with scales of their own; no window is opened."""
    figure = Figure(figsize=(width * n, height), layout="constrained")
    axes = list(figure.subplots(1, n, squeeze=False)[0])
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _title(n_shot: int | None) -> str:
    return "variable ways and shots" if n_shot is None else f"{n_shot}-shot"


def _scale_seconds(axis: Axes, seconds: list[float]) -> None:
    """A logarithmic scale with room on both sides and ticks at 1, 2 and 5, however narrow it is."""
    axis.set_xscale("log")
    if not seconds:
        return
    low, high = min(seconds) / 2, 2 * max(seconds)
    ticks = []
    for power in range(-5, 7):
        for digit in (1, 2, 5):
            if low <= digit * 10.0**power <= high:
                ticks.append(digit * 10.0**power)
    axis.set_xticks(ticks, minor=False)
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_formatter("")
    axis.set_xlim(low, high)


def _comparable_accuracy(record: Record | MeanRecord, records: Sequence[Record] | Sequence[MeanRecord]) -> float:
    """A method's accuracy as that of direct transfer on all its episodes plus the paired difference.

    Methods that ran on fewer episodes stay comparable so.

    Args:
        records: those of all methods, of the same number of shots and the same domain (or the mean).
    """
    for other in records:
        if other.method == REFERENCE and record.diff_vs_direct is not None:
            return other.accuracy + record.diff_vs_direct
    return record.accuracy


def _group_by_shots(records: Sequence[HasShotsT]) -> dict[int | None, list[HasShotsT]]:
    """Records by number of shots, ascending."""
    groups = group_by(records, lambda record: record.n_shot)
    return {n_shot: groups[n_shot] for n_shot in sorted(groups, key=lambda n_shot: n_shot or 0)}


def _list_methods(records: Sequence[Record]) -> list[str]:
    """The methods of some records, in the order of tables and figures."""
    by_method = group_by(records, lambda record: record.method)
    return [name for name in list_labels() if name in by_method]


def _list_complete_domains(records: Sequence[Record]) -> list[str]:
    """The domains that have records of all numbers of shots."""
    n_shots = len(_group_by_shots(records))
    by_domain = group_by(records, lambda record: record.domain)
    complete = []
    for domain, group in by_domain.items():
        if len(_group_by_shots(group)) == n_shots:
            complete.append(domain)
    return complete


def _list_seconds(records: Sequence[Record]) -> list[float]:
    """The times that were measured."""
    return [record.seconds_per_task for record in records if record.seconds_per_task]
