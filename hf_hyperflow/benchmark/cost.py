"""Measures what any piece of work costs: wall-clock, peak memory and floating-point operations."""

from __future__ import annotations

import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_all_start_methods, get_context
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import TypeVar

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

T = TypeVar("T")
K = TypeVar("K", bound=Hashable)

#: How often a piece of work is run for its median time, and how long that may take: a slow one is run less often.
MAX_ROUNDS = 10
ROUNDS_SECONDS = 20.0

#: What measurements need. The server that fresh processes are forked from imports it once.
PRELOADED = ["hf_hyperflow.benchmark.bench.measure", "sklearn.linear_model"]


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


class ProcessKilledError(RuntimeError):
    """A process ended before it had measured anything: mostly the system killed it, because memory ran out."""


@dataclass(frozen=True)
class Work:
    """A piece of work to measure.

    Attributes:
        run: does it.
        prepare: is called before every run. What it takes does not count.
    """

    run: Callable[[], object]
    prepare: Callable[[], object] = lambda: None


def device_name(device: str) -> str:
    """The device "cpu" or "cuda" in words, with the number of threads of a CPU."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{platform.processor() or platform.machine()} CPU, {torch.get_num_threads()} threads"


def run_in_fresh_process(function: Callable[..., T], *arguments: object) -> T:
    """Call a module-level function in a new Python process, whose memory no other work has touched.

    Raises:
        ProcessKilledError: the process was killed.
    """
    with ProcessPoolExecutor(max_workers=1, mp_context=_get_process_context()) as pool:
        try:
            return pool.submit(function, *arguments).result()
        except BrokenProcessPool as error:
            raise ProcessKilledError("the process that measured was killed, probably because memory ran out") from error


def _get_process_context() -> BaseContext:
    """How processes are started: forked from a server that has imported the libraries and done nothing else.

    Importing them takes seconds. Where there is no such server, as on Windows, every process does it.
    """
    if "forkserver" not in get_all_start_methods():
        return get_context("spawn")
    context = get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


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


def measure_in_turn(works: Mapping[K, Work], device: torch.device | str = "cpu") -> dict[K, Cost]:
    """Run several pieces of work in turn, round after round, so that a busy moment of the machine meets all alike.

    Returns:
        for each of them the median time over the rounds after the first, and the peak memory of its first run. On a
        CPU, that is its own only if there is no other work, see `measure_cost`.
    """
    first: dict[K, Cost] = {}
    seconds: dict[K, list[float]] = {}
    started = time.perf_counter()
    for key, work in works.items():
        work.prepare()
        _, first[key] = measure_cost(work.run, device)
        seconds[key] = []
    n_rounds = int(ROUNDS_SECONDS / (time.perf_counter() - started))
    for _ in range(max(1, min(n_rounds, MAX_ROUNDS))):
        for key, work in works.items():
            work.prepare()
            _, cost = measure_cost(work.run, device)
            seconds[key].append(cost.seconds)
    return {key: Cost(statistics.median(seconds[key]), first[key].peak_memory_mb) for key in works}


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
