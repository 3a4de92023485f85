"""What is likely not meant: listeners that others may reach, in clear text or without a key; too few descriptors."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterable

from relay.address import Address
from relay.config import LimitsConfig
from relay.daemon.process import shortages
from relay.net.guard import Guard
from relay.net.notices import Priority, say
from relay.net.tls import TlsListener


def exposures(listeners: Iterable[socket.socket], guard: Guard) -> set[str]:
    """A line for each that is on a public address: what it carries can be read on the way, or anybody may ask."""
    lines = set()
    for listener in filter(_is_public, listeners):
        advice = [] if isinstance(listener, TlsListener) else ["give listen.tls, or listen on loopback behind TLS"]
        advice += [] if guard.access else ["set auth.keys_file"]
        risk = "keys and answers go in clear text" if guard.access else "anybody may use the engines"
        if advice:
            address = Address(*listener.getsockname()[:2])
            lines.add(f"{address} can be reached from outside: {risk}; {', and '.join(advice)}")
    return lines


def warnings_of(listeners: Iterable[socket.socket], guard: Guard, limits: LimitsConfig) -> set[str]:
    """All there is to warn of, at the start and by a reload: `exposures`, and descriptors that are too few."""
    return exposures(listeners, guard) | shortages(limits)


def warn_of(lines: Iterable[str]) -> None:
    """Tells of `warnings_of` that have not been told of."""
    for line in sorted(lines):
        say(f"relay: warning: {line}", Priority.WARNING)


def _is_public(listener: socket.socket) -> bool:
    """Whether it is bound to an address of the internet, or to all the machine has."""
    if listener.family == socket.AF_UNIX:
        return False
    address = ipaddress.ip_address(listener.getsockname()[0].partition("%")[0])
    return address.is_unspecified or address.is_global
