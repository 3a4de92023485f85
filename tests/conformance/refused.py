"""What clients send: rows of what is refused."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, NamedTuple

from relay.core.strict import FORBIDDEN_TRAILERS

GET: Final = b"GET /p HTTP/1.1\r\nHost: a\r\n"
POST: Final = b"POST /p HTTP/1.1\r\nHost: a\r\n"
CHUNKED: Final = POST + b"Transfer-Encoding: chunked\r\n\r\n"
HELLO: Final = b"5\r\nhello\r\n0\r\n\r\n"
#: Control bytes but HTAB, CR and LF.
CONTROLS: Final = [bytes([byte]) for byte in (*range(0x20), 0x7F) if byte not in b"\t\r\n"]


class Refused(NamedTuple):
    """`data` gets an answer of `status` and the connection's end; no byte of it reaches an engine."""

    id: str
    section: str  #: of RFC 9110 or 9112
    status: int
    data: bytes


def row_id(family: str, variant: bytes) -> str:
    shown = variant if len(variant) < 40 else variant[:30] + b"..%d" % len(variant)
    return f"{family}: {shown!r}"


def refused(
    family: str, section: str, status: int, before: bytes, after: bytes, variants: Iterable[bytes]
) -> list[Refused]:
    """A row for each of `variants`, between `before` and `after`."""
    return [Refused(row_id(family, item), section, status, before + item + after) for item in variants]


def _in_place_of_each(mark: bytes, data: bytes, others: Iterable[bytes]) -> list[bytes]:
    """`data` with one `mark` after the other replaced by each of `others`."""
    parts = data.split(mark)
    return [
        mark.join(parts[:place]) + other + mark.join(parts[place:])
        for place in range(1, len(parts))
        for other in others
    ]


