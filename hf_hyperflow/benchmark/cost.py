"""Measures what any piece of work costs: wall-clock, peak memory and floating-point operations."""

from __future__ import annotations

import platform
import resource
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import TypeVar

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

T = TypeVar("T")


def _attention(query: torch.Size, key: torch.Size, value: torch.Size, *_: object, **__: object) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward(
    gradient: torch.Size, query: torch.Size, key: torch.Size, value: torch.Size, *_: object, **__: object
) -> int:
    return sdpa_backward_flop_count(gradient, query, key, value)


#: The attention of CPUs, which PyTorch's counter leaves out.
CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


@dataclass(frozen=True)
class Cost:
    """Cost of one run.

    Attributes:
        seconds: wall-clock.
        peak_memory_mb: most memory in use during the run beyond what was in use when it began, in MiB. On a CPU it
            is the memory of the process, on CUDA that of the allocator.
    """

    seconds: float
    peak_memory_mb: float


def device_name(device: str) -> str:
    """The device "cpu" or "cuda" in words, with the number of threads of a CPU."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{platform.processor() or platform.machine()} CPU, {torch.get_num_threads()} threads"


def run_in_fresh_process(function: Callable[..., T], *arguments: object) -> T:
    """Call a module-level function in a new Python process, whose memory nothing else has touched."""
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def measure_cost(function: Callable[[], T], device: torch.device | str = "cpu") -> tuple[T, Cost]:
    """Run a function and measure it.

    On a CPU, call this in a fresh process: memory that was freed before and is kept by the allocator would hide what
    the function takes.
    """
    is_cuda = torch.device(device).type == "cuda"
    if is_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        before = _reset_peak()
    started = time.perf_counter()
    result = function()
    if is_cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    peak = torch.cuda.max_memory_allocated() if is_cuda else _read_peak()
    return result, Cost(seconds, max(0, peak - before) / 2**20)


def flop_counter() -> FlopCounterMode:
    """Counts the operations of matrix products, convolutions and attention within; a multiply-add counts as two."""
    return FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION)


def count_flops(function: Callable[[], object]) -> int:
    """Floating-point operations of a run, see `flop_counter`."""
    with flop_counter() as counter:
        function()
    return counter.get_total_flops()


def _reset_peak() -> int:
    """Reset the process's peak memory where the system can (Linux), and return what is resident now, in bytes."""
    if sys.platform != "linux":
        return _read_peak()
    Path("/proc/self/clear_refs").write_text("5")
    return _read_status("VmRSS")


def _read_peak() -> int:
    """The process's peak memory in bytes."""
    if sys.platform == "linux":
        return _read_status("VmHWM")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if sys.platform == "darwin":
        return peak
    return 1024 * peak


def _read_status(key: str) -> int:
    """An entry of the process's status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {key}.")
