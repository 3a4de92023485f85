"""The marks of one exchange, and the record made of them when it has ended.

All marks are seconds of one monotonic clock, None where the exchange never got there. The record's fields and their
order are the interface; `make_record` is where each is defined.
"""

from __future__ import annotations

from datetime import UTC, datetime
from decimal import Decimal
from typing import Any, Final

import msgspec

from relay.core.dialect import Meter
from relay.core.histogram import Histogram
from relay.core.preface import Preface

_encode = msgspec.json.Encoder(decimal_format="number").encode

#: Of an engine's finish reason, in characters: they are words.
_LONGEST_REASON: Final = 100


class Timeline:
    """When an exchange passed which point."""

    __slots__ = (
        "answered", "connect_s", "ended", "first_content_read", "first_content_sent", "head", "lost_s", "prefill_s",
        "prefilled", "prefilled_beside_s", "queue_s", "request_read", "request_sent", "request_started",
    )  # fmt: skip

    def __init__(self, request_started: float, request_read: float) -> None:
        self.request_started = request_started  #: the request's first byte was read
        self.request_read = request_read  #: its last byte was
        self.queue_s: float | None = None  #: waited for a place; None: no place was asked for
        self.connect_s: float | None = None  #: spent dialling, in all attempts
        self.prefill_s: float | None = None  #: waited for the prefill leg, in all attempts; None: not a split request
        self.prefilled_beside_s = 0.0  #: the part of it that was spent beside the decode leg, and so not before it
        self.prefilled: float | None = None  #: the prefiller's answer was read
        self.lost_s = 0.0  #: waited for engines in attempts that failed
        self.request_sent: float | None = None  #: the last attempt's request was on its way
        self.head: float | None = None  #: the answer's head was read
        self.answered: float | None = None  #: what is committed to was there: the head, or a stream's first frame
        self.first_content_read: float | None = None  #: the first content frame came off the engine's socket
        self.first_content_sent: float | None = None  #: it was handed to the kernel for the client
        self.ended: float | None = None

    def add_connect(self, seconds: float) -> None:
        """Counts time spent until a connection was there."""
        self.connect_s = (self.connect_s or 0.0) + seconds

    def give_up(self, now: float) -> None:
        """The engine that was asked has failed: what it took is its time, and its marks are no answer's."""
        if self.request_sent is not None:
            self.lost_s += now - self.request_sent
        self.request_sent = self.head = self.answered = None

    def add_prefill(self, seconds: float, *, is_beside: bool = False) -> None:
        """Counts time spent on a prefill leg, before the decode leg or beside it."""
        self.prefill_s = (self.prefill_s or 0.0) + seconds
        if is_beside:
            self.prefilled_beside_s += seconds

    @property
    def ttft_s(self) -> float | None:
        """True time to first token: from the request's last byte read to the first content frame sent."""
        return None if self.first_content_sent is None else self.first_content_sent - self.request_read

    @property
    def handover_s(self) -> float | None:
        """Of a split request: from the prefiller's answer to the decoder's first content frame."""
        if self.prefilled is None or self.first_content_read is None:
            return None
        return max(0.0, self.first_content_read - self.prefilled)

    def relay_s(self, until: float | None, answered: float | None) -> float | None:
        """The relay's part of the time to `until`: less what it waited for, the engine's to `answered` included."""
        if until is None or answered is None or self.request_sent is None:
            return None
        return max(0.0, until - self.request_read - self.waited_s - (answered - self.request_sent))

    @property
    def waited_s(self) -> float:
        """What was waited for before the last attempt's request was on its way: no part of it is the relay's."""
        prefill_s = (self.prefill_s or 0.0) - self.prefilled_beside_s
        return (self.queue_s or 0.0) + (self.connect_s or 0.0) + prefill_s + self.lost_s


