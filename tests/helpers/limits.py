"""Runs a function in a process of its own, with a limit of memory and of time."""

from __future__ import annotations

import multiprocessing
import os
import resource
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any


def run_limited(function: Callable[..., Any], *arguments: Any, megabytes: int, seconds: float) -> Any:
    """The result of a function in a fork of this process; its exceptions are raised here.

    Args:
        function: what to run. What it returns or raises can be pickled.
        arguments: of the function.
        megabytes: how much more address space it may take than this process has.
        seconds: after that much time it is killed.

    Raises:
        AssertionError: it took too long or died.
    """
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_send_result, args=(sender, function, arguments, megabytes))
    child.start()
    sender.close()
    try:
        assert receiver.poll(seconds), f"it took longer than {seconds} s"
        try:
            result = receiver.recv()
        except EOFError:
            child.join()
            raise AssertionError(f"it died with exit code {child.exitcode}") from None
    finally:
        child.kill()
        child.join()
    if isinstance(result, BaseException):
        raise result
    return result


def _send_result(sender: Connection, function: Callable[..., Any], arguments: tuple, megabytes: int) -> None:
    with open("/proc/self/statm") as file:
        n_bytes = int(file.read().split()[0]) * os.sysconf("SC_PAGESIZE")
    resource.setrlimit(resource.RLIMIT_AS, (n_bytes + megabytes * 2**20,) * 2)
    try:
        result = function(*arguments)
    except BaseException as error:
        result = error
    sender.send(result)
