"""Processes that die, to the letter: SIGKILL before the k-th operation on the files of a folder."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path

#: What Python reports of itself before it changes files. `open` counts where it is opened to be written.
_CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.link", "os.symlink", "os.chmod")


def die_before(k: int, folder: Path) -> None:
    """SIGKILL of this process before operation number k (from 1) on the files of a folder."""
    watch(folder, lambda n, operation: os.kill(os.getpid(), signal.SIGKILL) if n == k else None)


def watch(folder: Path, notice: Callable[[int, str], None]) -> None:
    """Call `notice` before every operation on the files of a folder, for the rest of this process.

    Operations are numbered from 1. Each is described by its name and paths.
    """
    n, lock = 0, threading.Lock()

    def count(operation: str) -> None:
        nonlocal n
        with lock:  # files are synced by several threads
            n += 1
            notice(n, operation)

    def hook(event: str, arguments: tuple) -> None:
        if event == "open":
            _, mode, flags = arguments
            is_change = bool(flags & (os.O_WRONLY | os.O_RDWR)) or (mode is not None and set(mode) & set("wax+"))
        else:
            is_change = event in _CHANGES
        # Paths may be relative to an open folder, as those of `shutil.rmtree` are.
        paths = [os.fspath(a) for a in arguments if isinstance(a, str | bytes | os.PathLike)]
        is_inside = any(isinstance(p, str) and (str(folder) in p or not os.path.isabs(p)) for p in paths)
        if is_change and is_inside:
            count(" ".join([event, *map(str, paths)]))

    fsync = os.fsync

    def watched_fsync(descriptor: int) -> None:
        count(f"fsync {os.readlink(f'/proc/self/fd/{descriptor}')}")
        fsync(descriptor)

    sys.addaudithook(hook)
    os.fsync = watched_fsync


def ends_when_killed_before(k: int, folder: Path, action: Callable[[], object]) -> bool:
    """Do something in a forked child that is killed before its operation number k on the files of a folder.

    Returns:
        Whether it did what it had to do, because it had fewer operations.
    """
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            die_before(k, folder)
            action()
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return False
    assert os.WEXITSTATUS(status) == 0, "the action failed in the child; its error is above"
    return True
