"""Asking an engine and reading its answer whole, beside the pair of the exchange: prefill legs, drained handles."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Final, NamedTuple

import trio

from relay.core import headers
from relay.core.connectors.base import Leg as Sends
from relay.core.framing import decode_into
from relay.errors import Phase, UpstreamDisconnected, UpstreamProtocolError
from relay.net import upstream as wire
from relay.net.leg import head_of

if TYPE_CHECKING:
    from relay.net.exchange import Exchange
    from relay.net.pool import Upstream, UpstreamConnection

#: Longest answer that is read: a handle of 131,072 tokens' blocks is below a megabyte.
MOST_BYTES: Final = 67_108_864


class WholeAnswer(NamedTuple):
    """An answer, read to its end."""

    status: int
    fields: headers.Headers
    body: bytes


class _SocketWaits:
    """Waits for a socket by trio's own means; limits are the caller's scope's."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    async def wait_upstream(self, *, or_writable: bool = False) -> None:
        if not or_writable:
            await trio.lowlevel.wait_readable(self._sock)
            return
        async with trio.open_nursery() as nursery:

            async def first(wait: object) -> None:
                await wait(self._sock)  # type: ignore[operator]
                nursery.cancel_scope.cancel()

            nursery.start_soon(first, trio.lowlevel.wait_readable)
            nursery.start_soon(first, trio.lowlevel.wait_writable)


async def ask_whole(exchange: Exchange, upstream: Upstream, sends: Sends) -> WholeAnswer:
    """Asks an engine, and reads its answer. Cancelling it closes the connection, which frees the engine.

    Raises UpstreamUnreachable, UpstreamTimeout, UpstreamDisconnected or UpstreamProtocolError.
    """
    timeouts = exchange.config.timeouts
    connection = upstream.take_idle(timeouts.upstream_idle_s)
    if connection is not None:
        try:
            return await _over(exchange, connection, sends)
        except wire.ConnectionDied:
            pass  # the engine closed it just then
    return await _over(exchange, await upstream.dial(timeouts.connect_s), sends)


async def _over(exchange: Exchange, connection: UpstreamConnection, sends: Sends) -> WholeAnswer:
    waits = _SocketWaits(connection.sock)
    is_reusable = False
    try:
        head = head_of(exchange, connection.upstream, sends)
        answer, _ = await wire.ask(waits, connection, exchange.request.method, head, sends.body)
        body = bytearray()
        decoder, data = answer.decoder, answer.rest
        has_excess = False
        while True:
            has_excess = decode_into(body, decoder, data) < len(data)
            if decoder.is_done:
                break
            if decoder.error is not None:
                raise UpstreamProtocolError(f"the engine's answer is malformed: {decoder.error}", phase=Phase.HEAD)
            if len(body) > MOST_BYTES:
                raise UpstreamProtocolError(f"the engine's answer is over {MOST_BYTES} bytes", phase=Phase.HEAD)
            data = await wire.receive(waits, connection)
            if not data:
                decoder.at_close()
                if decoder.error is not None:
                    raise UpstreamDisconnected(f"the engine's answer is cut: {decoder.error}", phase=Phase.HEAD)
        is_reusable = answer.is_reusable and not has_excess
        return WholeAnswer(answer.status, answer.fields, bytes(body))
    finally:
        if is_reusable:
            connection.upstream.give_back(connection, exchange.config.timeouts.upstream_idle_s)
        else:
            connection.close()
