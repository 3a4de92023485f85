"""What is said of a head that is known by its bytes is what would have been said had it been parsed."""

from __future__ import annotations

from typing import Any, Final

import h11
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from relay.core.answer_head import REMEMBERED_BYTES, REMEMBERED_HEADS, REMEMBERED_WHOLE, AnswerHead, KnownHeads
from relay.core.framing import FramingError

STREAM: Final = (
    b"HTTP/1.1 200 OK\r\ndate: Sun, 22 Nov 2026 11:00:00 GMT\r\nserver: uvicorn\r\n"
    b"content-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
)
JSON: Final = (
    b"HTTP/1.1 200 OK\r\nDate: Sun, 22 Nov 2026 11:00:00 GMT\r\nContent-Length: 77\r\nX-Request-Id: a-1\r\n"
    b"Content-Type: application/json\r\n\r\n"
)


def parsed(head: bytes) -> AnswerHead | None:
    """None: it is refused."""
    connection = h11.Connection(h11.CLIENT)
    try:
        connection.send(h11.Request(method="POST", target="/", headers=[("host", "a")]))
        connection.send(h11.EndOfMessage())
        connection.receive_data(head)
        event = connection.next_event()
        return AnswerHead(b"POST", event) if isinstance(event, h11.Response) else None
    except (h11.RemoteProtocolError, FramingError):
        return None


def told(head: AnswerHead, fields: Any) -> dict[str, Any]:
    names = set(AnswerHead.__slots__) - {"fields", "_start", "_stream_start"}
    starts = {"fields": fields, "start": head.start.lines, "stream_start": head.stream_start.lines}
    return {name: getattr(head, name) for name in names} | starts


def read_both_ways(heads: list[bytes]) -> list[bool]:
    """Of each head, whether it was known; what was said of it then is what parsing says."""
    known_heads = KnownHeads()
    was_known = []
    for head in heads:
        known, fresh = known_heads.find(head), parsed(head)
        was_known.append(known is not None)
        if known is not None:
            assert fresh is not None
            assert told(*known) == told(fresh, fresh.fields)
        elif fresh is not None:
            known_heads.remember(head, fresh)
    return was_known


