"""Header fields of forwarded messages: lookups, and the two heads the relay writes.

A header section is an ordered list of ``(name, value)`` pairs of bytes, names in lower case, as h11 gives them. No
dictionary: order and repetition mean something (RFC 9110 §5.3), and a dozen pairs are searched as quickly as they are
hashed.

Both heads are written by hand, since constructing and sending an h11 event costs more than the rest of a request
together; and each in two parts, of which the first is the same whenever its sender repeats a head (`passed_fields`,
`head_start`), so that whoever keeps it need not have it written again. What h11 would have checked holds already: every
byte of a request's fields has passed `relay.core.strict.check_raw_head` and h11's parser, its id `good_request_id`
(or it is made of visible characters by the pattern it was found with: `visible_request_id`),
every name of a response has passed h11's parser, and the values of a response lose their control bytes here. What the
relay itself adds is made of text it controls.

What is removed: the fields of RFC 9110 §7.6.1, those of proxy authentication (§11.7: consumed by the proxy they meet),
``Trailer``, since trailers are not forwarded, and what ``Connection`` names. That last rule lets a peer remove fields
on their way (CVE-2022-1388 was one such), so names in `PROTECTED` stay: §7.6.1 forbids to name fields meant for all.
"""

from __future__ import annotations

from http import HTTPStatus
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

#: Field lines in their order; names in lower case, values without surrounding white space.
Headers = list[tuple[bytes, bytes]]

#: How a written head frames its body: that many bytes; chunks; up to the close of the connection; or there is none.
Framing = int | Literal["chunked", "close", "none"]

#: The name in ``Via``.
PSEUDONYM = b"relay"

HOP_BY_HOP = frozenset(
    {
        b"connection",
        b"http2-settings",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authentication-info",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
    }
)

#: Never removed because ``Connection`` names them: routing, framing, credentials, content, tracing, forwarding.
PROTECTED = frozenset(
    {
        b"accept",
        b"accept-encoding",
        b"authorization",
        b"cache-control",
        b"content-encoding",
        b"content-length",
        b"content-type",
        b"cookie",
        b"date",
        b"expect",
        b"forwarded",
        b"host",
        b"retry-after",
        b"set-cookie",
        b"traceparent",
        b"tracestate",
        b"vary",
        b"via",
        b"www-authenticate",
        b"x-api-key",
        b"x-forwarded-for",
        b"x-forwarded-host",
        b"x-forwarded-proto",
        b"x-request-id",
    }
)

_REWRITTEN_IN_REQUEST = HOP_BY_HOP | {
    b"content-length",
    b"expect",  # the relay answers it: 9110 §10.1.1
    b"host",
    b"via",
    b"x-forwarded-for",
    b"x-request-id",
}
_REWRITTEN_AND_ENCODING = _REWRITTEN_IN_REQUEST | {b"accept-encoding"}
_REWRITTEN_IN_RESPONSE = HOP_BY_HOP | {b"content-length", b"date", b"x-request-id"}
_REWRITTEN_IN_STREAM = _REWRITTEN_IN_RESPONSE | {b"x-accel-buffering"}

_PHRASES = {status.value: status.phrase.encode("ascii") for status in HTTPStatus}
_MOST_ID_CHARACTERS = 200
_EVENT_STREAM = b"text/event-stream"

# Control bytes other than HTAB become spaces (RFC 9110 §5.5 asks it for CR, LF and NUL).
_WITHOUT_CONTROLS = bytes(0x20 if (byte < 0x20 and byte != 0x09) or byte == 0x7F else byte for byte in range(256))


def find(headers: Headers, name: bytes) -> bytes | None:
    """The value of the first field called `name` (in lower case)."""
    for found, value in headers:
        if found == name:
            return value
    return None


def is_encoded(headers: Headers) -> bool:
    """Whether a body is not what it says by itself, but compressed, say (RFC 9110 §8.4)."""
    coding = find(headers, b"content-encoding")
    return coding is not None and coding.lower() != b"identity"


def find_all(headers: Headers, name: bytes) -> list[bytes]:
    """The values of all fields called `name` (in lower case), in order."""
    return [value for found, value in headers if found == name]


