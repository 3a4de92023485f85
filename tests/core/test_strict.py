"""Request strictness: each refusal with its status, and what is taken.

Whether others read alike what is taken: see `tests.conformance.test_differential`.
"""

from __future__ import annotations

import itertools
import re
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple

import h11
import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.core import framing, strict
from relay.errors import RequestRefused

if TYPE_CHECKING:
    from collections.abc import Iterator

    from relay.core.headers import Headers


class Received(NamedTuple):
    method: bytes
    version: bytes
    headers: Headers
    body: bytes
    destination: strict.Destination
    consumed: bytes  #: exactly the bytes of this request


def read_request(data: bytes) -> tuple[Received, bytes] | None:
    """Read one request the way a client connection does; also gives what is left. `None`: more is needed."""
    skipped = strict.leading_crlf(data)
    data = data[skipped:]
    end = strict.head_end(data)
    if not end:
        return None
    strict.check_raw_head(data[:end])
    connection = h11.Connection(h11.SERVER, max_incomplete_event_size=strict.MAX_HEAD_BYTES)
    connection.receive_data(data)
    try:
        request = connection.next_event()
        assert isinstance(request, h11.Request)
        headers = list(request.headers)
        destination = strict.check_request(request.method, request.target, request.http_version, headers)
        body = b""
        while not isinstance(event := connection.next_event(), h11.EndOfMessage):
            if event is h11.NEED_DATA:
                return None
            assert isinstance(event, h11.Data)
            body += event.data
        strict.check_trailers(name for name, _ in event.headers)
    except h11.RemoteProtocolError as error:
        raise strict.refusal_of(error) from error
    rest, _ = connection.trailing_data
    consumed = data[: len(data) - len(rest)]
    return Received(request.method, request.http_version, headers, body, destination, consumed), rest


def refusal(data: bytes) -> RequestRefused:
    with pytest.raises(RequestRefused) as caught:
        read_request(data)
    return caught.value


def is_taken_by_bare_h11(data: bytes) -> bool:
    connection = h11.Connection(h11.SERVER, max_incomplete_event_size=strict.MAX_HEAD_BYTES)
    connection.receive_data(data)
    try:
        while not isinstance(event := connection.next_event(), h11.EndOfMessage):
            if event is h11.NEED_DATA:
                return False
    except h11.RemoteProtocolError:
        return False
    return True


GET = b"GET / HTTP/1.1\r\nHost: a\r\n"
POST = b"POST / HTTP/1.1\r\nHost: a\r\n"
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"
CHUNKS = b"5\r\nhello\r\n0\r\n\r\n"

