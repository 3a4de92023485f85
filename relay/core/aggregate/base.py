"""What the aggregators of all dialects have in common: reading frames, telling errors, keeping the limit."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from relay.core.aggregate.failure import UNMERGEABLE, TooLarge, Truncated, engine_error, is_error, unreadable
from relay.core.aggregate.parts import Members, decode_members
from relay.core.framing import Buffer
from relay.core.request import Route
from relay.core.sse import fields


class Aggregator(ABC):
    """Makes one body of one stream: `feed` each frame, then ask for the `result`."""

    __slots__ = ("is_complete", "max_bytes", "size")

    route: ClassVar[Route]
    #: What the stream ends with, in words for an error message.
    end_mark: ClassVar[str]
    #: The end mark is ``[DONE]``, as in OpenAI's older two dialects.
    ends_with_done: ClassVar[bool] = False

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.size = 0  #: of the answer so far, in bytes, a few per member more or less
        self.is_complete = False  #: the end mark has come; frames behind it are ignored

    def __repr__(self) -> str:
        state = "complete" if self.is_complete else "open"
        return f"<{type(self).__name__} {state} {self.size} bytes>"

    def feed(self, frame: Buffer) -> None:
        """Takes one whole frame, its blank line included or not.

        Raises `EngineError` for an error the engine reports and for data that is none of the route's dialect, and
        `TooLarge`: at once, so that the engine can be stopped. Nothing can be had of the aggregator then.
        """
        event, data, _ = fields(bytes(frame))
        if data is None or self.is_complete:
            return
        if data == b"[DONE]":
            self.is_complete = self.ends_with_done
            return
        try:
            members = decode_members(data)
            if event == b"error" or is_error(members):
                raise engine_error(self.route, data, members)
            self.size += self._take(members)
        except UNMERGEABLE:
            raise unreadable(self.route, data, is_error=event == b"error") from None
        if self.size > self.max_bytes:
            raise TooLarge(f"the engine's answer is longer than {self.max_bytes} bytes")

    def result(self) -> bytes:
        """The JSON body. Raises `Truncated` where the stream has not ended as the route's streams do."""
        if not self.is_complete:
            raise Truncated(f"the engine's stream ended without {self.end_mark}")
        return self._result()

    @abstractmethod
    def _take(self, members: Members) -> int:
        """Merges one event; returns by how many bytes the answer has grown. May raise what is `UNMERGEABLE`."""

    @abstractmethod
    def _result(self) -> bytes:
        """The body of a complete stream."""
