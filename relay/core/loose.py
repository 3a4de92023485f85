"""Reading JSON that is for others to judge: what can be read is known, what cannot is not, and nobody is refused."""

from __future__ import annotations

from typing import Final, TypeVar

import msgspec

T = TypeVar("T")

#: What msgspec raises for what is no JSON, is JSON of another shape, or is nested too deeply.
UNDECODABLE: Final = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


def decode_or_none(decoder: msgspec.json.Decoder[T], text: bytes | bytearray | msgspec.Raw) -> T | None:
    """The value; None where it cannot be decoded."""
    try:
        return decoder.decode(text)
    except UNDECODABLE:
        return None


def first_known(*numbers: int | None) -> int | None:
    """The first that is not None: one thing under several names."""
    for number in numbers:
        if number is not None:
            return number
    return None
