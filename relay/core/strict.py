"""What the relay asks of a request head beyond what h11 asks: one request in, never two out.

Request smuggling lives on two parsers that read the same bytes differently. h11 0.16 is a careful parser, but lenient
where it can be: it joins folded lines, takes LF for CR LF, turns ``Content-Length: 5, 5`` into ``5``, prefers
``Transfer-Encoding`` over ``Content-Length``, and lets control bytes through. An engine behind us, or a proxy in front,
may read each of these otherwise. And once h11 has normalised a head, nobody can see how it was written.

Hence a head is judged as it arrived, before h11 sees it (once: `relay.core.request_head` knows those that repeat). One
regular expression, in linear time, describes all of a head's grammar, so an ordinary head costs a few microseconds and
only a faulty one is looked at line by line to say what is wrong with it. A second one finds the fields that frame the
body. What is left, the meaning of method, target, ``Host`` and ``Expect``, is judged on h11's event.

The order of use, on a buffer that begins where the last request ended::

    del buffer[: leading_crlf(buffer)]
    end = head_end(buffer)                   # 0: receive more
    check_raw_head(bytes(buffer[:end]))
    request = ...                            # a fresh h11.Connection fed with the buffer
    target, host = check_request(request.method, request.target, request.http_version, list(request.headers))

Refused although RFC 9112 leaves a choice: bare LF (§2.2), obs-fold (§5.2), ``Content-Length`` lists (§6.3),
``Content-Length`` beside ``Transfer-Encoding`` (§6.1), HTTP versions 1.2 to 1.9 (§2.5), control bytes (RFC 9110 §5.5).
After any refusal the connection must be closed: where the next request would begin is not known.

Bodies are not seen here. In a chunked one h11 lets bare LF end the trailer section, which is a way to smuggle as well,
and takes folded trailers and bare CR in chunk extensions; `relay.core.framing.ChunkDecoder` refuses all of these.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

from relay.errors import RequestRefused

if TYPE_CHECKING:
    from collections.abc import Iterable

    import h11

    from relay.core.headers import Headers

#: The whole head, as ``max_head_bytes`` of the configuration.
MAX_HEAD_BYTES = 65536
#: The request line. RFC 9112 §3 asks for at least 8000; nginx's ``large_client_header_buffers`` has the same 8 KiB.
MAX_REQUEST_LINE_BYTES = 8192
#: 64 KiB hold 16,000 fields, and h11 needs 2 to 5 µs for each: a bound on what one head can cost a worker.
MAX_FIELDS = 256

_TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]"
_VALUE = rb"[\t\x20-\x7e\x80-\xff]"

# Possessive (`++`, `*+`): no position is tried twice, whatever the input. Groups are not: before Python 3.11.5 a
# possessive one that fails behind a repeat or a lookahead has eaten what it read (python/cpython#106052, #100061).
_HEAD = re.compile(
    rb"(?P<method>" + _TOKEN + rb"++) (?P<target>[\x21-\x7e]++) HTTP/1\.(?P<minor>[01])\r\n"
    rb"(?:" + _TOKEN + rb"++:" + _VALUE + rb"*+\r\n)*"
    rb"\r\n"
)  # fmt: skip
_FRAMING_FIELD = re.compile(rb"(?i)\r\n(content[-_]length|transfer[-_]encoding):([^\r]*)")
_LENGTH = re.compile(rb"[0-9]{1,19}")  # 19 digits fit into 64 bits everywhere

_BARE_LF = re.compile(rb"(?<!\r)\n")
_BARE_CR = re.compile(rb"\r(?!\n)")
_ANY_VERSION = re.compile(rb"[^ ]+ [^ ]+ HTTP/([0-9]\.[0-9])")
_FIELD_NAME = re.compile(_TOKEN + rb"+")
_FIELD_VALUE = re.compile(_VALUE + rb"*")
_TOKEN_BYTES = frozenset(b"!#$%&'*+-.^_`|~0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz")

# uri-host [ ":" port ] of RFC 3986 §3.2.2 less the comma, which no name in use has and X-Forwarded-Host separates by.
_AUTHORITY = rb"(?:\[[0-9A-Fa-f:.]{2,45}\]|(?:[A-Za-z0-9\-._~!$&'()*+;=]|%[0-9A-Fa-f]{2})+)(?::[0-9]{0,5})?"
_HOST = re.compile(_AUTHORITY)
_ABSOLUTE_FORM = re.compile(rb"(?i:https?)://([^/?#]*)(.*)")

#: Fields that frame, route, authenticate or describe a message may not come after its body (RFC 9110 §6.5.1).
FORBIDDEN_TRAILERS = frozenset(
    {
        b"authorization",
        b"cache-control",
        b"connection",
        b"content-encoding",
        b"content-length",
        b"content-range",
        b"content-type",
        b"cookie",
        b"expect",
        b"host",
        b"keep-alive",
        b"max-forwards",
        b"proxy-authorization",
        b"proxy-connection",
        b"range",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
        b"x-api-key",
    }
)


class Destination(NamedTuple):
    """Where a request goes: `target` in origin form (or ``*``), and the `host` it was addressed to."""

    target: bytes
    host: bytes


def leading_crlf(data: bytes | bytearray) -> int:
    """How many bytes to skip before a request line: one empty line is ignored (RFC 9112 §2.2), h11 would refuse it."""
    return 2 if data.startswith(b"\r\n") else 0


def head_end(data: bytes | bytearray, searched: int = 0, *, max_head_bytes: int = MAX_HEAD_BYTES) -> int:
    """Find the end of the head that `data` begins with.

    `searched` is how many bytes an earlier call has seen. Returns the offset just behind the head's empty line, or 0
    when more has to be received.

    Raises `RequestRefused`, as soon as it is certain that no acceptable head can come of it: 400 for what cannot be a
    request line (a TLS handshake, say) and for lines that end in LF alone, 414 and 431 for what exceeds the limits.
    """
    if data and data[0] not in _TOKEN_BYTES and data != b"\r":
        if data[0] == 0x16:
            raise _bad_request("this looks like TLS, but this address speaks plain HTTP; use an http:// URL")
        raise _bad_request("a request must begin with a method (RFC 9112 §3)")
    start = searched - 3 if searched > 3 else 0
    end = data.find(b"\r\n\r\n", start) + 4
    if end > 3 and end <= max_head_bytes:
        return end
    if data.find(b"\n", 0, MAX_REQUEST_LINE_BYTES + 2) < 0 and len(data) > MAX_REQUEST_LINE_BYTES + 1:
        raise _line_too_long(MAX_REQUEST_LINE_BYTES)
    if end > 3 or len(data) > max_head_bytes:
        raise RequestRefused(431, "headers_too_large", f"the request's head exceeds {max_head_bytes} bytes")
    # An empty line without its CR, or behind a line without; one with both is not there. To look for it by a pattern
    # took ten times as long as all else here, and was two thirds of what a flood of large heads cost.
    if data.find(b"\n\n", start) >= 0 or data.find(b"\n\r\n", start + 1) >= 0:
        raise _bad_request("a line of the head ends in LF alone; lines end in CR LF (RFC 9112 §2.2)")
    return 0


def check_raw_head(head: bytes) -> None:
    """Judge a request head as it was received, from the request line up to and including the empty line.

    Raises `RequestRefused`:

    - 400: anything outside the grammar of RFC 9112 §3 and §5 (bare LF or CR, folded lines, space before a colon,
      control bytes, NUL); ``Content-Length`` that is not one number (§6.3); ``Transfer-Encoding`` that does not end in
      ``chunked``, comes in HTTP/1.0, or beside ``Content-Length`` (§6.1); names that become one of these two where a
      gateway reads ``_`` as ``-``.
    - 414 and 431: a request line longer than `MAX_REQUEST_LINE_BYTES`; more than `MAX_FIELDS` fields.
    - 501: a transfer coding besides ``chunked`` (§6.1).
    - 505: a version other than 1.0 and 1.1 (RFC 9110 §15.6.6).
    """
    if head.count(b"\n") > MAX_FIELDS + 2:
        raise RequestRefused(431, "headers_too_large", f"the request has more than {MAX_FIELDS} header fields")
    match = _HEAD.fullmatch(head)
    if match is None:
        raise _what_is_wrong(head)
    if match.end("minor") > MAX_REQUEST_LINE_BYTES:
        raise _line_too_long(MAX_REQUEST_LINE_BYTES)
    framing = _FRAMING_FIELD.findall(head)
    if framing:
        _check_framing(framing, is_http10=match["minor"] == b"0")


def check_request(method: bytes, target: bytes, version: bytes, headers: Headers) -> Destination:
    """Judge what a well-formed request means, and say where it goes.

    An absolute-form target is turned into origin form and overrides ``Host`` (RFC 9112 §3.2.2); a request of HTTP/1.0
    without ``Host`` has an empty `host`.

    Raises `RequestRefused`:

    - 400: no ``Host`` in HTTP/1.1, several, or an invalid one (§3.2); a target that is neither origin-form nor
      absolute-form of http or https, that has a fragment or user information, or is ``*`` outside of OPTIONS (§3.2).
    - 405: CONNECT and TRACE.
    - 417: an ``Expect`` other than ``100-continue`` (RFC 9110 §10.1.1).
    """
    if method in (b"CONNECT", b"TRACE"):
        raise RequestRefused(405, "bad_request", f"{method.decode('ascii')} is not supported")
    host = None
    for name, value in headers:
        if name == b"host":
            if host is not None:
                raise _bad_request("more than one Host (RFC 9112 §3.2)")
            host = value
        elif name == b"expect" and version != b"1.0" and value.lower() != b"100-continue":
            raise RequestRefused(417, "bad_request", "the only expectation supported is 100-continue")
    if host is None:
        if version != b"1.0":
            raise _bad_request("Host is missing (RFC 9112 §3.2)")
        host = b""
    elif _HOST.fullmatch(host) is None:
        raise _bad_request("Host is not a host and optional port (RFC 9112 §3.2)")
    if b"#" in target:
        raise _bad_request("the request target has a fragment (RFC 9112 §3.2)")
    if target.startswith(b"/"):
        return Destination(target, host)
    if target == b"*":
        if method != b"OPTIONS":
            raise _bad_request("the target * is for OPTIONS alone (RFC 9112 §3.2.4)")
        return Destination(target, host)
    return _from_absolute_form(method, target)


def check_trailers(names: Iterable[bytes]) -> None:
    """Raise `RequestRefused` (400) for trailer fields that have no business there (RFC 9110 §6.5.1)."""
    for name in names:
        if name.replace(b"_", b"-") in FORBIDDEN_TRAILERS:
            raise _bad_request(f"{name.decode('ascii')} is not allowed as a trailer (RFC 9110 §6.5.1)")


def refusal_of(error: h11.RemoteProtocolError) -> RequestRefused:
    """The refusal that h11's complaint about a client's bytes amounts to: 431, 501, or 400."""
    if error.error_status_hint == 431:
        return RequestRefused(431, "headers_too_large", "the request's head is too large")
    return RequestRefused(error.error_status_hint, "bad_request", f"not a valid HTTP/1.1 request: {str(error)[:200]}")


def _check_framing(fields: list[tuple[bytes, bytes]], *, is_http10: bool) -> None:
    """Allow one way to tell the body's length, written in one way; `fields` is as received."""
    has_length = has_coding = False
    for name, value in fields:
        value = value.strip(b" \t")
        if b"_" in name:
            raise _bad_request(f"{name.decode('ascii')} could be taken for the field with a hyphen; remove it")
        if name[0] in b"cC":
            if has_length or _LENGTH.fullmatch(value) is None:
                raise _bad_request("Content-Length must be one decimal number, given once (RFC 9112 §6.3)")
            has_length = True
        else:
            if has_coding:
                raise _bad_request("Transfer-Encoding must be given once (RFC 9112 §6.1)")
            has_coding = True
            _check_codings(value.lower())
    if has_coding and has_length:
        raise _bad_request("Content-Length and Transfer-Encoding exclude each other (RFC 9112 §6.1)")
    if has_coding and is_http10:
        raise _bad_request("HTTP/1.0 has no Transfer-Encoding (RFC 9112 §6.1)")


