"""systemd's conversations with a daemon: sockets it passes, and states it is told.

sd_listen_fds(3), sd_notify(3), sd_watchdog_enabled(3) and sd-daemon(3) are a few lines each on the environment, and the
ready-made libraries are dormant or need systemd's headers. Outside of systemd all of it does nothing.
"""

from __future__ import annotations

import os
import socket
import time
from typing import NamedTuple

#: Passed descriptors begin here; below are standard input, output and error.
_FIRST_FD = 3

#: Seconds a notification may wait for room in systemd's queue: its senders must not stop when it does.
_SEND_LIMIT_S = 0.5


class PassedSocket(NamedTuple):
    """A descriptor from systemd, and what its unit calls it (``FileDescriptorName=``; "" if it does not)."""

    fd: int
    name: str


class PassedListeners(NamedTuple):
    """The descriptors of listening sockets from systemd, by what is spoken on them."""

    http: list[int]
    https: list[int]
    admin: list[int]


def notify(*lines: str) -> bool:
    """Send systemd state lines such as ``READY=1``; whether they were sent. Never raises, does nothing elsewhere."""
    path = os.environ.get("NOTIFY_SOCKET", "")
    if not path.startswith(("/", "@")):
        return False
    address = "\0" + path[1:] if path.startswith("@") else path  # "@": the abstract namespace, unix(7)
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.settimeout(_SEND_LIMIT_S)
            sender.sendto("\n".join(lines).encode(), address)
    except OSError:
        return False
    return True


def ready(status: str) -> bool:
    """Started, or reloaded: requests are served. `status` is shown by ``systemctl status``, as all are below."""
    return notify("READY=1", _status(status))


def reloading(status: str) -> bool:
    """A reload has begun; `ready` ends it, whether it succeeded or not.

    The time lets systemd (253 and later, ``Type=notify-reload``) tell this reload from one that was asked for earlier.
    """
    return notify("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}", _status(status))


def stopping(status: str) -> bool:
    """The drain has begun."""
    return notify("STOPPING=1", _status(status))


def draining(left: int, seconds: float) -> bool:
    """The drain goes on: so many streams are `left`, and the stop may take `seconds` more from now.

    Counts once ``TimeoutStopSec=`` is used up, and has to be repeated before each extension ends (sd_notify(3)).
    """
    streams = "1 stream" if left == 1 else f"{left} streams"
    return notify(f"EXTEND_TIMEOUT_USEC={_microseconds(seconds)}", _status(f"draining, {streams} left"))


def feed_watchdog() -> bool:
    """A sign of life; systemd kills a service that owes one for longer than `watchdog_s`."""
    return notify("WATCHDOG=1")


def watchdog_s() -> float | None:
    """Seconds within which systemd expects `feed_watchdog`, best done twice as often; `None` if it does not."""
    limit = os.environ.get("WATCHDOG_USEC", "")
    if os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()) or not _is_number(limit):
        return None
    return int(limit) / 1e6 or None


def listen_fds() -> list[PassedSocket]:
    """Take the sockets that systemd passes to this process; a second call, or a child's, finds none."""
    pid = os.environ.pop("LISTEN_PID", "")
    count = os.environ.pop("LISTEN_FDS", "")
    names = os.environ.pop("LISTEN_FDNAMES", "").split(":")
    if pid != str(os.getpid()) or not _is_number(count):
        return []
    fds = range(_FIRST_FD, _FIRST_FD + int(count))
    for fd in fds:
        os.set_inheritable(fd, False)  # FD_CLOEXEC
    return [PassedSocket(fd, names[at] if at < len(names) else "") for at, fd in enumerate(fds)]


def passed_listeners() -> PassedListeners:
    """Take systemd's sockets as `listen_fds` does, sorted by their names; one of another name, or none, is http."""
    found = PassedListeners([], [], [])
    for passed in listen_fds():
        {"https": found.https, "admin": found.admin}.get(passed.name, found.http).append(passed.fd)
    return found


def _status(text: str) -> str:
    """A status line; a line break in it would begin another assignment."""
    return "STATUS=" + " ".join(text.splitlines())


def _microseconds(seconds: float) -> int:
    return round(seconds * 1_000_000)


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit()