class Record(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One exchange, as it is written: one JSON object, times in milliseconds."""

    ts: str
    id: str | None
    client: str
    key: str | None = None
    method: str | None
    path: str | None
    model: str | None = None
    pool: str | None = None
    upstream: str | None = None
    prefill_upstream: str | None = None
    status: int | None = None
    outcome: str
    stream: bool = False
    streamed_upstream: bool = False
    attempts: int = 0
    queue_ms: float | None = None
    connect_ms: float | None = None
    prefill_ms: float | None = None
    handover_ms: float | None = None
    head_ms: float | None = None
    ttft_ms: float | None = None
    total_ms: float | None = None
    relay_ms: float | None = None
    frames: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    gap_p50_ms: float | None = None
    gap_p99_ms: float | None = None
    gap_max_ms: float | None = None
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    completion_tokens: int | None = None
    reasoning_tokens: int | None = None
    total_tokens: int | None = None
    usage: str = "none"
    finish_reason: str | None = None
    cost: Decimal | None = None
    error: str | None = None

    def encode(self) -> bytes:
        """The record's line, without its newline."""
        return _encode(self)


def make_record(
    *,
    now: float,
    client: str,
    outcome: str,
    id: str | None = None,  # noqa: A002 - the record's own name for it
    method: str | None = None,
    path: str | None = None,
    model: str | None = None,
    pool: str | None = None,
    upstream: str | None = None,
    status: int | None = None,
    is_stream: bool = False,
    is_streamed_upstream: bool = False,
    attempts: int = 0,
    frames: int = 0,
    bytes_in: int = 0,
    bytes_out: int = 0,
    key: str | None = None,
    prefill_upstream: str | None = None,
    cost: Decimal | None = None,
    error: str | None = None,
    timeline: Timeline | None = None,
    meter: Meter | None = None,
    gaps: Histogram | None = None,
) -> Record:
    """The record of an exchange; `now` is the time of day in seconds since the epoch, all other times are marks."""
    ts = datetime.fromtimestamp(now, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    usage = meter.counted if meter else None
    source = "none" if usage is None or meter is None else "engine" if usage is meter.usage else "estimated"
    fields: dict[str, Any] = dict(_times(timeline)) if timeline else {}
    if gaps is not None and gaps.count:
        fields["gap_p50_ms"] = _ms_of_ns(gaps.quantile(0.5))
        fields["gap_p99_ms"] = _ms_of_ns(gaps.quantile(0.99))
        fields["gap_max_ms"] = _ms_of_ns(gaps.max_ns)
    return Record(
        ts=ts,
        id=id,
        client=client,
        key=key,
        method=method,
        path=path,
        model=model,
        pool=pool,
        upstream=upstream,
        prefill_upstream=prefill_upstream,
        status=status,
        outcome=outcome,
        stream=is_stream,
        streamed_upstream=is_streamed_upstream,
        attempts=attempts,
        frames=frames,
        bytes_in=bytes_in,
        bytes_out=bytes_out,
        prompt_tokens=usage.prompt_tokens if usage else None,
        cached_tokens=usage.cached_tokens if usage else None,
        completion_tokens=usage.completion_tokens if usage else None,
        reasoning_tokens=usage.reasoning_tokens if usage else None,
        total_tokens=usage.total_tokens if usage else None,
        usage=source,
        finish_reason=meter.finish_reason[:_LONGEST_REASON] if meter and meter.finish_reason else None,
        cost=cost,
        error=error or (meter.error if meter else None),
        **fields,
    )


def _times(timeline: Timeline) -> dict[str, float | None]:
    sent, head, ended = timeline.request_sent, timeline.head, timeline.ended
    content = timeline.first_content_sent
    if content is not None:
        own = timeline.relay_s(content, timeline.first_content_read)
    else:
        own = timeline.relay_s(head, head)
    return {
        "queue_ms": _ms(timeline.queue_s),
        "connect_ms": _ms(timeline.connect_s),
        "prefill_ms": _ms(timeline.prefill_s),
        "handover_ms": _ms(timeline.handover_s),
        "head_ms": _ms(None if head is None or sent is None else head - sent),
        "ttft_ms": _ms(timeline.ttft_s),
        "total_ms": _ms(None if ended is None else ended - timeline.request_started),
        "relay_ms": _ms(own),
    }


def server_timing(timeline: Timeline, now: float) -> bytes:
    """The ``Server-Timing`` field of an answer whose head goes out at `now`: what the time before it went into."""
    before = _waits_before(timeline)
    answered = timeline.answered or timeline.head
    last_s = 0.0 if answered is None or timeline.request_sent is None else answered - timeline.request_sent
    if engine_s := timeline.lost_s + last_s:
        before += b"engine;dur=%.3f, " % (engine_s * _MS)
    own = now - timeline.request_read - timeline.waited_s - last_s
    return before + b"relay;dur=%.3f" % (max(0.0, own) * _MS)


def preface(timeline: Timeline, before: bytes, after: bytes) -> Preface:
    """The head of an answer that is waited for; its ``Server-Timing`` goes between `before` and `after`."""
    assert timeline.request_sent is not None
    since_s = timeline.request_sent - timeline.lost_s
    own_s = timeline.request_sent - timeline.request_read - timeline.waited_s
    return Preface(before + _waits_before(timeline), after, since_ns=int(since_s * 1e9), own_ns=int(own_s * 1e9))


def _waits_before(timeline: Timeline) -> bytes:
    """The members of ``Server-Timing`` that are known before any answer of an engine."""
    text = b""
    if timeline.queue_s:
        text = b"queue;dur=%.3f, " % (timeline.queue_s * _MS)
    if timeline.prefill_s is not None:
        text += b"prefill;dur=%.3f, " % (timeline.prefill_s * _MS)
    return text


def record_text(record: Record) -> str:
    """A record for people: one compact line."""
    ttft = "-" if record.ttft_ms is None else f"{record.ttft_ms:.1f}ms"
    total = "-" if record.total_ms is None else f"{record.total_ms:.1f}ms"
    tokens = f"{_or_dash(record.prompt_tokens)}+{_or_dash(record.completion_tokens)}"
    line = (
        f"{record.ts} {record.client} {record.method or '-'} {record.path or '-'} {_or_dash(record.status)} "
        f"{record.outcome} model={_printable(record.model)} upstream={record.upstream or '-'} "
        f"attempts={record.attempts} ttft={ttft} total={total} frames={record.frames} tokens={tokens} "
        f"id={record.id or '-'}"
    )
    return f"{line} error={record.error!r}" if record.error else line


_MS: Final = 1000.0


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * _MS, 3)


def _ms_of_ns(ns: int | None) -> float | None:
    return None if ns is None else round(ns / 1e6, 3)


def _or_dash(value: int | None) -> str:
    return "-" if value is None else str(value)


def _printable(text: str | None) -> str:
    """What a client chose, on one line: no line break or escape sequence of it reaches a log that people read."""
    return "-" if not text else text if text.isprintable() else ascii(text)