def _check_codings(value: bytes) -> None:
    if value == b"chunked":
        return
    codings = [coding.strip(b" \t") for coding in value.split(b",")]
    if codings[-1] != b"chunked" or codings.count(b"chunked") > 1:
        raise _bad_request("Transfer-Encoding must end in chunked, applied once (RFC 9112 §6.1)")
    raise RequestRefused(501, "bad_request", "no transfer coding besides chunked is supported (RFC 9112 §6.1)")


def _from_absolute_form(method: bytes, target: bytes) -> Destination:
    match = _ABSOLUTE_FORM.fullmatch(target)
    if match is None:
        raise _bad_request("the request target must be a path or an http URL (RFC 9112 §3.2)")
    host, rest = match.groups()
    if _HOST.fullmatch(host) is None:
        raise _bad_request("the request target's authority is not a host and optional port (RFC 9110 §4.2)")
    if not rest and method == b"OPTIONS":
        return Destination(b"*", host)  # RFC 9112 §3.2.4
    return Destination(rest if rest.startswith(b"/") else b"/" + rest, host)


def _what_is_wrong(head: bytes) -> RequestRefused:
    """Name the fault of a head that is outside the grammar. Off the ordinary path: clear before quick."""
    if _BARE_LF.search(head) is not None:
        return _bad_request("a line of the head ends in LF alone; lines end in CR LF (RFC 9112 §2.2)")
    if _BARE_CR.search(head) is not None:
        return _bad_request("the head has a CR that does not end a line (RFC 9112 §2.2)")
    request_line, *fields = head.removesuffix(b"\r\n\r\n").split(b"\r\n")
    version = _ANY_VERSION.fullmatch(request_line)
    if version is not None and version[1] not in (b"1.0", b"1.1"):
        return RequestRefused(505, "bad_request", "this server speaks HTTP/1.1 and HTTP/1.0")
    for field in fields:
        name, colon, value = field.partition(b":")
        if field[:1] in (b" ", b"\t"):
            return _bad_request("a header field is folded over two lines (RFC 9112 §5.2)")
        if not colon or _FIELD_NAME.fullmatch(name) is None:
            return _bad_request("a line of the head is not a field name, a colon and a value (RFC 9112 §5)")
        if _FIELD_VALUE.fullmatch(value) is None:
            return _bad_request(f"the value of {name.decode('ascii')[:60]} has a control character (RFC 9110 §5.5)")
    return _bad_request("the request line is not a method, a target and a version (RFC 9112 §3)")


def _line_too_long(limit: int) -> RequestRefused:
    return RequestRefused(414, "bad_request", f"the request line exceeds {limit} bytes")


def _bad_request(message: str) -> RequestRefused:
    return RequestRefused(400, "bad_request", message)
