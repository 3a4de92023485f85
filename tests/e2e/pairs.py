"""Split pools for tests: prefillers and decoders that do as the test says, and a relay in front of them."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any, Final, NamedTuple, TypeAlias

import msgspec
import trio
import trio.testing

from relay.address import parse_upstream
from relay.config import PoolConfig, TimeoutsConfig
from relay.core.board import read
from relay.core.connectors.base import LegRequest
from relay.core.request import Route
from tests.core.captured import Captured, captured
from tests.e2e.fleet import RunningFleet, answer, close_kept, running_fleet
from tests.e2e.harness import PATIENCE_S

PATHS: Final = {
    Route.CHAT: "/v1/chat/completions",
    Route.COMPLETIONS: "/v1/completions",
    Route.RESPONSES: "/v1/responses",
    Route.MESSAGES: "/v1/messages",
}
#: What a client asks for, in bytes that re-encoding would change.
CLIENT: Final = {
    Route.CHAT: b'{"model":"tiny", "messages":[{"role":"user","content":"Z\\u00fcrich"}],"max_completion_tokens":6,'
    b'"temperature":1.0e-5}',
    Route.COMPLETIONS: b'{"model":"tiny","prompt":"once", "max_tokens":6,"seed":12345678901234567890}',
    Route.RESPONSES: b'{"model":"tiny","input":"once", "max_output_tokens":6}',
    Route.MESSAGES: b'{"model":"tiny","messages":[], "max_tokens":6}',
}

#: A handle no encoder would write so.
HANDLE: Final = b'{ "do_remote_prefill" : true, "a":1e400,"a":12345678901234567890.10, "h\\u00e9":"\\/" }'
PREFILLED: Final = answer(200, b'{"id":"x","usage":{},"kv_transfer_params":%b}' % HANDLE)
WITHOUT_HANDLE: Final = answer(200, b'{"id":"x","kv_transfer_params":null}')


def raw(name: str) -> bytes:
    """A recorded answer, as it was on the wire."""
    found = recorded(name)
    head = b"".join(b"%b: %b\r\n" % field for field in found.headers)
    return b"HTTP/1.1 %d -\r\n%b\r\n%b" % (found.status, head, found.raw_body)


def recorded(name: str) -> Captured:
    return next(each for each in captured() if each.name == name)


#: What decoders answer, by route: a stream, and a body.
STREAMS: Final = {
    Route.CHAT: "pd/pd_chat_stream.2decode",
    Route.COMPLETIONS: "pd/pd_comp_stream.2decode",
    Route.RESPONSES: "responses_basic.stream",
    Route.MESSAGES: "messages_stop_seq.stream",
}
BODIES: Final = {
    Route.CHAT: "pd/pd_chat_nonstream.2decode",
    Route.COMPLETIONS: "pd/pd_comp_nonstream.2decode",
    Route.RESPONSES: "responses_basic.nonstream",
    Route.MESSAGES: "messages_stop_seq.nonstream",
}
DECODED: Final = raw(STREAMS[Route.CHAT])
#: A stream that ends badly in its second frame, though it began with 200: vLLM has lost the handle.
LOST: Final = raw("fail/pd_prefill_then_killed.2decode")


class Asked(NamedTuple):
    """A request as an engine got it."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    number: int  #: of all requests of all engines

    @property
    def engine(self) -> str:
        """The URL of the engine that was asked."""
        return f"http://{self.headers['host']}"

    @property
    def id(self) -> str:
        return self.headers["x-request-id"]

    @property
    def leg(self) -> LegRequest:
        """As a connector would have planned it."""
        rank = self.headers.get("x-data-parallel-rank")
        return LegRequest(self.body, self.id, () if rank is None else ((b"x-data-parallel-rank", rank.encode()),))

    def json(self) -> Any:
        return json.loads(self.body)


_numbers = itertools.count()

#: What an engine does with a request.
Turn: TypeAlias = Callable[[Asked, trio.SocketStream], Awaitable[None]]


def says(data: bytes, *rest: bytes) -> Turn:
    """Sends an answer; in more parts, each in a turn of its own."""

    async def turn(asked: Asked, stream: trio.SocketStream) -> None:
        await stream.send_all(data)
        for part in rest:
            await trio.testing.wait_all_tasks_blocked(0.01)
            await stream.send_all(part)

    return turn


def dies(data: bytes = b"") -> Turn:
    """Closes, perhaps in the middle of an answer."""

    async def turn(asked: Asked, stream: trio.SocketStream) -> None:
        if data:
            await stream.send_all(data)
        await stream.aclose()

    return turn


class Silence:
    """An engine that says nothing, or nothing more, until its client has left."""

    def __init__(self, data: bytes = b"") -> None:
        self.begun = trio.Event()
        self._is_left = trio.Event()
        self._data = data

    async def left(self) -> None:
        """Waits until its client has left: at once, as nothing but that ends a connection of a `split_pair` so soon."""
        with trio.fail_after(PATIENCE_S):
            await self._is_left.wait()

    async def __call__(self, asked: Asked, stream: trio.SocketStream) -> None:
        if self._data:
            await stream.send_all(self._data)
        self.begun.set()
        with suppress(trio.BrokenResourceError):
            assert not await stream.receive_some(), "another request before the answer"
        self._is_left.set()
        await stream.aclose()


