"""A raw client for the built-in engine: it sees every byte, and how the connection ended."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import pytest
import trio

from relay_bench.engine import Engine, EngineConfig, serve_engine

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

DATA = Path(__file__).with_name("data")

#: Seconds after which a test that waits for the engine has failed.
PATIENCE_S = 5.0


class Answer:
    """An answer in raw bytes."""

    def __init__(self, raw: bytes, end: str) -> None:
        self.raw = raw
        self.end = end  #: ``fin``, ``rst`` or ``open``
        self.head, _, self.body = raw.partition(b"\r\n\r\n")
        while re.match(rb"HTTP/1.1 1\d\d", self.head):
            self.head, _, self.body = self.body.partition(b"\r\n\r\n")

    @property
    def status(self) -> int:
        return int(self.head.split(b" ")[1])

    @property
    def names(self) -> list[str]:
        """Header names, in order."""
        return [line.partition(b":")[0].decode() for line in self.head.split(b"\r\n")[1:]]

    @property
    def headers(self) -> dict[str, str]:
        lines = (line.decode().partition(": ") for line in self.head.split(b"\r\n")[1:])
        return {name: value for name, _, value in lines}

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def chunks(self) -> list[bytes]:
        """Payloads of the whole chunks."""
        return self._dechunk()[0]

    @property
    def is_whole(self) -> bool:
        """Whether the chunked body has its end."""
        return self.rest == b"0\r\n\r\n" or self.rest.startswith(b"0;")

    @property
    def rest(self) -> bytes:
        """What stands behind the last whole chunk."""
        return self._dechunk()[1]

    @property
    def frames(self) -> list[bytes]:
        """The events of the payload, whatever the chunks."""
        payload = b"".join(self.chunks) if "transfer-encoding" in self.headers else self.body
        return re.findall(rb"(?s).+?\n\n|.+\Z", payload)

    def _dechunk(self) -> tuple[list[bytes], bytes]:
        body = self.body
        chunks: list[bytes] = []
        while True:
            line, found, rest = body.partition(b"\r\n")
            if not found or not re.fullmatch(rb"[0-9a-f]+(;.*)?", line):
                return chunks, body
            size = int(line.partition(b";")[0], 16)
            if size == 0 or len(rest) < size + 2:
                return chunks, body
            chunks.append(rest[:size])
            body = rest[size + 2 :]


def recorded(name: str) -> Answer:
    """What a real vLLM answered."""
    return Answer((DATA / f"{name}.response.raw").read_bytes(), "fin")


class Client:
    """Talks to one engine."""

    #: Three words of prompt, four tokens of answer, on any route.
    ASK: ClassVar[dict[str, Any]] = {
        "messages": [{"role": "user", "content": "one two three"}],
        "prompt": "one two three",
        "input": "one two three",
        "max_tokens": 4,
    }

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    async def connect(self) -> trio.abc.Stream:
        if self.engine.url.startswith("unix:"):
            return await trio.open_unix_socket(self.engine.url.removeprefix("unix:"))
        return await trio.open_tcp_stream(self.engine.host, self.engine.port)

    def request(
        self,
        body: Mapping[str, Any] | bytes | None = None,
        *,
        path: str = "/v1/chat/completions",
        method: str = "POST",
        version: str = "1.1",
        **headers: str,
    ) -> bytes:
        """A request's bytes; `headers` are spelt with underscores, ``sim_fault`` means ``x-sim-fault``."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode() if body is not None else b""
        lines = [f"{method} {path} HTTP/{version}", "host: engine"]
        if method == "POST":
            lines.append(f"content-length: {len(data)}")
        lines += [f"{name.replace('sim_', 'x-sim-').replace('_', '-')}: {value}" for name, value in headers.items()]
        return ("\r\n".join(lines) + "\r\n\r\n").encode() + data

    async def ask(self, body: Mapping[str, Any] | bytes | None = None, **options: Any) -> Answer:
        """One request on a connection of its own, read until the engine closes."""
        with trio.fail_after(PATIENCE_S):
            async with await self.connect() as stream:
                await stream.send_all(self.request(body, connection="close", **options))
                return await read_to_end(stream)

    async def stream(self, **options: Any) -> Answer:
        """A streamed answer of four tokens: six frames on chat (role, four of content, ``[DONE]``)."""
        return await self.ask({**self.ASK, "stream": True}, **options)

    async def stream_body(self, extra: Mapping[str, Any], *, keep: bool = False, **options: Any) -> Answer:
        """A streamed answer to `ASK` with `extra` fields; `keep`: on a connection that would be kept."""
        body = {**self.ASK, "stream": True, **extra}
        if not keep:
            return await self.ask(body, **options)
        async with await self.connect() as stream:
            await stream.send_all(self.request(body, **options))
            return Answer(await self.read_until(stream, b"\r\n0\r\n\r\n"), "open")

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait for something about the engine to become true."""
        with trio.fail_after(PATIENCE_S):
            while True:  # states change synchronously, within a few turns of the scheduler
                if condition():
                    return
                await trio.lowlevel.checkpoint()

    @property
    def states(self) -> list[str]:
        return [request["state"] for request in self.engine.requests()]

    async def read_to_end(self, stream: trio.abc.Stream) -> Answer:
        """All that comes until the connection ends."""
        with trio.fail_after(PATIENCE_S):
            return await read_to_end(stream)

    async def read_until(self, stream: trio.abc.Stream, mark: bytes, times: int = 1) -> bytes:
        """All that comes until `mark` has come `times` times."""
        raw = b""
        with trio.fail_after(PATIENCE_S):
            while raw.count(mark) < times:
                data = await stream.receive_some()
                assert data, f"closed after {raw!r}"
                raw += data
        return raw


async def read_to_end(stream: trio.abc.Stream) -> Answer:
    """All that comes until the connection ends."""
    raw = b""
    try:
        while data := await stream.receive_some():
            raw += data
    except trio.BrokenResourceError:
        return Answer(raw, "rst")
    return Answer(raw, "fin")


@pytest.fixture(name="recorded")
def recorded_fixture() -> Callable[[str], Answer]:
    """`recorded`, for test modules, which cannot import this file."""
    return recorded


@pytest.fixture
def config() -> EngineConfig:
    """The engine's settings; tests that need others override this."""
    return EngineConfig(captures=str(DATA))


@pytest.fixture
async def client(config: EngineConfig, nursery: trio.Nursery) -> Client:
    return Client(await nursery.start(serve_engine, config))
