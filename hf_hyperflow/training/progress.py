"""How far a training has come: what its checkpoints keep beside the weights and the optimiser."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

#: Means in the history are over so many steps.
WINDOW = 50


@dataclass
class RecentValues:
    """The values of each metric in the last `WINDOW` steps that measured it without a break.

    Attributes:
        columns: the values by metric, the latest last.
    """

    columns: dict[str, list[float]] = field(default_factory=dict)

    def add(self, values: dict[str, float], measured: Iterable[str]) -> None:
        """Add the values of a step. A metric that is not among the `measured` ones is forgotten."""
        columns = {}
        for name in measured:
            column = [*self.columns.get(name, []), values[name]]
            columns[name] = column[-WINDOW:]
        self.columns = columns

    def latest(self) -> dict[str, float]:
        return {name: column[-1] for name, column in self.columns.items()}

    def means(self) -> dict[str, float]:
        return {name: sum(column) / len(column) for name, column in self.columns.items()}


@dataclass
class TrainingProgress:
    """The state of a run of `DriftTrainer`.

    Attributes:
        step: optimiser steps that are done.
        history: one entry per validation: step, phase, means of the recent values, scale of the logits, and the
            accuracies of each validation domain.
        recent: values of the last steps.
    """

    step: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    recent: RecentValues = field(default_factory=RecentValues)

    def to_dict(self) -> dict[str, Any]:
        return {"step": self.step, "history": self.history, "recent": self.recent.columns}

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> TrainingProgress:
        return cls(state["step"], state["history"], RecentValues(state["recent"]))
