"""Messages made well-formed, of which some are then spoilt in a place or two; and how their bytes arrive."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

from hypothesis import strategies as st

#: llhttp has a list of methods; these of it.
METHODS: Final = (b"POST", b"GET", b"OPTIONS", b"PUT", b"DELETE", b"PATCH")

Field = tuple[bytes, bytes]


class Made(NamedTuple):
    """A message, and whether it was left as it was made."""

    data: bytes
    is_good: bool
    pieces: Sequence[bytes]  #: the data, cut as it is sent


def left_as_made(data: bytes) -> Made:
    return Made(data, True, [data])


def spoilt(data: bytes) -> Made:
    return Made(data, False, [data])


def _weighted(*choices: tuple[int, st.SearchStrategy[bytes]]) -> st.SearchStrategy[bytes]:
    return st.sampled_from([choice for weight, choice in choices for _ in range(weight)]).flatmap(lambda each: each)


def _of(text: bytes) -> st.SearchStrategy[bytes]:
    return st.sampled_from(text.split(b"|"))


_COLONS: Final = st.sampled_from([b": "] * 6 + [b":", b":\t", b":   "])
_LINE_ENDS: Final = st.sampled_from([b"\r\n"] * 8 + [b" \r\n", b"\t \r\n"])

#: Bodies that look like the messages around them are among them.
BODIES: Final = st.one_of(
    st.binary(max_size=40),
    st.sampled_from([
        b"", b"a", b'{"model":"m","prompt":"a\\nb"}', b"0\r\n\r\n", b"5\r\nhello\r\n0\r\n\r\n", b"\r\n", b"\r\n\r\n",
        b"GET /smuggled HTTP/1.1\r\nHost: b\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nother", b"x" * 300,
    ]),
)  # fmt: skip


@st.composite
def _chunks(draw: st.DrawFn, body: bytes) -> bytes:
    """A chunked body, cut anywhere."""
    cuts = sorted(draw(st.sets(st.integers(1, max(1, len(body) - 1)), max_size=3)))
    pieces = [body[start:stop] for start, stop in zip([0, *cuts], [*cuts, len(body)], strict=True)]
    size = st.sampled_from([b"%x"] * 4 + [b"%X", b"0%x", b"00%X", b"%x;a=b", b'%x;a="b"', b"%x;a"])
    data = b"".join(draw(size) % len(piece) + b"\r\n" + piece + b"\r\n" for piece in pieces if piece)
    trailers = draw(st.sampled_from([b""] * 4 + [b"X-Sum: 1\r\n", b"a:\r\nb: c d\r\n"]))
    return data + draw(st.sampled_from([b"0", b"0", b"00", b"0;a=b"])) + b"\r\n" + trailers + b"\r\n"


class _Head(NamedTuple):
    """All of a head but its length, which each message with it has its own."""

    before: bytes
    length: bytes | None  #: how it is written; None: there is none
    behind: bytes
    is_chunked: bool = False
    has_body: bool = True

    def with_body(self, draw: st.DrawFn) -> bytes:
        body = draw(BODIES) if self.has_body else b""
        length = self.length % len(body) if self.length is not None else b""
        return self.before + length + self.behind + (draw(_chunks(body)) if self.is_chunked else body)


def _head(draw: st.DrawFn, start: bytes, fields: Sequence[Field], framing: str) -> _Head:
    """`framing`: ``length``, ``chunked``, ``close`` or ``none``."""
    lines = [name + draw(_COLONS) + value + draw(_LINE_ENDS) for name, value in fields]
    at = draw(st.integers(0, len(lines)))
    before, behind = start + b"\r\n" + b"".join(lines[:at]), b"".join(lines[at:]) + b"\r\n"
    if framing == "length":
        name = draw(_of(b"Content-Length|content-length"))
        length = name + draw(_COLONS) + draw(st.sampled_from([b"%d"] * 6 + [b"0%d", b"000%d"])) + draw(_LINE_ENDS)
        return _Head(before, length, behind)
    if framing == "chunked":
        before += draw(_of(b"Transfer-Encoding: chunked\r\n|transfer-encoding:Chunked\r\n"))
    return _Head(before, None, behind, is_chunked=framing == "chunked", has_body=framing != "none")


# -- requests

_TARGETS: Final = _of(b"/p|/p|/v1/chat/completions|/v1/embeddings?a=b|/a/%00/{x}?q=%20|//|http://b/x?y|HTTP://b:81")
_FIELDS: Final = st.lists(
    st.one_of(
        st.tuples(
            _of(b"X-Y|x-y|Accept|Cookie|X_Z|!odd'|User-Agent|Via|X-Forwarded-For|X-Request-Id|TraceParent|TE|Keep-Alive"),
            _of(b"a||a b|a,b\t;c|\x80\xff|chunked|Content-Length: 5|5"),
        ),
        st.sampled_from([
            (b"Connection", b"keep-alive"), (b"Connection", b"X-Y, te"), (b"Connection", b"close"),
            (b"Connection", b"content-length, host"), (b"Expect", b"100-continue"), (b"Accept-Encoding", b"gzip"),
            (b"Authorization", b"Bearer k"), (b"X-Forwarded-Proto", b"https"), (b"X-Forwarded-Host", b"c"),
        ]),
    ),
    max_size=4,
)  # fmt: skip


def _request_head(draw: st.DrawFn) -> _Head:
    method, version = draw(st.sampled_from([b"POST", *METHODS])), draw(st.sampled_from([b"1"] * 9 + [b"0"]))
    fields = draw(_FIELDS)
    fields.insert(draw(st.integers(0, len(fields))), (b"Host", b"a"))
    framings = ["none", "length", "length", *(["chunked"] * 3 if version == b"1" else [])]
    return _head(draw, b"%b %b HTTP/1.%b" % (method, draw(_TARGETS), version), fields, draw(st.sampled_from(framings)))


# -- answers

_STATUSES: Final = _of(b"200 OK|200 OK|200 OK|201 |404 Not Found|400 a\xffb|500 Internal Server Error|204 x|304 ")
_ANSWER_FIELDS: Final = st.lists(
    st.one_of(
        st.tuples(
            _of(b"X-Y|x-y|Server|Set-Cookie|Date|X-Request-Id|Via|Keep-Alive|Trailer|Vary"),
            _of(b"a||a b|a,b\t;c|\x80\xff|chunked|Content-Length: 5|Sun, 22 Nov 2026 11:00:00 GMT"),
        ),
        st.sampled_from([
            (b"Connection", b"keep-alive"), (b"Connection", b"X-Y"), (b"Connection", b"close"),
            (b"Content-Type", b"text/event-stream"), (b"Content-Type", b"text/event-stream; charset=utf-8"),
            (b"Content-Type", b"application/json"), (b"Content-Encoding", b"gzip"), (b"Cache-Control", b"no-store"),
        ]),
    ),
    max_size=4,
)  # fmt: skip
_INTERIM: Final = st.sampled_from([
    *[b""] * 8, b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 103 Early Hints\r\nLink: a\r\n\r\n",
])  # fmt: skip


def _answer_head(draw: st.DrawFn) -> _Head:
    status, version = draw(_STATUSES), draw(st.sampled_from([b"1"] * 9 + [b"0"]))
    framings = ["length", "length", "close", *(["chunked"] * 3 if version == b"1" else [])]
    if status.startswith((b"204", b"304")):
        framings = ["none"]
    start = draw(_INTERIM) + b"HTTP/1.%b %b" % (version, status)
    return _head(draw, start, draw(_ANSWER_FIELDS), draw(st.sampled_from(framings)))


# -- spoiling

#: Where a reader decides something: around line ends, colons, sizes, blanks and commas.
_PLACE: Final = re.compile(rb"\r\n|[:; ,]|[0-9A-Fa-f]+(?=\r\n)|(?<=\r\n)[^\r\n]")
_ODD: Final = _weighted(
    (3, st.sampled_from([bytes([byte]) for byte in b"\0\t \x0b\x0c\x7f\x85\xa0:,;_-+0\r\n"])),
    (1, st.binary(min_size=1, max_size=2)),
    (1, _of(b"\r\n|\n\n|\r\n |0x|5|\r\n\r\n| HTTP/1.1|\r")),
)
_LINES: Final = _of(
    b"Host: c|Connection: close|X: y|Content-Encoding: a|:|x| a|\ta|X : y|X: y\nContent-Length: 5"
    b"|X: y\rTransfer-Encoding: chunked|X:\x07|X\xff: a|: a"
)
#: Changes nothing, where it is among the fields.
_HARMLESS: Final = _of(b"X: y|Accept: a|X-Empty:|Cookie:\t\x80 b|x-content-length: 5")
#: What frames a body, or what another reader could take for it.
_FRAMINGS: Final = _weighted(
    (1, _of(b"Content-Length: 5|content-length:0|Content-Length: 5\r\n 5| Content-Length: 5")),
    (1, _of(b"Transfer-Encoding: chunked|transfer-encoding:CHUNKED| Transfer-Encoding: chunked")),
    (1, _of(
        b"Content-Length: 5, 5|Content-Length: +5|Content-Length:\x0b5|Content_Length: 5|Content-Length : 5"
        b"|Content-Length: 5 5|Content-Length:|Content-Length: 0x5|Content-Length: 5_0"
    )),
    (1, _of(
        b"Transfer-Encoding: gzip, chunked|Transfer-Encoding: chunked, identity|Transfer-Encoding: identity"
        b"|Transfer-Encoding:\x0bchunked|Transfer_Encoding: chunked|Transfer-Encoding : chunked"
        b"|Transfer-Encoding: xchunked|Transfer-Encoding: chunked, chunked|Transfer-Encoding:"
    )),
)  # fmt: skip
_SIZES: Final = st.sampled_from([
    b"%b ", b"%b\t", b" %b", b"0x%b", b"+%b", b"-%b", b"%b_0", b"%b;", b"%b;\n", b"%b;a\rb", b"%b ;a", b"%b;\x07",
    b"%b\n", b"%bg", b"", b"0000000000000000%b", b"%b\r", b"1%b", b"\0%b", b"%b,%b", b"ffffffffffffffff%b",
])  # fmt: skip
_WAYS: Final = st.sampled_from(
    ["bytes", "framing", "framing", "line", "double", "end", "size", "size", "harmless", "harmless"]
)


def _spoilt(draw: st.DrawFn, data: bytes) -> bytes:
    """The same with one thing changed."""
    way = draw(_WAYS)
    sizes = list(re.finditer(rb"(?<=\r\n)[0-9A-Fa-f]+(?=\r\n)", data))
    if way == "size" and sizes:
        size = draw(st.sampled_from(sizes))
        return data[: size.start()] + draw(_SIZES).replace(b"%b", size[0]) + data[size.end() :]
    if way == "bytes":
        places = [place.start() for place in _PLACE.finditer(data)]
        at = draw(st.one_of(st.sampled_from(places), st.integers(0, len(data))))
        behind = at + draw(st.integers(0, 2))
        return data[:at] + (draw(_ODD) if behind == at or draw(st.booleans()) else b"") + data[behind:]
    head = data.index(b"\r\n\r\n") + 2 if b"\r\n\r\n" in data else len(data)
    is_in_head = way in ("framing", "harmless") or draw(st.integers(0, 5))
    ends = [end.end() for end in re.finditer(rb"\r\n", data[: head if is_in_head else len(data)])] or [len(data)]
    at = draw(st.sampled_from(ends))
    if way == "double":
        return data[:at] + data[data.rfind(b"\n", 0, at - 1) + 1 : at] + data[at:]
    if way == "end":
        return data[: at - 2] + draw(_of(b"\n|\r|\r\r\n|\r\n |\n\r\n|\r\n\r\n||\r\n\t")) + data[at:]
    lines = {"line": _LINES, "framing": _FRAMINGS, "harmless": _HARMLESS}.get(way, _LINES)
    return data[:at] + draw(lines) + b"\r\n" + data[at:]


def _made(draw: st.DrawFn, data: bytes, spoils: int) -> Made:
    is_good = not spoils
    for _ in range(spoils):
        data = _spoilt(draw, data)
    cuts = sorted(draw(st.sets(st.integers(1, max(1, len(data) - 1)), max_size=3)))
    pieces = [data[start:stop] for start, stop in zip([0, *cuts], [*cuts, len(data)], strict=True)]
    return Made(data, is_good, [piece for piece in pieces if piece])


_SPOILS: Final = st.sampled_from([0, 0, 1, 1, 1, 2])


def _series(draw: st.DrawFn, head: Callable[[st.DrawFn], _Head], *, spoils_all: bool) -> list[Made]:
    """A few messages, some with the head of one before."""
    heads: list[_Head] = []
    made = []
    count = draw(st.sampled_from([1, 1, 2, 3]))
    for number in range(count):
        is_repeated = bool(heads) and draw(st.booleans())
        heads.append(heads[draw(st.integers(0, number - 1))] if is_repeated else head(draw))
        spoils = draw(_SPOILS) if spoils_all or number == count - 1 else 0
        made.append(_made(draw, heads[-1].with_body(draw), spoils))
    return made


@st.composite
def requests(draw: st.DrawFn) -> list[Made]:
    """What a client sends on one connection, one behind the other; only the last may be spoilt."""
    return _series(draw, _request_head, spoils_all=False)


@st.composite
def answers(draw: st.DrawFn) -> list[Made]:
    """What one engine answers, to one request after the other; each may be spoilt."""
    return _series(draw, _answer_head, spoils_all=True)
