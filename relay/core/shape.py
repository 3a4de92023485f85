"""The shape of a head: what is around the values that are each message's own.

Who sends heads sends them alike, one after the other. To find the values again where they were the last time takes a
quarter to a half of what a search for them does.
"""

from __future__ import annotations

import re
from typing import Self


class Shape:
    """Of one head. `values` of another, if it has the same shape."""

    __slots__ = ("_last", "_texts")

    def __init__(self, texts: list[bytes], last: bytes) -> None:
        self._texts = texts  # what is before each value
        self._last = last  # what is behind the last

    def __repr__(self) -> str:
        return f"<Shape {self._texts!r} {self._last!r}>"

    @classmethod
    def of(cls, head: bytes, pattern: re.Pattern[bytes]) -> Self | None:
        """The shape of `head`, whose values are group 2 of each match of `pattern`: any visible ASCII characters.

        None where a value is not all there is up to the end of its line.
        """
        texts = []
        position = 0
        for found in pattern.finditer(head):
            begin, end = found.span(2)
            if not head.startswith(b"\r", end):
                return None
            texts.append(head[position:begin])
            position = end
        return cls(texts, head[position:])

    def values(self, head: bytes) -> list[bytes] | None:
        """The values in `head`, as a search by the pattern would find them; None where it has another shape."""
        found = []
        position = 0
        for text in self._texts:
            if not head.startswith(text, position):
                return None
            position += len(text)
            end = head.find(b"\r", position)
            if end < 0:
                return None
            value = head[position:end]
            if not (value.isalnum() or _is_visible(value)):
                return None
            found.append(value)
            position = end
        return found if head[position:] == self._last else None


def _is_visible(value: bytes) -> bool:
    return value.isascii() and value.decode("ascii").isprintable() and b" " not in value
