"""Where the frames of an event stream end (WHATWG HTML §9.2.5), in bytes that come in any pieces, and what one says.

A frame is the bytes of one event with the blank line that ends it. Lines end in LF, CR LF or CR, mixed at will; a blank
line is a line end right behind a line end. Engines write LF, so a piece without CR takes two searches; anything else
goes line by line.

A CR may be half of a CR LF whose LF is still under way. After a line that ended in CR LF the LF is waited for; after
any other a blank line's CR ends the frame at once, since holding back a complete frame would be buffering, and a LF
that does come is passed on as the rest of that line end.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Final

from relay.core.framing import Buffer

_LF, _CR = 0x0A, 0x0D
_LINE_END: Final = re.compile(rb"\r\n|\n|\r")
# Atomic groups: without them, CR LF alone would match as CR and LF.
_BLANK_LINE: Final = re.compile(rb"(?>\r\n|\n|\r)(?>\r\n|\n|\r)")
#: What a stream may begin with, and that says nothing.
BOM: Final = b"\xef\xbb\xbf"
_LINE_STARTS: Final = (b"data:", b"event:", b"id:", b"retry:", b":")
_FIELD_LINE: Final = re.compile(rb"(?:\xef\xbb\xbf)?[\r\n]*(?:data|event|id|retry)?(?::|[\r\n]|$)")


class FrameFinder:
    """Follows one stream and says how far it is complete."""

    __slots__ = ("_after_cr", "_at_line_start", "_blank_awaits_lf", "_crlf", "at_boundary", "frames")

    def __init__(self) -> None:
        self.frames = 0  #: frames ended so far; further blank lines behind one do not count
        self.at_boundary = True  #: the last byte seen ended a frame, or none was seen
        self._at_line_start = True  # the last byte seen ended a line
        self._after_cr = False  # ... and was a CR, whose LF may follow
        self._crlf = False  # the last line with anything in it ended in CR LF
        self._blank_awaits_lf = False  # after such a line, the CR of a blank line has come, its LF not yet

    def feed(self, buffer: Buffer, start: int, stop: int) -> int:
        """Reads ``buffer[start:stop]``; answers the position behind the last frame that ends there, or -1."""
        if start == stop:
            return -1
        if (
            self._after_cr
            or (self._at_line_start and buffer[start] == _LF)
            or buffer.find(b"\r", start, stop) >= 0
            or buffer.find(b"\n\n\n", start, stop) >= 0
        ):
            return self._feed_lines(buffer, start, stop)
        self._at_line_start = buffer[stop - 1] == _LF
        self._crlf = False
        self.at_boundary = False
        ends = buffer.count(b"\n\n", start, stop)
        if not ends:
            return -1
        self.frames += ends
        boundary = buffer.rfind(b"\n\n", start, stop) + 2
        self.at_boundary = boundary == stop
        return boundary

    def _feed_lines(self, buffer: Buffer, start: int, stop: int) -> int:
        boundary = -1
        position = start
        if self._after_cr:
            self._after_cr = False
            is_lf = buffer[start] == _LF
            position += is_lf
            if self._blank_awaits_lf:
                self._blank_awaits_lf = False
                self._end_frame()
                boundary = position
            elif is_lf and self.at_boundary:
                boundary = position
            elif is_lf:
                self._crlf = True
        while position < stop:
            match = _LINE_END.search(buffer, position, stop)
            if match is None:
                self._at_line_start = self.at_boundary = False
                break
            begin, end = match.span()
            self._after_cr = end == stop and buffer[end - 1] == _CR
            if begin > position or not self._at_line_start:
                self.at_boundary = False
                self._crlf = end - begin == 2
            elif self._after_cr and self._crlf and not self.at_boundary:
                self._blank_awaits_lf = True
            else:
                self._end_frame()
                boundary = end
            self._at_line_start = True
            position = end
        return boundary

    def _end_frame(self) -> None:
        self.frames += not self.at_boundary
        self.at_boundary = True


def split_frames(buffer: Buffer, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """The ranges of the frames in a run of whole frames; a rest without its blank line comes last, as one range."""
    begin = start
    if buffer.find(b"\r", start, stop) < 0:  # a search for two bytes takes a tenth of one for a pattern
        while (end := buffer.find(b"\n\n", begin, stop)) >= 0:
            yield begin, end + 2
            begin = end + 2
    else:
        for match in _BLANK_LINE.finditer(buffer, start, stop):
            yield begin, match.end()
            begin = match.end()
    if begin < stop:
        yield begin, stop


def fields(frame: bytes) -> tuple[bytes, bytes | None, Sequence[bytes]]:
    """What a frame says (WHATWG HTML §9.2.6): the event's type, its data, and the names of all other fields.

    Without data nothing is dispatched: None. A comment is a field without a name. llama.cpp before September 2025 told
    of errors in a field ``error``; it is taken for the data of an event of that type.
    """
    if frame.startswith(b"data: ") and frame.find(b"\n") == len(frame) - 2 and b"\r" not in frame:
        return b"", frame[6:-2], ()  # one line of data: nearly every frame there is
    event = b""
    data: list[bytes] = []
    others: list[bytes] = []
    for line in _LINE_END.split(frame.removeprefix(BOM)):
        name, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if name == b"data":
            data.append(value)
        elif name == b"event":
            event = value
        elif name == b"error":
            event = name
            data.append(value)
        elif line:
            others.append(name)
    return event, b"\n".join(data) if data else None, others


def looks_like_event_stream(body_start: bytes) -> bool | None:
    """Whether a body of unknown type begins as an event stream does; None: too short to tell.

    For answers whose content type lies: vLLM-Ascend's example proxy labels streams ``application/json``. Blank bytes
    and a byte order mark are passed over; then the first line must be a comment or name a field.
    """
    text = body_start.removeprefix(BOM).lstrip(b" \t\r\n")
    if text.startswith(_LINE_STARTS):
        return True
    return None if any(start.startswith(text) for start in _LINE_STARTS) else False


def missing_blank_line(rest: Buffer) -> bytes:
    """What completes a last frame whose blank line the engine left out; empty where `rest` is no frame."""
    if not rest.strip(b"\r\n") or _FIELD_LINE.match(rest) is None:
        return b""
    if rest.endswith(b"\r\n\r"):
        return b"\n"
    for end in (b"\r\n", b"\n", b"\r"):
        if rest.endswith(end):
            return end
    return b"\n\n"
