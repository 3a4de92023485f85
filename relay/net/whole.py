"""Asking an engine and reading its answer whole, beside the pair of the exchange: prefill legs, drained handles."""

from __future__ import annotations

import math
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Final, NamedTuple

import trio

from relay.core import headers
from relay.core.connectors.base import LegRequest
from relay.core.framing import decode_into
from relay.errors import ExchangeError, Phase, UpstreamDisconnected, UpstreamProtocolError
from relay.net import upstream as wire
from relay.net.fiber import checkpoint_if_cancelled, in_task
from relay.net.leg import head_of

if TYPE_CHECKING:
    from relay.net.exchange import Exchange
    from relay.net.pool import Upstream, UpstreamConnection
    from relay.net.source import Source

#: Longest answer that is read: a handle of 131,072 tokens' blocks is below a megabyte.
MOST_BYTES: Final = 67_108_864


class WholeAnswer(NamedTuple):
    """An answer, read to its end."""

    status: int
    fields: headers.Headers
    body: bytes


class _LegWaits:
    """Waits for an engine's socket beside the exchange's pair, up to `limit_at_ns` (monotonic clock; 0: no limit).

    When it is cancelled, or too late, it hangs up, which makes the engine stop; but an answer may be on its way by
    then, and with it a handle that somebody has to free. So it closes one direction only, and waits up to `last_word_s`
    for what comes.
    """

    def __init__(self, connection: UpstreamConnection, source: Source, *, limit_at_ns: int, last_word_s: float) -> None:
        self.has_hung_up = False
        self._limit_at_ns = limit_at_ns
        self._connection = connection
        self._source = source
        self._last_word_s = last_word_s
        self._until = 0.0

    async def wait_upstream(self, *, or_writable: bool = False) -> None:
        if or_writable:
            await self._source.wait_writable(self._limit_at_ns)
            return
        try:
            await self._source.wait_readable(self._limit_at_ns)
        except (trio.Cancelled, trio.TooSlowError):  # noqa: ASYNC103 - whoever waits next is told again
            if not self._last_word_s:
                raise
            self._hang_up()
            async with in_task():  # noqa: ASYNC102 - not cancelled on entry
                with trio.CancelScope(shield=True, deadline=self._until) as patience:
                    await self._source.wait_readable()
            if patience.cancelled_caught:
                raise

    def _hang_up(self) -> None:
        if not self.has_hung_up:
            self.has_hung_up = True
            self._until = trio.current_time() + self._last_word_s
            with suppress(OSError):  # the engine has hung up itself
                self._connection.end_sending()


async def ask_whole(
    exchange: Exchange, upstream: Upstream, sends: LegRequest, *, limit_s: float = 0.0, last_word_s: float = 0.0
) -> WholeAnswer:
    """Asks an engine, and reads its answer, within `limit_s` (0: no limit). Cancelling it hangs up: the engine is free.

    With `last_word_s`, an answer that comes all the same within that time is returned in spite of either.
    Raises UpstreamUnreachable, UpstreamTimeout, UpstreamDisconnected or UpstreamProtocolError; trio.TooSlowError past
    `limit_s`: at once while it connects, after that when the pump's sweep finds it.
    """
    timeouts = exchange.config.timeouts
    limit_at_ns = time.monotonic_ns() + int(limit_s * 1e9) if limit_s else 0
    connection = upstream.take_idle(timeouts.upstream_idle_s)
    if connection is not None:
        try:
            return await _over(exchange, connection, sends, limit_at_ns, last_word_s)
        except wire.ConnectionDied:
            pass  # the engine closed it just then
    left_s = max(0.0, limit_at_ns / 1e9 - time.monotonic()) if limit_at_ns else math.inf
    async with in_task():
        with trio.fail_after(left_s):
            connection = await upstream.dial(timeouts.connect_s)
    return await _over(exchange, connection, sends, limit_at_ns, last_word_s)


async def _over(
    exchange: Exchange, connection: UpstreamConnection, sends: LegRequest, limit_at_ns: int, last_word_s: float
) -> WholeAnswer:
    source = connection.under(exchange.service.pump)
    waits = _LegWaits(connection, source, limit_at_ns=limit_at_ns, last_word_s=last_word_s)
    try:
        return await _ask(exchange, connection, waits, sends)
    except ExchangeError as exc:
        failure = exc
    try:
        if waits.has_hung_up:
            await checkpoint_if_cancelled()  # there was no last word, which is no fault of the engine's
            raise trio.TooSlowError
        raise failure
    finally:
        del failure  # whose frames hold this one


async def _ask(exchange: Exchange, connection: UpstreamConnection, waits: _LegWaits, sends: LegRequest) -> WholeAnswer:
    is_reusable = False
    try:
        head = head_of(exchange, connection.upstream, sends)
        answer, _ = await wire.ask(waits, connection, exchange.request.head.method, head, sends.body)
        body = await _body(waits, connection, answer)
        is_reusable = answer.is_reusable and not waits.has_hung_up
        return WholeAnswer(answer.status, answer.fields, body)
    finally:
        if is_reusable:
            connection.upstream.give_back(connection)
        else:
            connection.close()


async def _body(waits: _LegWaits, connection: UpstreamConnection, answer: wire.Answer) -> bytes:
    """The body; bytes behind it make the connection unusable. Raises UpstreamDisconnected or UpstreamProtocolError."""
    decoder, data = answer.decoder, answer.rest
    body = bytearray()
    while True:
        taken = decode_into(body, decoder, data)
        if decoder.is_done:
            answer.is_reusable = answer.is_reusable and taken == len(data)
            return bytes(body)
        if decoder.error is not None:
            raise UpstreamProtocolError(f"the engine's answer is malformed: {decoder.error}", phase=Phase.HEAD)
        if len(body) > MOST_BYTES:
            raise UpstreamProtocolError(f"the engine's answer is over {MOST_BYTES} bytes", phase=Phase.HEAD)
        data = await wire.receive(waits, connection)
        if not data:
            decoder.at_close()
            if decoder.error is not None:
                raise UpstreamDisconnected(f"the engine's answer is cut: {decoder.error}", phase=Phase.HEAD)
