"""Streamed requests, with every read stamped and kept."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import msgspec

from relay.core.dialect import Meter
from relay.core.framing import decoder_for, response_body_kind
from relay.core.request import Route
from relay.core.sse import FrameFinder, looks_like_event_stream, split_frames
from relay_bench.load.answer import Answer
from relay_bench.load.client import Client, Exchange

if TYPE_CHECKING:
    from relay_bench.load.target import Target

Read = tuple[int, bytes]


class Capture(Answer):
    """An answer that keeps what it was fed."""

    __slots__ = ("reads",)

    def __init__(self, route: Route) -> None:
        super().__init__(route)
        self.reads: list[Read] = []

    def feed(self, data: bytes, now_ns: int) -> None:
        """See `Answer.feed`."""
        if data:
            self.reads.append((now_ns, data))
        super().feed(data, now_ns)


class Observation(msgspec.Struct, kw_only=True):
    """One request, and all that was seen of its answer. Instants are seconds from its sending."""

    route: Route = Route.CHAT
    status: int = 0
    headers: dict[str, str] = {}  #: lower-case names; of repeated ones the last
    frames: list[tuple[float, bytes]] = []  #: whole event-stream frames, whatever the content type says
    content_s: list[float] = []  #: when each content frame came
    read_s: list[float] = []  #: when each read returned
    end_s: float = 0.0
    label: str = ""  #: the fault as ``load`` would count it
    error: str = ""
    has_usage: bool = False
    saw_end: bool = False
    may_reuse: bool = False  #: the head lets the connection stay
    is_reused: bool = False  #: it came on a kept connection

    @property
    def ttft_s(self) -> float | None:
        """To the first content frame."""
        return self.content_s[0] if self.content_s else None

    @property
    def last_silence_s(self) -> float:
        """Between the last read and the end."""
        return self.end_s - (self.read_s[-1] if self.read_s else 0.0)


class Patient:
    """A server under observation, over connections that are kept."""

    def __init__(self, target: Target, *, route: Route, path: str, fields: dict[str, str], timeout_s: float) -> None:
        self._route = route
        self._start = f"POST {target.path(path)} HTTP/1.1\r\nhost: {target.host}\r\n"
        self._fields = fields
        self._done: list[Exchange] = []
        self._client = Client(target, self._done.append, timeout_s=timeout_s)

    def close(self) -> None:
        """Hangs up."""
        self._client.close()

    async def ask(self, body: bytes, **fields: str) -> Observation:
        """Sends one request; `fields` are spelt with underscores."""
        named = self._fields | {name.replace("_", "-"): value for name, value in fields.items()}
        lines = [f"{name}: {value}\r\n" for name, value in named.items()]
        head = f"{self._start}{''.join(lines)}content-length: {len(body)}\r\n\r\n"
        answer = Capture(self._route)
        exchange = Exchange(0, head.encode("latin-1") + body, answer, 0, 0)
        self._client.start(exchange, time.monotonic_ns())
        while not self._done:
            await self._client.turn(0, lambda _: 0)
        self._done.clear()
        return _observation(exchange, answer)


def _observation(exchange: Exchange, answer: Capture) -> Observation:
    sent_ns = exchange.sent_ns
    label, error = answer.fault(None, is_exact=False)
    frames = timed_frames(answer.reads, answer.headers, answer.status)
    meter = Meter(answer.meter.route)
    content = []
    for at_ns, frame in frames:
        before = meter.content_frames
        meter.inspect(frame)
        if meter.content_frames > before:
            content.append((at_ns - sent_ns) / 1e9)
    return Observation(
        route=answer.meter.route,
        status=answer.status,
        headers={name.decode("latin-1"): value.decode("latin-1") for name, value in answer.headers},
        frames=[((at_ns - sent_ns) / 1e9, frame) for at_ns, frame in frames],
        content_s=content,
        read_s=[(at_ns - sent_ns) / 1e9 for at_ns, _ in answer.reads],
        end_s=(exchange.done_ns - sent_ns) / 1e9,
        label=label,
        error=error,
        has_usage=meter.usage is not None and meter.usage.completion_tokens is not None,
        saw_end=meter.saw_end,
        may_reuse=answer.may_reuse,
        is_reused=exchange.is_reused,
    )


def timed_frames(reads: list[Read], headers: list[tuple[bytes, bytes]], status: int) -> list[Read]:
    """The frames of an answer with the instant each was complete, whatever its content type says it is."""
    if status != 200 or any(name == b"content-encoding" for name, _ in headers):
        return []
    decoder = decoder_for(response_body_kind(b"POST", status, b"1.1", headers), headers)
    finder = FrameFinder()
    head, pending = bytearray(), bytearray()
    in_body = is_stream = False
    frames: list[Read] = []
    for at_ns, data in reads:
        rest = data
        while not in_body:
            head += rest
            rest = b""
            end = head.find(b"\r\n\r\n") + 4
            if end < 4:
                break
            rest = bytes(head[end:])
            in_body = not head.startswith((b"HTTP/1.1 1", b"HTTP/1.0 1"))
            head.clear()
        position = 0
        while in_body and position < len(rest) and not decoder.is_done and decoder.error is None:
            begin, stop, position = decoder.next(rest, position, len(rest))
            before = len(pending)
            pending += rest[begin:stop]
            is_stream = is_stream or looks_like_event_stream(bytes(pending[:64])) is True
            boundary = finder.feed(rest, begin, stop)
            if boundary >= 0 and is_stream:
                whole = before + boundary - begin
                frames += [(at_ns, bytes(pending[at:to])) for at, to in split_frames(pending, 0, whole)]
                del pending[:whole]
    if pending and is_stream:
        frames.append((reads[-1][0], bytes(pending)))
    return frames
