"""What engines send: rows of what is passed on, of what is not HTTP, and of what breaks off."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, NamedTuple

from relay.net.upstream import MOST_INTERIM
from tests.conformance.peers import Then
from tests.conformance.refused import CONTROLS, HELLO, row_id

HEAD: Final = b"HTTP/1.1 200 OK\r\n"
FIVE: Final = HEAD + b"Content-Length: 5\r\n\r\nhello"
CHUNKED: Final = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
STREAM: Final = HEAD + b"Content-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
FRAME: Final = b"9\r\ndata: a\n\n\r\n"
#: What an engine might have up its sleeve: an answer that nobody asked for.
POISON: Final = b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\npoison"


class Good(NamedTuple):
    """`data` is an answer: the client gets `status`, these `fields` and `body`.

    `is_reused` says whether the engine's connection may carry the next request. Where it must not, `late` is what the
    engine would say on it next.
    """

    id: str
    section: str  #: of RFC 9110 or 9112
    data: bytes
    status: int = 200
    fields: tuple[bytes, ...] = ()
    body: bytes = b"hello"
    is_reused: bool = True
    method: bytes = b"GET"
    version: bytes = b"1.1"
    then: Then = "keep"
    late: bytes = b""
    interim: tuple[int, ...] = ()
    reason: bytes = b"OK"


class Bad(NamedTuple):
    """`data` is no answer: the client gets a 502 of this `code`, and the engine's connection is closed."""

    id: str
    section: str
    data: bytes
    then: Then = "keep"
    code: str = "upstream_error"
    path: bytes = b"/p"


class Broken(NamedTuple):
    """`data` begins as an answer and does not end as one: neither does what the client gets, up to its `body`."""

    id: str
    section: str
    data: bytes
    body: bytes
    then: Then = "keep"
    path: bytes = b"/p"


def bad(family: str, section: str, before: bytes, after: bytes, variants: Iterable[bytes]) -> list[Bad]:
    """A row for each of `variants`, between `before` and `after`."""
    return [Bad(row_id(family, item), section, before + item + after) for item in variants]


def good(family: str, section: str, before: bytes, after: bytes, variants: Iterable[bytes], like: Good) -> list[Good]:
    """A row for each of `variants`, between `before` and `after`; all reach the client as `like`."""
    return [like._replace(id=row_id(family, item), section=section, data=before + item + after) for item in variants]


LENGTH_5: Final = b"content-length: 5"
CODING: Final = b"transfer-encoding: chunked"
_WHOLE: Final = Good("", "", b"", fields=(LENGTH_5,))
_CHUNKS: Final = Good("", "", b"", fields=(CODING,))
_EMPTY: Final = Good("", "", b"", status=204, body=b"", reason=b"No Content")

