"""What the page says of an adaptation: a paragraph and a plot."""

from __future__ import annotations

from matplotlib.figure import Figure

from .sessions import Session


def describe(session: Session) -> str:
    """What the adaptation took and where the flow was stopped, in words."""
    task = session.after
    return (
        f"Adapted to {len(task.class_names)} classes from {session.n_images} images in "
        f"{format_seconds(session.seconds)}, with {task.nfe} function evaluations (runs of the drift network) and no "
        f"gradients. {_describe_stopping(session)}"
    )


def _describe_stopping(session: Session) -> str:
    time, accuracies = session.stopping_point.time, session.stopping_point.accuracies
    if not accuracies:
        return (
            "Every class has a single image, so none can be left out to measure the accuracy along the flow: "
            "give a class a second one."
        )
    if time == 0:
        consequence = "before and after are the same"
        if session.has_other_head:
            consequence = "only the way that images are compared with classes is another one after it"
        return (
            f"Nowhere along the flow was the leave-one-out accuracy on your images above the {accuracies[0.0]:.0%} at "
            f"t = 0, so the weights of the backbone stay as they are: {consequence}."
        )
    return (
        f"Leave-one-out accuracy on your images: {accuracies[0.0]:.0%} before (t = 0), {accuracies[time]:.0%} at "
        f"t = {time:g}, where the flow was stopped."
    )


def format_seconds(seconds: float) -> str:
    """A duration in s, or in ms if it is below a second."""
    if seconds < 1:
        return f"{1000 * seconds:.0f} ms"
    return f"{seconds:.1f} s"


def plot_flow(session: Session) -> Figure | None:
    """Plot the leave-one-out accuracy on the support set along the flow; None if it could not be measured."""
    stopping_point = session.stopping_point
    if not stopping_point.accuracies:
        return None
    times = list(stopping_point.accuracies)
    percentages = [100 * accuracy for accuracy in stopping_point.accuracies.values()]
    figure = Figure(figsize=(5, 3), layout="constrained")
    axis = figure.subplots()
    axis.plot(times, percentages, "o-", color="#2563eb")
    axis.plot(
        stopping_point.time,
        100 * stopping_point.accuracies[stopping_point.time],
        "o",
        markersize=13,
        markerfacecolor="none",
        color="#c2410c",
        label="stopped here",
    )
    axis.set(xlabel="t along the flow", ylabel="accuracy, %", xticks=times, ylim=(-5, 105))
    axis.set_title("Leave-one-out accuracy on the support set", fontsize="medium")
    axis.grid(alpha=0.3)
    axis.legend(loc="lower right", frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    return figure
