"""A reader of heads says of each what it would have said had it come first."""

from __future__ import annotations

import time
from typing import Any, Final

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from relay.core.headers import Headers
from relay.core.request_head import (
    ALL_REMEMBERED_BYTES,
    REMEMBERED_BYTES,
    REMEMBERED_FIELDS,
    HeadReader,
    KnownHead,
    RequestHead,
)
from relay.errors import RequestRefused

HEAD: Final = (
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: relay:8080\r\nContent-Length: 77\r\nAuthorization: Bearer k\r\n"
    b"X-Request-Id: a-1\r\ntraceparent: 00-ab-cd-01\r\n\r\n"
)


class Connection:
    """Has heads read one behind the other, each perhaps with a hint at the one before it."""

    def __init__(self, *, hints: bool = True) -> None:
        self.reader = HeadReader()
        self._hints = hints
        self._last: KnownHead | None = None

    def read(self, head: bytes) -> tuple[RequestHead, Headers, int | None, str | None]:
        parsed, fields, length, request_id, last = self.reader.read(head, 65536, self._last)
        if self._hints:
            self._last = last
        return parsed, fields, length, request_id


def said(connection: Connection, head: bytes) -> Any:
    """Everything that is read of a head, or how it is refused."""
    try:
        read, fields, length, request_id = connection.read(head)
    except RequestRefused as refusal:
        return refusal.status, refusal.code, refusal.message
    same = {name: getattr(read, name) for name in RequestHead.__slots__ if name != "fields"}
    return same | {"fields": fields, "length": length, "request_id": request_id}


def fresh(head: bytes) -> Any:
    return said(Connection(), head)


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
    "other id": HEAD.replace(b"a-1", b"b"),
    "no id": HEAD.replace(b"X-Request-Id: a-1\r\n", b""),
    "empty id": HEAD.replace(b"a-1", b""),
    "longest id": HEAD.replace(b"a-1", b"a" * 200),
    "id too long": HEAD.replace(b"a-1", b"a" * 201),
    "id of two words": HEAD.replace(b"a-1", b"a 1"),
    "id with a control character": HEAD.replace(b"a-1", b"a\x01"),
    "id with a line break": HEAD.replace(b"a-1", b"a\n1"),
    "id with letters beyond ASCII": HEAD.replace(b"a-1", b"\xc3\xa4"),
    "a field in the id": HEAD.replace(b"a-1", b"a\r\nTransfer-Encoding: chunked"),
    "folded id": HEAD.replace(b"a-1", b"a\r\n 1"),
    "blanks around the id": HEAD.replace(b" a-1", b"\t a-1 \t"),
    "blank before the colon": HEAD.replace(b"Id: a-1", b"Id : a-1"),
    "two ids, the first of two words": HEAD.replace(b"a-1", b"a 1\r\nX-Request-Id: b"),
    "two ids": HEAD.replace(b"a-1", b"a-1\r\nX-Request-Id: b"),
    "fields in another order": HEAD.replace(b"\r\nContent-Length: 77", b"").replace(
        b"a-1", b"a-1\r\nContent-Length: 77"
    ),
    "names in another case": HEAD.replace(b"Content-L", b"content-l").replace(b"X-Request-Id", b"x-request-ID"),
    "values exchanged": HEAD.replace(b"77", b"x").replace(b"a-1", b"77").replace(b"x", b"a-1"),
    "other trace": HEAD.replace(b"00-ab", b"00-fe"),
    "empty trace": HEAD.replace(b"00-ab-cd-01", b""),
    "trace of two words": HEAD.replace(b"00-ab", b"00 ab"),
    "trace beyond ASCII": HEAD.replace(b"00-ab", b"\xe4"),
    "trace with a control character": HEAD.replace(b"00-ab", b"\x01"),
    "no trace": HEAD.replace(b"traceparent: 00-ab-cd-01\r\n", b""),
    "another trace": HEAD.replace(b"\r\n\r\n", b"\r\ncf-ray: 1\r\n\r\n"),
    "two traces": HEAD.replace(b"\r\n\r\n", b"\r\ntraceparent: 1\r\n\r\n"),
    "two traces, one of two words": HEAD.replace(b"\r\n\r\n", b"\r\ntraceparent: 1 2\r\n\r\n"),
    "two traces, the first of two words": HEAD.replace(b"Host", b"traceparent: 1 2\r\nHost"),
    "a field in the trace": HEAD.replace(b"00-ab", b"00\r\nTransfer-Encoding: chunked"),
    "folded trace": HEAD.replace(b"00-ab", b"00\r\n ab"),
    "a trace that is nominated": HEAD.replace(b"Host", b"Connection: traceparent\r\nHost"),
    "no method": HEAD.removeprefix(b"POST"),
    "without its end": HEAD.removesuffix(b"\r\n"),
}