OTHERS: Final = {
    "the same": (JSON, True),
    "another second": (JSON.replace(b"11:00:00", b"11:00:01"), True),
    "another date, no date": (JSON.replace(b"Sun, 22 Nov 2026 11:00:00 GMT", b"soon"), True),
    "no date": (JSON.replace(b"Date: Sun, 22 Nov 2026 11:00:00 GMT\r\n", b""), False),
    "empty date": (JSON.replace(b"Sun, 22 Nov 2026 11:00:00 GMT", b""), True),
    "date with a control character": (JSON.replace(b"Sun,", b"\x0b"), False),
    "date beyond ASCII": (JSON.replace(b"Sun,", b"\xe4"), False),
    "folded date": (JSON.replace(b"Sun, ", b"Sun,\r\n "), False),
    "blanks around": (JSON.replace(b": 77", b":\t 77  ").replace(b"a-1", b"a-1  "), True),
    "tab behind": (JSON.replace(b"77", b"77\t"), False),
    "other length": (JSON.replace(b"77", b"1234567"), True),
    "leading zeros": (JSON.replace(b"77", b"0077"), True),
    "nothing": (JSON.replace(b"77", b"0"), True),
    "length too long": (JSON.replace(b"77", b"7" * 20), False),
    "no digits": (JSON.replace(b"77", b""), False),
    "signed": (JSON.replace(b"77", b"+7"), False),
    "list": (JSON.replace(b"77", b"7, 7"), False),
    "a field in the length": (JSON.replace(b"77", b"77\r\nTransfer-Encoding: chunked"), False),
    "twice": (JSON.replace(b"77", b"77\r\nContent-Length: 77"), False),
    "other id": (JSON.replace(b"a-1", b"another"), True),
    "id of two words": (JSON.replace(b"a-1", b"a 1"), True),
    "two ids": (JSON.replace(b"a-1", b"a-1\r\nX-Request-Id: b"), False),
    "other status": (JSON.replace(b"200 OK", b"201 Created"), False),
    "no body": (JSON.replace(b"200 OK", b"204 No Content"), False),
    "names in another case": (JSON.lower(), False),
    "closing": (JSON.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"), False),
    "a stream": (STREAM, False),
}


@pytest.mark.parametrize(("other", "is_known"), OTHERS.values(), ids=OTHERS)
def test_a_head_behind_another(other: bytes, is_known: bool) -> None:
    assert read_both_ways([JSON, other, JSON]) == [False, is_known, True]


@pytest.mark.parametrize("first", [head for head, _ in OTHERS.values()], ids=OTHERS)
def test_any_head_behind_any_other(first: bytes) -> None:
    for second, _ in OTHERS.values():
        read_both_ways([first, second, first])


PIECES: Final = st.sampled_from(
    [b"\r\nDate: a", b"\r\ndate:b ", b"\r\nContent-Length: 7", b"\r\nContent-Length: 7\t", b"\r\nX-Request-Id: i",
     b"\r\ncontent-length:\t12", b"\r\nX-Request-Id:", b"\r\nTransfer-Encoding: chunked", b"\r\nX: 1", b" ", b"7", b",",
     b"\r\n b"]
)  # fmt: skip


def test_two_lengths_are_told_apart_each_time() -> None:
    """The second is none of those that `_OWN` finds, and h11 takes two that are the same for one."""
    head = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 5\t\r\n\r\n"
    read_both_ways([head, head.replace(b"5\r", b"900\r"), head])


@given(st.lists(st.lists(PIECES, max_size=5), min_size=2, max_size=5))
@example([[b"\r\nContent-Length: 7", b"\r\nContent-Length: 7"], [b"\r\nContent-Length: 7", b"\r\nContent-Length: 7"]])
def test_any_heads_after_each_other(heads: list[list[bytes]]) -> None:
    read_both_ways([b"HTTP/1.1 200 OK%b\r\n\r\n" % b"".join(pieces) for pieces in heads])


def test_a_known_stream_begins_with_its_own_date() -> None:
    known_heads = KnownHeads()
    first = parsed(STREAM)
    assert first is not None
    known_heads.remember(STREAM, first)
    found = known_heads.find(STREAM.replace(b"11:00:00", b"12:34:56"))
    assert found is not None
    head, fields = found
    assert head is first
    assert dict(fields)[b"date"] == b"Sun, 22 Nov 2026 12:34:56 GMT"
    assert dict(first.fields)[b"date"] == b"Sun, 22 Nov 2026 11:00:00 GMT"
    assert b"date" not in head.stream_start.lines


def test_the_same_bytes_are_not_searched_again_and_few_of_them_are_kept() -> None:
    known_heads = KnownHeads()
    first = parsed(JSON)
    assert first is not None
    known_heads.remember(JSON, first)
    heads = [JSON.replace(b"77", b"%d" % (1000 + index)) for index in range(3 * REMEMBERED_WHOLE)]
    for head in heads:
        found = known_heads.find(head)
        assert found is not None
        assert known_heads.find(head) is found
        assert dict(found[1])[b"content-length"] in head
    kept = [known_heads.find(head) for head in heads]
    again = [known_heads.find(head) for head in heads]
    assert sum(one is other for one, other in zip(kept, again, strict=True)) <= REMEMBERED_WHOLE


def test_so_many_heads_of_ordinary_size_are_remembered() -> None:
    known_heads = KnownHeads()
    heads = [JSON.replace(b"200 OK", b"%d OK" % (200 + index)) for index in range(30) if index not in (4, 5)]
    for number, head in enumerate(heads):
        fresh = parsed(head)
        assert fresh is not None
        known_heads.remember(head, fresh)
        assert known_heads.find(head) is not None
        known = [each for each in heads if known_heads.find(each) is not None]
        assert len(known) == number % REMEMBERED_HEADS + 1
    long = JSON.replace(b"a-1", b"a" * REMEMBERED_BYTES)
    fresh = parsed(long)
    assert fresh is not None
    known_heads.remember(long, fresh)
    assert known_heads.find(long) is None