def has_token(headers: Headers, name: bytes, token: bytes) -> bool:
    """Is `token` (in lower case) a member of the comma-separated list `name` (RFC 9110 §5.6.1)?"""
    for found, value in headers:
        if found == name and token in value.lower():
            members = [member.strip(b" \t") for member in value.lower().split(b",")]
            if token in members:
                return True
    return False


def wants_close(version: bytes, headers: Headers) -> bool:
    """Does the connection end with this message (RFC 9112 §9.3)? Of HTTP/1.0 the relay assumes so always."""
    return version != b"1.1" or has_token(headers, b"connection", b"close")


def content_type(headers: Headers) -> bytes:
    """The media type in lower case, without parameters (RFC 9110 §8.3.1); empty if there is none."""
    return (find(headers, b"content-type") or b"").partition(b";")[0].strip(b" \t").lower()


def is_event_stream(media_type: bytes) -> bool:
    """Is this, from `content_type`, the type of server-sent events?"""
    return media_type == _EVENT_STREAM


def good_request_id(given: bytes) -> str | None:
    """A client's ``X-Request-Id``, if it is 1 to 200 visible ASCII characters; otherwise None."""
    if not given.isascii() or not 1 <= len(given) <= _MOST_ID_CHARACTERS:
        return None
    text = given.decode("ascii")
    return text if text.isprintable() and " " not in text else None


def visible_request_id(given: bytes) -> str | None:
    """The same, where it is known to be of visible ASCII characters."""
    return given.decode("ascii") if 1 <= len(given) <= _MOST_ID_CHARACTERS else None


def passed_fields(
    headers: Headers,
    *,
    version: bytes,
    client_ip: str,
    scheme: bytes,
    original_host: bytes,
    identity: bool = False,
    without: frozenset[bytes] = frozenset(),
    extra: Sequence[tuple[bytes, bytes]] = (),
) -> bytes:
    """Write the field lines of a request that are the same each time the client repeats its head.

    Each begins with CR LF; behind the last there is none.

    `original_host` is the authority the client asked for; `version` is that of its message, for ``Via``. `client_ip`
    may be empty (a Unix socket), and is then not added to ``X-Forwarded-For``. `identity` asks the engine for an
    unencoded answer, whatever the client accepts. Fields named in `without` are left out, those of `extra` added:
    together they replace a credential.

    End-to-end fields keep their values and their order. Members added to lists end up in one field line, after them.
    """
    drop = _REWRITTEN_AND_ENCODING if identity else _REWRITTEN_IN_REQUEST
    if without:
        drop |= without
    drop = _with_nominated(drop, headers)
    via: list[bytes] = []
    forwarded_for: list[bytes] = []
    has_proto = has_host = False
    parts: list[bytes] = []
    for name, value in headers:
        if name in drop:
            if name == b"via":
                via.append(value)
            elif name == b"x-forwarded-for":
                forwarded_for.append(value)
            continue
        if name == b"x-forwarded-proto":
            has_proto = True
        elif name == b"x-forwarded-host":
            has_host = True
        parts += (b"\r\n", name, b": ", value)
    if client_ip:
        forwarded_for.append(client_ip.encode("ascii"))
    via.append(b"%b %b" % (version, PSEUDONYM))
    parts += (b"\r\nvia: ", b", ".join(via))
    if forwarded_for:
        parts += (b"\r\nx-forwarded-for: ", b", ".join(forwarded_for))
    if not has_proto:
        parts += (b"\r\nx-forwarded-proto: ", scheme)
    if not has_host and original_host:
        parts += (b"\r\nx-forwarded-host: ", original_host)
    if identity:
        parts.append(b"\r\naccept-encoding: identity")
    for name, value in extra:
        parts += (b"\r\n", name, b": ", value)
    return b"".join(parts)


def request_head(
    method: bytes, target: bytes, passed: bytes, *, host: bytes, request_id: str, body: int | Literal["none"]
) -> bytes:
    """Write the head of a request on its way to an engine (RFC 9110 §7.6).

    `target` is in origin form (`relay.core.strict.check_request` gives it), `host` the engine's authority, and `passed`
    made by `passed_fields`.
    """
    length = b"" if body == "none" else b"\r\ncontent-length: %d" % body
    own = b"\r\nx-request-id: ", request_id.encode("ascii"), length, b"\r\n\r\n"
    return b"".join((method, b" ", target, b" HTTP/1.1\r\nhost: ", host, passed, *own))


