"""Listeners that others than this machine's users may reach, in clear text."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterable

from relay.address import Address
from relay.net.guard import Guard
from relay.net.notices import Priority, say


def exposures(listeners: Iterable[socket.socket], guard: Guard) -> set[str]:
    """A line for each that is on a public address: what it carries can be read on the way, or anybody may ask."""
    risk = "keys and answers go in clear text" if guard.access else "anybody may use the engines"
    advice = "listen on loopback behind what ends TLS" + ("" if guard.access else ", and set auth.keys_file")
    exposed = (listener.getsockname() for listener in listeners if _is_public(listener))
    return {f"{Address(host, port)} can be reached from outside: {risk}; {advice}" for host, port, *_ in exposed}


def warn_of(lines: Iterable[str]) -> None:
    """Tells of `exposures` that have not been told of."""
    for line in sorted(lines):
        say(f"relay: warning: {line}", Priority.WARNING)


def _is_public(listener: socket.socket) -> bool:
    """Whether it is bound to an address of the internet, or to all the machine has."""
    if listener.family == socket.AF_UNIX:
        return False
    address = ipaddress.ip_address(listener.getsockname()[0].partition("%")[0])
    return address.is_unspecified or address.is_global
