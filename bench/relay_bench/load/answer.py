"""One answer as it comes: head, body, frames, and what is wrong with it. Pure; instants come in as arguments.

The same parts as in the relay's hot path: h11 for the head, `FrameRelay` for frames in any chunking. A frame whose like
has been inspected is merely counted, so a stream costs the client little more than its reads.
"""

from __future__ import annotations

import re
from array import array
from typing import TYPE_CHECKING, Final

import h11

from relay.core.dialect import Meter
from relay.core.frames import FrameRelay
from relay.core.framing import BodyDecoder, BodyKind, FramingError, decode_into, decoder_for, response_body_kind
from relay.core.headers import content_type, is_event_stream, wants_close
from relay.core.usage import Usage

if TYPE_CHECKING:
    from relay.core.frames import Pieces
    from relay.core.request import Route

#: Why a request failed. ``http_503`` and its like come beside these.
LABELS: Final = {
    "connect": "no connection",
    "tls": "TLS handshake failed",
    "timeout": "not done within --timeout-s",
    "reset": "connection broke",
    "no_answer": "closed before a whole head",
    "bad_head": "the head is no HTTP",
    "not_a_stream": "not text/event-stream, though a stream was asked for",
    "error_frame": "an error inside the stream",
    "bad_framing": "the body breaks the rules of its framing",
    "truncated": "closed in mid-body",
    "no_end_mark": "a clean end without the route's end mark",
    "no_content": "a complete stream without content",
    "wrong_count": "another number of tokens than asked for",
}

#: Bytes of a head; more is no HTTP server's.
_MAX_HEAD_BYTES: Final = 1 << 16
#: Bytes of an answer that is no stream which are kept, for its error message.
_MAX_BODY_BYTES: Final = 1 << 20
_MAX_FRAME_BYTES: Final = 1 << 26
_STAMP: Final = re.compile(rb'" \d{5}:(\d{15})"')

#: What h11 must have sent before it reads an answer. Of the request only the method matters (RFC 9112 §6.3).
_ASKED: Final = h11.Request(method="POST", target="/", headers=[("host", "x"), ("content-length", "0")])


class CountingMeter(Meter):
    """A meter that also keeps the running count of tokens at each content frame (``continuous_usage_stats``)."""

    __slots__ = ("token_counts",)

    def __init__(self, route: Route) -> None:
        super().__init__(route)
        self.token_counts: list[int] = []

    def inspect_data(self, data: bytes, event: bytes = b"") -> None:
        """See `Meter.inspect_data`: what every frame that is not ordinary comes to, and one with usage is not."""
        frames, usage = self.content_frames, self.usage
        super().inspect_data(data, event)
        if self.content_frames > frames and self.usage is not None and self.usage is not usage:
            self.token_counts.append(self.usage.completion_tokens or 0)


