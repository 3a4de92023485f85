"""Against llhttp: what the relay takes and writes, a strict parser of another family reads as the same one message."""

from __future__ import annotations

import re
from typing import Final, Literal

import h11
from hypothesis import example, given
from hypothesis import strategies as st

from relay.core import headers, strict
from relay.core.framing import BodyKind, ChunkDecoder, FramingError, decode_into, response_body_kind
from relay.errors import RequestRefused
from tests.conformance import llhttp
from tests.core.test_strict import METHODS, odd_requests
from tests.fuzz import checks

#: As written: the head's lines, the fields of it, the body.
Written = tuple[bytes, headers.Headers, bytes]

#: Chunk extensions: see `tests.fuzz.checks`.
EXTENSION: Final = re.compile(rb"(?m)^[0-9A-Fa-f]+[ \t]*;")


def forward(data: bytes) -> tuple[bytes, bytes, bytes] | None:
    """What goes to an engine for the request that `data` begins with, its body, and its own bytes; None: not whole."""
    data = data[strict.leading_crlf(data) :]
    end = strict.head_end(data)
    if not end:
        return None
    strict.check_raw_head(data[:end])
    connection = h11.Connection(h11.SERVER)
    connection.receive_data(data[:end])
    try:
        request = connection.next_event()
    except h11.RemoteProtocolError as error:
        raise strict.refusal_of(error) from None
    assert isinstance(request, h11.Request)
    fields = list(request.headers)
    target, host = strict.check_request(request.method, request.target, request.http_version, fields)
    body = bytearray()
    length = headers.find(fields, b"content-length")
    is_chunked = headers.find(fields, b"transfer-encoding") is not None
    if is_chunked:
        decoder = ChunkDecoder()
        stop = end + decode_into(body, decoder, data[end:])
        if decoder.error is not None:
            raise RequestRefused(400, "bad_request", str(decoder.error))
        if not decoder.is_done:
            return None
        strict.check_trailers(decoder.trailer_names)
    else:
        stop = end + int(length or 0)
        if stop > len(data):
            return None
        body += data[end:stop]
    passed = headers.passed_fields(
        fields, version=request.http_version, client_ip="192.0.2.1", scheme=b"http", original_host=host
    )
    size: int | Literal["none"] = len(body) if is_chunked or length is not None else "none"
    head = headers.request_head(request.method, target, passed, host=b"engine:1", request_id="id", body=size)
    return head + body, bytes(body), data[:stop]


def read(message: bytes) -> Written:
    """A message the plainest way there is: it must be readable so."""
    head, _, body = message.partition(b"\r\n\r\n")
    start, *lines = head.split(b"\r\n")
    pairs = (line.partition(b":") for line in lines)
    return start, [(name, value.strip(b" \t")) for name, _, value in pairs], body


@given(odd_requests())
@example(b"POST /p HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n5 \r\nhello\r\n0\r\n\r\n")
def test_requests(data: bytes) -> None:
    try:
        found = forward(data)
    except RequestRefused:
        return
    if found is None:
        return
    sent, body, received = found
    start, fields, rest = read(sent)
    method, target, version = start.split(b" ")
    assert (version, rest) == (b"HTTP/1.1", body)
    if method not in METHODS:
        return  # llhttp has a list of them
    seen = llhttp.requests(sent)
    assert seen.is_one, seen
    assert (seen.method, seen.target, seen.headers, seen.body) == (method, target, fields, body)
    before = llhttp.requests(received)
    if EXTENSION.search(received) is None:
        assert before.is_one, before
        assert (before.method, before.body) == (method, body)


_STARTS: Final = [
    b"HTTP/1.1 200 OK"
] * 6 + b"HTTP/1.0 200|HTTP/1.1 404 |HTTP/1.1 204 x|HTTP/1.1 304|HTTP/1.1 200 \xff".split(b"|")
_NAMES: Final = b"Content-Length|Transfer-Encoding|Content_Length|Connection|X|Keep-Alive|Upgrade|Date|Via".split(b"|")
_VALUES: Final = b"0|5|05|5,5|+5|chunked|CHUNKED|gzip, chunked|a||close|upgrade|x|\xff|\x07|a\x1b[0m".split(b"|")
_ENDS: Final = st.sampled_from([b"\r\n"] * 20 + [b"\n", b"\r\n ", b"\r", b"\r\r\n"])


@st.composite
def odd_answer_heads(draw: st.DrawFn) -> bytes:
    """Nearly valid heads of answers."""
    head = draw(st.sampled_from(_STARTS)) + draw(_ENDS)
    for _ in range(draw(st.integers(0, 4))):
        head += draw(st.sampled_from(_NAMES)) + b": " + draw(st.sampled_from(_VALUES)) + draw(_ENDS)
    if draw(st.integers(0, 2)) == 0:
        position = draw(st.integers(0, len(head)))
        head = head[:position] + draw(st.binary(min_size=1, max_size=2)) + head[position:]
    return head + b"\r\n"


@given(odd_answer_heads())
def test_answers(data: bytes) -> None:
    """Heads alone: how bodies of answers are read is `test_chunked_bodies`."""
    parser = h11.Connection(h11.CLIENT)
    parser.receive_data(data)
    try:
        event = parser.next_event()
        if not isinstance(event, h11.Response):
            return
        fields = list(event.headers)
        kind = response_body_kind(b"GET", event.status_code, event.http_version, fields)
    except (h11.RemoteProtocolError, FramingError):
        return
    length = int(headers.find(fields, b"content-length") or 0)
    framing: headers.Framing = {BodyKind.NONE: "none", BodyKind.LENGTH: length}.get(kind, "chunked")  # type: ignore[assignment]
    body = {BodyKind.NONE: b"", BodyKind.LENGTH: b"x" * length}.get(kind, b"1\r\nx\r\n0\r\n\r\n")
    start = headers.head_start(event.status_code, event.reason, fields)
    sent = headers.response_head(start, framing=framing, keep_alive=True, date=b"now", request_id="id") + body
    _, written, rest = read(sent)
    assert rest == body
    seen = llhttp.responses(sent)
    assert seen.is_one, (seen, sent)
    assert (seen.status, seen.headers) == (event.status_code, written)
    assert seen.body == (b"x" if framing == "chunked" else body)


_CHUNK_PARTS: Final = st.sampled_from([
    b"0\r\n\r\n", b"0\r\nX: y\r\n\r\n", b"5\r\nhello\r\n", b"05\r\nhello\r\n", b"5;a=b\r\nhello\r\n",
    b"A\r\n0123456789\r\n", b"0", b"5", b" ", b"\t", b";",
    b"\r", b"\n", b"\r\n", b"a", b":", b"-", b"+", b"x", b"\0", b"hello", b'"', b",", b"_", b"\xff",
    b"Content-Length: 5\r\n",
])  # fmt: skip


@given(st.integers(0, 31), st.lists(_CHUNK_PARTS, max_size=8))
@example(5, [b"5", b" ", b"\r\n", b"hello", b"\r\n", b"0\r\n\r\n"])
def test_chunked_bodies(cut: int, parts: list[bytes]) -> None:
    checks.framing(bytes([cut]) + b"".join(parts))
    checks.framing(bytes([cut]) + b"".join(parts) + b"\r\n0\r\n\r\n")
