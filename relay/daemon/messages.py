"""What the control process and its workers tell each other, and the channel it goes over.

A message is its length, 4 bytes, and MessagePack, on a stream socket: a status or a configuration may be longer than
what a datagram holds. Descriptors travel beside the first byte of the message that names them (SCM_RIGHTS, unix(7)), so
they are there when it is.
"""

from __future__ import annotations

import errno
import os
import socket
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Final, Protocol, TypeVar

import msgspec
import trio

from relay.address import UpstreamConfig
from relay.config import Config
from relay.net.guard import Credentials
from relay.net.notices import Priority, say
from relay.net.sockets import SHORTAGES

_HEAD_BYTES: Final = 4
_READ_BYTES: Final = 65536
#: Descriptors in one message: the kernel's SCM_MAX_FD is 253.
MOST_FDS: Final = 250
#: Seconds before what the kernel had no room for is sent again.
RETRY_S: Final = 0.05
#: Shortages that pass. ETOOMANYREFS: too many descriptors are on their way between processes of one user (unix(7)).
_PASSING: Final = (*SHORTAGES, errno.ETOOMANYREFS)


T = TypeVar("T")


class HasFileno(Protocol):
    """What has a descriptor."""

    def fileno(self) -> int:
        """The descriptor."""


def parts(items: Sequence[T]) -> Iterator[Sequence[T]]:
    """As many at a time as a message may have descriptors."""
    for at in range(0, len(items), MOST_FDS):
        yield items[at : at + MOST_FDS]


class Member(msgspec.Struct, frozen=True, array_like=True):
    """An engine of the fleet."""

    role: str
    config: UpstreamConfig
    number: int | None  #: its cell in the scoreboard; None: it has none
    is_limited: bool  #: its limit is one over all workers, under its number
    is_resolved: bool
    is_probed: bool
    is_up: bool
    has_been_up: bool
    error: str | None  #: why it is not
    error_at: float  #: since when (monotonic clock)
    probe_s: float | None
    models: dict[str, bytes] | None  #: its own list, each entry in JSON


class PoolMembers(msgspec.Struct, frozen=True, array_like=True):
    """A pool's engines."""

    name: str
    number: int | None
    is_limited: bool
    callback_url: str
    members: list[Member]


class Fleet(msgspec.Struct, frozen=True, tag=True):
    """All there is to know of the fleet; a worker makes its own so, and answers `Done`."""

    serial: int
    pools: list[PoolMembers]
    config: tuple[Config, Credentials] | None  #: None: as before
    workers: list[int]  #: their slots


class Listen(msgspec.Struct, frozen=True, tag=True):
    """Accept at these sockets, and at no others. In force with the next `Fleet`."""

    numbers: list[int]  #: for each its number, which stays while it is open
    new: list[int]  #: of them those not known yet, a descriptor for each; the next `Listen` may bring others
    secure: list[int]  #: of these, those whose clients speak TLS


class Semaphores(msgspec.Struct, frozen=True, tag=True):
    """Those of limits that are new, a descriptor for each number, or `are_gone`, without."""

    numbers: list[int]
    are_gone: bool


class KeyLimit(msgspec.Struct, frozen=True, array_like=True):
    """A limit of a key."""

    name: str
    kind: str  #: of `relay.core.metrics.KEY_LIMITS`
    number: int  #: of requests at once: their cell in the scoreboard


class KeySemaphores(msgspec.Struct, frozen=True, tag=True):
    """Likewise those of keys' limits."""

    limits: list[KeyLimit]
    are_gone: bool


class AskStatus(msgspec.Struct, frozen=True, tag=True):
    """What is the worker doing? Answered by `Said` with a `relay.core.status.Status`, after its board is up to date."""

    serial: int


class AskExchanges(msgspec.Struct, frozen=True, tag=True):
    """Answered by `Said` with a list of `relay.core.status.ExchangeStatus`."""

    serial: int


class Call(msgspec.Struct, frozen=True, tag=True):
    """A decoder has called back this worker; the message is for who waits for `key`."""

    key: str
    body: bytes


class Drain(msgspec.Struct, frozen=True, tag=True):
    """Stop accepting, and end when what is open has ended."""


class Cut(msgspec.Struct, frozen=True, tag=True):
    """End at once."""


