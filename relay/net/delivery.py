"""An engine's answer on its way to the client, from the commit point on; of a stream that has begun, the rest."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

from relay.core import headers
from relay.core.frames import LAST_CHUNK, FrameRelay
from relay.core.framing import BodyKind, decode_into
from relay.core.request import Route
from relay.errors import (
    ExchangeError,
    Phase,
    Side,
    UpstreamAnswered,
    UpstreamDisconnected,
    UpstreamProtocolError,
)
from relay.net import upstream as wire
from relay.net.opening import failure_of
from relay.net.pair import Stop
from relay.net.reply import refusal

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from relay.net.exchange import Exchange
    from relay.net.opening import Opening

#: Of an answer that is no stream, at most this much is kept for its usage, or its error; of a longer one its end, where
#: engines tell the usage.
MOST_METERED_BYTES: Final = 1_048_576
END_METERED_BYTES: Final = 65536
#: Of an error's answer that becomes a frame of a stream, at most about this much is read.
MOST_ERROR_BYTES: Final = 1_048_576


class Delivery:
    """Takes one answer to the client."""

    def __init__(self, exchange: Exchange, opening: Opening) -> None:
        self.exchange = exchange
        self.opening = opening
        self._timeouts = exchange.config.timeouts

    async def run(self) -> None:
        """Commits to the answer, relays it, and parks or closes the engine's connection. Raises ExchangeError."""
        opening = self.opening
        is_reusable = False
        try:
            if self.exchange.reply.is_early and (opening.relay is None or opening.answer.status != 200):
                raise await self._refusal()
            is_reusable = await self._deliver()
        except ExchangeError as failure:
            if failure.side is Side.UPSTREAM and not isinstance(failure, UpstreamAnswered):  # which is an answer
                self.exchange.service.tally.upstream_failed(self.exchange, opening.leg.upstream, failure)
            raise
        finally:
            opening.leg.close(opening.connection, is_reusable=is_reusable)

    def _deliver(self) -> Awaitable[bool]:
        """The answer, in its own way; True if the engine's connection can be used again."""
        opening = self.opening
        if opening.relay is not None:
            return self._relay_stream(opening.relay)
        if opening.body is not None:
            return self._send_whole(opening.body)
        return self._relay_body()

    async def _relay_stream(self, relay: FrameRelay) -> bool:
        """A stream to its end, by the pump; True if the engine's connection can be used again."""
        exchange, opening = self.exchange, self.opening
        reply, pair = exchange.reply, exchange.pair
        if not opening.has_begun:
            await self._send_first(relay)
        try:
            await self._pump(relay)
        finally:
            exchange.frames = relay.finder.frames
            reply.is_torn = relay.is_unaligned or bool(pair.unsent) or pair.stop in (Stop.FAULT, Stop.SHORTAGE)
        if relay.editor is not None and relay.editor.failure is not None:
            raise relay.editor.failure
        return opening.answer.is_reusable and not relay.has_excess

    async def _send_first(self, relay: FrameRelay) -> None:
        """Head and first frame, where the pump has not sent them.

        They were held, they came together, or the client has the head of a stream already.
        """
        exchange, pair = self.exchange, self.exchange.pair
        now_ns = time.monotonic_ns()
        head = self.opening.commit()
        await exchange.reply.send(head + self.opening.first)
        exchange.reply.is_torn = False
        exchange.service.pump.frames += relay.finder.frames
        pair.last_read_ns = pair.last_frame_ns = now_ns
        if exchange.meter.saw_content:
            pair.content_read_ns, pair.content_sent_ns = now_ns, time.monotonic_ns()

    async def _pump(self, relay: FrameRelay) -> None:
        """Lets the pump stream until the engine's body has ended, waiting for a full client in between."""
        exchange = self.exchange
        pair = exchange.pair
        idle_s = self._timeouts.between_tokens_s
        stop = await pair.stopped() if self.opening.has_begun else Stop.DONE
        while True:
            exchange.frames = relay.finder.frames
            if stop is Stop.CLIENT_BLOCKED:
                began_ns = time.monotonic_ns()
                await exchange.reply.send(pair.unsent)
                pair.unsent = b""
                pair.last_comment_ns = time.monotonic_ns()
                delay_ns = pair.last_comment_ns - began_ns  # the client's, and not the engine's silence
                pair.last_read_ns += delay_ns
                pair.last_frame_ns += delay_ns
            elif stop is not Stop.DONE:
                raise failure_of(stop, pair, relay, idle_s, phase=Phase.DATA)
            if relay.decoder.is_done:
                return
            if relay.decoder.error is not None:
                raise failure_of(Stop.UPSTREAM_MALFORMED, pair, relay, idle_s, phase=Phase.DATA)
            stop = await pair.stream(relay, exchange.gaps, idle_limit_s=idle_s)

    async def _refusal(self) -> ExchangeError:
        """What a client with the head of a stream is told where the engine's answer is none, or an error's."""
        answer = self.opening.answer
        if answer.status < 400:
            failure = UpstreamProtocolError("the engine's answer is not the stream it was asked for", phase=Phase.HEAD)
            failure.may_retry = False  # it has been generated
            return failure
        body = b"" if self.opening.relay is not None else await self._read_error()
        return refusal(answer.status, answer.fields, body, phase=Phase.HEAD)

    async def _read_error(self) -> bytes:
        """The body of an error answer; of one that is broken, or very long, its beginning."""
        decoder, data = self.opening.answer.decoder, self.opening.answer.rest
        body = bytearray()
        while True:
            decode_into(body, decoder, data)
            if decoder.is_done or decoder.error is not None or len(body) > MOST_ERROR_BYTES:
                return bytes(body)
            data = await self._read_body()
            if not data:
                return bytes(body)

    async def _send_whole(self, body: bytes) -> bool:
        """An answer that has been read to its end; True if the engine's connection can be used again."""
        exchange, answer = self.exchange, self.opening.answer
        head = exchange.reply.head(answer.status, answer.reason, answer.fields, len(body))
        exchange.commit(answer.status)
        await exchange.reply.send(head + body)
        return answer.is_reusable

    async def _relay_body(self) -> bool:
        """An answer that is no event stream, as it comes; True if the engine's connection can be used again."""
        exchange, answer = self.exchange, self.opening.answer
        reply, decoder = exchange.reply, answer.decoder
        framing = self._body_framing(answer)
        out = reply.head_from(answer.head.start, framing, headers.find(answer.fields, b"date"))
        kept, is_cut = bytearray(), False
        data = answer.rest
        is_told = exchange.route is not Route.OTHER or answer.status >= 400
        is_metered = is_told and not answer.head.is_encoded
        exchange.commit(answer.status)
        while True:
            payload = bytearray()
            has_excess = decode_into(payload, decoder, data) < len(data)
            if is_metered:
                kept += payload
                if len(kept) > MOST_METERED_BYTES:
                    is_cut = True
                    del kept[:-END_METERED_BYTES]
            if payload:
                out += b"%x\r\n%b\r\n" % (len(payload), bytes(payload)) if framing == "chunked" else payload
            if decoder.is_done and framing == "chunked":
                out += LAST_CHUNK
            await reply.send(out)
            out = b""
            if decoder.is_done:
                break
            if decoder.error is not None:
                raise UpstreamProtocolError(f"the engine's answer is malformed: {decoder.error}", phase=Phase.DATA)
            data = await self._read_body()
            if not data:
                decoder.at_close()
                if decoder.error is not None:
                    raise UpstreamDisconnected(f"the engine's answer is cut: {decoder.error}", phase=Phase.DATA)
        if is_cut:
            exchange.meter.take_end(bytes(kept))
        elif is_metered:
            exchange.meter.take_body(bytes(kept), status=answer.status)
        return answer.is_reusable and not has_excess

    def _body_framing(self, answer: wire.Answer) -> headers.Framing:
        """How the client is told where a body ends: as the engine tells it, where the client's version allows."""
        if answer.kind is BodyKind.NONE:
            return "none"
        if answer.kind is BodyKind.LENGTH:
            return answer.length
        reply = self.exchange.reply
        if reply.takes_chunks:
            return "chunked"
        reply.keep_alive = False
        return "close"

    async def _read_body(self) -> bytes:
        """The next bytes of the answer; empty at the end."""
        exchange, limit_s = self.exchange, self._timeouts.between_tokens_s
        return await wire.receive_next(exchange.pair, self.opening.connection, limit_s, exchange.phase)
