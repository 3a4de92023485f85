"""An engine's answer up to the commit point: what kind of body it has, and the first frame of a stream.

Some answers are read to their end before anything goes out: those made of a stream that the client did not ask for, and
those whose usage object changes. Until then a failed engine can still be replaced by another.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from relay.core.aggregate import Collector, EngineError, TooLarge, Truncated, aggregator_for
from relay.core.dialect import Meter
from relay.core.editor import UsageEditor
from relay.core.frames import FrameRelay, Pieces
from relay.core.framing import decode_into, decoder_for
from relay.core.request import Route
from relay.core.sse import looks_like_event_stream
from relay.errors import AnswerTooLarge, Phase, UpstreamDisconnected, UpstreamProtocolError, UpstreamTimeout
from relay.net import upstream
from relay.net.pair import Pair
from relay.net.pool import UpstreamConnection

if TYPE_CHECKING:
    from relay.core.framing import Buffer
    from relay.net.leg import Leg

#: How much of a body of doubtful type is read for its first non-blank byte.
MOST_LOOKED_AT_BYTES: Final = 4096
#: How long the end of a stream's body is waited for behind its end mark, for the sake of the connection alone.
BODY_END_S: Final = 0.25


class Opening:
    """An answer to commit to: its head, and the first frame where it is an event stream."""

    __slots__ = ("answer", "body", "connection", "first", "leg", "relay")

    def __init__(self, leg: Leg, connection: UpstreamConnection, answer: upstream.Answer) -> None:
        self.leg = leg
        self.connection = connection
        self.answer = answer
        self.relay: FrameRelay | None = None  #: an event stream's
        self.first = b""  #: the frames that go out with its head
        self.body: bytes | None = None  #: the whole answer's, where it has been read to its end

    def __repr__(self) -> str:
        return f"<Opening {self.answer!r} {'stream' if self.relay else 'body' if self.body is None else 'whole'}>"

    async def looks_like_event_stream(self, pair: Pair) -> bool:
        """Whether an answer that was to be an event stream, and is no error, is one by its first bytes."""
        answer = self.answer
        if answer.status != 200 or not answer.head.is_readable:
            return False
        while True:
            decoder = decoder_for(answer.kind, answer.fields)
            payload = bytearray()
            decode_into(payload, decoder, answer.rest)
            verdict = looks_like_event_stream(bytes(payload))
            is_over = decoder.is_done or decoder.error is not None or len(answer.rest) > MOST_LOOKED_AT_BYTES
            if verdict is not None or is_over:
                return verdict or False
            data = await upstream.receive(pair, self.connection)
            if not data:
                return False
            answer.rest += data

    async def read_first_frame(
        self, pair: Pair, meter: Meter, editor: UsageEditor | None, *, is_chunked: bool, max_frame_bytes: int
    ) -> None:
        """Reads until there is a whole frame to send. Raises UpstreamDisconnected where none comes."""
        relay = FrameRelay(
            self.answer.decoder, meter, is_chunked=is_chunked, max_frame_bytes=max_frame_bytes, editor=editor
        )
        self.relay = relay
        out: Pieces = []
        data = self.answer.rest
        while True:
            buffer = bytearray(data)
            relay.feed(buffer, memoryview(buffer), len(buffer), out)
            if relay.decoder.is_done:
                relay.finish(out)
            if out or relay.decoder.is_done:
                self.first = b"".join(out)
                return
            if relay.decoder.error is not None:
                message = f"the engine's stream is malformed: {relay.decoder.error}"
                raise UpstreamProtocolError(message, phase=Phase.HEAD)
            await pair.wait_upstream()  # also where bytes wait already: there may never be a frame in them
            data = await upstream.receive(pair, self.connection)
            if not data:
                relay.decoder.at_close()
                if relay.decoder.error is not None:
                    message = f"the engine's stream is cut: {relay.decoder.error}"
                    raise UpstreamDisconnected(message, phase=Phase.HEAD)

    async def collect(
        self, pair: Pair, meter: Meter, *, route: Route, request: Buffer, max_bytes: int, idle_s: float
    ) -> int:
        """Reads a whole stream and makes one body of it, or of the error in it; answers how many frames it had.

        After the first read the engine may be silent for `idle_s`. Raises UpstreamDisconnected, UpstreamProtocolError,
        UpstreamTimeout or AnswerTooLarge.
        """
        answer = self.answer
        collector = Collector(answer.decoder, meter, aggregator_for(route, max_bytes=max_bytes, request=request))
        try:
            await self._collect(pair, collector, idle_s)
            self.body = collector.result()
        except EngineError as error:
            answer.status, answer.reason, self.body = error.status, b"", error.body
        except Truncated as failure:
            raise UpstreamDisconnected(failure.message, phase=Phase.HEAD) from None
        except TooLarge as failure:
            message = f"{failure.message} (stream.max_answer_bytes); ask for a stream, or for less"
            raise AnswerTooLarge(message, phase=Phase.HEAD) from None
        fields = [field for field in answer.fields if field[0] not in (b"content-type", b"x-accel-buffering")]
        answer.fields = [*fields, (b"content-type", b"application/json")]
        answer.is_reusable = answer.is_reusable and collector.decoder.is_done and not collector.has_excess
        return collector.finder.frames

    async def _collect(self, pair: Pair, collector: Collector, idle_s: float) -> None:
        """Feeds the stream to its end. Behind its end mark nothing matters but whether the body ends too."""
        decoder, aggregator = collector.decoder, collector.aggregator
        data = self.answer.rest
        while True:
            collector.feed(data)
            if decoder.is_done or (decoder.error is not None and aggregator.is_complete):
                return
            if decoder.error is not None:
                message = f"the engine's stream is malformed: {decoder.error}"
                raise UpstreamProtocolError(message, phase=Phase.HEAD)
            try:
                if collector.finder.frames:
                    limit_s = BODY_END_S if aggregator.is_complete else idle_s
                    data = await upstream.receive_next(pair, self.connection, limit_s, Phase.HEAD)
                else:  # until the first, ``first_token_s`` goes on
                    await pair.wait_upstream()
                    data = await upstream.receive(pair, self.connection)
            except UpstreamTimeout:
                if aggregator.is_complete:
                    return
                raise
            if not data:
                decoder.at_close()
                if decoder.error is not None and not aggregator.is_complete:
                    message = f"the engine closed its connection in the middle of its answer: {decoder.error}"
                    raise UpstreamDisconnected(message, phase=Phase.HEAD)
                return

    async def read_whole(self, pair: Pair, meter: Meter, editor: UsageEditor, *, max_bytes: int, idle_s: float) -> None:
        """Reads a JSON answer to its end, and edits it; one that is longer, or breaks off, goes on as it comes."""
        answer = self.answer
        decoder = decoder_for(answer.kind, answer.fields)
        raw, payload = bytearray(answer.rest), bytearray()
        position = decode_into(payload, decoder, raw)
        while not decoder.is_done and decoder.error is None and len(raw) <= max_bytes:
            data = await upstream.receive_next(pair, self.connection, idle_s, Phase.HEAD)
            if not data:
                decoder.at_close()
                break
            position = len(raw) + decode_into(payload, decoder, data)
            raw += data
        if decoder.is_done and len(payload) <= max_bytes:
            self.body = editor.edit_body(bytes(payload), meter)
            answer.is_reusable = answer.is_reusable and position == len(raw)
        else:
            answer.rest = bytes(raw)
