"""What clients send: rows of what is passed on, and of what is no request yet."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, NamedTuple

from tests.conformance.peers import Forwarded
from tests.conformance.refused import CHUNKED, GET, HELLO, POST, row_id


class Passed(NamedTuple):
    """`data` reaches an engine as `forwarded`; then the connection goes on, or `closes`."""

    id: str
    section: str
    data: bytes
    forwarded: tuple[Forwarded, ...]
    closes: bool = False


class Waiting(NamedTuple):
    """`data` is the beginning of a request; nothing reaches an engine, and where the client leaves, nothing is said."""

    id: str
    section: str
    data: bytes


def passed(
    family: str,
    section: str,
    before: bytes,
    after: bytes,
    variants: Iterable[bytes],
    *forwarded: Forwarded,
    closes: bool = False,
) -> list[Passed]:
    """A row for each of `variants`, between `before` and `after`; all reach an engine alike."""
    return [Passed(row_id(family, item), section, before + item + after, forwarded, closes) for item in variants]


def field_by_field(family: str, section: str, fields: Iterable[bytes]) -> list[Passed]:
    """A row for each of `fields`, which stay as they are but for their names' case."""
    rows = []
    for field in fields:
        name, _, value = field.partition(b":")
        same = name.lower() + b": " + value.strip(b" \t")
        rows.append(Passed(row_id(family, field), section, GET + field + b"\r\n\r\n", (Forwarded(b"GET /p", [same]),)))
    return rows


_PLAIN: Final = Forwarded(b"GET /p")
_HELLO: Final = Forwarded(b"POST /p", body=b"hello")
_OLD: Final = Forwarded(b"GET /p", via=b"1.0 relay")