class Half:
    """All engines of one role: the n-th answer, whoever gives it, is the n-th of the `script`, then the `usual` one."""

    def __init__(self, usual: Turn) -> None:
        self.usual = usual
        self.script: list[Turn] = []
        self.asked: list[Asked] = []  #: in the order in which it came
        self.urls: list[str] = []

    def __repr__(self) -> str:
        return f"<Half {self.urls} asked={len(self.asked)}>"

    @property
    def last(self) -> Asked:
        return self.asked[-1]

    async def serve(self, stream: trio.SocketStream) -> None:
        buffer = bytearray()
        try:
            while (asked := await _request(stream, buffer)) is not None:
                self.asked.append(asked)
                turn = self.script.pop(0) if self.script else self.usual
                await turn(asked, stream)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass

    async def listen(self, nursery: trio.Nursery) -> str:
        """One more engine; where."""
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        self.urls.append(f"http://127.0.0.1:{listeners[0].socket.getsockname()[1]}")
        await nursery.start(trio.serve_listeners, self.serve, listeners)
        return self.urls[-1]


async def _request(stream: trio.SocketStream, buffer: bytearray) -> Asked | None:
    end = length = -1
    while end < 0 or len(buffer) < end + length:
        data = await stream.receive_some()
        if not data:
            return None
        buffer += data
        end = buffer.find(b"\r\n\r\n") + 4 if b"\r\n\r\n" in buffer else -1
        found = re.search(rb"(?i)\r\ncontent-length: *(\d+)", buffer[:end]) if end > 0 else None
        length = int(found[1]) if found else 0
    lines = bytes(buffer[: end - 4]).decode("latin-1").split("\r\n")
    method, path, _ = lines[0].split(" ")
    fields = dict(line.split(": ", 1) for line in lines[1:])
    asked = Asked(
        method, path, {name.lower(): value for name, value in fields.items()}, bytes(buffer[end:]), next(_numbers)
    )
    buffer.clear()
    return asked


class Pair:
    """Prefillers, decoders, and the relay before them."""

    def __init__(self) -> None:
        self.prefill = Half(says(PREFILLED))
        self.decode = Half(says(DECODED))
        self.relay: RunningFleet

    @property
    def order(self) -> str:
        """Who was asked, in order: a ``p`` or a ``d`` for each request."""
        asked = [(each.number, "p") for each in self.prefill.asked] + [(each.number, "d") for each in self.decode.asked]
        return "".join(role for _, role in sorted(asked))

    def metric(self, name: str) -> float:
        """A counter, summed over its labels."""
        tally = self.relay.worker.service.tally
        tally.board.flush()
        return sum(values[0] for key, values in read(tally.block).items() if key[0] == name)


@asynccontextmanager
async def split_pair(
    prefillers: int = 1,
    decoders: int = 1,
    *,
    connector: str = "nixl",
    settings: dict[str, Any] | None = None,
    engine: dict[str, Any] | None = None,
    **tables: Any,
) -> AsyncIterator[Pair]:
    """A relay in front of such a pool, which keeps an engine's connection for any time.

    So a connection that is closed was closed for what happened on it, and in the end each that is kept has to be good.
    `settings` are the pool's, `engine` each engine's, `tables` the configuration's.
    """
    pair = Pair()
    tables["timeouts"] = msgspec.structs.replace(tables.get("timeouts", TimeoutsConfig()), upstream_idle_s=0.0)
    async with trio.open_nursery() as nursery:
        urls = {
            "prefill": [await pair.prefill.listen(nursery) for _ in range(prefillers)],
            "decode": [await pair.decode.listen(nursery) for _ in range(decoders)],
        }
        roles: dict[str, Any] = {
            role: tuple(msgspec.structs.replace(parse_upstream(url), **(engine or {})) for url in of_role)
            for role, of_role in urls.items()
        }
        pool = PoolConfig(**{"connector": connector, **roles, **(settings or {})})
        async with running_fleet(pool, **tables) as pair.relay:
            yield pair
            await close_kept(pair.relay.worker)
        drains = pair.relay.worker.service.drains
        assert drains.running == 0
        assert not pair.relay.worker.service.callbacks
        nursery.cancel_scope.cancel()


def sent(route: Route = Route.CHAT, body: bytes | None = None, *, stream: bool = True, **headers: str) -> bytes:
    """A request of a client with headers of all kinds."""
    data = CLIENT[route] if body is None else body
    if stream:
        data = data[:-1] + b',"stream":true}'
    fields = {"host": "relay", "content-type": "application/json", "content-length": str(len(data)), **headers}
    lines = [f"POST {PATHS[route]}?q=1 HTTP/1.1", *(f"{name.replace('_', '-')}: {at}" for name, at in fields.items())]
    return ("\r\n".join(lines) + "\r\n\r\n").encode() + data
