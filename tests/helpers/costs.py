"""Costs as if a benchmark had measured them before."""

from __future__ import annotations

import json
from pathlib import Path

from hf_hyperflow.benchmark.cost import device_name
from hf_hyperflow.benchmark.methods import EASYFSL_METHODS, METHODS


def write_known_costs(output: Path, largest: int = 60) -> Path:
    """Write the costs of all methods on this device, so that a test of something else does not measure them.

    Args:
        output: the folder of a benchmark; made if need be.
        largest: tasks have fewer support images than that.
    """
    cost = {"seconds_per_task": 0.5, "peak_memory_mb": 2.0, "flops_per_task": 1000}
    entries = []
    for method in (*METHODS, *EASYFSL_METHODS):
        for n_way in (3, 4, 5, 6):
            for n_support in range(largest):
                key = {"method": method.name, "n_way": n_way, "n_support": n_support, "device": device_name("cpu")}
                entries.append(key | {"cost": cost})
    output.mkdir(parents=True, exist_ok=True)
    (output / "costs.json").write_text(json.dumps(entries))
    return output