class Done(msgspec.Struct, frozen=True, tag=True):
    """The `Fleet` of this number is the worker's."""

    serial: int


class Said(msgspec.Struct, frozen=True, tag=True):
    """The answer to a question, in MessagePack."""

    serial: int
    answer: bytes


Order = Fleet | Listen | Semaphores | KeySemaphores | AskStatus | AskExchanges | Call | Drain | Cut
Reply = Done | Said
Message = Order | Reply

_encode: Final = msgspec.msgpack.Encoder().encode
_decode: Final = msgspec.msgpack.Decoder(Message).decode


class Copy:
    """Another descriptor of what may be closed before it has been sent. Raises OSError: there is none left."""

    _fd = -1

    def __init__(self, file: HasFileno) -> None:
        self._fd = os.dup(file.fileno())

    def fileno(self) -> int:
        """The descriptor."""
        return self._fd

    def __del__(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)


class Channel:
    """One end. `send` never waits; `deliver` must run, so that what is sent leaves."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.unsent_bytes = 0
        self.fds: deque[int] = deque()  #: received, and not yet taken by whom they are for
        self._received = bytearray()
        self._unsent: deque[tuple[memoryview, Sequence[HasFileno]]] = deque()
        self._wake = trio.Event()
        sock.setblocking(False)

    def __repr__(self) -> str:
        return f"<Channel {self.sock.fileno()} unsent={self.unsent_bytes}>"

    def send(self, message: Message, files: Sequence[HasFileno] = ()) -> None:
        """Sends a message, as soon as the other end takes it. `files` are open until then."""
        data = _encode(message)
        self.unsent_bytes += _HEAD_BYTES + len(data)
        self._unsent.append((memoryview(len(data).to_bytes(_HEAD_BYTES, "big") + data), files))
        self._wake.set()

    async def deliver(self) -> None:
        """Sends what there is to send, until cancelled or the other end is gone, which `receive` tells."""
        is_short = False
        while True:
            await self._wake.wait()
            self._wake = trio.Event()
            while self._unsent:
                data, files = self._unsent[0]
                try:
                    fds = [file.fileno() for file in files]
                    sent = socket.send_fds(self.sock, [data], fds) if fds else self.sock.send(data)
                except BlockingIOError:
                    await trio.lowlevel.wait_writable(self.sock)
                    continue
                except OSError as exc:
                    if exc.errno not in _PASSING:  # where it is not gone, it cannot be told any more
                        self._give_up()
                        return
                    if not is_short:
                        is_short = True
                        say(f"relay: cannot send between processes: {exc.strerror}; trying again", Priority.ERROR)
                    await trio.sleep(RETRY_S)
                    continue
                is_short = False
                self.unsent_bytes -= sent
                if sent == len(data):
                    self._unsent.popleft()
                else:
                    self._unsent[0] = data[sent:], ()

    def close(self) -> None:
        """Drops what has not been sent, and closes what has not been taken; the socket is its owner's."""
        for fd in self.fds:
            os.close(fd)
        self.fds.clear()
        self._unsent.clear()

    async def receive(self) -> Message | None:
        """The next message; None when the other end is gone, or has sent descriptors that there is no room for."""
        while (message := self._take()) is None:
            try:
                data, fds, flags, _ = socket.recv_fds(self.sock, _READ_BYTES, MOST_FDS, socket.MSG_CMSG_CLOEXEC)
            except BlockingIOError:
                await trio.lowlevel.wait_readable(self.sock)
                continue
            except OSError:
                return None
            if flags & socket.MSG_CTRUNC:  # those that are missing are lost: it can no longer be known what is whose
                say("relay: too many open files to take what the control process passes on; draining", Priority.ERROR)
                for fd in fds:
                    os.close(fd)
                self._give_up()
                return None
            if not data:
                return None
            self._received += data
            self.fds += fds
        return message

    def _give_up(self) -> None:
        """Lets both ends know that nothing comes any more."""
        with suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)

    def _take(self) -> Message | None:
        received = self._received
        end = _HEAD_BYTES + int.from_bytes(received[:_HEAD_BYTES], "big")
        if len(received) < max(end, _HEAD_BYTES + 1):
            return None
        message: Message = _decode(memoryview(received)[_HEAD_BYTES:end])
        del received[:end]
        return message
