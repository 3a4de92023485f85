"""The two sockets of an exchange, as the pump sees them: what it is told of them, and what it tells."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from enum import Enum
from typing import TYPE_CHECKING

from relay.core.frames import FrameRelay
from relay.core.histogram import Histogram
from relay.core.preface import Preface
from relay.net.source import Source

if TYPE_CHECKING:
    from relay.net.pump import Pump


class Stop(Enum):
    """Why the pump gave a pair back to its exchange."""

    HELD = "the first frames are there, and nothing has gone out: they are in `Pair.unsent`"
    DONE = "the engine's body ended as its framing says, and everything has been sent"
    CLIENT_BLOCKED = "the client's socket is full; `Pair.unsent` holds what is left of the last read"
    CLIENT_GONE = "sending failed: the client has closed its connection"
    UPSTREAM_CLOSED = "the engine closed its connection before the end of its body"
    UPSTREAM_RESET = "the engine's connection broke"
    UPSTREAM_MALFORMED = "the engine's body breaks its framing (`FrameRelay.decoder.error`)"
    SHORTAGE = "the kernel has no memory for what was to be sent or received; the last read is lost"
    FAULT = "the relay itself failed; what of the last read went out is not known"
    UPSTREAM_IDLE = "nothing came from the engine for `between_tokens_s`"


class Pair:
    """The two sockets of one exchange, as the pump sees them. Made by `Pump.open`; always `close` it."""

    __slots__ = (
        "_pump", "begun_ns", "bytes_out", "client", "comment_every_ns", "content_read_ns", "content_sent_ns", "gaps",
        "idle_limit_ns", "is_beginning", "is_gone", "last_comment_ns", "last_frame_ns", "last_read_ns", "limit_at_ns",
        "on_gone", "on_quiet", "preface", "reason", "relay", "send", "sendmsg", "stop", "unsent", "upstream",
    )  # fmt: skip

    def __init__(self, pump: Pump, client: Source, on_gone: Callable[[], None]) -> None:
        self._pump = pump
        self.client = client
        self.on_gone = on_gone
        self.is_gone = False  #: the client has hung up
        self.upstream: Source | None = None
        self.relay: FrameRelay | None = None
        self.gaps: Histogram  #: of the stream, while there is one
        self.preface: Preface | None = None  #: of a stream that is to begin: see `begin`
        self.begun_ns = 0  #: when its first frames came; 0: they have not, or were held
        self.is_beginning = False  #: the pump waits for them
        self.last_read_ns = 0  #: when bytes last came from the engine (monotonic clock)
        self.last_frame_ns = 0  #: when a frame last became whole
        self.idle_limit_ns = 0  #: longest silence while streaming
        self.limit_at_ns = 0  #: when waiting for the engine ends, until a stream has begun
        self.comment_every_ns = 0  #: longest silence towards the client
        self.last_comment_ns = 0  #: when it last got a comment, or asked
        self.on_quiet: Callable[[], bool] | None = None  #: speaks in the pump's place, until a stream has begun
        self.content_read_ns = 0  #: when the first content frame came, and
        self.content_sent_ns = 0  #: when it had been handed to the kernel (monotonic clock)
        self.bytes_out = 0
        self.unsent = b""  #: of the last read, what the client's socket did not take
        self.stop = Stop.DONE  #: why the pump last gave the pair back, and
        self.reason = ""  #: in whose words the engine's connection broke, for `Stop.UPSTREAM_RESET`
        self.send = client.sock.send
        self.sendmsg = client.sock.sendmsg

    def __repr__(self) -> str:
        return f"<Pair client={self.client} upstream={self.upstream} {'streaming' if self.relay else 'idle'}>"

    def attach(self, upstream: Source) -> None:
        """Makes an engine's socket the one this pair waits for."""
        self.upstream = upstream

    def detach(self) -> None:
        """Lets go of the engine's socket; a stream ends with that."""
        if self.upstream is not None:
            self._take_back(self.upstream)
            self.upstream = None

    def close(self) -> None:
        """The exchange is over."""
        self._pump.commented.discard(self)
        self.on_quiet = None  # which the exchange holds, and it the pair
        self.detach()
        self.client.of_client = None

    def limit(self, limit_s: float) -> None:
        """Waits for the engine, from now on, end `limit_s` seconds from now; 0: no limit."""
        self.limit_at_ns = time.monotonic_ns() + int(limit_s * 1e9) if limit_s else 0

    def comment_every(self, interval_s: float, since_s: float, on_quiet: Callable[[], bool]) -> None:
        """Has the client hear something every `interval_s` seconds, counted from `since_s` (monotonic clock).

        While frames are streamed, comments go between them; at other times `on_quiet` is called, from the pump, and may
        send what it sees fit but not wait. False: it found that the client is gone.
        """
        self.comment_every_ns = int(interval_s * 1e9)
        self.last_comment_ns = int(since_s * 1e9)
        self.on_quiet = on_quiet
        self._pump.commented.add(self)

    def wait_upstream(self, *, or_writable: bool = False) -> Awaitable[None]:
        """Sleeps until the engine's socket can be read (or also: written). Raises trio.TooSlowError past the limit."""
        assert self.upstream is not None
        if or_writable:
            return self.upstream.wait_writable(self.limit_at_ns)
        return self.upstream.wait_readable(self.limit_at_ns)

    async def begin(self, relay: FrameRelay, gaps: Histogram, *, idle_limit_s: float) -> Stop | None:
        """Hands the streaming to the pump before its first frame, so that the first token costs what any other does.

        When that is there, it goes out behind `preface`; then `begun_ns` is set, the streaming goes on, and this
        answers None: `stopped` tells how it ended. Else it answers why it has not begun, or raises trio.TooSlowError
        past the limit. Where there is no preface any more, that is `Stop.HELD`.
        """
        upstream = self._hand_over(relay, gaps, idle_limit_s)
        self.is_beginning = True
        try:
            await upstream.park(self.limit_at_ns)
        finally:
            if not self.begun_ns:
                self._take_back(upstream)
        return None if self.begun_ns else self.stop

    async def stream(self, relay: FrameRelay, gaps: Histogram, *, idle_limit_s: float) -> Stop:
        """Hands the streaming to the pump; answers why it stopped. Call again to go on after `CLIENT_BLOCKED`.

        `idle_limit_s`: longest silence of the engine, 0 for none. Cancelling ends the streaming between two frames'
        writes: the client has got everything it was sent whole, unless `unsent` is not empty.
        """
        self._hand_over(relay, gaps, idle_limit_s)
        self._pump.streaming.add(self)
        return await self.stopped()

    async def stopped(self) -> Stop:
        """Sleeps until the pump has given the streaming back, and answers why; else as `stream`."""
        upstream = self.upstream
        assert upstream is not None
        try:
            if self.relay is not None:
                await upstream.park()
        finally:
            self._take_back(upstream)
        return self.stop

    def _hand_over(self, relay: FrameRelay, gaps: Histogram, idle_limit_s: float) -> Source:
        upstream = self.upstream
        assert upstream is not None
        self.relay = relay
        self.gaps = gaps
        self.idle_limit_ns = int(idle_limit_s * 1e9)
        upstream.streams = self
        if upstream.has_news:
            upstream.report_anew()
        return upstream

    def _take_back(self, upstream: Source) -> None:
        self.relay = self.preface = upstream.streams = None
        self.is_beginning = False
        self._pump.streaming.discard(self)
