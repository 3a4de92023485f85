"""An engine's answer up to the commit point: what kind of body it has, and the first frame of a stream."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from relay.core import headers
from relay.core.dialect import Meter
from relay.core.frames import FrameRelay, Pieces
from relay.core.framing import BodyKind, decode_into, decoder_for
from relay.core.sse import looks_like_event_stream
from relay.errors import Phase, UpstreamDisconnected, UpstreamProtocolError
from relay.net import upstream
from relay.net.pool import UpstreamConnection
from relay.net.pump import Pair

if TYPE_CHECKING:
    from relay.net.leg import Leg

#: How much of a body of doubtful type is read for its first non-blank byte.
MOST_LOOKED_AT_BYTES: Final = 4096


class Opening:
    """An answer to commit to: its head, and the first frame where it is an event stream."""

    __slots__ = ("answer", "connection", "first", "leg", "relay")

    def __init__(self, leg: Leg, connection: UpstreamConnection, answer: upstream.Answer) -> None:
        self.leg = leg
        self.connection = connection
        self.answer = answer
        self.relay: FrameRelay | None = None  #: an event stream's
        self.first = b""  #: the frames that go out with its head

    def __repr__(self) -> str:
        return f"<Opening {self.answer!r} {'stream' if self.relay else 'body'}>"

    async def is_event_stream(self, pair: Pair, *, is_expected: bool) -> bool:
        """Whether the answer is relayed frame by frame: by its type, or where that lies, by its first bytes.

        The bytes are only looked at where a stream `is_expected`: asked for, and not refused.
        """
        answer = self.answer
        if answer.kind is BodyKind.NONE:
            return False
        if headers.is_event_stream(headers.content_type(answer.fields)):
            return True
        if not is_expected or answer.status != 200:
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

    async def read_first_frame(self, pair: Pair, meter: Meter, *, is_chunked: bool, max_frame_bytes: int) -> None:
        """Reads until there is a whole frame to send. Raises UpstreamDisconnected where none comes."""
        relay = FrameRelay(self.answer.decoder, meter, is_chunked=is_chunked, max_frame_bytes=max_frame_bytes)
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
            data = await upstream.receive(pair, self.connection)
            if not data:
                relay.decoder.at_close()
                if relay.decoder.error is not None:
                    message = f"the engine's stream is cut: {relay.decoder.error}"
                    raise UpstreamDisconnected(message, phase=Phase.HEAD)
