"""Lookups, and the two heads the relay writes: byte for byte where it matters, and by h11's account in general."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import h11
import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.core import headers as headers_module
from relay.core import strict
from relay.core.headers import (
    HOP_BY_HOP,
    PROTECTED,
    content_type,
    find,
    find_all,
    good_request_id,
    has_token,
    head_start,
    is_event_stream,
    passed_fields,
    request_head,
    response_head,
    wants_close,
)

if TYPE_CHECKING:
    from relay.core.headers import Headers

DATE = b"Sat, 21 Nov 2026 02:23:52 GMT"


# Lookups.

FIELDS: Headers = [
    (b"host", b"a"),
    (b"connection", b"Keep-Alive , X-Close"),
    (b"connection", b",, Upgrade\t,"),
    (b"content-type", b"Text/Event-Stream ; charset=utf-8"),
    (b"accept", b"a"),
    (b"accept", b"b"),
]


def test_find() -> None:
    assert find(FIELDS, b"accept") == b"a"
    assert find(FIELDS, b"missing") is None
    assert find_all(FIELDS, b"accept") == [b"a", b"b"]
    assert find_all(FIELDS, b"missing") == []


@pytest.mark.parametrize(
    ("token", "is_there"),
    [
        (b"keep-alive", True),
        (b"x-close", True),
        (b"close", False),
        (b"upgrade", True),
        (b"keep-alive , x-close", False),
    ],
)
def test_has_token(token: bytes, is_there: bool) -> None:
    assert has_token(FIELDS, b"connection", token) is is_there


@pytest.mark.parametrize(
    ("version", "connection", "closes"),
    [
        (b"1.1", None, False),
        (b"1.1", b"keep-alive", False),
        (b"1.1", b"Close", True),
        (b"1.1", b"te, close", True),
        (b"1.0", None, True),
        (b"1.0", b"keep-alive", True),
    ],
)
def test_wants_close(version: bytes, connection: bytes | None, closes: bool) -> None:
    assert wants_close(version, [] if connection is None else [(b"connection", connection)]) is closes


@pytest.mark.parametrize(
    ("value", "media_type", "is_stream"),
    [
        (b"text/event-stream", b"text/event-stream", True),
        (b"Text/Event-Stream; charset=utf-8", b"text/event-stream", True),
        (b"text/event-stream\t;x", b"text/event-stream", True),
        (b"text/event-streams", b"text/event-streams", False),
        (b"application/json", b"application/json", False),
        (b"", b"", False),
        (None, b"", False),
    ],
)
def test_content_type(value: bytes | None, media_type: bytes, is_stream: bool) -> None:
    found = content_type([] if value is None else [(b"content-type", value)])
    assert found == media_type
    assert is_event_stream(found) is is_stream


@pytest.mark.parametrize(
    ("given_id", "kept"),
    [
        (b"abc-123", True),
        (b"!~{}\"'", True),
        (b"a" * 200, True),
        (b"a" * 201, False),
        (b"", False),
        (b"a b", False),
        (b"a\tb", False),
        (b"\xe9", False),
        (b"a\x7f", False),
    ],
)
def test_request_id(given_id: bytes, kept: bool) -> None:
    assert good_request_id(given_id) == (given_id.decode() if kept else None)


# The request on its way to the engine.


def to_engine(headers: Headers, **changes: Any) -> bytes:
    its_own: dict[str, Any] = {"host": b"10.0.0.1:8000", "body": "none", "request_id": "id-1"}
    its_own |= {name: changes.pop(name) for name in its_own.keys() & changes.keys()}
    options: dict[str, Any] = {
        "version": b"1.1",
        "client_ip": "192.0.2.7",
        "scheme": b"http",
        "original_host": b"relay.example",
    }
    return request_head(b"POST", b"/v1/x?y", passed_fields(headers, **options | changes), **its_own)


def engine_sees(headers: Headers, **changes: Any) -> Headers:
    """The fields of the written head, less those that every one of them has."""
    usual = {b"host", b"via", b"x-forwarded-for", b"x-forwarded-proto", b"x-forwarded-host", b"x-request-id"}
    return [(name, value) for name, value in fields_of(to_engine(headers, **changes)) if name not in usual]


def fields_of(head: bytes) -> Headers:
    """Split a head at its lines; the writers write `name: value` throughout."""
    assert head.endswith(b"\r\n\r\n")
    _, *lines = head[:-4].split(b"\r\n")
    return [(name, value) for name, _, value in (line.partition(b": ") for line in lines)]


def test_request_head_whole() -> None:
    headers: Headers = [
        (b"host", b"relay.example"),
        (b"user-agent", b"OpenAI/Python 2.8.0"),
        (b"via", b"1.0 edge"),
        (b"accept-encoding", b"gzip, deflate"),
        (b"connection", b"keep-alive, X-Hop"),
        (b"x-hop", b"1"),
        (b"keep-alive", b"timeout=5"),
        (b"x-forwarded-for", b"203.0.113.9"),
        (b"content-length", b"0005"),
        (b"traceparent", b"00-1-2-03"),
        (b"via", b"2 cdn"),
        (b"x-forwarded-for", b"198.51.100.4"),
        (b"x-request-id", b"theirs"),
        (b"authorization", b"Bearer sk"),
    ]
    assert to_engine(headers, body=5, identity=True).split(b"\r\n") == [
        b"POST /v1/x?y HTTP/1.1",
        b"host: 10.0.0.1:8000",
        b"user-agent: OpenAI/Python 2.8.0",
        b"traceparent: 00-1-2-03",
        b"authorization: Bearer sk",
        b"via: 1.0 edge, 2 cdn, 1.1 relay",
        b"x-forwarded-for: 203.0.113.9, 198.51.100.4, 192.0.2.7",
        b"x-forwarded-proto: http",
        b"x-forwarded-host: relay.example",
        b"accept-encoding: identity",
        b"x-request-id: id-1",
        b"content-length: 5",
        b"",
        b"",
    ]


@pytest.mark.parametrize("name", sorted(HOP_BY_HOP | {b"content-length", b"expect"}))
def test_request_loses(name: bytes) -> None:
    assert engine_sees([(name, b"1"), (b"x", b"y")]) == [(b"x", b"y")]


@pytest.mark.parametrize(
    ("connection", "kept"),
    [
        ([b"close"], [b"x-a", b"x-b", b"authorization", b"content-type"]),
        ([b"X-A"], [b"x-b", b"authorization", b"content-type"]),
        ([b"x-a,\tX-B ,,"], [b"authorization", b"content-type"]),
        ([b"x-a", b"x-b"], [b"authorization", b"content-type"]),
        ([b"authorization, content-type, host, x-b"], [b"x-a", b"authorization", b"content-type"]),
    ],
)
def test_connection_names_fields_away(connection: list[bytes], kept: list[bytes]) -> None:
    headers = [(name, b"1") for name in (b"x-a", b"x-b", b"authorization", b"content-type")]
    headers += [(b"connection", value) for value in connection]
    assert [name for name, _ in engine_sees(headers)] == kept


@pytest.mark.parametrize("name", sorted(PROTECTED))
def test_connection_cannot_name_away(name: bytes) -> None:
    plain: Headers = [(name, b"1")]
    assert to_engine([*plain, (b"connection", name)], body=3) == to_engine(plain, body=3)
    assert to_client([*plain, (b"connection", name)]) == to_client(plain)


def test_forwarding_fields() -> None:
    def of(headers: Headers, **changes: Any) -> dict[bytes, bytes]:
        return dict(fields_of(to_engine(headers, **changes)))

    assert of([], version=b"1.0")[b"via"] == b"1.0 relay"
    kept = of([(b"x-forwarded-proto", b"https"), (b"x-forwarded-host", b"api.example")])
    assert (kept[b"x-forwarded-proto"], kept[b"x-forwarded-host"]) == (b"https", b"api.example")
    assert b"x-forwarded-for" not in of([], client_ip="")
    assert of([(b"x-forwarded-for", b"1.2.3.4")], client_ip="")[b"x-forwarded-for"] == b"1.2.3.4"
    assert of([], client_ip="2001:db8::1")[b"x-forwarded-for"] == b"2001:db8::1"
    assert b"x-forwarded-host" not in of([], original_host=b"")


def test_request_framing_is_the_relays() -> None:
    theirs: Headers = [(b"content-length", b"9"), (b"transfer-encoding", b"chunked")]
    assert engine_sees(theirs, body=0) == [(b"content-length", b"0")]
    assert engine_sees(theirs, body="none") == []


def test_credential_is_replaced() -> None:
    headers: Headers = [(b"x-api-key", b"client"), (b"a", b"1"), (b"authorization", b"Bearer client")]
    engine_key = (b"authorization", b"Bearer engine")
    found = engine_sees(headers, without=frozenset({b"authorization", b"x-api-key"}), extra=[engine_key])
    assert found == [(b"a", b"1"), engine_key]


def test_accept_encoding_is_kept_where_nothing_streams() -> None:
    assert engine_sees([(b"accept-encoding", b"gzip")]) == [(b"accept-encoding", b"gzip")]


# The response on its way to the client.


def to_client(headers: Headers, status: int = 200, reason: bytes = b"OK", **changes: Any) -> bytes:
    date = find(headers, b"date") or DATE
    options: dict[str, Any] = {"framing": "chunked", "keep_alive": True, "date": date, "request_id": "id-1"}
    start = head_start(status, reason, headers, event_stream=changes.pop("event_stream", False))
    return response_head(start, **options | changes)


def client_sees(headers: Headers, **changes: Any) -> Headers:
    return [pair for pair in fields_of(to_client(headers, **changes)) if pair[0] not in (b"date", b"x-request-id")]


def test_response_head_of_a_stream_whole() -> None:
    headers: Headers = [
        (b"date", b"Sat, 01 Jan 2000 00:00:00 GMT"),
        (b"server", b"uvicorn"),
        (b"content-type", b"text/event-stream; charset=UTF-8"),
        (b"set-cookie", b"a=1"),
        (b"set-cookie", b"b=2"),
        (b"x-request-id", b"engine's"),
        (b"x-accel-buffering", b"yes"),
        (b"server-timing", b"gpu;dur=3"),
        (b"transfer-encoding", b"chunked"),
        (b"connection", b"close, x-hop"),
        (b"x-hop", b"1"),
    ]
    assert to_client(headers, event_stream=True, server_timing=b"relay;dur=0.2").split(b"\r\n") == [
        b"HTTP/1.1 200 OK",
        b"server: uvicorn",
        b"content-type: text/event-stream; charset=UTF-8",
        b"set-cookie: a=1",
        b"set-cookie: b=2",
        b"server-timing: gpu;dur=3",
        b"cache-control: no-cache",
        b"x-accel-buffering: no",
        b"date: Sat, 01 Jan 2000 00:00:00 GMT",
        b"x-request-id: id-1",
        b"server-timing: relay;dur=0.2",
        b"transfer-encoding: chunked",
        b"",
        b"",
    ]


def test_response_head_of_the_relays_own_answer_whole() -> None:
    fields = [(b"content-type", b"application/json"), (b"retry-after", b"3")]
    head = to_client(fields, 503, b"", framing=17, keep_alive=False)
    assert head.split(b"\r\n") == [
        b"HTTP/1.1 503 Service Unavailable",
        b"content-type: application/json",
        b"retry-after: 3",
        b"date: " + DATE,
        b"x-request-id: id-1",
        b"content-length: 17",
        b"connection: close",
        b"",
        b"",
    ]


@pytest.mark.parametrize("name", sorted(HOP_BY_HOP | {b"content-length"}))
def test_response_loses(name: bytes) -> None:
    assert client_sees([(name, b"1"), (b"x", b"y")], framing="close") == [(b"x", b"y"), (b"connection", b"close")]


def test_stream_fields() -> None:
    mislabelled = client_sees([(b"content-type", b"application/json")], event_stream=True)
    assert find_all(mislabelled, b"content-type") == [b"text/event-stream; charset=utf-8"]
    assert find_all(client_sees([], event_stream=True), b"content-type") == [b"text/event-stream; charset=utf-8"]
    assert find_all(client_sees([(b"cache-control", b"no-store")], event_stream=True), b"cache-control") == [
        b"no-store"
    ]
    plain = client_sees([(b"content-type", b"application/json"), (b"x-accel-buffering", b"yes")])
    assert find_all(plain, b"cache-control") == []
    assert find_all(plain, b"x-accel-buffering") == [b"yes"]


@pytest.mark.parametrize(
    ("framing", "status", "length", "closes"),
    [
        ("chunked", 200, None, False),
        ("close", 200, None, True),
        (0, 200, b"0", False),
        (12, 200, b"12", False),
        ("none", 200, b"99", False),  # HEAD
        ("none", 304, b"99", False),
        ("none", 204, None, False),
        ("none", 100, None, False),
    ],
)
def test_response_framing(framing: Any, status: int, length: bytes | None, closes: bool) -> None:
    theirs: Headers = [(b"content-length", b"99")]
    found = client_sees(theirs, status=status, framing=framing)
    assert find(found, b"content-length") == length
    assert find(found, b"transfer-encoding") == (b"chunked" if framing == "chunked" else None)
    assert wants_close(b"1.1", found) is closes
    assert wants_close(b"1.1", client_sees(theirs, status=status, framing=framing, keep_alive=False))


@pytest.mark.parametrize(
    ("status", "reason", "line"),
    [
        (200, b"OK", b"HTTP/1.1 200 OK"),
        (200, b"", b"HTTP/1.1 200 OK"),
        (200, b"Fine \xe9", b"HTTP/1.1 200 Fine \xe9"),
        (404, b"a\r\nb: c", b"HTTP/1.1 404 Not Found"),
        (404, b"a\x01", b"HTTP/1.1 404 Not Found"),
        (529, b"", b"HTTP/1.1 529 "),
        (529, b"Site is overloaded", b"HTTP/1.1 529 Site is overloaded"),
    ],
)
def test_status_line(status: int, reason: bytes, line: bytes) -> None:
    assert to_client([], status, reason).partition(b"\r\n")[0] == line


@pytest.mark.parametrize(
    "value", [b"a\r\nset-cookie: x", b"a\r\n\r\nbody", b"a\nb", b"a\rb", b"a\0b", b"a\x0bb\x7f\x1b[0m"]
)
def test_a_value_cannot_split_the_response(value: bytes) -> None:
    plain = to_client([(b"x", b"y")])
    for head in (
        to_client([(b"x", value)]),
        to_client([(b"x", b"y"), (b"content-length", value)], framing="none"),
    ):
        assert head.count(b"\r\n") == head.count(b"\r") == head.count(b"\n") == plain.count(b"\n")
        assert head.translate(None, bytes(range(32)) + b"\x7f") == head.replace(b"\r\n", b"")


def test_tab_and_obs_text_of_a_value_are_kept() -> None:
    assert client_sees([(b"x", b"a\tb\x80\xff")], framing=0)[0] == (b"x", b"a\tb\x80\xff")


# What is written is one message to h11, with the same end-to-end fields.

TOKENS = st.text("abcxyz0189!#$%&'*+-.^_`|~", min_size=1, max_size=8).map(str.encode)
KNOWN = sorted(HOP_BY_HOP | PROTECTED | {b"content-length", b"user-agent", b"x-a", b"x-b", b"location"})
NAMES = st.sampled_from(KNOWN) | TOKENS
VALUES = st.text("aZ09 \t,;:=\"'\\/{}éÿ\x80", max_size=12).map(lambda text: text.strip(" \t").encode("latin-1"))
MEMBERS = st.lists(NAMES | st.sampled_from([b"close", b"keep-alive", b""]), max_size=3).map(b", ".join)
LISTS = st.one_of(st.tuples(NAMES, VALUES), st.tuples(st.just(b"connection"), MEMBERS))
SECTIONS = st.lists(LISTS, max_size=8)
LENGTHS = st.just("none") | st.integers(0, 2**63)


def end_to_end(headers: Headers, *, rewritten: set[bytes]) -> Headers:
    """An independent reading of RFC 9110 §7.6.1."""
    nominated: set[bytes] = set()
    for value in find_all(headers, b"connection"):
        nominated.update(member.strip().lower() for member in value.split(b","))
    gone = HOP_BY_HOP | rewritten | (nominated - PROTECTED)
    return [(name, value) for name, value in headers if name not in gone]


@given(SECTIONS, LENGTHS, st.booleans())
def test_a_written_request_is_one_request(headers: Headers, body: Any, identity: bool) -> None:
    head = to_engine(headers, body=body, identity=identity)
    assert strict.head_end(head) == len(head)
    strict.check_raw_head(head)
    connection = h11.Connection(h11.SERVER)
    connection.receive_data(head)
    request = connection.next_event()
    assert isinstance(request, h11.Request)
    assert (request.method, request.target, request.http_version) == (b"POST", b"/v1/x?y", b"1.1")
    if body == "none" or body == 0:
        assert isinstance(connection.next_event(), h11.EndOfMessage)
    assert connection.trailing_data == (b"", False)
    found = list(request.headers)
    assert strict.check_request(b"POST", b"/", b"1.1", found).host == b"10.0.0.1:8000"
    rewritten = {b"host", b"via", b"x-forwarded-for", b"x-request-id", b"content-length", b"expect"}
    rewritten |= {b"accept-encoding"} if identity else set()
    expected = end_to_end(headers, rewritten=rewritten)
    added = {b"x-forwarded-proto", b"x-forwarded-host"} - {name for name, _ in expected}
    assert end_to_end(found, rewritten=rewritten | added) == expected
    assert find_all(found, b"via") == [b", ".join([*find_all(headers, b"via"), b"1.1 relay"])]


@given(
    SECTIONS,
    LENGTHS | st.sampled_from(["chunked", "close"]),
    st.sampled_from([200, 201, 400, 503]),
    st.booleans(),
    st.booleans(),
    st.binary(max_size=10),
    st.binary(max_size=10),
)
def test_a_written_response_is_one_response(
    headers: Headers, framing: Any, status: int, keep_alive: bool, event_stream: bool, reason: bytes, odd: bytes
) -> None:
    headers = [pair for pair in headers if pair[0] not in (b"content-length", b"date")]
    told = [*headers, (b"x-odd", odd), (b"date", odd)]
    head = to_client(told, status, reason, framing=framing, keep_alive=keep_alive, event_stream=event_stream)
    connection = h11.Connection(h11.CLIENT)
    connection.send(h11.Request(method="GET", target="/", headers=[("Host", "a")]))
    connection.send(h11.EndOfMessage())
    connection.receive_data(head)
    response = connection.next_event()
    assert isinstance(response, h11.Response)
    assert response.status_code == status
    assert connection.trailing_data == (b"", False)
    rewritten = {b"x-request-id", b"content-length", b"x-odd", b"date"}
    rewritten |= {b"x-accel-buffering", b"content-type"} if event_stream else set()
    expected = end_to_end(headers, rewritten=rewritten)
    added = ({b"cache-control"} if event_stream else set()) - {name for name, _ in expected}
    found = list(response.headers)
    assert end_to_end(found, rewritten=rewritten | added) == expected
    assert find(found, b"date") is not None
    assert odd or find(found, b"date") == DATE
    assert wants_close(b"1.1", found) is (not keep_alive or framing == "close")


def test_the_module_is_pure() -> None:
    assert not {"trio", "socket", "time", "logging", "h11"} & set(vars(headers_module))
