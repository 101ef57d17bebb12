"""How often images of each class were taken for each class: as figures, as tables and as a picture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .printing import print_line, print_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: With more classes than this the most frequent confusions are printed instead of the whole matrix.
MAX_COLUMNS = 20
MAX_CONFUSIONS = 10

#: With more classes than this, the cells of the picture hold no numbers.
MAX_NUMBERS = 15


@dataclass(frozen=True)
class Confusion:
    """The confusion matrix of one way to classify.

    Attributes:
        name: of the way to classify, in words.
        class_names: one per row and column.
        counts: `(n_way, n_way)` integers: images of the class of the row that were taken for the class of the column.
    """

    name: str
    class_names: list[str]
    counts: np.ndarray

    @property
    def n_images(self) -> int:
        """Number of images."""
        return int(self.counts.sum())

    @property
    def n_right(self) -> int:
        """Number of images that were taken for what they are."""
        return int(self.counts.trace())

    @property
    def accuracy(self) -> float:
        """Share of the images that were taken for what they are, in %."""
        return 100 * self.n_right / self.n_images

    @property
    def class_accuracies(self) -> list[float | None]:
        """The same of each class; None for a class without images."""
        accuracies: list[float | None] = []
        for number, row in enumerate(self.counts.tolist()):
            accuracies.append(100 * row[number] / sum(row) if sum(row) else None)
        return accuracies

    @property
    def mean_class_accuracy(self) -> float:
        """Mean of the accuracies of the classes that have images, in %: each class counts the same."""
        return float(np.mean([accuracy for accuracy in self.class_accuracies if accuracy is not None]))

    def to_dict(self) -> dict[str, Any]:
        """The figures for JSON. Accuracies are in %."""
        classes = []
        rows = zip(self.class_names, self.counts.tolist(), self.class_accuracies, strict=True)
        for number, (label, row, accuracy) in enumerate(rows):
            classes.append({"label": label, "n_images": sum(row), "n_right": row[number], "accuracy": accuracy})
        return {
            "accuracy": self.accuracy,
            "mean_class_accuracy": self.mean_class_accuracy,
            "n_images": self.n_images,
            "n_right": self.n_right,
            "classes": classes,
            "confusion": self.counts.tolist(),
        }


def print_confusions(confusions: list[Confusion]) -> None:
    """Print accuracies and confusions of several ways to classify the same images."""
    for confusion in confusions:
        print_line(
            f"{confusion.name}: {confusion.accuracy:.1f} % right ({confusion.n_right} of {confusion.n_images}), "
            f"{confusion.mean_class_accuracy:.1f} % in the mean over classes"
        )
    print_line("")
    names = [confusion.name for confusion in confusions]
    rows = [["class", "images", *names]]
    for number, label in enumerate(confusions[0].class_names):
        row = [label, str(int(confusions[0].counts[number].sum()))]
        for confusion in confusions:
            accuracy = confusion.class_accuracies[number]
            row.append("-" if accuracy is None else f"{accuracy:.1f} %")
        rows.append(row)
    print_table(rows)
    for confusion in confusions:
        print_line("")
        if len(confusion.class_names) > MAX_COLUMNS:
            _print_most_frequent(confusion)
        else:
            _print_matrix(confusion)


def _print_matrix(confusion: Confusion) -> None:
    print_line(f"{confusion.name}, confusion matrix. Rows: true classes. Columns: predicted ones, by their numbers.")
    numbers = [str(number) for number in range(1, len(confusion.class_names) + 1)]
    rows = [["", *numbers]]
    for number, label, counts in zip(numbers, confusion.class_names, confusion.counts.tolist(), strict=True):
        rows.append([f"{number} {label}", *map(str, counts)])
    print_table(rows)


def _print_most_frequent(confusion: Confusion) -> None:
    print_line(f"{confusion.name}, most frequent confusions (the whole matrix: --json or --picture)")
    errors = confusion.counts - np.diag(np.diag(confusion.counts))
    order = np.argsort(-errors, axis=None, kind="stable")[:MAX_CONFUSIONS]
    rows = [["true class", "taken for", "images"]]
    for place in order.tolist():
        row, column = divmod(place, len(confusion.class_names))
        if errors[row, column]:
            n_images = int(confusion.counts[row].sum())
            labels = [confusion.class_names[row], confusion.class_names[column]]
            rows.append([*labels, f"{errors[row, column]} of {n_images}"])
    print_table(rows)


def draw_confusions(confusions: list[Confusion]) -> Figure:
    """A panel per way to classify: of the images of each row, the share that was taken for each column."""
    from matplotlib.figure import Figure

    n_way = len(confusions[0].class_names)
    side = min(20, 3 + 0.3 * n_way)
    figure = Figure(figsize=(side * len(confusions), side), layout="constrained")
    for axis, confusion in zip(figure.subplots(1, len(confusions), squeeze=False)[0], confusions, strict=True):
        _draw_confusion(axis, confusion)
    return figure


def _draw_confusion(axis: Axes, confusion: Confusion) -> None:
    counts = confusion.counts
    shares = counts / np.maximum(1, counts.sum(axis=1, keepdims=True))
    axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    labels = []
    for label in confusion.class_names:
        labels.append(label if len(label) <= 24 else f"{label[:23]}…")
    numbers = range(len(labels))
    axis.set_xticks(numbers, labels, rotation=90, fontsize=8, parse_math=False)
    axis.set_yticks(numbers, labels, fontsize=8, parse_math=False)
    axis.set_xlabel("predicted")
    axis.set_ylabel("true")
    axis.set_title(f"{confusion.name}: {confusion.accuracy:.1f} %", fontsize=10)
    if len(labels) > MAX_NUMBERS:
        return
    for row in numbers:
        for column in numbers:
            colour = "white" if shares[row, column] > 0.5 else "black"
            axis.text(column, row, str(counts[row, column]), ha="center", va="center", color=colour, fontsize=8)
