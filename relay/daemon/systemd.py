"""systemd's two conversations with a daemon: sockets it passes (sd_listen_fds(3)), states it is told (sd_notify(3)).

Both protocols are a few lines on the environment, and the ready-made libraries are dormant or need systemd's headers.
"""

from __future__ import annotations

import os
import socket
from typing import NamedTuple

#: Passed descriptors begin here; below are standard input, output and error.
_FIRST_FD = 3

#: Seconds a notification may wait for room in systemd's queue: its senders must not stop when it does.
_SEND_LIMIT_S = 0.5


class PassedSocket(NamedTuple):
    """A descriptor from systemd, and what its unit calls it (``FileDescriptorName=``; "" if it does not)."""

    fd: int
    name: str


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


def listen_fds() -> list[PassedSocket]:
    """Take the sockets that systemd passes to this process; a second call, or a child's, finds none."""
    pid = os.environ.pop("LISTEN_PID", "")
    count = os.environ.pop("LISTEN_FDS", "")
    names = os.environ.pop("LISTEN_FDNAMES", "").split(":")
    if pid != str(os.getpid()) or not (count.isascii() and count.isdigit()):
        return []
    fds = range(_FIRST_FD, _FIRST_FD + int(count))
    for fd in fds:
        os.set_inheritable(fd, False)  # FD_CLOEXEC
    return [PassedSocket(fd, names[at] if at < len(names) else "") for at, fd in enumerate(fds)]