GOOD: Final[list[Good]] = [
    *good("length", "9112 6.2", HEAD + b"Content-Length:", b"\r\n\r\nhello", [b"5", b" 5", b"\t5 ", b" 005", b" 5,5",
        b" 5, 5"], _WHOLE),
    *good("length twice, the same", "9112 6.3", HEAD, b"\r\n\r\nhello", [
        b"Content-Length: 5\r\nContent-Length: 5", b"content-length:5\r\nCONTENT-LENGTH: 5",
    ], _WHOLE),
    *good("coding", "9112 6.1", HEAD, b"\r\n\r\n" + HELLO, [
        b"Transfer-Encoding: chunked", b"transfer-encoding:CHUNKED", b"Transfer-Encoding:\tchunked ",
        b"Transfer-Encoding:\r\n chunked",
        b"Transfer-Encoding: chunked\r\nTrailer: X", b"Transfer-Encoding: chunked\r\nConnection: transfer-encoding",
        b"Transfer-Encoding: chunked\r\nConnection: keep-alive\r\nKeep-Alive: timeout=5",
    ], _CHUNKS),
    *good("chunks", "9112 7.1", CHUNKED, b"", [
        b"05\r\nhello\r\n00\r\n\r\n", b"1\r\nh\r\n4\r\nello\r\n0\r\n\r\n", b'5;a="b"\r\nhello\r\n0;c\r\n\r\n',
        b"5 ;a\r\nhello\r\n0\r\n\r\n",
        b"5\r\nhello\r\n0\r\nX: y\r\nContent-Length: 3\r\n\r\n",
        b"5\r\nhello\r\n0\r\nTransfer-Encoding: chunked\r\n\r\n",
    ], _CHUNKS),
    Good("up to the close", "9112 6.3", HEAD + b"\r\nhello", fields=(CODING,), is_reused=False, then="fin"),
    Good("up to the close, in 1.0", "9112 6.3", b"HTTP/1.0 200 OK\r\n\r\nhello", fields=(CODING,), is_reused=False,
        then="fin"),
    Good("up to the close, for a client of 1.0", "9112 6.3", HEAD + b"\r\nhello", version=b"1.0", is_reused=False,
        then="fin"),
    Good("chunks for a client of 1.0", "9112 6.1", CHUNKED + HELLO, version=b"1.0"),
    Good("a length for a client of 1.0", "9112 6.2", HEAD + b"Content-Length: 5\r\n\r\nhello", fields=(LENGTH_5,),
        version=b"1.0"),
    Good("nothing up to the close", "9112 6.3", HEAD + b"\r\n", fields=(CODING,), body=b"", is_reused=False,
        then="fin"),
    *good("the connection ends", "9112 9.6", HEAD + b"Content-Length: 5\r\n", b"\r\n\r\nhello", [
        b"Connection: close", b"connection:CLOSE", b"Connection: x, close", b"Connection: x\r\nConnection: close",
    ], _WHOLE._replace(is_reused=False, late=POISON)),
    *good("the connection of 1.0", "9112 9.3", b"HTTP/1.0 200 OK\r\nContent-Length: 5\r\n", b"\r\n\r\nhello", [
        b"X-Request-Id: x", b"Connection: keep-alive", b"Connection: close",
    ], _WHOLE._replace(is_reused=False, late=POISON)),
    *good("a later minor version", "9112 2.5", b"HTTP/", b" 200 OK\r\nContent-Length: 5\r\n\r\nhello", [b"1.2", b"1.9"],
          _WHOLE._replace(is_reused=False)),
    *good("line ends and folds", "9112 2.2", b"HTTP/1.1 200 OK", b"hello", [
        b"\nContent-Length: 5\n\n", b"\r\nContent-Length: 5\n\r\n", b"\nContent-Length: 5\r\n\r\n",
        b"\r\nContent-Length:\r\n 5\r\n\r\n",
        b"\r\nContent-Length: 5\r\n \r\n\r\n", b"\r\nContent-Length: 5\n\n",
    ], _WHOLE),
    Good("a folded value is one line", "9112 5.2", HEAD + b"X: a\r\n\t b\r\nContent-Length: 5\r\n\r\nhello",
        fields=(b"x: a b", LENGTH_5)),
    *good("hop by hop", "9110 7.6.1", HEAD + b"Content-Length: 5\r\n", b"\r\n\r\nhello", [
        b"Keep-Alive: timeout=5", b"Proxy-Connection: keep-alive", b"TE: x", b"Trailer: x", b"Upgrade: h2c",
        b"Connection: X\r\nX: y",
        b"Proxy-Authenticate: Basic", b"Connection: content-length", b"X-Request-Id: theirs",
        b"Connection: X,Y\r\nx: y\r\nY: z",
    ], _WHOLE),
    Good("fields in order", "9110 5.3",
        HEAD + b"B: 1\r\nA: 2\r\nSet-Cookie: a\r\nSet-Cookie: b\r\nContent-Length: 5\r\n\r\nhello",
         fields=(b"b: 1", b"a: 2", b"set-cookie: a", b"set-cookie: b", LENGTH_5)),
    *(
        Good(row_id("value", value), "9110 5.5", HEAD + b"X:" + value + b"\r\nContent-Length: 5\r\n\r\nhello",
            fields=(b"x: " + clean, LENGTH_5))
        for value, clean in (
            (b"", b""), (b" y", b"y"), (b"\ty\t", b"y"), (b" a\tb", b"a\tb"), (b" \xff\x80", b"\xff\x80"), (b" a\x01b",
                b"a b"), (b" a\x07b", b"a b"),
            (b" a\x1bb", b"a b"), (b" a\x7fb", b"a b"), (b" a\x08b", b"a b"), (b" a: b", b"a: b"),
                (b" HTTP/1.1 200 OK", b"HTTP/1.1 200 OK"),
        )
    ),
    Good("not a framing field", "9112 6.1", HEAD + b"Transfer_Encoding: chunked\r\nContent-Length: 5\r\n\r\nhello",
        fields=(b"transfer_encoding: chunked", LENGTH_5)),
    Good("a great many fields", "9110 5.4", HEAD + b"X: y\r\n" * 200 + b"Content-Length: 5\r\n\r\nhello",
        fields=(b"x: y",) * 200 + (LENGTH_5,)),
    *(
        Good(row_id("status", status), "9110 15", b"HTTP/1.1 " + status + b"\r\nContent-Length: 5\r\n\r\nhello",
            int(status[:3]), (LENGTH_5,), reason=reason)
        for status, reason in (
            (b"200 OK", b"OK"), (b"200 ", b"OK"), (b"200", b"OK"), (b"200 a\tb \xff", b"a\tb \xff"), (b"200 a\x07b",
                b"OK"), (b"201 Created", b"Created"),
            (b"299 x", b"x"), (b"301 x", b"x"), (b"400 x", b"x"), (b"404", b"Not Found"), (b"429 x", b"x"), (b"500 x",
                b"x"), (b"599 x", b"x"), (b"999 x", b"x"),
            (b"600", b""),
        )
    ),
    *good("204", "9112 6.3", b"HTTP/1.1 204 No Content\r\n", b"\r\n\r\n", [b"X-Request-Id: x", b"Content-Length: 0"],
        _EMPTY),
    *good("204 with the head of a body", "9110 15.3.5", b"HTTP/1.1 204 No Content\r\n", b"\r\n\r\n", [
        b"Content-Length: 60", b"Transfer-Encoding: chunked",
    ], _EMPTY._replace(is_reused=False, late=POISON)),
    *good("204 with a body", "9110 15.3.5", b"HTTP/1.1 204 No Content\r\n", b"", [
        b"\r\nhello", b"Content-Length: 5\r\n\r\nhello", b"Transfer-Encoding: chunked\r\n\r\n" + HELLO,
        b"\r\n" + POISON,
        b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\nhello",
    ], _EMPTY._replace(is_reused=False, late=POISON)),
    Good("304", "9110 15.4.5", b"HTTP/1.1 304 Not Modified\r\nETag: a\r\n\r\n", 304, (b"etag: a",), b"",
        reason=b"Not Modified"),
    *good("304 with the head of a body", "9110 15.4.5", b"HTTP/1.1 304 Not Modified\r\n", b"\r\n\r\n",
        [b"Content-Length: 60"],
          Good("", "", b"", 304, (b"content-length: 60",), b"", is_reused=False, late=POISON, reason=b"Not Modified")),
    *good("304 with a body", "9110 15.4.5", b"HTTP/1.1 304 Not Modified\r\n", b"", [b"\r\nhello",
        b"Transfer-Encoding: chunked\r\n\r\n" + HELLO, b"\r\n" + POISON],
          Good("", "", b"", 304, (), b"", is_reused=False, late=POISON, reason=b"Not Modified")),
    Good("HEAD", "9110 9.3.2", HEAD + b"\r\n", method=b"HEAD", body=b""),
    Good("HEAD of nothing", "9110 9.3.2", HEAD + b"Content-Length: 0\r\n\r\n", fields=(b"content-length: 0",),
        method=b"HEAD", body=b""),
    Good("HEAD with a length", "9110 8.6", HEAD + b"Content-Length: 60\r\n\r\n", fields=(b"content-length: 60",),
        method=b"HEAD", body=b"", is_reused=False, late=POISON),
    Good("HEAD with a coding", "9112 6.1", CHUNKED, method=b"HEAD", body=b"", is_reused=False, late=b"3c\r\n" + POISON),
    Good("HEAD with a body", "9110 9.3.2", HEAD + b"Content-Length: 5\r\n\r\nhello", fields=(LENGTH_5,),
        method=b"HEAD", body=b"", is_reused=False),
    Good("HEAD with an answer as body", "9110 9.3.2", HEAD + b"\r\n" + POISON, method=b"HEAD", body=b"",
        is_reused=False),
    *good("excess behind a length", "9112 6.3", HEAD + b"Content-Length: 5\r\n\r\nhello", b"", [b"X", b"\r\n",
        b"\r\n\r\n", POISON, b"\x00"], _WHOLE._replace(is_reused=False)),
    *good("excess behind chunks", "9112 6.3", CHUNKED + HELLO, b"", [b"X", b"\r\n", b"0\r\n\r\n", POISON],
        _CHUNKS._replace(is_reused=False)),
    *good("interim", "9110 15.2", b"", HEAD + b"Content-Length: 5\r\n\r\nhello", [
        b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.0 100 Continue\r\n\r\n", b"HTTP/1.1 100\r\n\r\n",
        b"HTTP/1.1 100 Continue\r\nX: y\r\n\r\n" * MOST_INTERIM,
    ], _WHOLE),
    Good("interim that is passed on", "9110 15.2",
        b"HTTP/1.1 103 Early Hints\r\nLink: a\r\n\r\nHTTP/1.1 102 Processing\r\n\r\n" + FIVE,
         fields=(LENGTH_5,), interim=(103, 102)),
    Good("interim with framing fields", "9112 6.1",
        b"HTTP/1.1 103 x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n" + FIVE,
         fields=(LENGTH_5,), interim=(103,)),
    Good("interim for a client of 1.0", "9110 15.2",
        b"HTTP/1.1 103 x\r\n\r\n" + FIVE, fields=(LENGTH_5,), version=b"1.0"),
]  # fmt: skip

