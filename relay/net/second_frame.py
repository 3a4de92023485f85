"""A decode leg's stream that begins without content: the frame behind the first may say that it has failed.

vLLM tells of a lost handle in the second frame of a stream that began with 200 and a role (`tests/captures/fail`).
While nothing has gone to the client, that can still become another attempt, or an answer with its true status.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import trio

from relay.core.aggregate import AggregateError, EngineError, aggregator_for
from relay.core.framing import ChunkDecoder, decode_into
from relay.core.request import Route
from relay.core.sse import split_frames
from relay.errors import ExchangeError, Phase, UpstreamAnswered, UpstreamDisconnected, UpstreamProtocolError
from relay.net import upstream as wire

if TYPE_CHECKING:
    from relay.core.frames import FrameRelay, Pieces
    from relay.net.opening import Opening
    from relay.net.pair import Pair

#: How long a first frame without content waits for the one behind it; both come of the same step of the engine.
SECOND_FRAME_S: Final = 0.1
#: More than first frames can hold.
_MOST_BYTES: Final = 67_108_864


async def see_second_frame(pair: Pair, opening: Opening) -> None:
    """Waits a moment for a stream to show what it will be, and adds what comes to `opening`.

    Raises ExchangeError where that is an error, or its end.
    """
    relay = opening.relay
    if relay is None or relay.meter.route is Route.OTHER:
        return
    meter, editor = relay.meter, relay.editor
    pair.limit(SECOND_FRAME_S)
    try:
        while not _has_shown(relay):
            await _read_on(pair, opening, relay)
    except trio.TooSlowError:
        pass
    pair.limit(0)
    if editor is not None and editor.failure is not None:
        editor.failure.phase = Phase.HEAD
        raise editor.failure
    if meter.error is not None and not meter.saw_content:
        raise _as_answer(meter.route, opening.first, meter.error, is_chunked=relay.is_chunked)


def _has_shown(relay: FrameRelay) -> bool:
    """Whether a stream has shown what it will be."""
    meter = relay.meter
    return relay.decoder.is_done or meter.saw_content or meter.saw_end or meter.error is not None


async def _read_on(pair: Pair, opening: Opening, relay: FrameRelay) -> None:
    await pair.wait_upstream()  # also where bytes wait already: other tasks' turn, and the limit's
    data = await wire.receive(pair, opening.connection)
    out: Pieces = []
    if data:
        relay.feed(data, memoryview(data), out)
        if relay.decoder.error is not None:
            raise UpstreamProtocolError(f"the engine's stream is malformed: {relay.decoder.error}", phase=Phase.HEAD)
    else:
        relay.decoder.at_close()
        if relay.decoder.error is not None:
            raise UpstreamDisconnected(f"the engine's stream is cut: {relay.decoder.error}", phase=Phase.HEAD)
    if relay.decoder.is_done:
        relay.finish(out)
    opening.first += b"".join(out)


def _as_answer(route: Route, sent: bytes, message: str, *, is_chunked: bool) -> ExchangeError:
    """The error of a stream's first frames as the answer the engine would have given without a stream."""
    payload = bytearray()
    if is_chunked:
        decode_into(payload, ChunkDecoder(), sent)
    else:
        payload += sent
    aggregator = aggregator_for(route, max_bytes=_MOST_BYTES)
    try:
        for begin, end in split_frames(payload, 0, len(payload)):
            aggregator.feed(payload[begin:end])
    except EngineError as error:
        fields = [(b"content-type", b"application/json")]
        failure = UpstreamAnswered(message, phase=Phase.HEAD, status=error.status, fields=fields, body=error.body)
        failure.may_retry = error.status >= 500  # else it is the request that is wrong
        return failure
    except AggregateError:
        pass  # what came before the error is no answer
    return UpstreamProtocolError(message, phase=Phase.HEAD)