# What bare h11 0.16 takes and the relay must not.
GAPS = [
    # lines
    (400, "every line ends in LF", b"GET / HTTP/1.1\nHost: a\n\n"),
    (400, "the request line ends in LF", b"GET / HTTP/1.1\nHost: a\r\n\r\n"),
    (400, "a field ends in LF", GET + b"X: y\nZ: z\r\n\r\n"),
    (400, "the empty line is LF", b"GET / HTTP/1.1\r\nHost: a\r\n\n"),
    (400, "the last field ends in LF", b"GET / HTTP/1.1\r\nHost: a\n\r\n"),
    (400, "two heads for who takes LF", b"GET / HTTP/1.1\r\nHost: a\n\nGET /b HTTP/1.1\r\nHost: a\r\n\r\n"),
    (400, "folded with a space", GET + b"X: y\r\n z\r\n\r\n"),
    (400, "folded with a tab", GET + b"X: y\r\n\tz\r\n\r\n"),
    (400, "framing field folded", POST + b"Transfer-Encoding:\r\n chunked\r\n\r\n" + CHUNKS),
    (400, "framing field hidden in a fold", POST + b"X: y\r\n Content-Length: 5\r\n\r\n"),
    # values
    (400, "BEL in a value", GET + b"X: a\x07b\r\n\r\n"),
    (400, "DEL in a value", GET + b"X: a\x7fb\r\n\r\n"),
    (400, "SOH in a value", GET + b"X: \x01\r\n\r\n"),
    # framing
    (400, "length list of equals", POST + b"Content-Length: 5, 5\r\n\r\nhello"),
    (400, "length twice, equal", POST + b"Content-Length: 5\r\nContent-Length: 5\r\n\r\nhello"),
    (400, "length and coding", POST + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n" + CHUNKS),
    (400, "coding and length", POST + b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n" + CHUNKS),
    (400, "coding in 1.0", b"POST / HTTP/1.0\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n" + CHUNKS),
    (400, "Transfer_Encoding", POST + b"Transfer_Encoding: chunked\r\nContent-Length: 5\r\n\r\nhello"),
    (400, "Content_Length", POST + b"Content_Length: 3\r\nContent-Length: 5\r\n\r\nhello"),
    (400, "CONTENT_LENGTH", POST + b"CONTENT_LENGTH: 3\r\n\r\n"),
    (400, "length of 20 digits", POST + b"Content-Length: 00000000000000000005\r\n\r\nhello"),
    # targets
    (400, "GET *", b"GET * HTTP/1.1\r\nHost: a\r\n\r\n"),
    (400, "authority-form", b"GET a:80 HTTP/1.1\r\nHost: a\r\n\r\n"),
    (400, "relative", b"GET index.html HTTP/1.1\r\nHost: a\r\n\r\n"),
    (400, "query alone", b"GET ?q HTTP/1.1\r\nHost: a\r\n\r\n"),
    (400, "fragment", b"GET /a#b HTTP/1.1\r\nHost: a\r\n\r\n"),
    (400, "absolute with fragment", b"GET http://a/#b HTTP/1.1\r\nHost: a\r\n\r\n"),
    (400, "other scheme", b"GET ftp://a/ HTTP/1.1\r\nHost: a\r\n\r\n"),
    (400, "absolute without a host", b"GET http:///a HTTP/1.1\r\nHost: a\r\n\r\n"),
    (400, "user information", b"GET http://u:p@a/ HTTP/1.1\r\nHost: a\r\n\r\n"),
    (414, "target of 9000", b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\nHost: a\r\n\r\n"),
    # versions
    (505, "HTTP/2.0", b"GET / HTTP/2.0\r\nHost: a\r\n\r\n"),
    (505, "HTTP/1.2", b"GET / HTTP/1.2\r\nHost: a\r\n\r\n"),
    (505, "HTTP/0.9", b"GET / HTTP/0.9\r\nHost: a\r\n\r\n"),
    (505, "preface of HTTP/2", b"PRI * HTTP/2.0\r\n\r\n"),
    # Host
    (400, "empty Host", b"GET / HTTP/1.1\r\nHost:\r\n\r\n"),
    (400, "Host with a path", b"GET / HTTP/1.1\r\nHost: a/b\r\n\r\n"),
    (400, "Host with user information", b"GET / HTTP/1.1\r\nHost: u@a\r\n\r\n"),
    (400, "Host with a space", b"GET / HTTP/1.1\r\nHost: a b\r\n\r\n"),
    (400, "Host list", b"GET / HTTP/1.1\r\nHost: a,b\r\n\r\n"),
    (400, "Host with a wordy port", b"GET / HTTP/1.1\r\nHost: a:http\r\n\r\n"),
    (400, "Host with open bracket", b"GET / HTTP/1.1\r\nHost: [::1\r\n\r\n"),
    (400, "Host not ASCII", b"GET / HTTP/1.1\r\nHost: \xe9\r\n\r\n"),
    (400, "bad Host beside a good target", b"GET http://a/ HTTP/1.1\r\nHost: b/c\r\n\r\n"),
    # methods, expectations, trailers
    (405, "TRACE", b"TRACE / HTTP/1.1\r\nHost: a\r\n\r\n"),
    (405, "CONNECT", b"CONNECT a:80 HTTP/1.1\r\nHost: a\r\n\r\n"),
    (417, "unknown expectation", GET + b"Expect: 200-ok\r\n\r\n"),
    (417, "one expectation too many", GET + b"Expect: 100-continue, x\r\n\r\n"),
    (400, "trailer Host", CHUNKED + b"0\r\nHost: b\r\n\r\n"),
    (400, "trailer Content-Length", CHUNKED + b"0\r\nContent-Length: 5\r\n\r\n"),
    (400, "trailer Transfer-Encoding", CHUNKED + b"0\r\nTransfer-Encoding: chunked\r\n\r\n"),
    (400, "trailer Transfer_Encoding", CHUNKED + b"0\r\nTransfer_Encoding: chunked\r\n\r\n"),
    (400, "trailer Authorization", CHUNKED + b"0\r\nAuthorization: x\r\n\r\n"),
    (431, "a head too large", GET + b"X: " + b"a" * 70000 + b"\r\n\r\n"),
    (431, "300 fields", GET + b"X: y\r\n" * 300 + b"\r\n"),
]  # fmt: skip

# What h11 refuses as well, here with the status and code the relay gives it.
SHARED = [
    (400, "bare CR in a value", GET + b"X: a\rb\r\n\r\n"),
    (400, "bare CR as line end", b"GET / HTTP/1.1\rHost: a\r\r\n\r\n"),
    (400, "CR CR LF", b"GET / HTTP/1.1\r\r\nHost: a\r\n\r\n"),
    (400, "NUL in a value", GET + b"X: a\0b\r\n\r\n"),
    (400, "NUL in a name", GET + b"X\0: a\r\n\r\n"),
    (400, "fold before any field", b"GET / HTTP/1.1\r\n X: y\r\nHost: a\r\n\r\n"),
    (400, "space before the colon", POST + b"Content-Length : 5\r\n\r\nhello"),
    (400, "tab before the colon", POST + b"Transfer-Encoding\t: chunked\r\n\r\n" + CHUNKS),
    (400, "vertical tab before the colon", POST + b"Transfer-Encoding\x0b: chunked\r\n\r\n" + CHUNKS),
    (400, "form feed in a value", GET + b"X: a\x0cb\r\n\r\n"),
    (400, "no colon", GET + b"X\r\n\r\n"),
    (400, "no name", GET + b": y\r\n\r\n"),
    (400, "name in parentheses", GET + b"(X): y\r\n\r\n"),
    (400, "name with a quote", GET + b'"X": y\r\n\r\n'),
    (400, "name not ASCII", GET + b"X\xe9: y\r\n\r\n"),
    (400, "name with a slash", GET + b"Content/Length: 5\r\n\r\n"),
    (400, "length +5", POST + b"Content-Length: +5\r\n\r\nhello"),
    (400, "length -1", POST + b"Content-Length: -1\r\n\r\n"),
    (400, "length 0x5", POST + b"Content-Length: 0x5\r\n\r\nhello"),
    (400, "length 5_0", POST + b"Content-Length: 5_0\r\n\r\nhello"),
    (400, "length 5.0", POST + b"Content-Length: 5.0\r\n\r\nhello"),
    (400, "length empty", POST + b"Content-Length:\r\n\r\n"),
    (400, "length 5 5", POST + b"Content-Length: 5 5\r\n\r\nhello"),
    (400, "length 5,", POST + b"Content-Length: 5,\r\n\r\nhello"),
    (400, "length in superscript", POST + "Content-Length: ⁵\r\n\r\nhello".encode()),
    (400, "lengths differ", POST + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello!"),
    (400, "length list differs", POST + b"Content-Length: 5, 6\r\n\r\nhello!"),
    (400, "coding with vertical tab", POST + b"Transfer-Encoding: \x0bchunked\r\n\r\n" + CHUNKS),
    (400, "coding with form feed behind", POST + b"Transfer-Encoding: chunked\x0c\r\n\r\n" + CHUNKS),
    (400, "coding twice", POST + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n" + CHUNKS),
    (400, "coding spread over two", POST + b"Transfer-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n\r\n" + CHUNKS),
    (400, "chunked, chunked", POST + b"Transfer-Encoding: chunked, chunked\r\n\r\n" + CHUNKS),
    (400, "chunked, identity", POST + b"Transfer-Encoding: chunked, identity\r\n\r\n" + CHUNKS),
    (400, "identity", POST + b"Transfer-Encoding: identity\r\n\r\n"),
    (400, "gzip alone", POST + b"Transfer-Encoding: gzip\r\n\r\n"),
    (400, "chunked;q=1", POST + b"Transfer-Encoding: chunked;q=1\r\n\r\n" + CHUNKS),
    (400, '"chunked"', POST + b'Transfer-Encoding: "chunked"\r\n\r\n' + CHUNKS),
    (400, "xchunked", POST + b"Transfer-Encoding: xchunked\r\n\r\n" + CHUNKS),
    (400, "chunked,", POST + b"Transfer-Encoding: chunked,\r\n\r\n" + CHUNKS),
    (400, "coding empty", POST + b"Transfer-Encoding:\r\n\r\n" + CHUNKS),
    (501, "gzip, chunked", POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n" + CHUNKS),
    (501, "deflate,chunked", POST + b"Transfer-Encoding: deflate,chunked\r\n\r\n" + CHUNKS),
    (400, "length with vertical tab", POST + b"Content-Length: \x0b5\r\n\r\nhello"),
    (400, "UTF-8 in the target", "GET /é HTTP/1.1\r\nHost: a\r\n\r\n".encode()),
    (400, "no Host", b"GET / HTTP/1.1\r\n\r\n"),
    (400, "Host twice", GET + b"Host: a\r\n\r\n"),
    (400, "Host twice, differing", GET + b"Host: b\r\n\r\n"),
    (400, "no version", b"GET /\r\n\r\n"),
    (400, "no target", b"GET HTTP/1.1\r\nHost: a\r\n\r\n"),
    (400, "empty target", b"GET  HTTP/1.1\r\nHost: a\r\n\r\n"),
    (400, "two spaces", b"GET  / HTTP/1.1\r\nHost: a\r\n\r\n"),
    (400, "tabs for spaces", b"GET\t/\tHTTP/1.1\r\nHost: a\r\n\r\n"),
    (400, "space behind the version", b"GET / HTTP/1.1 \r\nHost: a\r\n\r\n"),
    (400, "space in the target", b"GET /a b HTTP/1.1\r\nHost: a\r\n\r\n"),
    (400, "tab in the target", b"GET /a\tb HTTP/1.1\r\nHost: a\r\n\r\n"),
    (400, "two requests in a line", b"GET / HTTP/1.1 GET /b HTTP/1.1\r\nHost: a\r\n\r\n"),
    (400, "space before the method", b" GET / HTTP/1.1\r\nHost: a\r\n\r\n"),
    (400, "method in parentheses", b"(GET) / HTTP/1.1\r\nHost: a\r\n\r\n"),
    (400, "version in lower case", b"GET / http/1.1\r\nHost: a\r\n\r\n"),
    (400, "HTTP/1.10", b"GET / HTTP/1.10\r\nHost: a\r\n\r\n"),
    (400, "HTTP/1", b"GET / HTTP/1\r\nHost: a\r\n\r\n"),
    (400, "HTTP/01.1", b"GET / HTTP/01.1\r\nHost: a\r\n\r\n"),
    (400, "HTTPS/1.1", b"GET / HTTPS/1.1\r\nHost: a\r\n\r\n"),
    (400, "two empty lines first", b"\r\n\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n"),
    (400, "an empty line of LF first", b"\nGET / HTTP/1.1\r\nHost: a\r\n\r\n"),
    (400, "a TLS handshake", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"),
    (400, "a NUL alone", b"\0"),
    (400, "chunk size +5", CHUNKED + b"+5\r\nhello\r\n0\r\n\r\n"),
    (400, "chunk size 0x5", CHUNKED + b"0x5\r\nhello\r\n0\r\n\r\n"),
    (400, "chunk size empty", CHUNKED + b"\r\nhello\r\n0\r\n\r\n"),
    (400, "chunk longer than its size", CHUNKED + b"4\r\nhello\r\n0\r\n\r\n"),
    (400, "LF in a chunk extension", CHUNKED + b"5;a\nb\r\nhello\r\n0\r\n\r\n"),
    (431, "a head without an end", GET + b"X: " + b"a" * 70000),
    (414, "a target without an end", b"GET /" + b"a" * 9000),
    (431, "a chunk header without an end", CHUNKED + b"5;" + b"a" * 70000),
]  # fmt: skip


def named(cases: list[tuple[int, str, bytes]]) -> list[object]:
    return [pytest.param(status, data, id=name.replace(" ", "-")) for status, name, data in cases]


@pytest.mark.parametrize(("status", "data"), named(GAPS))
def test_closes_what_h11_leaves_open(status: int, data: bytes) -> None:
    assert is_taken_by_bare_h11(data), "no gap any more: move it to the other table"
    found = refusal(data)
    assert (found.status, found.code) == (status, "headers_too_large" if status == 431 else "bad_request")


@pytest.mark.parametrize(("status", "data"), named(SHARED))
def test_refuses(status: int, data: bytes) -> None:
    found = refusal(data)
    assert (found.status, found.code) == (status, "headers_too_large" if status == 431 else "bad_request")
    assert not is_taken_by_bare_h11(data)


ACCEPTED = [
    (b"/", b"a", GET + b"\r\n"),
    (b"/", b"a", b"\r\n" + GET + b"\r\n"),
    (b"/", b"", b"GET / HTTP/1.0\r\n\r\n"),
    (b"/", b"a", b"POST / HTTP/1.0\r\nHost: a\r\nContent-Length: 2\r\n\r\nhi"),
    (b"/", b"a", b"GET / HTTP/1.0\r\nHost: a\r\nExpect: nonsense\r\n\r\n"),
    (b"/", b"a", POST + b"Content-Length:5\t \r\n\r\nhello"),
    (b"/", b"a", POST + b"content-LENGTH: 0005\r\n\r\nhello"),
    (b"/", b"a", POST + b"Transfer-Encoding: Chunked\r\n\r\n" + CHUNKS),
    (b"/", b"a", CHUNKED + b"5;ext=1\r\nhello\r\n0\r\nX-Sum: 1\r\n\r\n"),
    (b"/", b"a", GET + b"X:\r\nY: \r\nZ: a\tb \x80\xff\r\n\r\n"),
    (b"/", b"a", GET + b"X_Y: Transfer_Encoding: chunked\r\n\r\n"),
    (b"/", b"a", GET + b"Upgrade: websocket\r\nConnection: upgrade\r\n\r\n"),
    (b"/", b"a", POST + b"Expect: 100-Continue\r\nContent-Length: 0\r\n\r\n"),
    (b"/", b"[::1]:8080", b"GET / HTTP/1.1\r\nHost: [::1]:8080\r\n\r\n"),
    (b"/", b"my_host:", b"GET / HTTP/1.1\r\nHost: my_host:\r\n\r\n"),
    (b"//a/?q={x}&y=%20|", b"a", b"GET //a/?q={x}&y=%20| HTTP/1.1\r\nHost: a\r\n\r\n"),
    (b"*", b"a", b"OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n"),
    (b"/v1/models?a=b", b"b:81", b"GET http://b:81/v1/models?a=b HTTP/1.1\r\nHost: a\r\n\r\n"),
    (b"/", b"b", b"GET HTTP://b HTTP/1.1\r\nHost: a\r\n\r\n"),
    (b"/?a=http://c/", b"b", b"GET https://b?a=http://c/ HTTP/1.1\r\nHost: a\r\n\r\n"),
    (b"*", b"b", b"OPTIONS http://b HTTP/1.1\r\nHost: a\r\n\r\n"),
    (b"/", b"b", b"OPTIONS http://b/ HTTP/1.1\r\nHost: a\r\n\r\n"),
    (b"/", b"a", b"X-ODD! / HTTP/1.1\r\nHost: a\r\n\r\n"),
    (b"/" + b"a" * 8000, b"a", b"GET /" + b"a" * 8000 + b" HTTP/1.1\r\nHost: a\r\n\r\n"),
]  # fmt: skip


@pytest.mark.parametrize(("target", "host", "data"), ACCEPTED)
@pytest.mark.parametrize("behind", [b"", GET + b"\r\n", b"\0"], ids=["alone", "pipelined", "rubbish-behind"])
def test_accepts(target: bytes, host: bytes, data: bytes, behind: bytes) -> None:
    found = read_request(data + behind)
    assert found is not None
    assert found[0].destination == (target, host)
    assert found[1] == behind


@pytest.mark.parametrize("data", [data for _, _, data in ACCEPTED if len(data) < 200])
def test_a_head_may_arrive_byte_by_byte(data: bytes) -> None:
    data = data[strict.leading_crlf(data) :]
    end = data.index(b"\r\n\r\n") + 4
    for seen in range(end):
        assert strict.head_end(data[:seen], max(0, seen - 1)) == 0
        assert strict.head_end(data[:seen]) == 0
    for seen in range(end, len(data)):
        assert strict.head_end(data[:seen]) == end
        assert strict.head_end(bytearray(data[:seen]), end - 1) == end


CHUNKED_GAPS = [
    b"0\r\nX: y\n\n",
    b"0\r\nX: y\n\r\n",
    b"0\r\n\n",
    b"0\r\nX: y\r\n z\r\n\r\n",
    b"0\r\nX: a\x07\r\n\r\n",
    b"5;a\rb\r\nhello\r\n0\r\n\r\n",
    b"5;a\x07\r\nhello\r\n0\r\n\r\n",
]


@pytest.mark.parametrize("body", CHUNKED_GAPS)
def test_chunk_decoder_closes_what_h11_leaves_open_in_bodies(body: bytes) -> None:
    assert is_taken_by_bare_h11(CHUNKED + body)
    decoder = framing.ChunkDecoder()
    position = 0
    while position < len(body) and decoder.error is None and not decoder.is_done:
        _, _, position = decoder.next(body, position, len(body))
    assert decoder.error is not None


def test_leading_crlf_is_one() -> None:
    assert [strict.leading_crlf(data) for data in (b"", b"\r", b"\r\n", b"\r\n\r\n", b"GET", b"\n")] == [
        0,
        0,
        2,
        2,
        0,
        0,
    ]
    assert strict.head_end(b"\r") == 0  # the other half may follow


@pytest.mark.parametrize("searched", [0, 3, 24, 25])
def test_lines_of_lf_are_refused_before_a_timeout(searched: int) -> None:
    with pytest.raises(RequestRefused) as caught:
        strict.head_end(b"GET / HTTP/1.1\r\nHost: a\n\n", searched)
    assert caught.value.status == 400


@pytest.mark.parametrize("searched", range(7))
def test_empty_lines_of_lf_are_found_as_by_a_pattern(searched: int) -> None:
    pattern = re.compile(rb"[^\r]\n\r?\n|\n\n")
    start = max(searched - 3, 0)
    for parts in itertools.chain.from_iterable(itertools.product(b"\r\na", repeat=size) for size in range(7)):
        data = b"G" + bytes(parts)
        end = data.find(b"\r\n\r\n", start) + 4
        found: int | None = end if end > 3 else 0
        if not found and pattern.search(data, start):
            found = None
        try:
            assert strict.head_end(data, searched) == found
        except RequestRefused as refusal:
            assert (found, refusal.status) == (None, 400)  # noqa: PT017 - or else it is not refused


@pytest.mark.parametrize(("line", "status"), [(100, None), (101, 414)])
def test_line_limit(line: int, status: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strict, "MAX_REQUEST_LINE_BYTES", 100)
    head = b"GET /%b HTTP/1.1\r\nHost: a\r\n\r\n" % (b"a" * (line - 14))
    assert head.index(b"\r") == line
    if status is None:
        assert strict.head_end(head) == len(head)
        strict.check_raw_head(head)
    else:
        with pytest.raises(RequestRefused) as caught:
            strict.check_raw_head(head)
        assert caught.value.status == status
        with pytest.raises(RequestRefused) as caught:
            strict.head_end(head[:102])
        assert caught.value.status == status


def test_head_limit_is_exact() -> None:
    head = GET + b"\r\n"
    assert strict.head_end(head + b"x" * 100, max_head_bytes=len(head)) == len(head)
    for data in (head, head[:-1]):
        with pytest.raises(RequestRefused) as caught:
            strict.head_end(data, max_head_bytes=len(head) - 2)
        assert caught.value.status == 431


def test_field_limit_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strict, "MAX_FIELDS", 5)
    strict.check_raw_head(GET + b"X: y\r\n" * 4 + b"\r\n")
    with pytest.raises(RequestRefused) as caught:
        strict.check_raw_head(GET + b"X: y\r\n" * 5 + b"\r\n")
    assert caught.value.status == 431


def test_messages_name_the_fault_and_not_the_value() -> None:
    assert "X-Secret" in (message := refusal(GET + b"X-Secret: sk\x07123\r\n\r\n").message)
    assert "123" not in message
    assert "folded" in refusal(GET + b"X: y\r\n z\r\n\r\n").message
    assert "TLS" in refusal(b"\x16\x03\x01").message


def splits(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    for position in range(len(data) + 1):
        yield data[:position], data[position:]


@given(st.binary(max_size=60), st.sampled_from([GET, POST, b"", GET + b"X: y\r\n"]))
def test_rubbish_is_refused_or_waited_for(rubbish: bytes, before: bytes) -> None:
    for head, tail in splits(b"\r\n\r\n"):
        with suppress(RequestRefused):
            read_request(before + head + rubbish + tail)