@pytest.mark.parametrize("first", SECONDS.values(), ids=SECONDS)
def test_any_head_behind_any_other(first: bytes) -> None:
    for name, second in SECONDS.items():
        for hints in (False, True):
            connection = Connection(hints=hints)
            for head in (first, first, second, second, first):
                assert said(connection, head) == fresh(head), (name, hints)


PIECES: Final = st.sampled_from(
    [
        b"\r\ntraceparent: a",
        b"\r\nTraceParent:b ",
        b"\r\ntraceparent: a b",
        b"\r\nCF-Ray: 1",
        b"\r\nX-Request-Id: a",
        b"\r\nx-request-id:b",
        b"\r\nX-Request-Id: a b",
        b"\r\nX-Request-Id:",
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
    connections = [Connection(), Connection(hints=False)]
    for length, others in parts:
        head = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: %b%b\r\n\r\n" % (b"".join(length), b"".join(others))
        for connection in connections:
            assert said(connection, head) == fresh(head)


def test_a_head_that_repeats_is_the_same_but_for_what_is_its_requests_own() -> None:
    connection = Connection()
    first, first_fields, *its_own = connection.read(HEAD)
    assert its_own == [77, "a-1"]
    other = HEAD.replace(b"77", b"8").replace(b"a-1", b"other").replace(b"ab", b"ef")
    second, fields, *its_own = connection.read(other)
    assert its_own == [8, "other"]
    assert first is second
    assert not {b"content-length", b"x-request-id"} & {name for name, _ in fields}
    assert (dict(first_fields)[b"traceparent"], dict(fields)[b"traceparent"]) == (b"00-ab-cd-01", b"00-ef-cd-01")


def test_a_head_without_length_or_id_is_known_too() -> None:
    connection = Connection()
    head = b"GET /v1/models HTTP/1.1\r\nHost: a\r\n\r\n"
    first = connection.read(head)
    assert first[2:] == (None, None)
    again = connection.read(head)
    assert again[0] is first[0]
    assert again[1] is first[0].fields  # by which it is known that nothing in them is another's


@pytest.mark.parametrize(
    "value", [b" " * 60000, b"a" * 60000, b" a" * 30000, b"\t " * 30000], ids=["blanks", "letters", "both", "tabs"]
)
def test_no_value_is_looked_at_twice(value: bytes) -> None:
    """With a pattern that tries each way to read blanks, one such head takes half a minute."""
    head = HEAD.replace(b" a-1", value + b"\x80")
    began = time.process_time()
    assert fresh(head)["request_id"] is None
    assert time.process_time() - began < 5


def is_known(head: bytes) -> bool:
    connection = Connection()
    return connection.read(head)[0] is connection.read(head)[0]


def test_only_heads_of_ordinary_size_are_remembered() -> None:
    rest = REMEMBERED_BYTES - len(HEAD)
    assert is_known(HEAD.replace(b"Bearer k", b"Bearer k" + b"k" * rest))
    assert not is_known(HEAD.replace(b"Bearer k", b"Bearer kk" + b"k" * rest))


def test_heads_of_many_fields_are_not_kept() -> None:
    """A small field costs thirty times its bytes once it is parsed."""
    more = REMEMBERED_FIELDS - 5
    assert is_known(HEAD.replace(b"\r\n\r\n", b"\r\na:" * more + b"\r\n\r\n"))
    assert not is_known(HEAD.replace(b"\r\n\r\n", b"\r\na:" * (more + 1) + b"\r\n\r\n"))


def test_of_ever_new_heads_no_more_than_so_much_is_kept() -> None:
    reader = HeadReader()
    padding = b"k" * (REMEMBERED_BYTES - len(HEAD) - 8)
    number = ALL_REMEMBERED_BYTES // REMEMBERED_BYTES * 3
    most = 0
    for index in range(number):
        reader.read(HEAD.replace(b"Bearer k", b"Bearer %08d%b" % (index, padding)), 65536)
        most = max(most, sum(map(len, [piece for shape in reader._known for piece in shape])))
    assert ALL_REMEMBERED_BYTES * 0.8 < most <= ALL_REMEMBERED_BYTES
    assert reader.read(HEAD, 65536)[0] is reader.read(HEAD, 65536)[0]


def test_the_oldest_heads_go_first_and_as_many_stay_as_there_is_room_for() -> None:
    reader = HeadReader()
    heads = [HEAD.replace(b"Bearer k", b"Bearer %08d" % index) for index in range(3000)]
    room = ALL_REMEMBERED_BYTES // len(heads[0])
    parsed = [reader.read(head, 65536)[0] for head in heads]
    for _ in range(2):
        again = [reader.read(head, 65536)[0] for head in heads[-room:]]
        assert all(one is other for one, other in zip(again, parsed[-room:], strict=True))
    assert reader.read(heads[-room - 1], 65536)[0] is not parsed[-room - 1]
    assert reader.read(heads[-room], 65536)[0] is not parsed[-room]  # that was the oldest by now
    assert reader.read(heads[-1], 65536)[0] is parsed[-1]