PASSED: Final[list[Passed]] = [
    *passed("hop by hop", "9110 7.6.1", GET, b"\r\n\r\n", [
        b"X-Request-Id:", b"Keep-Alive: timeout=5", b"Proxy-Connection: keep-alive", b"TE: trailers, deflate",
        b"Trailer: X",
        b"Upgrade: websocket", b"Upgrade: h2c\r\nConnection: Upgrade, HTTP2-Settings\r\nHTTP2-Settings: AAMAAABk",
        b"Connection:",
        b"Connection: keep-alive", b"Connection: X\r\nX: y", b"Connection: x,Y\r\nX: y\r\nY: z",
        b"Connection: X\r\nX: y\r\nX: z",
        b"connection:x\r\nConnection: Y\r\nX: y\r\ny: z", b"X: y\r\nConnection: X", b"Connection: ,, x ,\r\nX: y",
        b"Proxy-Authorization: Basic eA==", b"Proxy-Authenticate: Basic", b"Expect: 100-continue", b"Connection: host",
        b"Connection: via, x-forwarded-for, x-forwarded-host",
    ], _PLAIN),
    *passed("close", "9112 9.6", GET, b"\r\n\r\n", [
        b"Connection: close", b"connection:CLOSE", b"Connection: x, close", b"Connection: x\r\nConnection: close",
        b"Connection: close, keep-alive",
    ], _PLAIN, closes=True),
    *field_by_field("protected from Connection", "9110 7.6.1", [b"Accept: a"]),
    Passed("authorization is not to be nominated", "9110 7.6.1",
        GET + b"Connection: authorization, x-api-key\r\nAuthorization: b\r\n\r\n",
           (Forwarded(b"GET /p", [b"authorization: b"]),)),
    *field_by_field("field", "9110 5.5", [
        b"X:", b"X: ", b"X:y", b"X: y", b"X:\ty", b"X: \t y \t ", b"X: a\tb", b"X: a  b", b"X: \x80\xff",
        b"X: \xc3\xa9", b'X: "\\"', b"X: a,b,,c",
        b"X: :", b"X: HTTP/1.1 200 OK", b"X: %0d%0aY: z", b"x_y: z", b"X.Y: z", b"!#$%&'*+-.^_`|~9: y",
        b"X: " + b"y" * 60_000,
        b"X" * 1000 + b": y", b"Content-Type: a", b"Content-Encoding: gzip", b"Content-Range: bytes 0-1/2",
        b"Cookie: a=b", b"Date: x",
        b"If-Match: *", b"Max-Forwards: 0", b"Range: bytes=0-1", b"Traceparent: 00-1-2-01", b"Accept-Encoding: br",
        b"Forwarded: for=b",
        b"Authorization: Bearer x", b"Pragma: no-cache", b"Origin: null",
    ]),
    *field_by_field("no framing field", "9112 6", [
        b"Content-Lengths: 3", b"XContent-Length: 3", b"Content-Length-X: 3", b"Content.Length: 3",
        b"Content--Length: 3", b"ContentLength: 3",
        b"X-Content-Length: 3", b"Transfer-Encodings: chunked", b"XTransfer-Encoding: chunked",
        b"Transfer.Encoding: chunked",
        b"TransferEncoding: chunked", b"Transfer--Encoding: chunked", b"X-Transfer-Encoding: chunked",
        b"Content-Transfer-Encoding: chunked",
        b"Te-: chunked", b"X: Transfer-Encoding: chunked", b"X: Content-Length: 3", b"Content-Type: chunked",
    ]),
    Passed("fields in order", "9110 5.3", GET + b"B: 1\r\nA: 2\r\nB: 3\r\nb: 4\r\n\r\n", (Forwarded(b"GET /p",
        [b"b: 1", b"a: 2", b"b: 3", b"b: 4"]),)),
    Passed("fields in great number", "9110 5.4", GET + b"X: y\r\n" * 255 + b"\r\n", (Forwarded(b"GET /p",
        [b"x: y"] * 255),)),
    Passed("via is continued", "9110 7.6.3", GET + b"Via: 1.0 b\r\nVia: 1.1 c\r\n\r\n", (Forwarded(b"GET /p",
        via=b"1.0 b, 1.1 c, 1.1 relay"),)),
    Passed("x-forwarded-for is continued", "7239 5.2", GET + b"X-Forwarded-For: b, c\r\n\r\n", (Forwarded(b"GET /p",
        forwarded_for=b"b, c, 127.0.0.1"),)),
    Passed("x-forwarded-host and -proto stay", "7239 5.3",
        GET + b"X-Forwarded-Host: b\r\nX-Forwarded-Proto: https\r\n\r\n",
           (Forwarded(b"GET /p", [b"x-forwarded-host: b", b"x-forwarded-proto: https"], host=b"", proto=b""),)),
    Passed("x-request-id is kept", "9110 7.6", GET + b"X-Request-Id: mine\r\n\r\n", (Forwarded(b"GET /p",
    request_id=b"mine"),
        )),
    *passed("x-request-id is replaced", "9110 7.6", GET + b"X-Request-Id: ", b"\r\n\r\n", [b"a b", b"\xff",
        b"x" * 201], _PLAIN),
    *(
        Passed(row_id("method", method), "9110 9.1", method + b" /p HTTP/1.1\r\nHost: a\r\n\r\n",
            (Forwarded(method + b" /p"),))
        for method in (b"GET", b"HEAD", b"DELETE", b"OPTIONS", b"PATCH", b"QUERY", b"get", b"GETX", b"PRI", b"connect",
            b"X-ODD!", b"1", b"M" * 1000)
    ),
    *(
        Passed(row_id("target", target), "9112 3.2.1", b"GET " + target + b" HTTP/1.1\r\nHost: a\r\n\r\n",
            (Forwarded(b"GET " + target),))
        for target in (
            b"/", b"//", b"///p", b"/p?", b"/?a=b&c", b"/p?http://b/", b"/../p", b"/./p", b"/%2e%2e/p", b"/p%00",
            b"/p%0d%0aX:%20y",
            b"/%zz", b"/%", b"/p;a=b", b"/{x}|^`", b'/"<>', b"/\\p", b"/p?a=[1]", b"/*", b"/http://b/p", b"//b/p",
            b"/a:80", b"/@", b"/" + b"a" * 8000,
        )
    ),
    *(
        Passed(row_id("absolute target", target), "9112 3.2.2",
        method + b" " + target + b" HTTP/1.1\r\nHost: a\r\n\r\n",
            (Forwarded(start, host=host),))
        for method, target, start, host in (
            (b"GET", b"http://a/p", b"GET /p", b"a"), (b"GET", b"http://b/p", b"GET /p", b"b"), (b"GET",
                b"https://b/p", b"GET /p", b"b"),
            (b"GET", b"HTTP://B:80/p", b"GET /p", b"B:80"), (b"GET", b"http://b", b"GET /", b"b"), (b"GET",
                b"http://b?q", b"GET /?q", b"b"),
            (b"GET", b"http://[::1]:80/p", b"GET /p", b"[::1]:80"), (b"GET", b"http://b//p", b"GET //p", b"b"),
                (b"OPTIONS", b"http://b", b"OPTIONS *", b"b"),
            (b"OPTIONS", b"http://b/", b"OPTIONS /", b"b"), (b"GET", b"http://b/http://c/", b"GET /http://c/", b"b"),
                (b"GET", b"http://b/*", b"GET /*", b"b"),
        )
    ),
    Passed("OPTIONS *", "9112 3.2.4", b"OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n", (Forwarded(b"OPTIONS *"),)),
    *(
        Passed(row_id("host", host), "9112 3.2", b"GET /p HTTP/1.1\r\nHost:" + host + b"\r\n\r\n", (Forwarded(b"GET /p",
            host=host.strip(b" \t")),))
        for host in (b"a", b" a ", b"\ta\t", b" a:80", b" a:", b" a.b.", b" A-b_c~", b" 127.0.0.1:1", b" [::1]",
            b" [fe80::1]:65535", b" a%41", b" xn--e9a")
    ),
    *passed("length", "9112 6.2", POST + b"Content-Length:", b"\r\n\r\nhello", [b"5", b" 5", b"\t5\t", b" 5 ",
        b" 0005", b" 0000000000000000005"], _HELLO),
    *passed("length of nothing", "9112 6.2", POST + b"Content-Length: ", b"\r\n\r\n", [b"0", b"000"],
        Forwarded(b"POST /p", body=b"")),
    Passed("no length", "9112 6.3", POST + b"\r\n", (Forwarded(b"POST /p"),)),
    Passed("GET with a body", "9110 9.3.1", GET + b"Content-Length: 5\r\n\r\nhello", (Forwarded(b"GET /p",
        body=b"hello"),)),
    Passed("HEAD with a body", "9110 9.3.2", b"HEAD /p HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhello",
        (Forwarded(b"HEAD /p", body=b"hello"),)),
    Passed("a body that looks like a request", "9112 6.2",
        POST + b"Content-Length: %d\r\n\r\n" % len(GET + b"\r\n") + GET + b"\r\n",
           (Forwarded(b"POST /p", body=GET + b"\r\n"),)),
    *passed("coding", "9112 6.1", POST, b"\r\n\r\n" + HELLO, [
        b"Transfer-Encoding: chunked", b"transfer-encoding:chunked", b"TRANSFER-ENCODING:\tCHUNKED\t",
        b"Transfer-Encoding:  Chunked ",
        b"Transfer-Encoding: chunked\r\nTrailer: X", b"Connection: transfer-encoding\r\nTransfer-Encoding: chunked",
        b"Transfer-Encoding: chunked\r\nTE: trailers", b"Transfer-Encoding: chunked\r\nExpect: 100-continue",
    ], _HELLO),
    *passed("chunks", "9112 7.1", CHUNKED, b"", [
        HELLO, b"05\r\nhello\r\n0\r\n\r\n", b"000000000000005\r\nhello\r\n000000000000000\r\n\r\n",
            b"1\r\nh\r\n4\r\nello\r\n0\r\n\r\n",
        b"5;a=b\r\nhello\r\n0;c\r\n\r\n", b'5;a="b;c"\r\nhello\r\n0\r\n\r\n', b"5 ;a\r\nhello\r\n0\r\n\r\n",
        b"5\t; a = b\r\nhello\r\n0\r\n\r\n",
        b"5;\xff\r\nhello\r\n0\r\n\r\n", b"5;" + b"e" * 4000 + b"\r\nhello\r\n0\r\n\r\n",
        b"5\r\nhello\r\n0\r\nX: y\r\n\r\n",
        b"5\r\nhello\r\n0\r\nX:\r\nY: z\r\nX: \xff\r\n\r\n", b"5\r\nhello\r\n0\r\nContent-Lengths: 3\r\n\r\n",
    ], _HELLO),
    Passed("chunks of nothing", "9112 7.1", CHUNKED + b"0\r\n\r\n", (Forwarded(b"POST /p", body=b""),)),
    Passed("a chunk in hexadecimal", "9112 7.1", CHUNKED + b"aB\r\n" + b"x" * 171 + b"\r\n0\r\n\r\n",
        (Forwarded(b"POST /p", body=b"x" * 171),)),
    Passed("a chunk that looks like chunks", "9112 7.1", CHUNKED + b"5\r\n0\r\n\r\n\r\n0\r\n\r\n",
        (Forwarded(b"POST /p", body=b"0\r\n\r\n"),)),
    Passed("an empty line first", "9112 2.2", b"\r\n" + GET + b"\r\n", (_PLAIN,)),
    Passed("an empty line behind a body", "9112 2.2", POST + b"Content-Length: 5\r\n\r\nhello\r\n" + GET + b"\r\n",
        (_HELLO, _PLAIN)),
    Passed("a pipeline", "9112 9.3.2",
        CHUNKED + HELLO + GET + b"\r\n" + POST + b"Content-Length: 5\r\n\r\nhello" + GET + b"\r\n", (_HELLO, _PLAIN,
            _HELLO, _PLAIN)),
    *passed("HTTP/1.0", "9112 2.3", b"GET /p HTTP/1.0\r\n", b"\r\n\r\n", [
        b"Host: a", b"Host: a\r\nConnection: keep-alive", b"Host: a\r\nKeep-Alive: 300\r\nConnection: keep-alive",
        b"Host: a\r\nExpect: x",
    ], _OLD, closes=True),
    Passed("HTTP/1.0 without a host", "9112 3.2", b"GET /p HTTP/1.0\r\n\r\n", (Forwarded(b"GET /p", via=b"1.0 relay",
        host=b""),), True),
    Passed("HTTP/1.0 with a body", "9112 6.2", b"POST /p HTTP/1.0\r\nHost: a\r\nContent-Length: 5\r\n\r\nhello",
           (Forwarded(b"POST /p", via=b"1.0 relay", body=b"hello"),), True),
    Passed("an answer that streams is not to be encoded", "9110 12.5.3",
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nAccept-Encoding: gzip\r\nContent-Length: 2\r\n\r\n{}",
           (Forwarded(b"POST /v1/chat/completions", body=b"{}", identity=True),)),
]  # fmt: skip

WAITING: Final[list[Waiting]] = [
    *(Waiting(f"cut: {size}", "9112 8", (GET + b"\r\n")[:size]) for size in range(1, len(GET) + 2)),
    *(
        Waiting(f"body cut: {size}", "9112 8", POST + b"Content-Length: 5\r\n\r\n" + b"hello"[:size])
        for size in range(5)
    ),
    *(Waiting(f"chunks cut: {size}", "9112 8", CHUNKED + HELLO[:size]) for size in range(len(HELLO))),
    Waiting("trailers cut", "9112 8", CHUNKED + b"0\r\nX: y\r\n"),
    Waiting("an empty line alone", "9112 2.2", b"\r\n"),
]
