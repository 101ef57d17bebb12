"""The file that keeps what the methods of a benchmark cost, so that nothing is measured twice."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ..modeling.atomic_file import write_json
from ..modeling.saving import CheckpointError
from .bench.measure import TaskCost
from .cost import device_name

#: What an entry of the file has.
ENTRY = {"method", "n_way", "n_support", "device", "cost"}


@dataclass(frozen=True)
class CostKey:
    """What a cost depends on beside its `CostSetting`: a method's name, ways, and the number of support images."""

    method: str
    n_way: int
    n_support: int


class CostFile:
    """The costs measured so far, in a JSON file, of any device.

    Attributes:
        costs: those that were measured on this device.

    Raises:
        CheckpointError: the file is damaged or of something else; it is named.
    """

    def __init__(self, path: Path, device: str):
        self.path = path
        self.device = device_name(device)
        self._entries = _read_entries(path)
        self.costs: dict[CostKey, TaskCost] = {}
        for entry in self._entries:
            if entry["device"] == self.device:
                key = CostKey(entry["method"], entry["n_way"], entry["n_support"])
                self.costs[key] = TaskCost(**entry["cost"])

    def add(self, key: CostKey, cost: TaskCost) -> None:
        """Add a cost, in memory and in the file."""
        self.costs[key] = cost
        entry = asdict(key)
        entry["device"] = self.device
        entry["cost"] = asdict(cost)
        self._entries.append(entry)
        write_json(self.path, self._entries)


def _read_entries(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    try:
        entries = json.loads(path.read_text())
        names = {field.name for field in fields(TaskCost)}
        is_complete = all(ENTRY.issubset(entry) and names == set(entry["cost"]) for entry in entries)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged ({error}): remove it to measure again.") from error
    if not is_complete:
        raise CheckpointError(f"{path} is not the costs of a benchmark of this version: remove it to measure again.")
    return entries
