"""What the page says of an adaptation: a few sentences, and a plot for those who open the details."""

from __future__ import annotations

import io
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from .html import details, note
from .sessions import Session

#: Colours that the plot is drawn in, and the page's own that replace them: these are others in dark mode.
_INK, _BEFORE, _AFTER = "#010101", "#020202", "#030303"
_PAGE_COLOURS = {_INK: "currentColor", _BEFORE: "var(--hf-before)", _AFTER: "var(--hf-after)"}

#: Every line and letter in `_INK`, and letters that stay letters, so that the page's font is used.
_PLOT_STYLE: dict[Any, Any] = {
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "svg.fonttype": "none",
    "svg.hashsalt": "hyperflow",
}


def report(session: Session) -> str:
    """What came of an adaptation, as HTML: what matters to everybody, and the rest behind "Details"."""
    plot = plot_flow(session)
    return note(describe(session)) + details(describe_flow(session), plot)


def describe(session: Session) -> str:
    """How long it took, and what it is worth on the images that were given."""
    task = session.after
    ready = (
        f"Ready after {format_seconds(session.seconds)}: {len(task.class_names)} classes from {session.n_images} "
        "images, without gradients."
    )
    measured = session.leave_one_out
    if measured is None:
        return f"{ready} Give every class a second image, and the page tells you how far to trust it."
    counts = (
        f"Each of your images was classified by means of the others: {measured.right_before} of {measured.n_images} "
        f"right before, {measured.right_after} after."
    )
    return f"{ready} {counts}"


def describe_flow(session: Session) -> str:
    """Where the flow was stopped and why, and what differs between before and after."""
    point = session.stopping_point
    evaluations = f"The drift network was run {session.after.nfe} times."
    before = (
        "Before is direct transfer: the backbone as it is, which picks the class whose images are on average most "
        "similar."
    )
    if not point.accuracies:
        return (
            f"{evaluations} Every class has a single image, so none can be left out to choose where to stop: the flow "
            f"was followed to its end. {before}"
        )
    if point.time > 0:
        stopped = (
            f"The flow was stopped at t = {point.time:g}, where most of your images were classified right. Because the "
            "best point was taken, expect a little less on new images."
        )
    elif session.has_other_head:
        stopped = (
            "Nowhere along the flow were more of your images classified right than at its start, so the weights of the "
            "backbone stay as they are. Only the way in which images are compared with classes differs from before."
        )
    else:
        stopped = (
            "Nowhere along the flow were more of your images classified right than at its start, so the weights of the "
            "backbone stay as they are, and after is the same as before."
        )
    return f"{evaluations} {stopped} {before}"


def format_seconds(seconds: float) -> str:
    """A duration in s, or in ms if it is below a second."""
    if seconds < 1:
        return f"{1000 * seconds:.0f} ms"
    return f"{seconds:.1f} s"


def plot_flow(session: Session) -> str:
    """Plot the leave-one-out accuracy on the support set along the flow.

    Returns:
        an SVG in the colours of the page around it, or nothing if no image could be left out.
    """
    point, measured = session.stopping_point, session.leave_one_out
    if measured is None:
        return ""
    times = list(point.accuracies)
    percentages = [100 * accuracy for accuracy in point.accuracies.values()]
    best = 100 * point.accuracies[point.time]
    with matplotlib.rc_context(_PLOT_STYLE):  # the page plots one at a time
        figure = Figure(figsize=(4.2, 2.8), layout="constrained")
        axis = figure.subplots()
        axis.axhline(100 * measured.right_before / measured.n_images, linestyle="--", color=_BEFORE, label="before")
        axis.plot(times, percentages, "o-", color=_AFTER, label="along the flow")
        axis.plot(point.time, best, "o", markersize=13, markerfacecolor="none", color=_AFTER, label="stopped here")
        axis.set(xlabel="t along the flow", ylabel="of your images right, %", xticks=times, ylim=(-5, 105))
        axis.legend(loc="lower right", frameon=False)
        axis.spines[["top", "right"]].set_visible(False)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    for drawn, shown in _PAGE_COLOURS.items():
        svg = svg.replace(drawn, shown)
    return svg
