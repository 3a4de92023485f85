"""Clients of every kind: all routes, streams and whole answers, keys, faults asked for, slow readers, hang-ups."""

from __future__ import annotations

import random
import socket
import time
from typing import Any, Final

import msgspec
import trio

from relay.core.request import Route
from relay_bench.drill.client import PATIENCE_S, READ_BYTES
from relay_bench.drill.hangups import HangUp, Moment, draw_hang_up, leave, part_of
from relay_bench.load.answer import Answer

#: The generating routes: path, what holds the prompt, and what limits the tokens.
_PATHS: Final[dict[Route, tuple[str, dict[str, Any], str]]] = {
    Route.CHAT: ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hello?"}]}, "max_tokens"),
    Route.COMPLETIONS: ("/v1/completions", {"prompt": "Hello?"}, "max_tokens"),
    Route.RESPONSES: ("/v1/responses", {"input": "Hello?"}, "max_output_tokens"),
    Route.MESSAGES: ("/v1/messages", {"messages": [{"role": "user", "content": "Hello?"}]}, "max_tokens"),
}
#: What engines are asked to do instead of answering well; `%d`: after so many frames.
_STREAM_FAULTS: Final = (
    "die-after:%d", "rst-after:%d", "stall-after:%d", "die-mid-frame:%d", "rst-mid-frame:%d", "bad-chunk:%d",
    "error-frame:%d", "error-first", "no-done", "no-final-blank", "json-error", "json-on-stream", "huge-frame:100000",
)  # fmt: skip
_FAULTS: Final = ("die-before-head", "rst-before-head", "stall-before-head", "status:500", "status:503", "status:429")
#: A slow reader's receive buffer, and what it reads at once, and how long it rests in between.
_SLOW_BYTES: Final = 2048
_SLOW_S: Final = 0.02


class Mix(msgspec.Struct, frozen=True, kw_only=True):
    """What share of the requests is of which kind."""

    models: tuple[str, ...]
    tokens: range
    keys: tuple[str, ...]
    streams: float = 0.7
    faults: float = 0.1
    hang_ups: float = 0.12
    slow: float = 0.03
    strangers: float = 0.02  #: those whose key nobody knows
    paddings: tuple[int, ...] = (0, 0, 1000, 50_000)
    wait_s: float = 0.3  #: longest wait behind a request before its client hangs up


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """A request as it was drawn."""

    id: str
    route: Route
    model: str
    tokens: int
    key: str
    is_stream: bool
    fault: str = ""
    padding: int = 0
    is_slow: bool = False
    hang_up: HangUp | None = None

    def encode(self) -> tuple[bytes, bytes]:
        """Its head and its body."""
        path, prompt, limit = _PATHS[self.route]
        fields = {"model": self.model, "stream": self.is_stream, limit: self.tokens, "padding": "x" * self.padding}
        body = msgspec.json.encode({**fields, **prompt})
        key = f"x-api-key: {self.key}" if self.route is Route.MESSAGES else f"authorization: Bearer {self.key}"
        fault = f"x-sim-fault: {self.fault}\r\n" if self.fault else ""
        head = (
            f"POST {path} HTTP/1.1\r\nhost: drill\r\nx-request-id: {self.id}\r\n{key}\r\n{fault}"
            f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        )
        return head.encode("ascii"), body


class Seen(msgspec.Struct, frozen=True, kw_only=True):
    """What a client has of one request."""

    is_sent: bool  #: to its last byte
    has_left: bool
    status: int = 0
    received: int = 0  #: bytes, head and framing included
    tokens: int | None = None  #: content frames, or what the answer's usage says
    frames: int | None = None  #: of a stream, of any kind
    is_whole: bool = False  #: as long as its framing says