_NOT_A_LENGTH: Final = (
    b"", b" ", b"+5", b"-5", b"-0", b"0x5", b"5h", b"5.0", b"5e0", b"5 5", b"5,", b",5", b"5,5", b"5, 5", b"5,6",
    b"5;5",
    b"5\t5", b"5\x0b", b"\x0b5", b"5\x0c", b"5\x00", b"\x005", b"5_0", b"1_0", b"'5'", b'"5"', b"(5)", b"five",
    b"0b101",
    b"NaN", b"inf", b"\xb2", b"\xd9\xa5", b"\xef\xbc\x95", b"5\x85", b"\xa05", b"5%00", b"%35", b"0" * 19 + b"5",
    b"18446744073709551621", b"9" * 100, b"5\r", b"5\n", b"5\r\n 5", b"5\r\n\t", b"\r\n 5",
)  # fmt: skip
_NO_CODING: Final = (
    b"", b" ", b",", b"identity", b"gzip", b"x", b"cow", b"xchunked", b"chunkedx", b"chunke", b"chunked,", b",chunked,",
    b"chunked;", b"chunked;q=1", b"chunked;a=b", b'"chunked"', b"'chunked'", b"<chunked>", b"chunked chunked",
    b"chunked, chunked", b"chunked,chunked", b"chunked, identity", b"chunked, gzip", b"identity, identity",
    b"chunked\x00", b"\x00chunked", b"\x0bchunked", b"chunked\x0b", b"\x0cchunked", b"chunked\x0c", b"\x7fchunked",
    b"chun\x08ked", b"chunked\xa0", b"\xa0chunked", b"chunked\xff", b"\xef\xbb\xbfchunked", b"chunked\r", b"\rchunked",
    b"chunked\n", b"\nchunked", b"chunked\r\n ", b"\r\n chunked", b"\r\n\tchunked", b"gzip\r\n , chunked", b"chunked/1",
    b"chunked=1", b"{chunked}", b"chu\xc5\x88ked", b"\xe2\x84\xaahunked", b"ch\xc3\xbcnked",
)  # fmt: skip
#: Names that some parser or gateway may take for ``Transfer-Encoding``, and none may see.
_CODING_IN_DISGUISE: Final = (
    b"Transfer-Encoding : chunked", b"Transfer-Encoding\t: chunked", b" Transfer-Encoding: chunked",
    b"\tTransfer-Encoding: chunked", b"Transfer_Encoding: chunked", b"transfer_encoding: chunked",
    b"TRANSFER_ENCODING: chunked", b"Transfer-Encoding\x00: chunked", b"\x00Transfer-Encoding: chunked",
    b"Transfer\x00-Encoding: chunked", b"Transfer-Encoding\x0b: chunked", b"\x0bTransfer-Encoding: chunked",
    b"Transfer Encoding: chunked", b"Transfer-\r\n Encoding: chunked", b"Transfer-Encoding\r\n : chunked",
    b"X: y\rTransfer-Encoding: chunked", b"X: y\nTransfer-Encoding: chunked", b"X: y\r\rTransfer-Encoding: chunked",
    b"X: y\r\r\nTransfer-Encoding: chunked", b"X: y\n\rTransfer-Encoding: chunked",
    b"X: y\x00Transfer-Encoding: chunked",
    b"Transfer-Encoding\xa0: chunked", b"\xef\xbb\xbfTransfer-Encoding: chunked", b"Transfer-Encod\xc4\xb1ng: chunked",
    b"Transfer-Encoding", b"Transfer-Encoding chunked", b"Transfer-Encoding= chunked", b'"Transfer-Encoding": chunked',
    b"Transfer-Encoding:: chunked", b"Transfer/Encoding: chunked", b"Transfer-Encoding: chunked",
    b"transfer-encoding:chunked", b"TRANSFER-ENCODING:\tCHUNKED", b"Transfer-Encoding: chunked \t",
    b"Transfer-Encoding: identity", b"Transfer-Encoding: xchunked", b"Transfer-Encoding:",
    b"Transfer-Encoding: chunked\r\nTransfer-Encoding: x", b"Transfer-Encoding: x\r\nTransfer-Encoding: chunked",
    b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked",
    b"Connection: transfer-encoding\r\nTransfer-Encoding: chunked",
    b"X: y\r\n Transfer-Encoding: chunked", b"X:\r\n\tTransfer-Encoding: chunked", b"(Transfer-Encoding): chunked",
)  # fmt: skip
_LENGTH_IN_DISGUISE: Final = (
    b"Content-Length : 3", b"Content-Length\t: 3", b" Content-Length: 3", b"\tContent-Length: 3", b"Content_Length: 3",
    b"CONTENT_LENGTH: 3", b"content_length:3", b"Content-Length\x00: 3", b"\x00Content-Length: 3", b"Content Length: 3",
    b"Content-Length\x0b: 3", b"X: y\rContent-Length: 3", b"X: y\nContent-Length: 3", b"X: y\n\rContent-Length: 3",
    b"Content-Length: 3", b"content-length:3", b"CONTENT-LENGTH: 5", b"Content-Length: 5", b"Content-Length: 0",
    b"Content-Length", b"Content-Length 3", b"Content-Length=3", b'"Content-Length": 3', b"Content/Length: 3",
    b"Content-\r\n Length: 3", b"X: y\r\n Content-Length: 3", b"X: y\x00Content-Length: 3", b"Content-Length\xa0: 3",
    b"Connection: content-length\r\nContent-Length: 3",
)  # fmt: skip
_BAD_CHUNKS: Final = (
    b"", b" 5", b"\t5", b"5 ", b"5\t", b"5 5", b"+5", b"-5", b"-0", b"0x5", b"0X5", b"5h", b"x5", b"g", b"G", b"5.0",
    b"5,",
    b"5_0", b"'5'", b'"5"', b"\x005", b"5\x00", b"\x0b5", b"5\x0b", b"\xa05", b"\xef\xbc\x95", b"\xd9\xa5", b"5\r",
    b"5\n",
    b"\r5", b"\n5", b"\r\n5", b"5\r\r", b"5;a\r", b"5;a\n", b"5;a\rb", b"5;a\nb", b"5;a\x00", b"5;\x7f", b"5;\x07",
    b"5:a",
    b"5=a", b"5,5", b"0000000000000005", b"10000000000000005", b"100000005\r", b"ffffffffffffffff",
    b"fffffffffffffffff",
    b"8000000000000005", b"-fffffffffffffffb", b"5\r\n ", b"5;" + b"e" * 4096, b"0" * 5000 + b"5", b"5;\r\n\r",
)  # fmt: skip
#: Behind the size line of a chunk of five: data that is not five bytes and a CR LF.
_BAD_DATA: Final = (
    b"hell\r\n", b"hello!\r\n", b"hello\n", b"hello\r", b"hello\r\r\n", b"hello\n\r", b"hello \r\n", b"hello0\r\n",
    b"hello;\r\n", b"hello\r\n\r\n",
)  # fmt: skip
_BAD_TRAILERS: Final = (
    b"X", b"X y", b" X: y", b"\tX: y", b": y", b"X : y", b"X\t: y", b"X: y\r\n z", b"X: y\r\n\tz", b"X: y\rZ: z",
    b"X: y\nZ: z",
    b"X: \x00", b"X: \x07", b"X: \x7f", b"X: y\n", b"X: y\r", b"\x00: y", b"X\x00: y", b"(X): y", b"X\xe9: y",
    b"GET /b HTTP/1.1",
    b"X: " + b"y" * 5000, b"X: y\r\n" * 3000 + b"Z: z",
)  # fmt: skip
_BAD_TARGETS: Final = (
    b"*", b"a", b"p", b"index.html", b"?q", b"#", b"a:80", b"a.example:443", b"[::1]:80", b"../p", b"\\p", b"/p#f",
    b"/#", b"/p?q#f",
    b"http:/p", b"http:p", b"http://", b"http:///p", b"http://?q", b"http://a#f", b"http://a/#f", b"http://u@a/",
    b"http://u:p@a/", b"http://@a/", b"http://a:b/", b"http://a:80:80/", b"http://a b/", b"http://a,b/",
    b"http://[::1/",
    b"http://a%zz/", b"http://\xc3\xa9/", b"http://a\\b/", b"ftp://a/", b"ws://a/", b"file:///p", b"javascript:0",
    b"httpx://a/", b"://a/", b"/\xc3\xa9", b"/\x80", b"/\xff", b"", b" /p", b"/p /q", b"/p\tq", b"/p HTTP/1.1 GET /q",
)  # fmt: skip
_BAD_METHODS: Final = (
    b"", b" GET", b"GET ", b"GET\t", b"\tGET", b"G ET", b"(GET)", b"GET:", b"GET,", b"GET/", b'"GET"', b"GET;",
    b"[GET]",
    b"{GET}", b"GET=", b"G@T", b"<GET>", b"G\\T", b"G?T", b"\xc3\xa9", b"G\xff", b"G\x80T", b"\xef\xbb\xbfGET",
)  # fmt: skip
_BAD_HOSTS: Final = (
    b"", b" ", b"a b", b"a,b", b"a, b", b"a/b", b"a/", b"/a", b"a?b", b"a#b", b"u@a", b"u:p@a", b"@a", b"a:b",
    b"a:80:80", b"a:-1",
    b"a:999999", b"a: 80", b"a :80", b"http://a", b"[::1", b"::1]", b"::1", b"[a]", b"[]", b"[::1]a", b"[::1%25eth0]",
    b"a\\b",
    b"a<b", b'"a"', b"a|b", b"a^b", b"a`b", b"{a}", b"\xc3\xa9", b"a\xff", b"a%", b"a%z1", b":80", b":",
)  # fmt: skip
_BAD_VERSIONS: Final = (
    b"", b"HTTP", b"HTTP/", b"HTTP/1", b"HTTP/1.", b"HTTP/.1", b"HTTP/11", b"HTTP/1,1", b"HTTP/1.1.1", b"HTTP/1.10",
    b"HTTP/1.01",
    b"HTTP/01.1", b"HTTP/10.1", b"HTTP/+1.1", b"HTTP/-1.1", b"HTTP/1.-1", b"HTTP/ 1.1", b"HTTP /1.1", b"HTTP/1 .1",
    b"HTTP/1.1 ",
    b" HTTP/1.1", b"HTTP/1.1\t", b"http/1.1", b"Http/1.1", b"HTTP\\1.1", b"HTTPS/1.1", b"HTTP/1.x", b"HTTP/x.1",
    b"HTTP/1.1x",
    b"xHTTP/1.1", b"ICE/1.0", b"RTSP/1.0", b"SIP/2.0", b"HTTP/\xc2\xb9.1", b"HTTP/1.1\x00", b"HTTP/1.1\x0b",
    b"HTTP/1.1\r",
    b"HTTP/1.1 HTTP/1.1", b"HTTP/99999999999.1",
)  # fmt: skip
_OTHER_VERSIONS: Final = (
    b"HTTP/0.0", b"HTTP/0.9", b"HTTP/1.2", b"HTTP/1.9", b"HTTP/2.0", b"HTTP/2.1", b"HTTP/3.0", b"HTTP/9.9",
)  # fmt: skip
_LINE_ENDS: Final = (
    b"\n",
    b"\r",
    b"\r\r\n",
    b"\n\r\n",
    b"\r \n",
    b"\r\x00\n",
    b"\r\n ",
    b"\r\n\t",
    b"\x85",
    b"\xe2\x80\xa8",
)
_LINES: Final = b"POST /p HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nX: y\r\n"

