"""Downloads an image from an address: within a time, up to a size, and never from a private address by a detour."""

from __future__ import annotations

import base64
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection, responses
from typing import NamedTuple
from urllib.parse import SplitResult, quote, unquote_to_bytes, urljoin, urlsplit

from .modeling.images import ImageError
from .modeling.version import __version__

#: The largest image that is downloaded, in bytes.
MAX_BYTES = 50_000_000

#: How many redirects are followed.
MAX_REDIRECTS = 5

_REDIRECTS = (301, 302, 303, 307, 308)
_PIECE = 65_536
#: IPv6 addresses that stand for the IPv4 address in their last 32 bits (RFC 6052).
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


class _Address(NamedTuple):
    """An address of a host, in the form that `socket.connect` takes."""

    family: int
    target: tuple


def download(url: str, timeout: float) -> bytes:
    """The bytes behind an http, https or data URL.

    Everything takes `timeout` seconds at most: finding the address, connecting, redirecting and receiving. More than
    `MAX_BYTES` are not read. At most `MAX_REDIRECTS` redirects are followed, to http and https only. All addresses
    of the host of every redirect are looked up once and checked, and the connection goes to one of those that were
    checked. Private, loopback and link-local addresses are refused, unless the URL was given with one (or with
    "localhost"); then its server may redirect to others. The proxies of the environment are not used.

    Raises:
        ImageError: one of these limits is reached, or the URL is wrong or cannot be reached. It is named.
    """
    name = shorten(url)
    try:
        if url.startswith("data:"):
            return _read_data(url)
        return _run_in_time(_Download(url, timeout), timeout)
    except (OSError, ValueError, HTTPException) as error:
        problem = str(error) or type(error).__name__
        raise ImageError(f"{name} cannot be fetched ({problem}). Check the address.") from error


def shorten(url: str) -> str:
    """A URL as errors name it: its first 200 characters, without a password."""
    before, separator, rest = url.partition("://")
    authority, slash, path = rest.partition("/")
    return f"{before}{separator}{authority.rpartition('@')[2]}{slash}{path}"[:200]


def _read_data(url: str) -> bytes:
    """The content of a data URL (RFC 2397)."""
    header, _, payload = url.partition(",")
    data = unquote_to_bytes(payload)
    if header.endswith(";base64"):
        data = base64.decodebytes(data)
    _require_size(len(data))
    return data


def _require_size(n_bytes: int) -> None:
    if n_bytes > MAX_BYTES:
        raise ValueError(f"it is larger than {MAX_BYTES / 1e6:g} MB")


