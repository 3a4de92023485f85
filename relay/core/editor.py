"""What of an answer its client gets otherwise than the engine sent it: usage, hidden, priced, or set right.

Each change is limited to the frame it names, and in it to one object. All other frames pass in the engine's own bytes.
The one end that is not passed on is a good one that is none (`relay.core.connectors.recompute`).
"""

from __future__ import annotations

from relay.core import rewrite
from relay.core.connectors import recompute
from relay.core.cost import Prices
from relay.core.dialect import Meter
from relay.core.framing import Buffer
from relay.errors import Phase, UpstreamRecomputed


class UsageEditor:
    """Edits the usage of one answer, on its way through `relay.core.frames.FrameRelay` or whole.

    It meters what it edits: what the engine said, but for the cached tokens, which it cannot know.
    """

    __slots__ = ("cached_tokens", "failure", "hides_usage", "prices", "request")

    def __init__(self, *, hides_usage: bool = False, prices: Prices | None = None) -> None:
        self.hides_usage = hides_usage  #: the frame that holds nothing but usage is not for the client
        self.prices = prices  #: None: costs are not told
        self.cached_tokens: int | None = None  #: of a split request, what its prefiller said; None: nothing
        self.request: Buffer | None = None  #: sent to a decoder that may give it up; None: to another
        self.failure: UpstreamRecomputed | None = None  #: it has; nothing more is for the client, and no good end

    def __repr__(self) -> str:
        return f"<UsageEditor hides={self.hides_usage} prices={self.prices} cached={self.cached_tokens}>"

    @property
    def edits_bodies(self) -> bool:
        """Whether a whole JSON answer becomes another."""
        return self.prices is not None or self.cached_tokens is not None or self.request is not None

    def concerns(self, frame: Buffer) -> bool:
        """Whether `edit` has to see a frame; all others are metered and passed on by the caller."""
        if self.request is not None and (self.failure is not None or recompute.MARK in frame):
            return True
        return b'"usage"' in frame

    def edit(self, frame: bytes, meter: Meter) -> bytes | None:
        """Meters a frame; answers what goes out in its place: the same object where nothing changes; None: nothing."""
        if self.failure is None and self._is_given_up(rewrite.json_of(frame)):
            self.failure = _recomputed(Phase.DATA)
            return None
        if self.cached_tokens is not None:
            frame = rewrite.set_cached_tokens(frame, self.cached_tokens)
        meter.inspect(frame)
        if self.failure is not None or (self.hides_usage and rewrite.is_usage_only(frame)):
            return None
        return self._priced(frame, meter)

    def edit_body(self, body: bytes, meter: Meter) -> bytes:
        """Meters a whole JSON answer, and returns what goes out in its place. Raises UpstreamRecomputed."""
        if self._is_given_up(body):
            raise _recomputed(Phase.HEAD)
        if self.cached_tokens is not None:
            body = rewrite.set_cached_tokens(body, self.cached_tokens)
        meter.take_body(body)
        return self._priced(body, meter)

    def _is_given_up(self, event: Buffer) -> bool:
        return self.request is not None and recompute.is_recomputed(event, self.request)

    def _priced(self, answer: bytes, meter: Meter) -> bytes:
        if self.prices is None or meter.usage is None:
            return answer
        return rewrite.add_cost(answer, self.prices.cost(meter.usage).members())


def _recomputed(phase: Phase) -> UpstreamRecomputed:
    message = "the decoder gave the request up, short of memory: its answer is cut in the middle; ask again"
    return UpstreamRecomputed(message, phase=phase)
