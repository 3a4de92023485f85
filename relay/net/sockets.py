"""Non-blocking sockets, tried first and waited for second.

trio's own sockets checkpoint after every operation that succeeds at once: a turn of the scheduler for each send of a
request that fits the kernel's buffer. What sends here only enters trio when it has to wait, so callers must wait
somewhere on every path (they do: for the next request, and for the engine's answer). What is waited for here is waited
for in trio: in a task, or within `relay.net.fiber.in_task`.
"""

from __future__ import annotations

import errno
import socket
import ssl
from contextlib import suppress
from typing import Final

import trio

from relay.errors import OutOfResources, Phase
from relay.net.tls import TlsSocket

#: Bytes asked of a socket at once.
READ_BYTES: Final = 65536
#: What says that this process, or its machine, is short of something, and nothing of the peer.
SHORTAGES: Final = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.ENOSPC)


def shortage(error: OSError, phase: Phase) -> OutOfResources | None:
    """The failure of an exchange where `error` is a shortage of the relay's; None where its cause is the peer."""
    if error.errno not in SHORTAGES:
        return None
    message = f"the relay is short of resources: {error.strerror}; try again"
    return OutOfResources(message, phase=phase, retry_after_s=1)


_room: Final = bytearray(READ_BYTES)
_view: Final = memoryview(_room)


def read(sock: socket.socket) -> bytes:
    """What there is, up to `READ_BYTES`; empty at the peer's end. Raises BlockingIOError, or OSError.

    By way of one buffer: `socket.recv` allocates all it asks for, then gives back what was not needed, and in its place
    comes what lives longer, so that the C library's heap becomes one of holes.
    """
    return bytes(_view[: sock.recv_into(_room)])


def read_onto(buffer: bytearray, sock: socket.socket) -> int:
    """The same, at the end of `buffer`; how many bytes. One copy less, which counts where clients flood."""
    size = sock.recv_into(_room)
    buffer += _view[:size]
    return size


async def skip(sock: socket.socket) -> int:
    """Drops what comes next, as `receive` would read it; how many bytes, 0 at the peer's end."""
    while True:
        await trio.lowlevel.wait_readable(sock)
        with suppress(BlockingIOError):
            return sock.recv_into(_room)


async def receive(sock: socket.socket) -> bytes:
    """The next bytes; empty at the peer's end. Raises OSError where the connection broke.

    After other tasks' turn also where bytes wait already: else a peer that floods would hold up the streams, and the
    end of the time it has.
    """
    while True:
        await trio.lowlevel.wait_readable(sock)
        with suppress(BlockingIOError):
            return read(sock)


async def send_all(sock: socket.socket, data: bytes | memoryview) -> None:
    """Sends all of `data`. A cancelled call may have sent a part: that connection is finished."""
    view = memoryview(data)
    while view:
        try:
            view = view[sock.send(view) :]
        except BlockingIOError:
            await trio.lowlevel.wait_writable(sock)


async def shake_hands(sock: TlsSocket) -> None:
    """Begins to speak TLS; the caller limits the time. Raises OSError: see `relay.net.tls.reason_of`."""
    while True:
        try:
            sock.do_handshake()
            return
        except ssl.SSLWantReadError:
            await trio.lowlevel.wait_readable(sock)
        except ssl.SSLWantWriteError:
            await trio.lowlevel.wait_writable(sock)


def set_no_delay(sock: socket.socket) -> None:
    """Sends small writes at once: with Nagle's algorithm a token can wait 40 ms for an acknowledgement."""
    if sock.family in (socket.AF_INET, socket.AF_INET6):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
