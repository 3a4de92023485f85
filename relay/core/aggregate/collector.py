"""An event stream on its way into one body: an engine's bytes come in, whole frames go to meter and aggregator."""

from __future__ import annotations

from relay.core.aggregate.base import Aggregator
from relay.core.aggregate.failure import TooLarge
from relay.core.dialect import Meter
from relay.core.framing import BodyDecoder, Buffer, decode_into
from relay.core.sse import FrameFinder, missing_blank_line, split_frames


class Collector:
    """Reads one stream. `decoder` says when and how the engine's body ended."""

    __slots__ = ("_pending", "aggregator", "decoder", "finder", "has_excess", "meter")

    def __init__(self, decoder: BodyDecoder, meter: Meter, aggregator: Aggregator) -> None:
        self.decoder = decoder
        self.meter = meter
        self.aggregator = aggregator
        self.finder = FrameFinder()
        self.has_excess = False  #: bytes came behind the end of the body: the connection is of no further use
        self._pending = bytearray()

    def __repr__(self) -> str:
        return f"<Collector {self.aggregator!r} frames={self.finder.frames}>"

    def feed(self, data: Buffer) -> None:
        """Takes the next bytes of the body, framing included. Raises what `Aggregator.feed` does."""
        pending = self._pending
        before = len(pending)
        self.has_excess = decode_into(pending, self.decoder, data) < len(data)
        boundary = self.finder.feed(pending, before, len(pending))
        if boundary > 0:
            for begin, end in split_frames(pending, 0, boundary):
                self._take(bytes(pending[begin:end]))
            del pending[:boundary]
        if len(pending) > self.aggregator.max_bytes:
            raise TooLarge(f"the engine's stream holds a frame longer than {self.aggregator.max_bytes} bytes")

    def result(self) -> bytes:
        """The JSON body, after a clean end of the stream. Raises what `Aggregator.result` and `Aggregator.feed` do."""
        rest = bytes(self._pending)
        if end := missing_blank_line(rest):
            self._take(rest + end)
            self.finder.frames += 1
        return self.aggregator.result()

    def _take(self, frame: bytes) -> None:
        self.meter.take(frame)
        self.aggregator.feed(frame)