BAD: Final[list[Bad]] = [
    *bad("length", "9112 6.3", HEAD + b"Content-Length: ", b"\r\n\r\nhello", [
        b"", b"+5", b"-5", b"0x5", b"5.0", b"5 5", b"5,", b",5", b"5,6", b"5, 6", b"5;", b"5h", b"\xb2", b"5\x0b",
        b"five", b"5_0", b"9" * 21,
        b"5\r\nContent-Length: 6", b"5\r\nContent-Length: 5,6", b"5\r\nContent-Length:", b"5\r\n 5", b"5\x00", b"5\xa0",
    ]),
    *bad("coding", "9112 6.1", HEAD + b"Transfer-Encoding: ", b"\r\n\r\n" + HELLO, [
        b"", b"identity", b"gzip", b"gzip, chunked", b"chunked, gzip", b"chunked, chunked", b"xchunked",
        b"chunked;q=1", b'"chunked"', b"chunked\x0b",
        b"chunked\r\nTransfer-Encoding: chunked", b"identity\r\nTransfer-Encoding: chunked",
        b"chunked\r\nTransfer-Encoding:", b"chunked\x00", b",chunked", b"chunked,",
    ]),
    *bad("length and coding", "9112 6.1", HEAD, b"\r\n\r\n" + HELLO, [
        b"Content-Length: 5\r\nTransfer-Encoding: chunked", b"Transfer-Encoding: chunked\r\nContent-Length: 5",
        b"Content-Length: 0\r\nTransfer-Encoding: chunked",
        b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\nContent-Length: 5",
    ]),
    *bad("coding in 1.0", "9112 6.1", b"HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked", b"\r\n\r\n" + HELLO, [b"",
        b"\r\nConnection: keep-alive"]),
    *bad("version", "9112 2.3", b"", b" 200 OK\r\nContent-Length: 5\r\n\r\nhello", [
        b"HTTP/0.9", b"HTTP/0.0", b"HTTP/2.0", b"HTTP/2", b"HTTP/3.0", b"HTTP/9.9", b"HTTP/1.10", b"HTTP/11.1",
        b"HTTP/1", b"HTTP/", b"HTTP", b"http/1.1",
        b"ICY", b"HTTPS/1.1", b" HTTP/1.1", b"HTTP /1.1", b"HTTP/1.1\t", b"\x00HTTP/1.1", b"",
    ]),
    *bad("status", "9112 4", b"HTTP/1.1 ", b"\r\nContent-Length: 5\r\n\r\nhello", [
        b"", b"OK", b"2000 OK", b"20 OK", b"099 OK", b"000 OK", b"-200 OK", b"+20 OK", b"2 0 OK", b"0x200 OK",
        b"200OK", b" 200 OK", b"\t200 OK", b"200\tOK",
        b"\xb200 OK", b"200 O\x00K", b"200 O\rK",
    ]),
    *bad("switching protocols", "9110 15.2.2", b"HTTP/1.1 101 Switching Protocols\r\n", b"\r\n\r\n", [
        b"Upgrade: websocket\r\nConnection: upgrade", b"Upgrade: h2c", b"X: y",
    ]),
    *bad("interim flood", "9110 15.2", b"", HEAD + b"Content-Length: 5\r\n\r\nhello", [
        b"HTTP/1.1 100 Continue\r\n\r\n" * (MOST_INTERIM + 1), b"HTTP/1.1 103 x\r\nLink: a\r\n\r\n" * 500,
    ]),
    *bad("interim with a body", "9112 6.3", b"HTTP/1.1 103 x\r\nContent-Length: 5\r\n\r\n",
        HEAD + b"Content-Length: 5\r\n\r\nhello", [b"hello", b"hello\r\n", b"\r\n"]),
    *bad("name", "9112 5.1", HEAD, b"\r\nContent-Length: 5\r\n\r\nhello", [
        b"X : y", b"X\t: y", b": y", b" X: y", b"X", b"X y", b"X\x00: y", b"X\xe9: y", b"(X): y", b"X Y: z",
        b"\xef\xbb\xbfX: y", b"Transfer-Encoding : chunked",
        b"Transfer-Encoding\x00: chunked", b"Content-Length\t: 3",
    ]),
    *bad("control in a name", "9110 5.1", HEAD + b"X", b"Y: z\r\nContent-Length: 5\r\n\r\nhello", CONTROLS),
    *bad("value", "9110 5.5", HEAD + b"X: a", b"b\r\nContent-Length: 5\r\n\r\nhello", [b"\x00", b"\r", b"\r\r",
        b"\r\r\n"]),
    *bad("empty line first", "9112 2.2", b"", HEAD + b"Content-Length: 5\r\n\r\nhello", [b"\r\n", b"\n", b"\r\n\r\n",
        b"\r"]),
    *bad("not HTTP", "9112 4", b"", b"", [
        b"\x15\x03\x01\x00\x02\x02\x46 and more", b"hello, world\r\n\r\n", b"<html></html>\r\n\r\n",
        b'{"a":"b"}\r\n\r\n', b"\x00" * 40, b"GET / HTTP/1.1\r\nHost: a\r\n\r\n",
        b"HTTP/1.1\r\n\r\n",
    ]),
    *bad("head too large", "9110 5.4", HEAD, b"\r\nContent-Length: 5\r\n\r\nhello", [
        b"X: " + b"a" * 70_000, b"X" * 70_000 + b": y", b"X: y\r\n" * 20_000 + b"X: y", b"X: y\r\n" * 300 + b"X: y",
        b"X:\r\n" * 16_000 + b"X:",
    ]),
    *(
        Bad(f"head cut {then}: {size}", "9112 8", (HEAD + b"Content-Length: 5\r\n\r\n")[:size], then,
            "upstream_disconnected")
        for then in ("fin", "rst") for size in (1, 9, 12, 16, 17, 30, 36, 37)
    ),
    *(Bad(f"nothing: {then}", "9112 8", b"", then, "upstream_disconnected") for then in ("fin", "rst")),
    Bad("interim and no more", "9110 15.2", b"HTTP/1.1 100 Continue\r\n\r\n", "fin", "upstream_disconnected"),
    *(
        Bad(row_id("chunk before a first frame", item), "9112 7.1", STREAM + item, path=b"/v1/chat/completions")
        for item in (b"x\r\n", b"5 \r\ndata:", b"9\ndata: a\n\n\r\n", b"-1\r\n", b"\r\n", b"9;\x00\r\n",
            b"5\r\ndata: a\n\n")
    ),
]  # fmt: skip

