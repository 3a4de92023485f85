"""Values are found where a search would have found them, or not at all."""

from __future__ import annotations

import re
from typing import Final

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from relay.core.shape import Shape

PATTERN: Final = re.compile(rb"\r\n((?i:a|length)):[ \t]*+([!-~]*+)[ \t]*+(?=\r\n)")
HEAD: Final = b"GET /\r\nLength: 7\r\nx: y\r\nA:one\r\n\r\n"


def values(first: bytes, second: bytes) -> list[bytes] | None:
    shape = Shape.of(first, PATTERN)
    return None if shape is None else shape.values(second)


@pytest.mark.parametrize(
    ("second", "found"),
    [
        (HEAD, [b"7", b"one"]),
        (HEAD.replace(b"7", b"").replace(b"one", b"another"), [b"", b"another"]),
        (HEAD.replace(b"7", b" 7"), None),  # a search would find it
        (HEAD.replace(b"7", b"7 7"), None),
        (HEAD.replace(b"7", b"\xb2"), None),
        (HEAD.replace(b"7", b"7\x00"), None),
        (HEAD.replace(b"7\r\n", b"7\n"), None),
        (HEAD.replace(b"7\r\n", b"7\r"), None),
        (HEAD.replace(b"y", b"z"), None),
        (HEAD.replace(b"Length", b"length"), None),
        (HEAD.replace(b"one", b"one\r\nA:two"), None),
        (HEAD + b"x", None),
        (HEAD[:-2], None),
        (HEAD[:14], None),
        (b"", None),
    ],
)
def test_values_of_a_head_behind_another(second: bytes, found: list[bytes] | None) -> None:
    assert values(HEAD, second) == found


def test_a_value_with_something_behind_it_makes_no_shape() -> None:
    assert Shape.of(HEAD.replace(b"7", b"7 "), PATTERN) is None
    assert values(b"GET /\r\n\r\n", b"GET /\r\n\r\n") == []


PIECES: Final = st.lists(
    st.sampled_from([b"\r\n", b"a:", b"A: ", b"Length:", b"x:", b"1", b"22", b" ", b"\t", b"\r", b"\n", b"\x80"]),
    max_size=12,
).map(b"".join)


@given(PIECES, PIECES, PIECES)
@example(b"\r\na:", b"1", b"\r\n")
def test_what_is_found_is_what_a_search_finds(before: bytes, value: bytes, behind: bytes) -> None:
    first, second = before + b"1" + behind, before + value + behind
    if (found := values(first, second)) is not None:
        assert found == [each[2] for each in PATTERN.finditer(second)]
        assert PATTERN.sub(b"", first) == PATTERN.sub(b"", second)
