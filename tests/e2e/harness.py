"""A client that sees every byte and how the connection ended, and engines that play a script."""

from __future__ import annotations

import gc
import json
import re
import socket
import ssl
import struct
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from typing import Any, Final, Literal, Self, TypeAlias

import trio

from relay_bench.engine import Engine

#: No single wait of a test is longer than this.
PATIENCE_S: Final = 5.0

CHAT_PATH: Final = "/v1/chat/completions"
#: What each route needs to stream six tokens.
ASKS: Final[dict[str, dict[str, Any]]] = {
    CHAT_PATH: {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 6, "stream": True},
    "/v1/completions": {"prompt": "hi", "max_tokens": 6, "stream": True},
    "/v1/responses": {"input": "hi", "max_output_tokens": 6, "stream": True},
    "/v1/messages": {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 6, "stream": True},
}
PATHS: Final = tuple(ASKS)

#: ``whole``: as long as its framing says. ``fin`` and ``rst``: the connection ended before that. With TLS ``fin`` is an
#: end with a goodbye, and any other ``rst``.
End: TypeAlias = Literal["whole", "fin", "rst"]


def request(
    path: str = CHAT_PATH,
    body: Mapping[str, Any] | bytes | None = None,
    *,
    method: str = "POST",
    version: str = "1.1",
    **headers: str,
) -> bytes:
    """A request's bytes; `body` fields come on top of the route's own. ``sim_fault`` is spelt ``x-sim-fault``."""
    data = body if isinstance(body, bytes) else b""
    if method == "POST" and not isinstance(body, bytes):
        data = json.dumps({"model": "tiny", **ASKS.get(path, {}), **(body or {})}).encode()
    lines = [f"{method} {path} HTTP/{version}", "host: relay"]
    if method == "POST" and "transfer_encoding" not in headers:
        lines.append(f"content-length: {len(data)}")
    lines += [f"{name.replace('sim_', 'x-sim-').replace('_', '-')}: {value}" for name, value in headers.items()]
    return ("\r\n".join(lines) + "\r\n\r\n").encode() + data


class Answer:
    """One answer as it came."""

    def __init__(self) -> None:
        self.interim: list[bytes] = []  #: heads of 1xx answers before it
        self.head = b""
        self.chunks: list[bytes] = []  #: payloads of chunks; of other framings a single one
        self.rest = b""  #: what stood behind the last whole chunk when the connection ended
        self.end: End = "whole"

    def __repr__(self) -> str:
        return f"<Answer {self.head!r} {self.chunks!r} {self.rest!r} {self.end}>"

    @property
    def status(self) -> int:
        return int(self.head.split(b" ")[1])

    @property
    def headers(self) -> dict[str, str]:
        lines = (line.decode("latin-1").partition(":") for line in self.head.split(b"\r\n")[1:] if line)
        return {name.lower(): value.strip() for name, _, value in lines}

    @property
    def payload(self) -> bytes:
        return b"".join(self.chunks)

    @property
    def frames(self) -> list[bytes]:
        """The events of the payload, where lines end in LF; a torn one last."""
        return re.findall(rb"(?s).+?\n\n|.+\Z", self.payload)

    def json(self) -> Any:
        return json.loads(self.payload)

    @property
    def error(self) -> dict[str, Any]:
        """The error object of an error answer."""
        error: dict[str, Any] = self.json()["error"]
        return error


