"""What tests that run `hyperflow benchmark` need."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch

from hf_hyperflow.benchmark.cost import device_name
from hf_hyperflow.benchmark.methods import EASYFSL_METHODS, METHODS

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = os.environ | {
    "OMP_NUM_THREADS": str(torch.get_num_threads()),
    "HF_HUB_OFFLINE": "1",
    "PYTHONPATH": str(ROOT),
}


def with_known_costs(output: Path, largest: int = 60) -> Path:
    """The folder, with costs as if measured before on this device: a test of something else need not measure them."""
    cost = {"seconds_per_task": 0.5, "peak_memory_mb": 2.0, "flops_per_task": 1000, "flops_per_prediction": 100}
    entries = []
    for method in (*METHODS, *EASYFSL_METHODS):
        for n_way in (3, 4, 5, 6):
            for n_support in range(largest):
                entry = {"method": method.name, "n_way": n_way, "n_support": n_support}
                entries.append(entry | {"device": device_name("cpu"), "cost": cost})
    output.mkdir(parents=True, exist_ok=True)
    (output / "costs.json").write_text(json.dumps(entries))
    return output
