"""The figures of a benchmark, drawn from its results."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .results import ORDER, REFERENCE

COLOURS = dict(zip(ORDER, [*matplotlib.colormaps["tab10"].colors, *matplotlib.colormaps["Dark2"].colors], strict=False))
DPI = 140


def draw_figures(results: dict[str, list[dict]], folder: Path) -> None:
    """Write `accuracy_cost.png`, `gain.png`, `shots.png` and, where the flow was followed, `flow.png`.

    Args:
        results: of `summarise`.
        folder: is there.
    """
    draw_accuracy_cost(results).savefig(folder / "accuracy_cost.png", dpi=DPI)
    draw_gain(results).savefig(folder / "gain.png", dpi=DPI)
    draw_shots(results).savefig(folder / "shots.png", dpi=DPI)
    if results["flow"]:
        draw_flow(results).savefig(folder / "flow.png", dpi=DPI)


def _shots(records: list[dict]) -> list[int | None]:
    return sorted({r["n_shot"] for r in records}, key=lambda shots: shots or 0)


def _title(shots: int | None) -> str:
    return "variable ways and shots" if shots is None else f"{shots}-shot"


def _panels(n: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """A figure of `n` panels side by side, with scales of their own; no window is opened."""
    figure = Figure(figsize=(width * n, height), layout="constrained")
    axes = list(figure.subplots(1, n, squeeze=False)[0])
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _accuracy(record: dict, records: list[dict]) -> float:
    """A method's accuracy as that of direct transfer on all its episodes plus the paired difference: methods that ran
    on fewer episodes stay comparable.
    """
    direct = _of(records, method=REFERENCE, n_shot=record["n_shot"])
    direct = [r for r in direct if r.get("domain") == record.get("domain")]  # means have none
    if not direct or record["diff_vs_direct"] is None:
        return record["accuracy"]
    return direct[0]["accuracy"] + record["diff_vs_direct"]


def draw_accuracy_cost(results: dict[str, list[dict]]) -> Figure:
    """Mean accuracy over domains against the mean time to get ready for a task, one panel per number of shots.

    The intervals are those of the difference to direct transfer.
    """
    means, shots_there = results["means"], _shots(results["means"])
    figure, axes = _panels(len(shots_there), 4.5, 4)
    named = set()
    for axis, shots in zip(axes, shots_there, strict=True):
        for mean in _of(means, n_shot=shots):
            mine = _of(results["records"], n_shot=shots, method=mean["method"])
            seconds = [r["seconds_per_task"] for r in mine if r["seconds_per_task"] is not None]
            if seconds:
                label = None if mean["method"] in named else mean["method"]
                named.add(mean["method"])
                style = {"fmt": "o", "capsize": 3, "color": COLOURS[mean["method"]], "label": label}
                axis.errorbar(np.mean(seconds), _accuracy(mean, means), yerr=mean["diff_ci95"] or 0, **style)
        _seconds_axis(axis, [r["seconds_per_task"] for r in _of(results["records"], n_shot=shots)])
        axis.set_title(_title(shots))
        axis.set_xlabel("seconds to get ready for a task")
    axes[0].set_ylabel("accuracy, % (mean over domains)")
    figure.legend(loc="outside right upper", fontsize=8)
    return figure


def _seconds_axis(axis: Axes, seconds: list[float | None]) -> None:
    """Logarithmic, with room on both sides and ticks at 1, 2 and 5, however narrow it is."""
    known = [value for value in seconds if value]
    axis.set_xscale("log")
    if known:
        low, high = min(known) / 2, 2 * max(known)
        ticks = [digit * 10.0**power for power in range(-5, 7) for digit in (1, 2, 5)]
        axis.set_xticks([t for t in ticks if low <= t <= high], minor=False)
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter("")
        axis.set_xlim(low, high)


def draw_gain(results: dict[str, list[dict]]) -> Figure:
    """Gain over direct transfer of every domain, with intervals: a panel per number of shots, a colour per method."""
    records = [r for r in results["records"] if r["diff_vs_direct"] is not None]
    shots_there = _shots(records) or [None]
    domains = sorted({r["domain"] for r in records}, reverse=True)
    methods = [m for m in ORDER if any(r["method"] == m for r in records)]
    figure, axes = _panels(len(shots_there), 4.5, 1.2 + 0.14 * max(3, len(methods)) * max(2, len(domains)))
    for axis, shots in zip(axes, shots_there, strict=True):
        for i, method in enumerate(methods):
            mine = [r for r in records if (r["n_shot"], r["method"]) == (shots, method)]
            shift = 0.8 * ((len(methods) - 1) / 2 - i) / len(methods)
            heights = [domains.index(r["domain"]) + shift for r in mine]
            gains, halves = [r["diff_vs_direct"] for r in mine], [r["diff_ci95"] or 0 for r in mine]
            label = method if shots == shots_there[0] else None
            style = {"fmt": "o", "markersize": 4, "capsize": 2, "color": COLOURS[method], "label": label}
            axis.errorbar(gains, heights, xerr=halves, **style)
        axis.axvline(0, color="grey", linewidth=0.8)
        axis.set_yticks(range(len(domains)), domains if axis is axes[0] else [])
        axis.set_title(_title(shots))
        axis.set_xlabel("minus direct transfer, points (95 % interval)")
    if methods:
        figure.legend(loc="outside right upper", fontsize=8)
    return figure


def draw_shots(results: dict[str, list[dict]]) -> Figure:
    """Mean accuracy against the number of shots, over the domains that have all of them."""
    records = results["records"]
    shots_there = _shots(records)
    complete = {d for d in {r["domain"] for r in records} if len(_shots(_of(records, domain=d))) == len(shots_there)}
    figure, (axis,) = _panels(1, 5.5, 4)
    for method in [m for m in ORDER if _of(records, method=m)]:
        mine = [r for r in _of(records, method=method) if r["domain"] in complete]
        known = [s for s in shots_there if len(_of(mine, n_shot=s)) == len(complete) > 0]
        heights = [np.mean([_accuracy(r, records) for r in _of(mine, n_shot=s)]) for s in known]
        axis.plot([_title(s) for s in known], heights, "o-", color=COLOURS[method], label=method)
    axis.set_ylabel(f"accuracy, % (mean over {len(complete)} domains)")
    axis.legend(fontsize=8)
    return figure


def draw_flow(results: dict[str, list[dict]]) -> Figure:
    """Gain over direct transfer along the flow, and at its end with other numbers of solver steps; mean over domains
    with the 95 % interval as a band, a colour per number of shots.
    """
    figure, axes = _panels(2, 5, 4)
    for axis, along in zip(axes, ("t", "steps"), strict=True):
        records = _of(results["flow"], along=along)
        for shots in _shots(records):
            mine = _of(records, n_shot=shots)
            values = sorted({r["value"] for r in mine})
            gains = [np.mean([r["diff_vs_direct"] for r in _of(mine, value=v)]) for v in values]
            squares = [np.square([r["diff_ci95"] or 0 for r in _of(mine, value=v)]) for v in values]
            halves = [np.sqrt(s.sum()) / len(s) for s in squares]
            (line,) = axis.plot(values, gains, "o-", label=_title(shots))
            low, high = np.array(gains) - halves, np.array(gains) + halves
            axis.fill_between(values, low, high, color=line.get_color(), alpha=0.15)
        axis.axhline(0, color="grey", linewidth=0.8)
    axes[0].set_xlabel("t along the flow")
    axes[0].axvline(1, color="grey", linewidth=0.8, linestyle=":")
    axes[1].set_xlabel("solver steps to t = 1")
    axes[1].set_xscale("log", base=2)
    steps = sorted({r["value"] for r in _of(results["flow"], along="steps")})
    axes[1].set_xticks(steps, [f"{n:g}" for n in steps])
    axes[0].set_ylabel("minus direct transfer, points")
    axes[0].legend(fontsize=8)
    return figure


def _of(records: list[dict], **values: object) -> list[dict]:
    """Records with these values."""
    return [r for r in records if all(r[key] == value for key, value in values.items())]