class Client:
    """A connection to relay or engine."""

    def __init__(self, stream: trio.SocketStream, secure: trio.SSLStream[trio.SocketStream] | None = None) -> None:
        self.stream = stream
        self.secure = secure
        self._bytes: trio.abc.Stream = secure or stream
        self._buffer = bytearray()
        self._end: End | None = None

    @classmethod
    async def connect(cls, port: int, *, receive_buffer: int = 0, tls: ssl.SSLContext | None = None) -> Self:
        """With TLS where there is a context, as to ``localhost``."""
        sock = trio.socket.socket()
        if receive_buffer:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        try:
            await sock.connect(("127.0.0.1", port))
        except BaseException:
            sock.close()
            raise
        stream = trio.SocketStream(sock)
        return cls(stream, trio.SSLStream(stream, tls, server_hostname="localhost") if tls else None)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.stream.socket.close()

    def leave(self, how: str) -> None:
        """Hang up: ``fin`` half-closes, ``close`` closes, ``rst`` resets."""
        if how == "fin":
            self.stream.socket.shutdown(socket.SHUT_WR)
            return
        if how == "rst":
            self.stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.stream.socket.close()

    async def send(self, data: bytes) -> None:
        with trio.fail_after(PATIENCE_S):
            await self._bytes.send_all(data)

    async def ask(self, data: bytes) -> Answer:
        await self.send(data)
        return await self.answer(is_head=data.startswith(b"HEAD "))

    async def answer(self, *, is_head: bool = False) -> Answer:
        """The next answer, to its end or the connection's."""
        answer = Answer()
        with trio.fail_after(PATIENCE_S):
            while True:
                head = await self._take_until(b"\r\n\r\n")
                if not head.startswith(b"HTTP/1.1 1"):
                    break
                answer.interim.append(head)
            answer.head = head
            if self._end is None and not is_head and answer.status not in (204, 304):
                await self._body(answer)
            if self._end is not None and answer.end == "whole" and not head:
                answer.end = self._end
        return answer

    async def frames(self, count: int) -> bytes:
        """The raw bytes up to the `count`-th blank line of an event stream's body."""
        with trio.fail_after(PATIENCE_S):
            while self._buffer.count(b"\n\n") < count:
                assert await self._more(), f"closed after {self._buffer!r}"
        return bytes(self._buffer)

    async def is_closed(self) -> bool:
        """Whether the relay closes the connection in order, and sends nothing more before."""
        with trio.fail_after(PATIENCE_S):
            return not self._buffer and not await self._more() and self._end == "fin"

    async def interim(self) -> bytes:
        """A 1xx head, while the request is not yet sent to its end."""
        with trio.fail_after(PATIENCE_S):
            return await self._take_until(b"\r\n\r\n")

    async def _body(self, answer: Answer) -> None:
        headers = answer.headers
        if headers.get("transfer-encoding") == "chunked":
            await self._chunks(answer)
        elif "content-length" in headers:
            size = int(headers["content-length"])
            while len(self._buffer) < size and await self._more():
                pass
            answer.chunks.append(self._take(min(size, len(self._buffer))))
            if len(answer.payload) < size:
                answer.end = self._end or "fin"
        else:
            while await self._more():
                pass
            answer.chunks.append(self._take(len(self._buffer)))
            answer.end = self._end or "fin"

    async def _chunks(self, answer: Answer) -> None:
        while True:
            while (position := self._buffer.find(b"\r\n")) < 0:
                if not await self._more():
                    return self._cut(answer)
            size = int(bytes(self._buffer[:position]).partition(b";")[0], 16)
            if not size:  # behind its line: trailers, and an empty line
                while self._buffer.find(b"\r\n\r\n") < 0:
                    if not await self._more():
                        return self._cut(answer)
                self._take(self._buffer.find(b"\r\n\r\n") + 4)
                return None
            while len(self._buffer) < position + size + 4:
                if not await self._more():
                    return self._cut(answer)
            del self._buffer[: position + 2]
            answer.chunks.append(self._take(size))
            assert self._take(2) == b"\r\n"

    def _cut(self, answer: Answer) -> None:
        answer.rest = self._take(len(self._buffer))
        answer.end = self._end or "fin"

    async def _take_until(self, mark: bytes) -> bytes:
        while (position := self._buffer.find(mark)) < 0:
            if not await self._more():
                return b""
        return self._take(position + len(mark))

    def _take(self, size: int) -> bytes:
        data = bytes(self._buffer[:size])
        del self._buffer[:size]
        return data

    async def _more(self) -> bool:
        try:
            data = await self._bytes.receive_some(65536)
        except trio.BrokenResourceError:
            self._end = "rst"
            return False
        if not data:
            self._end = "fin"
        self._buffer += data
        return bool(data)


async def ask(port: int, data: bytes) -> Answer:
    """One request on a connection of its own."""
    async with await Client.connect(port) as client:
        return await client.ask(data)


