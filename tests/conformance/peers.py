"""A stand-in engine that keeps every byte it gets, a client that keeps every byte it gets, and the relay in between."""

from __future__ import annotations

import re
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Final, Literal

import trio
import trio.testing

from relay.config import LimitsConfig
from tests.conftest import RunningRelay, running_relay
from tests.e2e.harness import Client

#: What a connection of the engine's does behind its answer.
Then = Literal["keep", "fin", "rst"]

MAX_BODY_BYTES: Final = 1000
_NEW_ID = re.compile(rb"(?<=\r\nx-request-id: )[0-9a-f]{32}(?=\r\n)")
_LENGTH = re.compile(rb"(?i)\r\ncontent-length: *([0-9]+)\r\n")

OK: Final = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
SECOND: Final = b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nsecond"


class Engine:
    """Answers the first request with `first` and, behind the end of `then`, all others with `others`.

    `late` is what else it says on the first connection when, and only when, another request comes over that.
    """

    def __init__(self, first: bytes, then: Then = "keep", *, late: bytes = b"", others: bytes = SECOND) -> None:
        self.received: list[bytes] = []  #: by each connection, in the order they were opened
        self.authority = b""
        self._first: bytes | None = first
        self._then = then
        self._late = late
        self._others = others

    async def serve(self, stream: trio.SocketStream) -> None:
        number = len(self.received)
        self.received.append(b"")
        rest = b""
        try:
            while True:
                size = _size_of_first(rest)
                while not size:
                    data = await stream.receive_some()
                    if not data:
                        return
                    self.received[number] += data
                    rest += data
                    size = _size_of_first(rest)
                method = rest.partition(b" ")[0]
                rest = rest[size:]
                if not await self._answer(stream, method, self._late if number == 0 else b""):
                    return
        except trio.BrokenResourceError:
            pass  # the relay has had enough

    async def _answer(self, stream: trio.SocketStream, method: bytes, late: bytes) -> bool:
        """Answers one request; False where that ended the connection."""
        if self._first is None:
            others = self._others.partition(b"\r\n\r\n")[0] + b"\r\n\r\n" if method == b"HEAD" else self._others
            await stream.send_all(late + others)
            return True
        first, self._first = self._first, None
        await stream.send_all(first)
        if self._then == "keep":
            return True
        if self._then == "rst":
            stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        stream.socket.close()
        return False

    def requests(self) -> list[bytes]:
        """What it got, connection by connection, with the ids that the relay made up replaced by ``new``."""
        return [_NEW_ID.sub(b"new", data) for data in self.received]


def _size_of_first(data: bytes) -> int:
    """The bytes of the first request in `data`; 0: it is not whole yet. The relay sends no chunks."""
    end = data.find(b"\r\n\r\n") + 4
    if end < 4:
        return 0
    length = _LENGTH.search(data, 0, end)
    size = end + (int(length[1]) if length else 0)
    return size if len(data) >= size else 0


class Tap(Client):
    """A client that also keeps what it was sent, as it came."""

    def __init__(self, stream: trio.SocketStream, secure: trio.SSLStream[trio.SocketStream] | None = None) -> None:
        super().__init__(stream, secure)
        self.raw = b""

    async def _more(self) -> bool:
        before = len(self._buffer)
        more = await super()._more()
        self.raw += self._buffer[before:]
        return more

    async def everything(self) -> bytes:
        """All there is until the relay closes; fails where that is a reset."""
        with trio.fail_after(5):
            while await self._more():
                pass
        assert self._end == "fin", "the answer could have been lost"
        return self.raw


@asynccontextmanager
async def exchange(engine: Engine) -> AsyncIterator[tuple[RunningRelay, Tap]]:
    """A relay in front of `engine`, and a connection to it."""
    async with trio.open_nursery() as nursery:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        await nursery.start(trio.serve_listeners, engine.serve, listeners)
        engine.authority = b"127.0.0.1:%d" % listeners[0].socket.getsockname()[1]
        limits = LimitsConfig(max_body_bytes=MAX_BODY_BYTES)
        async with (
            running_relay(f"http://{engine.authority.decode()}", limits=limits) as relay,
            await Tap.connect(relay.port) as client,
        ):
            yield relay, client
        nursery.cancel_scope.cancel()


async def url_of(serve: Callable[[trio.SocketStream], Awaitable[None]], nursery: trio.Nursery) -> str:
    """Where it serves from now on."""
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    nursery.start_soon(trio.serve_listeners, serve, listeners)
    return f"http://127.0.0.1:{listeners[0].socket.getsockname()[1]}"


async def send_in(pieces: Iterable[bytes], stream: trio.SocketStream) -> None:
    """Each piece when the one before has been read, as far as that can be seen; as many as are wanted."""
    with suppress(trio.BrokenResourceError):
        for piece in pieces:
            await stream.send_all(piece)
            await trio.testing.wait_all_tasks_blocked()


class Forwarded:
    """A request as the relay writes it (`relay.core.headers.request_head`), for any engine.

    `fields` are the client's own that stay; the others are those that the relay adds or rewrites.
    """

    def __init__(
        self,
        start: bytes,
        fields: Sequence[bytes] = (),
        body: bytes | None = None,
        *,
        via: bytes = b"1.1 relay",
        forwarded_for: bytes = b"127.0.0.1",
        proto: bytes = b"http",
        host: bytes = b"a",
        request_id: bytes = b"new",
        identity: bool = False,
    ) -> None:
        self.method = start.partition(b" ")[0]
        added = [b"via: " + via, b"x-forwarded-for: " + forwarded_for]
        added += [b"x-forwarded-proto: " + proto] if proto else []
        added += [b"x-forwarded-host: " + host] if host else []
        added += [b"accept-encoding: identity"] if identity else []
        added += [b"x-request-id: " + request_id]
        added += [b"content-length: %d" % len(body)] if body is not None else []
        self._start = start
        self._rest = b"\r\n".join([*fields, *added]) + b"\r\n\r\n" + (body or b"")

    def to(self, authority: bytes) -> bytes:
        """Its bytes on the way to the engine at `authority`."""
        return self._start + b" HTTP/1.1\r\nhost: " + authority + b"\r\n" + self._rest