class Answer:
    """One answer. `feed` it what was received, `close` it when the peer did; then ask `fault`."""

    __slots__ = (
        "_body", "_decoder", "_frames", "_head", "_out", "bytes_in", "content_ns", "content_type", "first_byte_ns",
        "head_ns", "headers", "is_done", "lost_stamps", "may_reuse", "meter", "problem", "stamps_us", "status",
    )  # fmt: skip

    def __init__(self, route: Route, *, continuous_usage: bool = False, has_stamps: bool = False) -> None:
        self.meter = CountingMeter(route) if continuous_usage else Meter(route)
        self.status = 0
        self.headers: list[tuple[bytes, bytes]] = []
        self.content_type = b""
        self.bytes_in = 0
        self.head_ns = 0  #: 0: not yet, as the next one
        self.first_byte_ns = 0
        self.content_ns = array("q")  #: when each content frame was received
        self.stamps_us: array[int] | None = array("q") if has_stamps else None  #: when the engine made each
        self.lost_stamps = 0
        self.is_done = False  #: nothing more of it will come
        self.may_reuse = False  #: the connection can take another request
        self.problem: tuple[str, str] | None = None  #: label and detail of what broke the transport or its framing
        self._head = bytearray()
        self._decoder: BodyDecoder | None = None
        self._frames: FrameRelay | None = None
        self._body = bytearray()
        self._out: Pieces = []

    def __repr__(self) -> str:
        return f"<Answer {self.status} {self.meter!r} done={self.is_done} {self.problem}>"

    @property
    def is_stream(self) -> bool:
        """Whether the answer is an event stream."""
        return self._frames is not None

    @property
    def body(self) -> bytes:
        """The body of an answer that is no stream."""
        return bytes(self._body)

    @property
    def usage(self) -> Usage | None:
        """The engine's last word on its tokens."""
        return self.meter.usage

    @property
    def frames(self) -> int:
        """Frames so far, of any kind."""
        return self._frames.finder.frames if self._frames is not None else 0

    @property
    def token_counts(self) -> list[int] | None:
        """Tokens so far at each content frame, where every frame said so."""
        counts = getattr(self.meter, "token_counts", None)
        return counts if counts and len(counts) == len(self.content_ns) else None

    def feed(self, data: bytes, now_ns: int) -> None:
        """Takes what was received at `now_ns`; nothing: the peer has closed."""
        self.bytes_in += len(data)
        frames = self._frames
        if not data:
            self.close()
        elif frames is None:
            self._feed_start(data, now_ns)
        else:
            self._feed_frames(frames, data, now_ns)

    def _feed_frames(self, frames: FrameRelay, data: bytes, now_ns: int) -> None:
        meter = self.meter
        before = meter.content_frames
        frames.feed(data, memoryview(data), self._out)
        if not self.first_byte_ns:
            self.first_byte_ns = now_ns
        decoder = frames.decoder
        if decoder.is_done or decoder.error is not None:
            self._end()
        new = meter.content_frames - before
        while new:
            self.content_ns.append(now_ns)
            new -= 1
        if self.stamps_us is not None:
            self._read_stamps(meter.content_frames - before)
        self._out.clear()

    def _read_stamps(self, expected: int) -> None:
        found = _STAMP.findall(b"".join(self._out))
        self.lost_stamps += abs(expected - len(found))
        if len(found) == expected and self.stamps_us is not None:
            self.stamps_us.extend(map(int, found))

    def _feed_start(self, data: bytes, now_ns: int) -> None:
        """Takes bytes of the head, of a body that is no stream, or of what comes behind the answer."""
        if self._decoder is not None:
            self._feed_body(data)
            return
        self._head += data
        while not self.status and not self.problem:
            end = self._head.find(b"\r\n\r\n") + 4
            if end < 4:
                if len(self._head) > _MAX_HEAD_BYTES:
                    self.break_off("bad_head", f"more than {_MAX_HEAD_BYTES} bytes without an end")
                return
            head = bytes(self._head[:end])
            del self._head[:end]
            self._read_head(head, now_ns)
        rest, self._head = self._head, bytearray()
        if self.problem or self._decoder is None:
            return
        if self._decoder.is_done:
            self._end()
        elif rest:
            if not self.first_byte_ns:
                self.first_byte_ns = now_ns
            if self._frames is not None:
                self._feed_frames(self._frames, bytes(rest), now_ns)
            else:
                self._feed_body(bytes(rest))

    def _read_head(self, head: bytes, now_ns: int) -> None:
        """Reads one head; of an interim answer (1xx) nothing is kept."""
        reader = h11.Connection(h11.CLIENT, max_incomplete_event_size=_MAX_HEAD_BYTES)
        reader.send(_ASKED)
        reader.send(h11.EndOfMessage())
        reader.receive_data(head)
        try:
            event = reader.next_event()
            if isinstance(event, h11.InformationalResponse):
                return
            if not isinstance(event, h11.Response):
                raise h11.RemoteProtocolError("not an answer")
            headers = list(event.headers)
            kind = response_body_kind(b"POST", event.status_code, event.http_version, headers)
        except (h11.RemoteProtocolError, FramingError) as error:
            self.break_off("bad_head", str(error))
            return
        self.status = event.status_code
        self.headers = headers
        self.head_ns = now_ns
        self.may_reuse = kind is not BodyKind.CLOSE and not wants_close(event.http_version, headers)
        self._decoder = decoder = decoder_for(kind, headers)
        self.content_type = content_type(headers)
        if is_event_stream(self.content_type):
            is_chunked = kind is BodyKind.CHUNKED
            self._frames = FrameRelay(decoder, self.meter, is_chunked=is_chunked, max_frame_bytes=_MAX_FRAME_BYTES)

    def _feed_body(self, data: bytes) -> None:
        decoder = self._decoder
        assert decoder is not None
        read = decode_into(self._body, decoder, data)
        del self._body[_MAX_BODY_BYTES:]
        if decoder.is_done or decoder.error is not None:
            self.may_reuse = self.may_reuse and read == len(data)
            self._end()

    def close(self) -> None:
        """Takes note that the peer has closed its side."""
        if self._decoder is None:
            self.break_off("no_answer", f"after {self.bytes_in} bytes")
            return
        self.may_reuse = False
        self._decoder.at_close()
        error = self._decoder.error
        if error is not None:
            self.break_off("truncated", str(error))
        else:
            self._end()

    def break_off(self, label: str, detail: str) -> None:
        """Takes note that transport or framing failed, or that nobody waits for it any longer."""
        self.problem = self.problem or (label, detail)
        self.may_reuse = False
        self.is_done = True

    def _end(self) -> None:
        """The body is complete, or breaks its framing."""
        assert self._decoder is not None
        if self._decoder.error is not None:
            self.break_off("bad_framing", str(self._decoder.error))
            return
        self.is_done = True
        if self._frames is not None:
            self.may_reuse = self.may_reuse and not self._frames.has_excess
            self._frames.finish(self._out)

    def fault(self, expected: int | None, *, is_exact: bool) -> tuple[str, str]:
        """What is wrong with the answer, now that it has ended: label and detail, both empty if nothing is.

        `expected` are the tokens asked for. An answer may be shorter, unless `is_exact` (``ignore_eos``) or its finish
        reason claims that it is not.
        """
        meter = self.meter
        if self.status and self.status != 200:
            return f"http_{self.status}", self._message()
        if meter.error is not None:
            return "error_frame", meter.error
        if self.problem is not None:
            return self.problem
        if not self.is_stream:
            kind = self.content_type.decode("latin-1") or "no content type"
            return "not_a_stream", f"{kind}: {self._message()}"
        if meter.expects_end_mark and not meter.saw_end:
            return "no_end_mark", ""
        if not meter.saw_content:
            return "no_content", ""
        tokens = meter.usage.completion_tokens if meter.usage else None
        if expected is not None and tokens is not None and tokens != expected:
            claims_all = meter.finish_reason in ("length", "max_tokens", "max_output_tokens")
            if is_exact or claims_all or tokens > expected:
                return "wrong_count", f"{tokens} tokens of {expected}, finish reason {meter.finish_reason}"
        return "", ""

    def _message(self) -> str:
        return bytes(self._body[:300]).decode("utf-8", "replace")