async def until(condition: Callable[[], bool], limit_s: float = PATIENCE_S) -> None:
    """Waits, in short steps, for something to become true."""
    with trio.fail_after(limit_s):
        while not condition():  # noqa: ASYNC110 — others' states have no event to wait for
            await trio.sleep(0.002)


@contextmanager
def nothing_unreachable() -> Iterator[None]:
    """Of what the relay makes meanwhile, nothing may be left in the end that only a garbage collection would find."""
    gc.freeze()
    gc.disable()
    try:
        yield
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        found = Counter(type(each).__qualname__ for each in gc.garbage if type(each).__module__.startswith("relay."))
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.unfreeze()
        gc.enable()
    assert not found


def same(payload: bytes) -> bytes:
    """`payload` without what differs between two answers to one question: times."""
    return re.sub(rb'"(created|created_at|completed_at)":[0-9.]+', rb'"\1":0', payload)


def error_frames(answer: Answer) -> list[bytes]:
    """Frames that tell of an error, in any dialect."""
    return [frame for frame in answer.frames if b'"error":{' in frame]


def assert_cut_off(answer: Answer, code: str, *, frames: int) -> None:
    """`frames` frames of the engine, whole, then one error frame in the route's dialect, and the connection's end."""
    assert answer.status == 200
    assert answer.end == "fin"  # and not `whole`: there was no last chunk
    assert answer.rest == b""
    assert len(answer.frames) == frames + 1, answer.frames
    assert error_frames(answer) == [answer.frames[-1]]
    assert answer.payload.endswith(b"\n\n")
    assert b"[DONE]" not in answer.payload
    lines = answer.frames[-1].decode().splitlines()
    data = json.loads(lines[-2 if lines[-1] == "" else -1].removeprefix("data: "))
    if data.get("type") == "error":  # Responses and Anthropic name their events
        assert lines[0] == "event: error"
    if data["error"].keys() != {"type", "message"}:  # Anthropic's own form has no code
        assert data["error"]["code"] == code


class ScriptedEngine:
    """Several addresses, one script: the n-th request, wherever it arrives, gets the n-th answer."""

    def __init__(self, *script: tuple[bytes, Literal["keep", "fin", "rst"]]) -> None:
        self.script = list(script)
        self.heads: list[bytes] = []
        self.connections = 0
        self.urls: list[str] = []

    async def _serve(self, stream: trio.SocketStream) -> None:
        self.connections += 1
        buffer = bytearray()
        while True:
            match = None
            while match is None or len(buffer) < match.end() + int(match[1]):
                data = await stream.receive_some()
                if not data:
                    return
                buffer += data
                match = re.match(rb"(?si).*?\r\ncontent-length: *(\d+).*?\r\n\r\n", buffer)
            self.heads.append(bytes(buffer[: match.end()]))
            del buffer[: match.end() + int(match[1])]
            answer, then = self.script.pop(0)
            await stream.send_all(answer)
            if then == "rst":
                stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            if then != "keep":
                stream.socket.close()
                return


@asynccontextmanager
async def scripted(
    *script: tuple[bytes, Literal["keep", "fin", "rst"]], addresses: int = 2
) -> AsyncIterator[ScriptedEngine]:
    """A `ScriptedEngine` that listens on so many ports."""
    engine = ScriptedEngine(*script)
    async with trio.open_nursery() as nursery:
        for _ in range(addresses):
            listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
            port = listeners[0].socket.getsockname()[1]
            engine.urls.append(f"http://127.0.0.1:{port}")
            await nursery.start(trio.serve_listeners, engine._serve, listeners)
        yield engine
        nursery.cancel_scope.cancel()


#: A short chat stream, for scripts.
STREAM: Final = b'data: {"choices":[{"index":0,"delta":{"content":"a"}}]}\n\ndata: [DONE]\n\n'
GOOD_ANSWER: Final = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
    b"%x\r\n%b\r\n0\r\n\r\n" % (len(STREAM), STREAM)
)
UNAVAILABLE: Final = (
    b"HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\nretry-after: 7\r\n"
    b"content-length: 2\r\n\r\n{}"
)


def states(engine: Engine) -> list[str]:
    return [record["state"] for record in engine.requests()]
