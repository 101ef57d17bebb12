"""What training has cost so far, phase by phase. Checkpoints keep it, so that a resumed run goes on counting."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import Any

import torch
from accelerate import Accelerator

from ..benchmark.cost import device_name, flop_counter

#: Operations are counted in every n-th run of a phase, the first included, because counting slows small models down.
COUNTED_EVERY = 50
PACKAGES = ("hf_hyperflow", "torch", "transformers", "peft", "accelerate", "datasets")


@dataclass
class PhaseCost:
    """What one phase has cost.

    Attributes:
        runs: how often it ran.
        seconds: wall-clock of all runs.
        counted_runs, counted_flops: the runs in which operations were counted, and the operations of these.
        counts: what went through it, such as episodes.
    """

    runs: int = 0
    seconds: float = 0.0
    counted_runs: int = 0
    counted_flops: float = 0.0
    counts: dict[str, int] = field(default_factory=dict)

    @property
    def flops(self) -> float:
        """Operations of all runs: the mean of the counted ones, times all."""
        return self.counted_flops / self.counted_runs * self.runs

    def add_counts(self, counts: dict[str, int]) -> None:
        for name, value in counts.items():
            self.counts[name] = self.counts.get(name, 0) + value


class OfflineCost:
    """Runs, seconds and floating-point operations of each phase of a training.

    Args:
        accelerator: operations are summed over its processes. Seconds are the wall-clock of the main process.
        state: `state()` of an earlier part of the same training.
    """

    def __init__(self, accelerator: Accelerator, state: dict[str, dict[str, Any]] | None = None):
        self.accelerator = accelerator
        self.phases: dict[str, PhaseCost] = {}
        for name, values in (state or {}).items():
            self.phases[name] = PhaseCost(**values)

    def state(self) -> dict[str, dict[str, Any]]:
        """Everything that has been counted, as JSON can hold it."""
        return {name: asdict(phase) for name, phase in self.phases.items()}

    @contextmanager
    def phase(self, name: str, *, every: int = COUNTED_EVERY, **counts: int) -> Iterator[None]:
        """Count what happens in the block as one run of a phase. All processes must take part.

        Args:
            every: operations are counted in every n-th run of the phase.
            counts: further things to add up, such as episodes.
        """
        phase = self.phases.setdefault(name, PhaseCost())
        started = time.perf_counter()
        if phase.runs % every == 0:
            with flop_counter() as counter:
                yield
            flops = torch.tensor(counter.get_total_flops(), dtype=torch.float64, device=self.accelerator.device)
            phase.counted_flops += self.accelerator.reduce(flops).item()
            phase.counted_runs += 1
        else:
            yield
        phase.runs += 1
        phase.seconds += time.perf_counter() - started
        phase.add_counts(counts)

    def summary(self) -> dict[str, dict[str, float]]:
        """`runs`, `seconds`, `flops` and the counts of each phase."""
        summaries = {}
        for name, phase in self.phases.items():
            summary: dict[str, float] = {
                "runs": phase.runs,
                "seconds": round(phase.seconds, 3),
                "flops": phase.flops,
            }
            summary.update(phase.counts)
            summaries[name] = summary
        return summaries


def describe_hardware(accelerator: Accelerator) -> dict[str, Any]:
    """What a run runs on: the device in words, the number of processes and of threads in each, the precision."""
    return {
        "device": device_name(accelerator.device.type),
        "gpu": accelerator.device.type != "cpu",
        "processes": accelerator.num_processes,
        "threads": torch.get_num_threads(),
        "mixed_precision": accelerator.mixed_precision,
    }


def list_versions() -> dict[str, str]:
    """Versions of the packages that a run depends on."""
    return {package: version(package) for package in PACKAGES}