class _Download:
    """One download, to be run in a thread of its own and to be aborted from another.

    Attributes:
        data: what was downloaded.
        error: why it was not.
    """

    def __init__(self, url: str, timeout: float):
        self.data = b""
        self.error: Exception | None = None
        self._url = url
        self._deadline = time.monotonic() + timeout
        self._socket: socket.socket | None = None
        self._is_aborted = False

    def run(self) -> None:
        try:
            self.data = self._follow_redirects()
        except Exception as error:  # raised again in the thread that waits
            self.error = error

    def abort(self) -> None:
        """End the connection, whatever the thread is waiting for."""
        self._is_aborted = True
        if self._socket is not None:
            with suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)

    def _follow_redirects(self) -> bytes:
        url = self._url
        may_be_private = _is_private_name(_split(url).hostname or "")
        for _ in range(MAX_REDIRECTS + 1):
            parts = _split(url)
            addresses = _resolve(parts)
            is_private = not all(_is_public(address.target[0]) for address in addresses)
            if is_private and not may_be_private:
                raise ValueError(f"{parts.hostname!r} is at a private address")
            # Only a server at a private address may send us on to another one.
            may_be_private = is_private
            with self._get(parts, addresses) as response:
                if response.status not in _REDIRECTS:
                    return _read(response)
                url = urljoin(url, response.headers.get("Location", ""))
        raise ValueError(f"it redirects more than {MAX_REDIRECTS} times")

    @contextmanager
    def _get(self, parts: SplitResult, addresses: list[_Address]) -> Iterator[HTTPResponse]:
        """The answer to a GET request, its body unread."""
        kind = HTTPSConnection if parts.scheme == "https" else HTTPConnection
        connection = kind(parts.hostname or "", parts.port)
        connection.sock = self._connect(addresses)
        try:
            if parts.scheme == "https":
                connection.sock = self._secure(connection.sock, parts.hostname)
            path = quote(parts.path or "/", safe="/%:=&~+!$,;'@()*")
            query = quote(parts.query, safe="/%:=&~+!$,;'@()*?")
            target = f"{path}?{query}" if query else path
            connection.request("GET", target, headers={"User-Agent": f"hf_hyperflow/{__version__}"})
            yield connection.getresponse()
        finally:
            connection.close()

    def _connect(self, addresses: list[_Address]) -> socket.socket:
        """A connection to the first of the addresses that answers."""
        error: OSError = OSError("the host has no address")
        for address in addresses:
            connected = socket.socket(address.family, socket.SOCK_STREAM)
            try:
                self._watch(connected)
                connected.connect(address.target)
                return connected
            except OSError as reason:
                connected.close()
                error = reason
        raise error

    def _secure(self, connected: socket.socket, host: str | None) -> socket.socket:
        context = ssl.create_default_context()
        secured = context.wrap_socket(connected, server_hostname=host, do_handshake_on_connect=False)
        self._watch(secured)
        secured.do_handshake()
        return secured

    def _watch(self, current: socket.socket) -> None:
        """Make this the socket that `abort` ends."""
        self._socket = current
        current.settimeout(max(0.001, self._deadline - time.monotonic()))
        if self._is_aborted:
            raise TimeoutError("it takes too long")


def _run_in_time(job: _Download, timeout: float) -> bytes:
    """Run a download in a thread and wait for it no longer than this. Looking up a name cannot be stopped otherwise."""
    thread = threading.Thread(target=job.run, daemon=True)
    thread.start()
    thread.join(timeout)
    if thread.is_alive() or isinstance(job.error, TimeoutError):
        job.abort()
        raise TimeoutError(f"it takes longer than {timeout:g} s")
    if job.error is not None:
        raise job.error
    return job.data


def _read(response: HTTPResponse) -> bytes:
    """The body of an answer."""
    if response.status != 200:
        raise OSError(f"HTTP {response.status} {responses.get(response.status, '')}".rstrip())
    _require_size(response.length or 0)
    data = bytearray()
    while piece := response.read(_PIECE):
        data += piece
        _require_size(len(data))
    if response.length:
        raise OSError(f"the connection broke off {response.length} bytes before the end")
    return bytes(data)


def _split(url: str) -> SplitResult:
    """The parts of an http or https URL.

    Raises:
        ValueError: it is another kind of URL, or has no host, or a password.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https"):
        raise ValueError(f"it redirects to {parts.scheme or 'no address'!r}, and only http and https are followed")
    if not parts.hostname:
        raise ValueError("it names no host")
    if parts.username is not None or parts.password is not None:
        raise ValueError("it has a user name or a password in it: fetch it yourself and give the bytes")
    return parts


def _resolve(parts: SplitResult) -> list[_Address]:
    """All addresses of the host of a URL."""
    port = parts.port or (443 if parts.scheme == "https" else 80)
    infos = socket.getaddrinfo(parts.hostname, port, type=socket.SOCK_STREAM)
    return [_Address(family, target) for family, _, _, _, target in infos]


def _is_private_name(host: str) -> bool:
    """Whether a host is written as a private address or as localhost. Other names have to be at public addresses."""
    try:
        return not _is_public(host)
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def _is_public(address: str) -> bool:
    """Whether an IP address is one of the internet.

    Raises:
        ValueError: it is not an IP address.
    """
    ip = ipaddress.ip_address(address.partition("%")[0])  # behind the % is the network card of a link-local address
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour
        if ip in _NAT64:
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner is not None:
            return inner.is_global and not inner.is_multicast
    return ip.is_global and not ip.is_multicast
