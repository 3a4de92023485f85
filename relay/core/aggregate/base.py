"""What the aggregators of all dialects have in common: reading frames, telling errors, keeping the limit."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from typing import ClassVar, Final

from relay.core.aggregate.failure import UNDECODABLE, TooLarge, Truncated, engine_error, is_error, unreadable
from relay.core.aggregate.parts import Members, decode_members
from relay.core.framing import Buffer
from relay.core.request import Route

_LINES = re.compile(rb"\r\n|\n|\r")
_BOM: Final = b"\xef\xbb\xbf"


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
        event, data = fields(bytes(frame))
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
        except UNDECODABLE:
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
        """Merges one event; returns by how many bytes the answer has grown. May raise what is `UNDECODABLE`."""

    @abstractmethod
    def _result(self) -> bytes:
        """The body of a complete stream."""


def fields(frame: bytes) -> tuple[bytes, bytes | None]:
    """The event type and the data of a frame (WHATWG HTML §9.2.6); no data: nothing is dispatched."""
    if frame.startswith(b"data: ") and frame.find(b"\n") == len(frame) - 2 and b"\r" not in frame:
        return b"", frame[6:-2]
    event = b""
    data: list[bytes] = []
    for line in _LINES.split(frame.removeprefix(_BOM)):
        name, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if name == b"data":
            data.append(value)
        elif name == b"event":
            event = value
        elif name == b"error":  # llama.cpp before September 2025
            event = name
            data.append(value)
    return event, b"\n".join(data) if data else None
