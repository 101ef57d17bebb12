"""Locks on files and folders. They end with their process, however that ends, and depend on nothing but the path."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows, where folders cannot be locked
    HAS_FLOCK = False
else:
    HAS_FLOCK = True


class LockTimeoutError(TimeoutError):
    """Somebody else held a lock for too long."""


def try_lock(path: Path, *, is_shared: bool = False) -> int | None:
    """Lock a file or folder, unless somebody else has it. Other threads of this process count as somebody else.

    Where the system or the file system knows no such locks, nobody is kept out.

    Returns:
        The descriptor to close at the end; None if somebody else has the lock or has just removed the file.
    """
    if not HAS_FLOCK:
        return os.open(os.devnull, os.O_RDONLY)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    is_ours = False
    try:
        # Its last holder may have removed the file after it was opened here: then the lock is that of no file.
        is_ours = _flock(descriptor, is_shared) and os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        pass
    finally:
        if not is_ours:
            os.close(descriptor)
    return descriptor if is_ours else None


def _flock(descriptor: int, is_shared: bool) -> bool:
    """Lock an open file; False if somebody else has it."""
    kind = fcntl.LOCK_SH if is_shared else fcntl.LOCK_EX
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True


def wait_for_lock(
    path: Path, *, is_shared: bool = False, seconds: float, make: Callable[[], None] | None = None
) -> int:
    """`try_lock` until it succeeds.

    Args:
        make: makes the file if it is not there. Called before every attempt, because the last holder may remove it.

    Raises:
        LockTimeoutError: somebody else held the lock for so many seconds.
        FileNotFoundError: there is no such file, and `make` is None.
    """
    deadline = time.monotonic() + seconds
    while True:
        if make is not None:
            make()
        descriptor = try_lock(path, is_shared=is_shared)
        if descriptor is not None:
            return descriptor
        if make is None:
            os.stat(path)
        if time.monotonic() > deadline:
            raise LockTimeoutError(f"{path} has been locked by somebody else for {seconds:.0f} s")
        time.sleep(0.005)