class HeadStart(NamedTuple):
    """The beginning of a response's head: what is the same each time an engine repeats its own."""

    lines: bytes  #: the status line and the fields that are passed on, without the last line end
    length: bytes  #: the engine's ``Content-Length``, but for 1xx and 204, which have none (RFC 9110 §8.6)


def head_start(status: int, reason: bytes, headers: Headers, *, event_stream: bool = False) -> HeadStart:
    """Write the beginning of the head of a response on its way to the client, an engine's or the relay's own.

    `event_stream` says that the body is one, whatever its label: nobody on the way shall buffer or cache it, and a
    wrong media type is put right.

    The engine's ``Date`` is not among the lines, as each answer has its own: `response_head` is told it.

    The version is the relay's own (RFC 9110 §6.2). Values lose their control bytes, so nothing an engine sends can end
    the head.
    """
    drop = _with_nominated(_REWRITTEN_IN_STREAM if event_stream else _REWRITTEN_IN_RESPONSE, headers)
    is_mislabelled = event_stream and not is_event_stream(content_type(headers))
    has_cache_control = False
    length = b""
    parts = [b"HTTP/1.1 %d " % status, _phrase(status, reason)]
    for name, value in headers:
        if name in drop:
            if name == b"content-length" and status >= 200 and status != 204:
                length = value.translate(_WITHOUT_CONTROLS)
            continue
        if name == b"cache-control":
            has_cache_control = True
        elif name == b"content-type" and is_mislabelled:
            continue
        parts += (b"\r\n", name, b": ", value.translate(_WITHOUT_CONTROLS))
    if event_stream:
        if is_mislabelled:
            parts.append(b"\r\ncontent-type: text/event-stream; charset=utf-8")
        if not has_cache_control:
            parts.append(b"\r\ncache-control: no-cache")
        parts.append(b"\r\nx-accel-buffering: no")
    return HeadStart(b"".join(parts), length)


def response_head(
    start: HeadStart,
    *,
    framing: Framing,
    keep_alive: bool,
    date: bytes,
    request_id: str,
    server_timing: bytes = b"",
) -> bytes:
    """Write the head of a response that begins with `start`.

    `framing` decides the framing fields alone: with ``"none"`` (answers to HEAD, 304) the engine's ``Content-Length``
    stays, as it describes what GET would have brought (RFC 9110 §8.6). `date` is the engine's, or the relay's where
    that sent none (§6.6.1).
    """
    parts = [start.lines, b"\r\ndate: ", date.translate(_WITHOUT_CONTROLS)]
    parts += (b"\r\nx-request-id: ", request_id.encode("ascii"))
    if server_timing:
        parts += (b"\r\nserver-timing: ", server_timing)
    if framing == "chunked":
        parts.append(b"\r\ntransfer-encoding: chunked")
    elif framing == "none":
        if start.length:
            parts += (b"\r\ncontent-length: ", start.length)
    elif framing != "close":
        parts.append(b"\r\ncontent-length: %d" % framing)
    if not keep_alive or framing == "close":
        parts.append(b"\r\nconnection: close")
    parts.append(b"\r\n\r\n")
    return b"".join(parts)


def _with_nominated(drop: frozenset[bytes], headers: Headers) -> frozenset[bytes]:
    """`drop`, and what the message's ``Connection`` fields name, less what is protected (RFC 9110 §7.6.1)."""
    for name, value in headers:
        if name == b"connection":
            nominated = {member.strip(b" \t") for member in value.lower().split(b",")}
            drop |= nominated - PROTECTED
    return drop


def _phrase(status: int, reason: bytes) -> bytes:
    """The engine's reason phrase if it is one (RFC 9112 §4), the standard's otherwise."""
    if reason and reason.translate(_WITHOUT_CONTROLS) == reason:
        return reason
    return _PHRASES.get(status, b"")
