"""What one stream's ordinary frames have in common: all but their text and their size.

A pattern has to be matched byte by byte (`relay.core.ordinary`); a frame that is like the one before it is known by
comparing. That takes half of the time, and much less of the processor's caches, which a stream whose frames come 20 ms
apart finds filled with other things.
"""

from __future__ import annotations

import re
from typing import Final

from relay.core.framing import Buffer

#: Below this a chunk can be a template, or known by one.
MOST_BYTES: Final = 1024
#: The sizes of such chunks, as engines write them.
_SIZES: Final = [b"%x\r" % size for size in range(MOST_BYTES)]
_LONGEST_SIZE: Final = len(_SIZES[-1])


class Template:
    """One chunk with an ordinary frame, but for its text. `end_of` another that is like it."""

    __slots__ = ("_before", "_behind", "_digits", "_quote", "_stray")

    def __init__(self, found: re.Match[bytes], stray: bytes) -> None:
        """`found` by `ordinary.CHUNKS`; `stray`: a byte that may be in no text, or more has to be known of it."""
        chunk, start = found[0], found.start()
        begin, end = found.span(found.lastindex or 0)
        self._stray = stray
        self._before = chunk[found.end(1) - start : begin - start]  # from a chunk's size to the text
        self._behind = chunk[end - start :]  # from the byte that ends the text to the end of the chunk
        self._quote = self._behind[:1]
        self._digits = found.end(1) - start  # of the last chunk's size

    def __repr__(self) -> str:
        return f"<Template {self._before!r} {self._behind!r}>"

    def end_of(self, buffer: Buffer, position: int, stop: int) -> int:
        """The end of the whole chunk at `position`, where it is like the template; else `position`.

        Or -1, where it may be like it, and the pattern has to say.
        """
        before, behind = self._before, self._behind
        begin = position + self._digits
        if not buffer.startswith(before, begin):
            begin = buffer.find(b"\r", position, position + _LONGEST_SIZE)
            if begin < 0 or not buffer.startswith(before, begin):
                return position
            self._digits = begin - position
        text = begin + len(before)
        quote = buffer.find(self._quote, text, stop)
        if quote <= text:
            return position
        if buffer.find(self._stray, text, quote) >= 0:
            return -1
        end = quote + len(behind)
        size = end - begin - 4  # but for both line ends
        if end > stop or size >= MOST_BYTES or not buffer.startswith(_SIZES[size], position):
            return position
        return end if buffer.startswith(behind, quote) else position