def draw(rng: random.Random, mix: Mix, number: int) -> Asked:
    """One request of the mix."""
    is_stream = rng.random() < mix.streams
    tokens = rng.choice(mix.tokens)
    fault, hang_up = "", None
    if rng.random() < mix.faults:
        fault = rng.choice(_FAULTS + _STREAM_FAULTS if is_stream else _FAULTS)
        fault = fault.replace("%d", str(rng.randrange(1, tokens)))
    elif rng.random() < mix.hang_ups:
        hang_up = draw_hang_up(rng)
    return Asked(
        id=f"soak-{number}",
        route=rng.choice(tuple(_PATHS)),
        model=rng.choice(mix.models),
        tokens=tokens,
        key="nobody's" if rng.random() < mix.strangers else rng.choice(mix.keys),
        is_stream=is_stream,
        fault=fault,
        padding=rng.choice(mix.paddings),
        is_slow=rng.random() < mix.slow,
        hang_up=hang_up,
    )


class Visitor:
    """A client with a connection that it keeps for as long as answers leave it one. A context manager's `close`."""

    def __init__(self, address: tuple[str, int], mix: Mix) -> None:
        self._address = address
        self._mix = mix
        self._stream: trio.SocketStream | None = None

    def __repr__(self) -> str:
        return f"<Visitor {'connected' if self._stream else 'apart'}>"

    def close(self) -> None:
        """Hangs up, if it is connected."""
        if self._stream is not None:
            self._stream.socket.close()
            self._stream = None

    async def visit(self, asked: Asked) -> Seen:
        """One request, for as long as its client stays. Raises nothing but `Cancelled`."""
        answer = Answer(asked.route)
        head, body = asked.encode()
        hang_up = asked.hang_up
        has_sent = False
        with trio.move_on_after(PATIENCE_S) as patience:
            try:
                stream = await self._connected(is_slow=asked.is_slow)
                if hang_up is not None and hang_up.moment in (Moment.HEAD, Moment.BODY):
                    await stream.send_all(part_of(hang_up, head, body))
                else:
                    await stream.send_all(head + body)
                    has_sent = True
                    await self._read(stream, answer, asked)
                if hang_up is not None:
                    await leave(stream, hang_up.how)
            except (OSError, trio.BrokenResourceError) as error:
                answer.break_off("reset", str(error))
        if patience.cancelled_caught:
            answer.break_off("timeout", f"no end within {PATIENCE_S:g} s")
        if hang_up is not None or asked.is_slow or not answer.may_reuse:
            self.close()
        return Seen(
            is_sent=has_sent,
            has_left=hang_up is not None,
            status=answer.status,
            received=answer.bytes_in,
            tokens=_tokens(answer, asked.route),
            frames=answer.frames if answer.is_stream else None,
            is_whole=answer.is_done and answer.problem is None,
        )

    async def _connected(self, *, is_slow: bool) -> trio.SocketStream:
        if is_slow:
            self.close()
        if self._stream is None:
            sock = trio.socket.socket()
            self._stream = trio.SocketStream(sock)
            if is_slow:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _SLOW_BYTES)
            await sock.connect(self._address)
        return self._stream

    async def _read(self, stream: trio.SocketStream, answer: Answer, asked: Asked) -> None:
        """Reads the answer, to where its client hangs up or to its end."""
        hang_up, enough = asked.hang_up, float("inf")
        if hang_up is not None:
            if hang_up.moment is Moment.SENT:
                await trio.sleep(hang_up.share * self._mix.wait_s)
                return
            enough = hang_up.share * asked.tokens if hang_up.moment is Moment.STREAM else enough
        while not answer.is_done and answer.meter.content_frames < enough:
            data = await stream.receive_some(_SLOW_BYTES if asked.is_slow else READ_BYTES)
            answer.feed(data, time.monotonic_ns())
            if asked.is_slow:
                await trio.sleep(_SLOW_S)


class _Body(msgspec.Struct):
    usage: dict[str, Any] | None = None


def _tokens(answer: Answer, route: Route) -> int | None:
    if answer.is_stream:
        return answer.meter.content_frames
    try:
        usage = msgspec.json.decode(answer.body, type=_Body).usage
    except msgspec.DecodeError:
        return None
    name = "output_tokens" if route in (Route.RESPONSES, Route.MESSAGES) else "completion_tokens"
    return usage.get(name) if usage else None
