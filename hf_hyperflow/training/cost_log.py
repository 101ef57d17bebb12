"""What training has cost so far, phase by phase; kept in the checkpoints, so that a resumed run goes on counting."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version

import torch
from accelerate import Accelerator

from ..benchmark.cost import flop_counter
from ..benchmark.task_cost import device_name

#: Operations are counted in every n-th run of a phase, the first included: counting slows small models down.
COUNTED_EVERY = 50
PACKAGES = ("hf_hyperflow", "torch", "transformers", "peft", "accelerate", "datasets")


class OfflineCost:
    """Runs, seconds and floating-point operations of each phase, and what went through it.

    Args:
        accelerator: operations are summed over its processes; seconds are wall-clock, those of the main process.
        phases: `state` of an earlier part of the same training.
    """

    def __init__(self, accelerator: Accelerator, phases: dict[str, dict[str, float]] | None = None):
        self.accelerator = accelerator
        self.state = phases or {}

    @contextmanager
    def phase(self, name: str, *, every: int = COUNTED_EVERY, **counts: int) -> Iterator[None]:
        """Count what happens in the block as one run of a phase; all processes must take part.

        Args:
            every: operations are counted in every n-th run of the phase.
            counts: further things to add up, like episodes.
        """
        entry = self.state.setdefault(name, {"runs": 0, "seconds": 0.0, "counted_runs": 0, "counted_flops": 0.0})
        started = time.perf_counter()
        if entry["runs"] % every == 0:
            with flop_counter() as counter:
                yield
            flops = torch.tensor(counter.get_total_flops(), dtype=torch.float64, device=self.accelerator.device)
            entry["counted_flops"] += self.accelerator.reduce(flops).item()
            entry["counted_runs"] += 1
        else:
            yield
        entry["runs"] += 1
        entry["seconds"] += time.perf_counter() - started
        for key, value in counts.items():
            entry[key] = entry.get(key, 0) + value

    def summary(self) -> dict[str, dict[str, float]]:
        """Of each phase `runs`, `seconds`, `flops` (the mean of the counted runs times all runs) and the counts."""
        result = {}
        for name, entry in self.state.items():
            flops = entry["counted_flops"] / entry["counted_runs"] * entry["runs"]
            rest = {key: value for key, value in entry.items() if not key.startswith("counted_")}
            result[name] = rest | {"seconds": round(entry["seconds"], 3), "flops": flops}
        return result


def hardware(accelerator: Accelerator) -> dict[str, object]:
    """What a run runs on: the device in words, how many processes, threads of each."""
    return {
        "device": device_name(accelerator.device.type),
        "gpu": accelerator.device.type != "cpu",
        "processes": accelerator.num_processes,
        "threads": torch.get_num_threads(),
        "mixed_precision": accelerator.mixed_precision,
    }


def versions() -> dict[str, str]:
    """Of the packages that a run depends on."""
    return {package: version(package) for package in PACKAGES}
