"""A reader of heads says of each what it would have said had it come first."""

from __future__ import annotations

from typing import Any, Final

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from relay.core.request_head import REMEMBERED_BYTES, REMEMBERED_FIELDS, HeadReader, RequestHead
from relay.errors import RequestRefused

HEAD: Final = (
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: relay:8080\r\nContent-Length: 77\r\nAuthorization: Bearer k\r\n\r\n"
)


def said(reader: HeadReader, head: bytes) -> Any:
    """Everything a reader says of a head, or how it refuses it."""
    try:
        read, length = reader.read(head)
    except RequestRefused as refusal:
        return refusal.status, refusal.code, refusal.message
    return {name: getattr(read, name) for name in RequestHead.__slots__} | {"length": length}


def fresh(head: bytes) -> Any:
    return said(HeadReader(65536), head)


SECONDS: Final = {
    "the same": HEAD,
    "other length": HEAD.replace(b"77", b"8"),
    "longest length": HEAD.replace(b"77", b"9" * 19),
    "length too long": HEAD.replace(b"77", b"9" * 20),
    "leading zeros": HEAD.replace(b"77", b"0077"),
    "no digits": HEAD.replace(b"77", b""),
    "signed": HEAD.replace(b"77", b"+7"),
    "list": HEAD.replace(b"77", b"7, 7"),
    "space before": HEAD.replace(b"77", b" 77"),
    "space behind": HEAD.replace(b"77", b"77 "),
    "other digits": HEAD.replace(b"77", "٣".encode()),
    "a field in the digits": HEAD.replace(b"77", b"7\r\nTransfer-Encoding: chunked"),
    "twice": HEAD.replace(b"Host", b"Content-Length: 77\r\nHost"),
    "other target": HEAD.replace(b"chat/", b""),
    "other key": HEAD.replace(b"Bearer k", b"Bearer l"),
    "one more field": HEAD.replace(b"\r\n\r\n", b"\r\nExpect: 100-continue\r\n\r\n"),
    "no length": HEAD.replace(b"Content-Length: 77\r\n", b""),
    "no method": HEAD.removeprefix(b"POST"),
    "without its end": HEAD.removesuffix(b"\r\n"),
}


@pytest.mark.parametrize("second", SECONDS.values(), ids=SECONDS)
def test_a_second_head(second: bytes) -> None:
    reader = HeadReader(65536)
    assert said(reader, HEAD) == fresh(HEAD)
    assert said(reader, second) == fresh(second)
    assert said(reader, HEAD) == fresh(HEAD)


PIECES: Final = st.sampled_from(
    [
        b"7",
        b"12",
        b"9" * 19,
        b"9" * 20,
        b"",
        b"\r\n",
        b"\r\nContent-Length: 7",
        b"\r\ncontent-length:\t7 ",
        b"\r\nTransfer-Encoding: chunked",
        b"\r\nX-Content-Length: 7",
        b"\r\nExpect: 100-continue",
        b"\r\nConnection: close",
        b",",
        b" ",
    ]
)


@given(st.lists(st.tuples(st.lists(PIECES, max_size=3), st.lists(PIECES, max_size=3)), min_size=2, max_size=4))
@example([([b"7"], []), ([b"7", b"7"], [])])
def test_any_heads_after_each_other(parts: list[tuple[list[bytes], list[bytes]]]) -> None:
    reader = HeadReader(65536)
    for length, others in parts:
        head = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: %b%b\r\n\r\n" % (b"".join(length), b"".join(others))
        assert said(reader, head) == fresh(head)


def test_a_head_that_repeats_is_the_same_but_for_the_length() -> None:
    reader = HeadReader(65536)
    (first, first_length), (second, second_length) = reader.read(HEAD), reader.read(HEAD.replace(b"77", b"8"))
    assert (first_length, second_length) == (77, 8)
    assert first is second
    assert not any(name == b"content-length" for name, _ in first.fields)


def test_only_heads_of_ordinary_size_are_remembered() -> None:
    reader = HeadReader(65536)
    reader.read(HEAD.replace(b"Bearer k", b"Bearer " + b"k" * REMEMBERED_BYTES))
    assert reader._last is None


def test_heads_of_many_fields_are_not_kept() -> None:
    """A small field costs thirty times its bytes once it is parsed."""
    reader = HeadReader(65536)
    most = REMEMBERED_FIELDS - HEAD.count(b":") + 1  # one colon is in a value
    reader.read(HEAD.replace(b"\r\n\r\n", b"\r\na:" * (most + 1) + b"\r\n\r\n"))
    assert reader._last is None
    reader.read(HEAD.replace(b"\r\n\r\n", b"\r\na:" * most + b"\r\n\r\n"))
    assert reader._last is not None
