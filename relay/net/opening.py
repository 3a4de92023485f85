"""How an engine's answer begins: what kind of body it has, and the first frame of a stream, which the pump sends.

Some answers are read to their end before anything goes out: those made of a stream that the client did not ask for, and
those whose usage object changes. Until then a failed engine can still be replaced by another.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from relay.core import headers
from relay.core.aggregate import Collector, EngineError, TooLarge, Truncated, aggregator_for
from relay.core.dialect import Meter
from relay.core.editor import UsageEditor
from relay.core.frames import FrameRelay, Pieces, without_mark
from relay.core.framing import decode_into, decoder_for
from relay.core.request import Route
from relay.core.sse import looks_like_event_stream
from relay.errors import (
    AnswerTooLarge,
    ClientGone,
    ExchangeError,
    OutOfResources,
    Phase,
    UpstreamDisconnected,
    UpstreamProtocolError,
    UpstreamTimeout,
)
from relay.net import upstream
from relay.net.pair import Pair, Stop
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
        self.first = b""  #: the frames that go out with its head, unless the pump has seen to that
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

    async def begin_stream(self, *, idle_s: float) -> None:
        """Waits for the first whole frame. The pump sends it behind the head, unless that has brought it along.

        After it the engine may be silent for `idle_s`. Raises UpstreamDisconnected where none comes,
        UpstreamProtocolError, OutOfResources, or ExchangeError for a fault of the relay's; trio.TooSlowError past the
        pair's limit.
        """
        exchange = self.leg.exchange
        relay = self.relay = FrameRelay(
            self.answer.decoder,
            exchange.meter,
            is_chunked=exchange.reply.takes_chunks,
            max_frame_bytes=exchange.config.stream.max_frame_bytes,
            editor=exchange.editor,
        )
        if self.answer.rest or relay.decoder.is_done:  # as is a body of no length
            out: Pieces = []
            relay.feed(self.answer.rest, memoryview(self.answer.rest), out)
            if relay.decoder.is_done:
                relay.finish(out)
            if out or relay.decoder.is_done:
                self.first = b"".join(out)
                return
            if relay.decoder.error is not None:
                raise failure_of(Stop.UPSTREAM_MALFORMED, exchange.pair, relay, idle_s, phase=Phase.HEAD)
        await self._await_first(relay, idle_s)

    async def _await_first(self, relay: FrameRelay, idle_s: float) -> None:
        """Has the pump wait for the first frame, where the head has brought none."""
        exchange, pair = self.leg.exchange, self.leg.exchange.pair
        if not self.leg.holds_first and not exchange.reply.is_early:
            pair.preface = exchange.reply.preface(self.answer.head.stream_start, *self._framing(relay))
        stop = await pair.begin(relay, exchange.gaps, idle_limit_s=idle_s)
        if stop is None:
            exchange.timeline.answered = pair.begun_ns / 1e9
            self._note_commit(relay)
        elif stop is Stop.HELD:
            self.first, pair.unsent = pair.unsent, b""
        else:
            raise failure_of(stop, pair, relay, idle_s, phase=Phase.HEAD)

    @property
    def has_begun(self) -> bool:
        """Whether the client has head and first frame; the pump has sent them, and streams on."""
        return self.leg.exchange.pair.begun_ns > 0

    def commit(self) -> bytes:
        """The commit point where `has_begun` is false: answers the head, which is to go out with `first` at once."""
        relay, reply = self.relay, self.leg.exchange.reply
        assert relay is not None
        if reply.is_early:
            head, self.first = b"", without_mark(self.first, is_chunked=relay.is_chunked)
        else:
            head = reply.head_from(self.answer.head.stream_start, *self._framing(relay))
        self._note_commit(relay)
        return head

    def _framing(self, relay: FrameRelay) -> tuple[headers.Framing, bytes | None]:
        """How the client is told where the stream ends; and the answer's date."""
        return "chunked" if relay.is_chunked else "close", headers.find(self.answer.fields, b"date")

    def _note_commit(self, relay: FrameRelay) -> None:
        exchange, reply = self.leg.exchange, self.leg.exchange.reply
        exchange.commit(self.answer.status)
        reply.keep_alive = reply.keep_alive and relay.is_chunked
        reply.is_stream = reply.is_torn = True  # until all of it has been sent

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


def failure_of(stop: Stop, pair: Pair, relay: FrameRelay, idle_s: float, *, phase: Phase) -> ExchangeError:
    """What a stream that the pump gave back unfinished died of."""
    if stop is Stop.CLIENT_GONE:
        return ClientGone("the client closed its connection", phase=phase)
    if stop is Stop.SHORTAGE:
        return OutOfResources("the relay ran out of memory for sockets; try again", phase=phase)
    if stop is Stop.FAULT:
        return ExchangeError("the relay failed; its standard error says how", phase=phase)
    if stop is Stop.UPSTREAM_IDLE:
        return UpstreamTimeout(f"the engine was silent for between_tokens_s = {idle_s:g} s", phase=phase)
    if stop is Stop.UPSTREAM_MALFORMED:
        return UpstreamProtocolError(f"the engine's stream is malformed: {relay.decoder.error}", phase=phase)
    where = "before its stream's first frame" if phase is Phase.HEAD else "in the middle of the stream"
    if stop is Stop.UPSTREAM_RESET:
        return UpstreamDisconnected(f"the engine's connection broke {where}: {pair.reason}", phase=phase)
    return UpstreamDisconnected(f"the engine closed its connection {where}", phase=phase)
