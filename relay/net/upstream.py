"""Asking an engine: a request out, the head of its answer in, and the rest of the bytes handed over raw.

h11 parses the head of the answer, in a fresh `h11.Connection` per exchange; one that is the same as one before, but for
its date, length and id, is not parsed again. The request's head was written by `relay.core.headers`, so h11 is only
told that one went out.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Final, Protocol

import h11
import trio

from relay.core import headers
from relay.core.answer_head import AnswerHead
from relay.core.framing import BodyDecoder, Buffer, FramingError, decoder_for
from relay.errors import Phase, UpstreamDisconnected, UpstreamProtocolError, UpstreamTimeout
from relay.net import sockets, tls
from relay.net.pool import UpstreamConnection
from relay.net.sockets import READ_BYTES

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from relay.net.pair import Pair

#: Largest head of an answer, with the interim ones before it, and most fields of one: what `strict` allows requests.
MAX_ANSWER_HEAD_BYTES: Final = 65536
MAX_ANSWER_FIELDS: Final = 256
#: Most interim answers before the final one. Engines send a 100 or a 103, if any (Go's `net/http` reads five).
MOST_INTERIM: Final = 16
#: Up to this size head and body leave in one write.
_JOIN_BYTES: Final = 65536

_REQUEST: Final = h11.Request(method=b"GET", target=b"/", headers=[(b"host", b"-")])
_END: Final = h11.EndOfMessage()
_INTERIM: Final = (b"HTTP/1.1 1", b"HTTP/1.0 1")
_HEAD_END: Final = b"\r\n\r\n"


class Answer:
    """The head of an engine's answer, and what came behind it."""

    __slots__ = ("decoder", "fields", "head", "is_reusable", "kind", "reason", "rest", "status")

    def __init__(self, head: AnswerHead, fields: headers.Headers, rest: bytes, *, is_request_sent: bool) -> None:
        self.head = head  #: shared with others that began alike
        self.status = head.status
        self.reason = head.reason
        self.fields = fields  #: perhaps shared, too: not to be changed, but replaced
        self.kind = head.kind
        self.rest = rest  #: bytes of the body that came with the head
        self.decoder: BodyDecoder = decoder_for(head.kind, fields)
        #: whether, after its body, the connection can carry another exchange
        self.is_reusable = is_request_sent and head.is_keep_alive

    def __repr__(self) -> str:
        return f"<Answer {self.status} {self.kind.value}>"

    @property
    def length(self) -> int:
        """``Content-Length``, where the body has one."""
        return int(headers.find(self.fields, b"content-length") or 0)


class Waits(Protocol):
    """Who waits for the engine's socket: the exchange's `Pair`, or a leg beside it."""

    def wait_upstream(self, *, or_writable: bool = False) -> Awaitable[None]:
        """Sleeps until the engine's socket can be read, or also written."""
        ...


class ConnectionDied(UpstreamDisconnected):
    """The connection ended before a single byte of an answer: on a reused one, the engine may just have closed it.

    So the request is sent again. RFC 9110 §9.2.2 has a proxy not do so with a POST, as it might be applied twice; of
    what engines do with one, the worst is an answer generated for nobody.
    """


async def ask(
    pair: Waits,
    connection: UpstreamConnection,
    method: bytes,
    head: bytes,
    body: Buffer,
    meanwhile: Callable[[], None] | None = None,
) -> tuple[Answer, list[h11.InformationalResponse]]:
    """Sends a request and waits for the head of the final answer; also the interim ones that came before it.

    `meanwhile` is called when the request has gone out, or as much of it as the engine took. Raises ConnectionDied,
    UpstreamDisconnected, UpstreamProtocolError or OutOfResources. Limits are the caller's.
    """
    is_sent, data = await _send(pair, connection, head, body)
    if meanwhile is not None:
        meanwhile()
    try:
        if not data:
            await pair.wait_upstream()  # no engine has answered by now, so trying first would fail
            data = await receive(pair, connection)
    except UpstreamDisconnected as exc:
        raise ConnectionDied(exc.message, phase=Phase.HEAD) from None
    if not data:
        raise ConnectionDied("the engine closed the connection before its answer", phase=Phase.HEAD)
    while len(data) < len(_INTERIM[0]) and (more := await receive(pair, connection)):
        data += more  # at the engine's end, `_read_head` says what is wrong
    heads = connection.upstream.heads
    size = data.find(_HEAD_END) + len(_HEAD_END)
    known = heads.find(data[:size]) if method != b"HEAD" else None  # whose answers' bodies are framed otherwise
    if known is not None:
        return Answer(*known, data[size:], is_request_sent=is_sent), []
    interim: list[h11.InformationalResponse] = []
    try:
        event, rest = await _read_head(pair, connection, data, interim)
        answer_head = AnswerHead(method, event)
    except (h11.RemoteProtocolError, FramingError) as exc:
        raise UpstreamProtocolError(f"the engine's answer is not HTTP/1.1: {exc}", phase=Phase.HEAD) from None
    is_all = not data.startswith(_INTERIM) and data[size:] == rest  # the first head is the answer's, and came whole
    if is_all and size > len(_HEAD_END) and method != b"HEAD":
        heads.remember(data[:size], answer_head)
    return Answer(answer_head, answer_head.fields, rest, is_request_sent=is_sent), interim


