"""What of an answer its client gets otherwise than the engine sent it: usage, hidden, priced, or set right.

Each change is limited to the frame it names, and in it to one object. All other frames pass in the engine's own bytes.
"""

from __future__ import annotations

from relay.core import rewrite
from relay.core.cost import Prices
from relay.core.dialect import Meter
from relay.core.framing import Buffer


class UsageEditor:
    """Edits the usage of one answer, on its way through `relay.core.frames.FrameRelay` or whole.

    It meters what it edits: what the engine said, but for the cached tokens, which it cannot know.
    """

    __slots__ = ("cached_tokens", "hides_usage", "prices")

    def __init__(self, *, hides_usage: bool = False, prices: Prices | None = None) -> None:
        self.hides_usage = hides_usage  #: the frame that holds nothing but usage is not for the client
        self.prices = prices  #: None: costs are not told
        self.cached_tokens: int | None = None  #: of a split request, what its prefiller said; None: nothing

    def __repr__(self) -> str:
        return f"<UsageEditor hides={self.hides_usage} prices={self.prices} cached={self.cached_tokens}>"

    @property
    def edits_bodies(self) -> bool:
        """Whether a whole JSON answer becomes another."""
        return self.prices is not None or self.cached_tokens is not None

    def concerns(self, frame: Buffer) -> bool:
        """Whether `edit` has to see a frame; all others are metered and passed on by the caller."""
        return b'"usage"' in frame

    def edit(self, frame: bytes, meter: Meter) -> bytes | None:
        """Meters a frame; answers what goes out in its place: the same object where nothing changes; None: nothing."""
        if self.cached_tokens is not None:
            frame = rewrite.set_cached_tokens(frame, self.cached_tokens)
        meter.inspect(frame)
        if self.hides_usage and rewrite.is_usage_only(frame):
            return None
        return self._priced(frame, meter)

    def edit_body(self, body: bytes, meter: Meter) -> bytes:
        """Meters a whole JSON answer, and returns what goes out in its place."""
        if self.cached_tokens is not None:
            body = rewrite.set_cached_tokens(body, self.cached_tokens)
        meter.take_body(body)
        return self._priced(body, meter)

    def _priced(self, answer: bytes, meter: Meter) -> bytes:
        if self.prices is None or meter.usage is None:
            return answer
        return rewrite.add_cost(answer, self.prices.cost(meter.usage).members())