BROKEN: Final[list[Broken]] = [
    *(
        Broken(row_id("chunk size", item), "9112 7.1", CHUNKED + b"5\r\nhello\r\n" + item + b"\r\n", b"hello")
        for item in (
            b"", b" 0", b"0 ", b"0\t", b"+0", b"-0", b"0x0", b"g", b"0\r", b"0\n", b"0,", b"0;\x00", b"0;a\r",
            b"0;a\nb", b"0" * 16, b"1" * 17, b"0;" + b"e" * 4096,
        )
    ),
    *(
        Broken(row_id("chunk data", item), "9112 7.1", CHUNKED + b"5\r\nhello" + item, b"hello")
        for item in (b"!\r\n0\r\n\r\n", b"\n0\r\n\r\n", b"\r\r\n", b"\r0\r\n\r\n", b"0\r\n\r\n", POISON)
    ),
    *(
        Broken(row_id("trailer", item), "9112 7.1.2", CHUNKED + b"5\r\nhello\r\n0\r\n" + item, b"hello")
        for item in (b"X\r\n\r\n", b" X: y\r\n\r\n", b"X : y\r\n\r\n", b"X: y\n\r\n", b"\n", b"X: \x00\r\n\r\n",
            POISON, b"X: y\r\n" * 3000 + b"\r\n")
    ),
    *(Broken(f"length cut {then}", "9112 8", HEAD + b"Content-Length: 6\r\n\r\nhello", b"hello",
        then) for then in ("fin", "rst")),
    *(
        Broken(f"chunks cut: {size}", "9112 8", CHUNKED + (b"5\r\nhello\r\n0\r\n\r\n")[:size], b"hello"[: max(0,
            size - 3)], "fin")
        for size in (0, 1, 3, 5, 8, 9, 10, 11, 13, 14)
    ),
    Broken("reset of a body up to the close", "9112 8", HEAD + b"\r\nhello", b"hello", "rst"),
    *(
        Broken(row_id("chunk of a stream", item), "9112 7.1", STREAM + FRAME + item, b"data: a\n\n",
            path=b"/v1/chat/completions")
        for item in (b"x\r\n", b"0 \r\n\r\n", b"9\ndata: b\n\n\r\n", b"\r\n", b"9;\x00\r\ndata: b\n\n\r\n", b"0\r\n\n",
            POISON)
    ),
]  # fmt: skip
