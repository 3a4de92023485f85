"""Where requests go: a URL, taken apart once."""

from __future__ import annotations

import socket
from contextlib import suppress
from typing import Any, Final
from urllib.parse import urlsplit

import msgspec

_PORTS: Final = {"http": 80, "https": 443}
#: Seconds for an address of several to take a connection.
_PROBE_S: Final = 2.0


class Target(msgspec.Struct, frozen=True, kw_only=True):
    """A server's address. `address` is what ``connect`` takes; `prefix` stands before every path."""

    url: str
    family: int
    address: str | tuple[str, int]
    host: str  #: the ``Host`` field
    prefix: str = ""
    tls_name: str = ""  #: set: TLS, with this server name

    def path(self, endpoint: str) -> str:
        """The path of an endpoint; a base URL as SDKs want it, with ``/v1`` at its end, does not double that."""
        prefix = self.prefix
        if prefix.endswith("/v1") and endpoint.startswith("/v1/"):
            prefix = prefix[:-3]
        return prefix + endpoint


def resolve(url: str) -> Target:
    """A target from ``http://…``, ``https://…`` or ``unix:/path``; names are looked up here, once.

    Raises `ValueError` for what is no such URL, or whose name has no address.
    """
    if url.startswith("unix:"):
        return Target(url=url, family=socket.AF_UNIX, address=url.removeprefix("unix:"), host="localhost")
    parts = urlsplit(url if "://" in url else f"http://{url}")
    try:
        port = parts.port or _PORTS[parts.scheme]
    except (KeyError, ValueError):
        raise ValueError(f"{url}: wanted http://HOST[:PORT], https://… or unix:/path") from None
    if not parts.hostname or parts.query or parts.fragment or parts.username is not None:
        raise ValueError(f"{url}: wanted http://HOST[:PORT][/PREFIX], without user, query or fragment")
    try:
        family, address = _answering(socket.getaddrinfo(parts.hostname, port, type=socket.SOCK_STREAM))
    except OSError as error:
        raise ValueError(f"{url}: {error}") from None
    return Target(
        url=url,
        family=family,
        address=address,
        host=parts.netloc,
        prefix=parts.path.rstrip("/"),
        tls_name=parts.hostname if parts.scheme == "https" else "",
    )


def _answering(found: list[tuple[Any, ...]]) -> tuple[int, tuple[str, int]]:
    """The first address that takes a connection, or just the first: ``localhost`` has two, a server often one."""
    # what IPv6 addresses have beyond host and port is for link-local ones
    addresses = [(family, (str(address[0]), int(address[1]))) for family, *_, address in found]
    for family, address in addresses if len(addresses) > 1 else ():
        with suppress(OSError), socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.settimeout(_PROBE_S)
            probe.connect(address)
            return family, address
    return addresses[0]
