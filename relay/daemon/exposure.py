"""Listeners that others than this machine's users may reach, in clear text."""

from __future__ import annotations

import ipaddress
import socket
import sys
from collections.abc import Iterable

from relay.address import Address
from relay.net.guard import Guard


def warn_if_exposed(listeners: Iterable[socket.socket], guard: Guard) -> None:
    """One line where a listener is on a public address: what it carries can be read on the way, or anybody may ask."""
    exposed = [listener.getsockname() for listener in listeners if _is_public(listener)]
    if not exposed:
        return
    where = ", ".join(str(Address(host, port)) for host, port, *_ in exposed)
    risk = "keys and answers go in clear text" if guard.access else "anybody may use the engines"
    advice = "listen on loopback behind what ends TLS" + ("" if guard.access else ", and set auth.keys_file")
    print(f"relay: warning: {where} can be reached from outside: {risk}; {advice}", file=sys.stderr, flush=True)


def _is_public(listener: socket.socket) -> bool:
    """Whether it is bound to an address of the internet, or to all the machine has."""
    if listener.family == socket.AF_UNIX:
        return False
    address = ipaddress.ip_address(listener.getsockname()[0].partition("%")[0])
    return address.is_unspecified or address.is_global
