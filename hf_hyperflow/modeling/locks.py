"""Locks for threads that share a backbone.

A task puts its own weights into the backbone whenever it is used, so only one thread at a time can use a backbone.
There is one lock per backbone. Whoever puts weights in, or runs the backbone with them, holds it.

Threads cannot wait for each other in a circle. A thread that holds the lock of a backbone waits neither for the lock of
another backbone nor for that of a folder. The only lock that it takes is that of `ignored_warnings`, and a thread that
holds that one waits for nothing.
"""

from __future__ import annotations

import os
import sys
import threading
import types
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

# As remote code this module is there once for each checkpoint, and all of these copies can work on one backbone. What
# they share is a module of its own, of which a process has one.
_shared = sys.modules.setdefault("_hf_hyperflow_locks", types.ModuleType("_hf_hyperflow_locks"))

# The locks are not attributes of the backbones, because a lock can be neither copied nor pickled, and a backbone can.
_locks: weakref.WeakKeyDictionary[nn.Module, threading.RLock]
_locks = vars(_shared).setdefault("locks", weakref.WeakKeyDictionary())

# Backbones that another thread was using when this process was forked.
_interrupted: weakref.WeakSet[nn.Module]
_interrupted = vars(_shared).setdefault("interrupted", weakref.WeakSet())

vars(_shared).setdefault("filters_lock", threading.RLock())


def get_lock(backbone: nn.Module) -> threading.RLock:
    """The lock of a backbone, for a `with` statement. A thread that holds it can take it again.

    The functions of this package take it themselves. Take it to keep other threads from using tasks while you copy,
    pickle, move or run their backbone, or fork the process. Hold the lock of one backbone at a time.

    A copy of a backbone has a lock of its own. In a forked process all locks are free.

    Raises:
        RuntimeError: this process was forked while another thread held the lock. What that thread was doing to the
            backbone is half done here, and nobody will complete it.
    """
    if backbone in _interrupted:
        raise RuntimeError(
            f"another thread was using this {type(backbone).__name__} when the process was forked: load the backbone "
            "again in the new process, or fork while you hold its lock (hf_hyperflow.modeling.locks.get_lock)."
        )
    lock = _locks.get(backbone)
    if lock is None:
        lock = _locks.setdefault(backbone, threading.RLock())  # of two threads here, both get the same lock
    return lock


@contextmanager
def ignored_warnings(*filters: tuple[str, type[Warning]]) -> Iterator[None]:
    """Within, warnings are not shown whose text begins with a pattern and that are of the class beside it.

    All threads share the filters of warnings, so one thread at a time can change them and put them back.
    """
    with _shared.filters_lock, warnings.catch_warnings():
        for pattern, category in filters:
            warnings.filterwarnings("ignore", pattern, category)
        yield


def _renew_locks() -> None:
    """Make all locks free in a forked process: the threads that held them do not exist in it."""
    vars(_shared)["filters_lock"] = threading.RLock()
    for backbone, lock in list(_locks.items()):
        if not lock.acquire(blocking=False):  # neither free nor held by the thread that forked
            _interrupted.add(backbone)
    _locks.clear()


if hasattr(os, "register_at_fork"):  # Windows has no fork
    os.register_at_fork(after_in_child=_renew_locks)