async def _read_head(
    pair: Waits, connection: UpstreamConnection, data: bytes, interim: list[h11.InformationalResponse]
) -> tuple[h11.Response, bytes]:
    """The final answer's head, of which `data` has come, and the bytes behind it; `interim` takes those before it."""
    parser = h11.Connection(h11.CLIENT, max_incomplete_event_size=MAX_ANSWER_HEAD_BYTES)
    if data.startswith(_INTERIM):
        # h11 takes a final answer before any request, but interim ones only behind one.
        parser.send(_REQUEST)
        parser.send(_END)
    count, received = 0, len(data)
    parser.receive_data(data)
    while True:
        event = parser.next_event()
        if isinstance(event, h11.Response):
            rest = bytes(parser.trailing_data[0])
            _check_head(event, received - len(rest))
            return event, rest
        if isinstance(event, h11.InformationalResponse):
            count += 1
            if count > MOST_INTERIM:
                message = f"the engine sent more than {MOST_INTERIM} interim answers"
                raise UpstreamProtocolError(message, phase=Phase.HEAD)
            if event.status_code != 100:  # nobody asked the engine for that one
                interim.append(event)
        else:
            data = await receive(pair, connection)
            if not data:
                raise UpstreamDisconnected("the engine closed the connection before its answer", phase=Phase.HEAD)
            received += len(data)
            parser.receive_data(data)


def _check_head(event: h11.Response, size: int) -> None:
    """Raises UpstreamProtocolError for what h11 lets pass: other major versions, and heads beyond the limits.

    Its own limit is one of what it has to keep of an unfinished head: one that the next read finishes is longer.
    """
    if not event.http_version.startswith(b"1."):
        message = f"the engine's answer is not HTTP/1.1 but HTTP/{event.http_version.decode('ascii')}"
        raise UpstreamProtocolError(message, phase=Phase.HEAD)
    if size > MAX_ANSWER_HEAD_BYTES or len(event.headers) > MAX_ANSWER_FIELDS:
        message = (
            f"the head of the engine's answer has over {MAX_ANSWER_HEAD_BYTES} bytes or {MAX_ANSWER_FIELDS} fields"
        )
        raise UpstreamProtocolError(message, phase=Phase.HEAD)


async def receive(pair: Waits, connection: UpstreamConnection, phase: Phase = Phase.HEAD) -> bytes:
    """The next bytes from the engine; empty at its end. Raises UpstreamDisconnected or OutOfResources."""
    source = connection.source
    while True:
        try:
            data = sockets.read(connection.sock)
            if source is not None:
                source.took(len(data), READ_BYTES)
            return data
        except BlockingIOError:
            if source is not None:
                source.has_news = False
            await pair.wait_upstream()
        except OSError as exc:
            message = f"the engine's connection broke: {tls.reason_of(exc)}"
            raise sockets.shortage(exc, phase) or UpstreamDisconnected(message, phase=phase) from None


async def receive_next(pair: Pair, connection: UpstreamConnection, limit_s: float, phase: Phase) -> bytes:
    """As `receive`, after other tasks' turn also where bytes wait already.

    Raises UpstreamTimeout after `limit_s` of silence (``between_tokens_s``; 0: no limit).
    """
    pair.limit(limit_s)
    try:
        await pair.wait_upstream()
        return await receive(pair, connection, phase)
    except trio.TooSlowError:
        message = f"the engine was silent for between_tokens_s = {limit_s:g} s"
        raise UpstreamTimeout(message, phase=phase) from None


async def _send(pair: Waits, connection: UpstreamConnection, head: bytes, body: Buffer) -> tuple[bool, bytes]:
    """Sends the request; False where the engine answered, or hung up, before it had read all of it.

    And what has come from it meanwhile: interim answers stop nothing.
    """
    sock, early = connection.sock, b""
    parts = [head + body] if len(body) < _JOIN_BYTES else [head, body]
    for part in parts:
        left: Buffer | memoryview = part
        while left:
            try:
                sent = sock.send(left)
                left = memoryview(left)[sent:] if sent < len(left) else b""
            except BlockingIOError:
                await pair.wait_upstream(or_writable=True)
                if not connection.is_silent():
                    try:
                        data = await receive(pair, connection)
                    except UpstreamDisconnected:
                        return False, early
                    early += data
                    if not data or not _is_interim(early):
                        return False, early
            except OSError as exc:
                if exc.errno in (errno.EPIPE, errno.ECONNRESET):
                    return False, early  # an answer may have come before; reading tells
                message = f"sending to the engine failed: {tls.reason_of(exc)}"
                raise sockets.shortage(exc, Phase.HEAD) or UpstreamDisconnected(message, phase=Phase.HEAD) from None
    return True, early


def _is_interim(data: bytes) -> bool:
    """Whether all that has come are interim answers, the last of them perhaps in part, and not too much of them."""
    rest = data
    while rest.startswith(_INTERIM):
        _, _, rest = rest.partition(_HEAD_END)
    is_begun = any(each.startswith(rest) for each in _INTERIM)
    return is_begun and len(data) <= MAX_ANSWER_HEAD_BYTES
