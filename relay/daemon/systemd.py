"""systemd's conversations with a daemon: sockets it passes, and states it is told.

sd_listen_fds(3), sd_notify(3), sd_watchdog_enabled(3) and sd-daemon(3) are a few lines each on the environment, and the
ready-made libraries are dormant or need systemd's headers. Outside of systemd all of it does nothing.
"""

from __future__ import annotations

import itertools
import os
import socket
import time
from contextlib import suppress
from typing import NamedTuple

#: Passed descriptors begin here; below are standard input, output and error.
_FIRST_FD = 3

#: Seconds a notification may wait for room in systemd's queue: its senders must not stop when it does.
_SEND_LIMIT_S = 0.5


class PassedListeners(NamedTuple):
    """The descriptors of listening sockets from systemd, by what is spoken on them."""

    http: list[int]
    https: list[int]
    admin: list[int]


def notify(*lines: str) -> None:
    """Send systemd state lines such as ``READY=1``. Never raises, does nothing elsewhere."""
    path = os.environ.get("NOTIFY_SOCKET", "")
    if not path.startswith(("/", "@")):
        return
    address = "\0" + path[1:] if path.startswith("@") else path  # "@": the abstract namespace, unix(7)
    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        sender.settimeout(_SEND_LIMIT_S)
        sender.sendto("\n".join(lines).encode(), address)


def ready(status: str) -> None:
    """Started, or reloaded: requests are served. `status` is shown by ``systemctl status``, as all are below."""
    notify("READY=1", _status(status))


def reloading(status: str) -> None:
    """A reload has begun; `ready` ends it, whether it succeeded or not.

    The time lets systemd (253 and later, ``Type=notify-reload``) tell this reload from one that was asked for earlier.
    """
    notify("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}", _status(status))


def stopping(status: str) -> None:
    """The drain has begun."""
    notify("STOPPING=1", _status(status))


def draining(left: int, seconds: float) -> None:
    """The drain goes on: so many streams are `left`, and the stop may take `seconds` more from now.

    Counts once ``TimeoutStopSec=`` is used up, and has to be repeated before each extension ends (sd_notify(3)).
    """
    streams = "1 stream" if left == 1 else f"{left} streams"
    notify(f"EXTEND_TIMEOUT_USEC={round(seconds * 1_000_000)}", _status(f"draining, {streams} left"))


def feed_watchdog() -> None:
    """A sign of life; systemd kills a service that owes one for longer than `watchdog_s`."""
    notify("WATCHDOG=1")


def watchdog_s() -> float | None:
    """Seconds within which systemd expects `feed_watchdog`, best done twice as often; `None` if it does not."""
    limit = os.environ.get("WATCHDOG_USEC", "")
    if os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()) or not _is_number(limit):
        return None
    return int(limit) / 1e6 or None


def passed_listeners() -> PassedListeners:
    """Take the sockets that systemd passes to this process; a second call, or a child's, finds none.

    They are sorted by what their units call them (``FileDescriptorName=``): of another name, or none, is http.
    """
    found = PassedListeners([], [], [])
    pid = os.environ.pop("LISTEN_PID", "")
    count = os.environ.pop("LISTEN_FDS", "")
    names = os.environ.pop("LISTEN_FDNAMES", "").split(":")
    if pid != str(os.getpid()) or not _is_number(count):
        return found
    fds = range(_FIRST_FD, _FIRST_FD + int(count))
    for fd, name in itertools.zip_longest(fds, names[: len(fds)]):
        os.set_inheritable(fd, False)  # FD_CLOEXEC
        {"https": found.https, "admin": found.admin}.get(name, found.http).append(fd)
    return found


def _status(text: str) -> str:
    """A status line; a line break in it would begin another assignment."""
    return "STATUS=" + " ".join(text.splitlines())


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit()