REFUSED: Final[list[Refused]] = [
    *refused("length", "9112 6.3", 400, POST + b"Content-Length: ", b"\r\n\r\nhello", _NOT_A_LENGTH),
    *refused("length beside a length", "9112 6.3", 400, POST + b"Content-Length: 5\r\n", b"\r\n\r\nhello",
        _LENGTH_IN_DISGUISE),
    *refused("length before a length", "9112 6.3", 400, POST, b"\r\nContent-Length: 5\r\n\r\nhello",
        _LENGTH_IN_DISGUISE),
    *refused("length in 1.0", "9112 6.3", 400, b"POST /p HTTP/1.0\r\nContent-Length: ", b"\r\n\r\nhello", [b"5,5",
        b"+5", b""]),
    *refused("coding", "9112 6.1", 400, POST + b"Transfer-Encoding: ", b"\r\n\r\n" + HELLO, _NO_CODING),
    *refused("coding unknown", "9112 6.1", 501, POST + b"Transfer-Encoding: ", b"\r\n\r\n" + HELLO, [
        b"gzip, chunked", b"gzip,chunked", b"deflate, chunked", b"x, chunked", b"identity, chunked", b", chunked",
        b"gzip;q=1, chunked", b"GZIP, CHUNKED",
    ]),
    *refused("coding beside a length", "9112 6.1", 400, POST + b"Content-Length: 5\r\n", b"\r\n\r\n" + HELLO,
        _CODING_IN_DISGUISE),
    *refused("coding before a length", "9112 6.1", 400, POST, b"\r\nContent-Length: 5\r\n\r\n" + HELLO,
        _CODING_IN_DISGUISE),
    *refused("coding in 1.0", "9112 6.1", 400, b"POST /p HTTP/1.0\r\nHost: a\r\n", b"\r\n\r\n" + HELLO, [
        b"Transfer-Encoding: chunked", b"transfer-encoding:chunked", b"Transfer-Encoding: chunked\r\nContent-Length: 5",
        b"Transfer-Encoding: chunked\r\nConnection: keep-alive",
    ]),
    *refused("length beside a coding", "9112 6.1", 400, POST + b"Transfer-Encoding: chunked\r\n", b"\r\n\r\n" + HELLO,
        _LENGTH_IN_DISGUISE),
    *refused("line ends", "9112 2.2", 400, b"", b"\r\nhello", _in_place_of_each(b"\r\n", _LINES, _LINE_ENDS)),
    *refused("all line ends", "9112 2.2", 400, b"", b"", [_LINES.replace(b"\r\n",
        end) + end + b"hello" for end in (b"\n", b"\r\r\n")]),
    *refused("empty line", "9112 2.2", 400, _LINES, b"hello", [b"\n", b"\r\r\n", b" \r\n", b"\t\r\n", b"\x00\r\n",
        b"\n\r"]),
    *refused("before the method", "9112 2.2", 400, b"", GET + b"\r\n", [
        b"\n", b"\r", b"\r\n\n", b"\r\n\r\n", b"\n\n", b" ", b"\t", b"\r\n ", b"\x00", b"\xef\xbb\xbf", b"\r\r\n",
    ]),
    *refused("fold", "9112 5.2", 400, GET, b"\r\n\r\n", [
        b"X: y\r\n z", b"X: y\r\n\tz", b"X: y\r\n ", b"X:\r\n y", b"X: y\r\n  \r\n z", b"X: y\r\n :z",
        b"X: y\r\n Host: b",
        b"X: y\r\n \r\nZ: z", b"X\r\n : y", b"X: y\r\n\x0bz", b"X: y\r\n\x0cz", b"X: y\r\n\xa0z",
    ]),
    *refused("fold first", "9112 2.2", 400, b"GET /p HTTP/1.1\r\n", b"Host: a\r\n\r\n", [b" ", b"\t", b" X: y\r\n",
        b" \r\n", b"\t\r\n"]),
    *refused("control in a value", "9110 5.5", 400, GET + b"X: y", b"z\r\n\r\n", CONTROLS),
    *refused("control in a name", "9110 5.1", 400, GET + b"X", b"Y: z\r\n\r\n", CONTROLS),
    *refused("control in a target", "9112 3.2", 400, b"GET /p", b"q HTTP/1.1\r\nHost: a\r\n\r\n", CONTROLS),
    *refused("control in a method", "9110 9.1", 400, b"GE", b"T /p HTTP/1.1\r\nHost: a\r\n\r\n", CONTROLS),
    *refused("name", "9110 5.1", 400, GET, b"\r\n\r\n", [
        b": y", b" : y", b"X", b"X y", b"X\xe9: y", b"\xc3\xa9: y", b"X : y", b"X\t: y", b"X Y: z",
        *(b"X%cY: z" % byte for byte in b'"(),/;<=>?@[\\]{}'),
    ]),
    *refused("target", "9112 3.2", 400, b"GET ", b" HTTP/1.1\r\nHost: a\r\n\r\n", _BAD_TARGETS),
    *refused("target of OPTIONS", "9112 3.2.4", 400, b"OPTIONS ", b" HTTP/1.1\r\nHost: a\r\n\r\n", [b"**", b"*/",
        b"*?q", b"/*#", b"a:80"]),
    *refused("method", "9110 9.1", 400, b"", b" /p HTTP/1.1\r\nHost: a\r\n\r\n", _BAD_METHODS),
    *refused("method not served", "9110 9.3", 405, b"", b" HTTP/1.1\r\nHost: a\r\n\r\n", [
        b"CONNECT a:80", b"CONNECT /p", b"CONNECT *", b"TRACE /p", b"TRACE *", b"CONNECT http://a/",
    ]),
    *refused("version", "9112 2.3", 400, b"GET /p ", b"\r\nHost: a\r\n\r\n", _BAD_VERSIONS),
    *refused("other version", "9110 15.6.6", 505, b"GET /p ", b"\r\nHost: a\r\n\r\n", _OTHER_VERSIONS),
    *refused("no version", "9112 2.3", 400, b"", b"\r\n", [b"GET /p\r\n", b"GET\r\n", b"GET \r\n",
        b"GET /p\r\nHost: a\r\n"]),
    Refused("preface of HTTP/2", "9113 3.4", 505, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
    *refused("not HTTP", "9112 3", 400, b"", b"", [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc", b"\x00", b"{}\r\n\r\n", b"\xff\xfb\x01\r\n", b"(hello)\r\n\r\n",
        b"hello\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n\r\n",
    ]),
    *refused("host", "9112 3.2", 400, b"GET /p HTTP/1.1\r\nHost: ", b"\r\n\r\n", _BAD_HOSTS),
    *refused("host beside an absolute target", "9112 3.2.2", 400, b"GET http://a/p HTTP/1.1\r\n", b"\r\n\r\n", [
        b"X: y", b"Host: a b", b"Host: a/b", b"Host: a\r\nHost: a", b"Host:",
    ]),
    *refused("hosts", "9112 3.2", 400, b"GET /p HTTP/1.1\r\n", b"\r\n\r\n", [
        b"X: y", b"Host: a\r\nHost: a", b"Host: a\r\nHost: b", b"Host: a\r\nX: y\r\nhost: a", b"Host: a\r\nHost:",
        b"Host : a",
        b" Host: a", b"Host\x00: a", b"Host: a\nHost: b",
    ]),
    Refused("hosts in 1.0", "9112 3.2", 400, b"GET /p HTTP/1.0\r\nHost: a\r\nHost: b\r\n\r\n"),
    *refused("expect", "9110 10.1.1", 417, POST + b"Content-Length: 5\r\nExpect: ", b"\r\n\r\nhello", [
        b"", b"100", b"100-continue, x", b"100-continued", b"200-ok", b'"100-continue"', b"100-continue;q=1",
        b"100 continue",
    ]),
    *refused("chunk size", "9112 7.1", 400, CHUNKED, b"\r\nhello\r\n0\r\n\r\n", _BAD_CHUNKS),
    *refused("second chunk size", "9112 7.1", 400, CHUNKED + b"1\r\nx\r\n", b"\r\nhello\r\n0\r\n\r\n", _BAD_CHUNKS),
    *refused("chunk data", "9112 7.1", 400, CHUNKED + b"5\r\n", b"0\r\n\r\n", _BAD_DATA),
    *refused("last chunk", "9112 7.1", 400, CHUNKED + b"5\r\nhello\r\n", b"", [
        b"0\n\n", b"0\r\n\n", b"0\n\r\n", b"0\r\r\n\r\n", b"0 \r\n\r\n", b"-0\r\n\r\n", b"0x0\r\n\r\n", b"\r\n",
        b"\r\n\r\n", b"\n", b"0\r\n\r\r\n",
        b"0\r\n \r\n", b"0\r\n\x00\r\n", b"0" * 16 + b"\r\n\r\n", b"0;\x00\r\n\r\n",
    ]),
    *refused("trailer", "9112 7.1.2", 400, CHUNKED + b"5\r\nhello\r\n0\r\n", b"\r\n\r\n", _BAD_TRAILERS),
    *refused("trailer with a meaning", "9110 6.5.1", 400, CHUNKED + b"5\r\nhello\r\n0\r\nX: y\r\n", b": 5\r\n\r\n", [
        *sorted(FORBIDDEN_TRAILERS), b"Content-Length", b"CONTENT_LENGTH", b"transfer_encoding", b"Transfer-Encoding",
            b"HOST",
    ]),
    *refused("request line too long", "9112 3", 414, b"GET /", b" HTTP/1.1\r\nHost: a\r\n\r\n", [b"a" * 8200,
        b"a" * 60_000]),
    Refused("request line without an end", "9112 3", 414, b"GET /" + b"a" * 70_000),
    Refused("method without an end", "9112 3", 414, b"G" * 70_000),
    *refused("head too large", "6585 5", 431, GET, b"\r\n\r\n", [
        b"X: " + b"a" * 70_000, b"X" * 70_000 + b": y", b"X:" + b" " * 70_000, b"X: y\r\n" * 300 + b"X: y",
        b"X:\r\n" * 16_000 + b"X:",
        b"Cookie: a=b\r\n" * 255 + b"X: y",
    ]),
    *refused("body too large", "9110 15.5.14", 413, POST, b"", [
        b"Content-Length: 1001\r\n\r\n" + b"x" * 1001, b"Content-Length: 1001\r\n\r\n",
        b"Content-Length: 9999999999999999999\r\n\r\n",
        b"Content-Length: 1001\r\nExpect: 100-continue\r\n\r\n",
        b"Transfer-Encoding: chunked\r\n\r\n3e9\r\n" + b"x" * 1001 + b"\r\n0\r\n\r\n",
        b"Transfer-Encoding: chunked\r\n\r\n" + b"1\r\nx\r\n" * 1001 + b"0\r\n\r\n",
    ]),
]  # fmt: skip
