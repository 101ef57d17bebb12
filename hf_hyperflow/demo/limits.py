"""What one visitor of the page may use up, so that there is something left for the others."""

from __future__ import annotations

import ipaddress
import threading
import time
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any, TypeAlias

Scope: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send: TypeAlias = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]

#: Bytes that a visitor may upload at once, and again in every hour.
UPLOAD_BYTES = 500_000_000

#: How often a visitor may adapt or predict at once, and again in every `RUNS_PERIOD` seconds.
RUNS, RUNS_PERIOD = 20, 120

#: Visitors who are remembered.
MAX_VISITORS = 10_000


@dataclass
class Allowance:
    """An amount that is used up, and grows back evenly within a period (a token bucket).

    Attributes:
        capacity: the amount at the start, and the most there ever is.
        period: how many seconds the whole amount takes to grow back.
    """

    capacity: float
    period: float

    def __post_init__(self) -> None:
        self._left = self.capacity
        self._time = time.monotonic()

    def take(self, amount: float) -> bool:
        """Use up an amount if there is as much; whether there was."""
        now = time.monotonic()
        self._left = min(self.capacity, self._left + self.capacity * (now - self._time) / self.period)
        self._time = now
        if amount > self._left:
            return False
        self._left -= amount
        return True


class VisitorLimits:
    """ASGI middleware that refuses what goes beyond the allowance of a visitor, before it is read or queued.

    Visitors are told apart by their network address, IPv6 ones by its first 64 bits. This machine itself has no limits.
    A proxy on this machine, or one that the server trusts (FORWARDED_ALLOW_IPS), notes the addresses of the visitors.
    """

    def __init__(self, app: App):
        self.app = app
        self._uploads: dict[str, Allowance] = {}
        self._runs: dict[str, Allowance] = {}
        self._lock = threading.Lock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        problem = None
        if scope["type"] == "http" and scope["method"] == "POST":
            problem = self._find_problem(scope)
        if problem is None:
            await self.app(scope, receive, send)
            return
        status, message = problem
        headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"connection", b"close")]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": message.encode()})

    def _find_problem(self, scope: Scope) -> tuple[int, str] | None:
        """Why a request is refused, as an HTTP status and a message."""
        visitor = _get_visitor(scope)
        if visitor is None:
            return None
        path = scope["path"]
        is_run = path.endswith("/queue/join") or "/call/" in path
        if is_run and not self._take(self._runs, visitor, Allowance(RUNS, RUNS_PERIOD), 1):
            return 429, "You have asked for a lot. Wait some seconds, then go on."
        if path.endswith("/upload"):
            length = dict(scope["headers"]).get(b"content-length", b"")
            if not length.isdigit():
                return 411, "Uploads have to say how long they are."
            if not self._take(self._uploads, visitor, Allowance(UPLOAD_BYTES, 3600), int(length)):
                return 429, "You have uploaded a lot. Wait some minutes, then go on."
        return None

    def _take(self, allowances: dict[str, Allowance], visitor: str, fresh: Allowance, amount: float) -> bool:
        with self._lock:
            if visitor not in allowances and len(allowances) >= MAX_VISITORS:
                del allowances[next(iter(allowances))]  # the one who came first
            return allowances.setdefault(visitor, fresh).take(amount)


def _get_visitor(scope: Scope) -> str | None:
    """The address that a visitor is known by; None for this machine itself."""
    host = (scope.get("client") or ("",))[0]
    try:
        address = ipaddress.ip_address(host)
    except ValueError:  # a socket file, or a proxy that hides it
        return host
    if address.is_loopback:
        return None
    if isinstance(address, ipaddress.IPv6Address):
        return str(ipaddress.ip_network((int(address) >> 64 << 64, 64)))
    return str(address)
