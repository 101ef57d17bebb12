"""Hyper-parameters of the baselines, chosen on episodes of training domains and never on those that are reported."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path

from .methods import METHODS, DirectTransfer, FineTuning, Method

#: Hyper-parameters by name, of methods by name.
Hyperparameters = dict[str, dict[str, int | float]]


def read_hyperparameters(path: str | Path | None) -> Hyperparameters:
    """Read the hyper-parameters that a grid search chose and wrote to a JSON file; no file gives none.

    Raises:
        ValueError: the file is no such JSON, or names methods or hyper-parameters that there are not; it is named.
        FileNotFoundError: the file is not there.
    """
    if path is None:
        return {}
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there: make it with a grid search, or leave it out.")
    try:
        chosen = json.loads(path.read_text())["hyperparameters"]
        for name, values in chosen.items():
            _check(name, values)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not the result of a grid search: {error}") from error
    return chosen


def _check(name: str, values: dict[str, int | float]) -> None:
    expected: dict[str, int | float] = {}
    for method in METHODS:
        if method.name == name:
            expected = method.hyperparameters()
    is_complete = bool(expected) and values.keys() == expected.keys()
    if not is_complete or not all(value > 0 for value in values.values()):
        raise ValueError(f"{name} has {values}, expected positive numbers for {sorted(expected)}")


def with_hyperparameters(methods: Iterable[Method], hyperparameters: Hyperparameters) -> list[Method]:
    """The methods, with other hyper-parameters where there are some.

    Fine-tuning has the scale of direct transfer, for both compare images by plain cosines.
    """
    direct = dataclasses.replace(DirectTransfer(), **hyperparameters.get(DirectTransfer.name, {}))
    changed = []
    for method in methods:
        values = dict(hyperparameters.get(method.name, {}))
        if isinstance(method, FineTuning):
            values["scale"] = direct.scale
        changed.append(dataclasses.replace(method, **values))
    return changed
