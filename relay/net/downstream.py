"""A client's connection: requests in, one after the other, and what its socket needs around an answer.

Heads are read by `relay.core.request_head`. Bytes behind a request stay here for the next, so pipelined requests are
answered in order. Answers are written by the exchange, head and body, as their framing is decided there.
"""

from __future__ import annotations

import math
import socket
import ssl
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from typing import TYPE_CHECKING, Final, Protocol

import trio

from relay.config import LimitsConfig, TimeoutsConfig
from relay.core import strict
from relay.core.framing import ChunkDecoder, decode_into
from relay.core.request_head import HeadReader, KnownHead, Request, RequestHead
from relay.errors import ClientGone, ExchangeError, Phase, RequestRefused, RequestTimeout
from relay.net import sockets, tls
from relay.net.budget import BodyBudget
from relay.net.fiber import in_task
from relay.net.source import Source

if TYPE_CHECKING:
    from relay.core.auth import Substitution

#: After an answer to a request not read to its end: how long, and how much, is read and dropped so that the answer is
#: not lost to a reset (RFC 9112 §9.6; nginx's lingering_timeout).
LINGER_S: Final = 5.0
LINGER_BYTES: Final = 16_777_216

#: How often those who wait for room in the budget of bodies are looked at, seconds: they may have left.
ROOM_LOOK_S: Final = 0.25

#: Of the connections that wait one in so many makes room, and no more than that many at a time (nginx's numbers).
_ROOM_SHARE: Final = 8
_MOST_LEAVING: Final = 32

_CONTINUE: Final = b"HTTP/1.1 100 Continue\r\n\r\n"
_EMPTY_LINE: Final = b"\r\n"


class Visit(Protocol):
    """What a request that is let in holds until it has ended."""

    def end(self) -> None:
        """It has."""
        ...


#: Judges a request by its head, and notes the name of its key; None: there is nothing to end. Raises RequestRefused.
Admit = Callable[[Request], Visit | None]


class ClientConnection:
    """A client's connection. `next_request` until it answers None or raises; then `close` or `linger`."""

    def __init__(
        self,
        source: Source,
        peer: str,
        timeouts: TimeoutsConfig,
        limits: LimitsConfig,
        budget: BodyBudget,
        heads: HeadReader,
        admit: Admit = lambda request: None,
    ) -> None:
        self._heads = heads
        self._last_head: KnownHead | None = None  # which the next is likely to resemble
        self._admit = admit
        self.source = source
        self.sock = source.sock
        self.peer = peer  #: the client's address, without port
        self.timeouts = timeouts
        self.limits = limits
        self.refused: Request | None = None  #: what `next_request` has raised for, if its head was right
        self.request_started = 0.0  #: when the current request's first byte came (monotonic clock)
        self.is_waiting = False  #: between two requests, or in a TLS handshake
        self.is_torn = False  #: the last answer did not come to its end
        #: what `headers.passed_fields` made for the last request, behind the head and the rules it was made of
        self.passed_fields: tuple[RequestHead, Substitution, bytes] | None = None
        self._tls = self.sock if isinstance(self.sock, tls.TlsSocket) else None
        self._budget = budget
        self._held = 0
        self._room_ns = 0  # waited for the budget by the present body
        self._visit: Visit | None = None
        self._buffer = bytearray()
        #: what the connection's task runs in; cancelled by draining and a client's hang-up
        self.scope = trio.CancelScope()
        self._limit_s = 0.0
        self._limit_at_ns: int | None = None  # None: nothing has been waited for yet

    def __repr__(self) -> str:
        return f"<ClientConnection {self.peer} {'waiting' if self.is_waiting else 'busy'}>"

    @property
    def ip(self) -> str:
        """`peer` where it is an address; empty for a Unix socket."""
        return self.peer if self.sock.family != socket.AF_UNIX else ""

    @property
    def scheme(self) -> bytes:
        """Of the URLs that the client asks for."""
        return b"http" if self._tls is None else b"https"

    @property
    def has_unread(self) -> bool:
        """Whether the client has sent bytes nobody has read: closing now would reset, and could lose an answer.

        An empty line is none of these: no request may ever follow.
        """
        if not _EMPTY_LINE.startswith(self._buffer):
            return True
        try:
            return bool(self.sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
        except OSError:
            return False

    def stop_waiting(self) -> bool:
        """Ends the connection, if it is between two requests and nothing of the next has come; whether it does."""
        if not self.is_waiting or self.scope.cancel_called or self.has_unread:
            return False
        self.scope.cancel()
        return True

    async def begin(self) -> bool:
        """Shakes hands with a client that is to speak TLS, within ``client_head_s``; False where it has left.

        Raises RequestRefused where it speaks plain HTTP, ClientGone where the handshake fails.
        """
        self.is_waiting = True
        self._limit_waits(self.timeouts.client_head_s)
        try:
            if self._tls is not None:
                await self._shake_hands(self._tls)
        except trio.TooSlowError:
            return False
        except ssl.SSLError as exc:
            if tls.has_left(exc):
                return False
            if exc.reason == "HTTP_REQUEST":
                self._speak_plainly()
                raise RequestRefused(400, "bad_request", "this port speaks TLS; write https:// in the URL") from None
            message = f"the TLS handshake failed: {tls.reason_of(exc)}"
            raise ClientGone(message, phase=Phase.REQUEST) from None
        except OSError:
            return False
        return True

    async def _shake_hands(self, sock: tls.TlsSocket) -> None:
        while True:
            try:
                sock.do_handshake()
                return
            except ssl.SSLWantReadError:
                self.source.has_news = False
                await self.source.wait_readable(self._limit_now())
            except ssl.SSLWantWriteError:
                await self.source.wait_writable(self._limit_now())

    def _speak_plainly(self) -> None:
        """Has the client understand the answer."""
        self.source.sock = self.sock = socket.socket(fileno=self.sock.detach())
        self.sock.setblocking(False)
        self._tls = None

    async def next_request(self) -> Request | None:
        """The next request; None when the client is done or has idled too long.

        Raises RequestRefused, RequestTimeout or ClientGone; the connection can then take one answer and no more.
        The body counts against the worker's budget, and the request against its key's limits, until `release`.
        """
        timeouts, limits, buffer = self.timeouts, self.limits, self._buffer
        if buffer:
            await trio.lowlevel.checkpoint()  # whoever pipelines has no turn but its own
        self.is_waiting = True
        self._limit_waits(timeouts.client_idle_s)
        # One empty line before a request is ignored (RFC 9112 §2.2); alone, it is no beginning of one.
        try:
            while not buffer or _EMPTY_LINE.startswith(buffer):
                if not await self._more():
                    return None
        except trio.TooSlowError:
            return None
        self.is_waiting = False
        if skipped := strict.leading_crlf(buffer):
            del buffer[:skipped]
        self.request_started = time.monotonic()
        try:
            end = strict.head_end(buffer, max_head_bytes=limits.max_head_bytes) or await self._head_end()
            raw = bytes(buffer[:end])
            del buffer[:end]
            read = self._heads.read(raw, limits.max_head_bytes, self._last_head)
            head, fields, length, request_id, self._last_head = read
            request = Request(head, fields, request_id, has_body=head.is_chunked or length is not None)
            self.refused = request  # until it is read whole
            self._visit = self._admit(request)
            # All of it has come and nothing behind it, as mostly: no coroutine is needed.
            if length and length == len(buffer) <= limits.max_body_bytes and self._budget.take_now(length):
                self._held += length
                request.body = bytes(buffer)
                buffer.clear()
            elif request.has_body:
                self._limit_waits(timeouts.client_body_s)
                self._room_ns = 0
                if length is not None and length > limits.max_body_bytes:
                    raise _too_large(limits.max_body_bytes)
                if head.expects_continue and not buffer:
                    await self._send_continue()
                if length is not None:
                    await self._body_of_length(request, length)
                else:
                    await self._chunked_body(request)
        except trio.TooSlowError:
            raise RequestTimeout("the request did not arrive in time", phase=Phase.REQUEST) from None
        self.refused = None
        return request

    def release(self) -> None:
        """The current request has ended: neither its body nor its key's part is held any longer."""
        if self._visit is not None:
            self._visit.end()
            self._visit = None
        if self._held:
            self._budget.give_back(self._held)
            self._held = 0

    def close(self) -> None:
        """Closes at once."""
        self.release()
        self._say_goodbye()
        self.source.close()

    def _say_goodbye(self) -> None:
        """Tells a TLS client that it has got everything; one that has not sees a truncation (RFC 8446 §6.1)."""
        if self._tls is not None and not self.is_torn:
            with suppress(OSError, ValueError):  # its own goodbye has not come, nor is it waited for
                self._tls.unwrap()

    async def linger(self) -> None:
        """Says that no more comes, and reads on, so that an answer already sent is not lost to a reset; then `close`.

        The caller bounds it by `LINGER_S`.
        """
        self._buffer.clear()  # many may linger at once, and nobody reads what has come
        self._say_goodbye()
        try:
            self.sock.shutdown(socket.SHUT_WR)  # and TLS is over: what comes is dropped as it is
            left = LINGER_BYTES
            while left > 0 and (size := await sockets.skip(self.sock)):
                left -= size
        except OSError:
            pass  # it is gone, and with it the need

    def _limit_waits(self, limit_s: float) -> None:
        """Begins a phase of `limit_s` seconds, 0 for no limit. Its clock starts where it first waits."""
        self._limit_s = limit_s
        self._limit_at_ns = None

    def _limit_now(self) -> int:
        """When the phase ends, whose clock starts at the latest now; 0: never."""
        if self._limit_at_ns is None:
            self._limit_at_ns = time.monotonic_ns() + int(self._limit_s * 1e9) if self._limit_s else 0
        return self._limit_at_ns

    async def _more(self) -> bool:
        """Reads on; False at the client's end. Raises trio.TooSlowError at the end of the phase's time."""
        source = self.source
        limit_at_ns = self._limit_now()
        while True:
            await source.wait_readable(limit_at_ns)
            try:
                size = sockets.read_onto(self._buffer, self.sock)
            except BlockingIOError:
                source.has_news = False
            except OSError:
                return False
            else:
                source.took(size, sockets.READ_BYTES)
                return size > 0

    async def _head_end(self) -> int:
        """The end of the next head, of which some has come. Raises ClientGone, RequestRefused or trio.TooSlowError."""
        buffer, end = self._buffer, 0
        self._limit_waits(self.timeouts.client_head_s)
        while not end:
            searched = len(buffer)
            if not await self._more():
                raise ClientGone("the client left in the middle of a request's head", phase=Phase.REQUEST)
            end = strict.head_end(buffer, searched, max_head_bytes=self.limits.max_head_bytes)
        return end

    async def _body_of_length(self, request: Request, length: int) -> None:
        """A body of ``Content-Length``, which `strict` has made sure is one number."""
        buffer = self._buffer
        while True:
            # What has come, not what is announced: a client that sends nothing must not take the others' room.
            arrived = min(len(buffer), length)
            if arrived > self._held:
                await self._hold(arrived - self._held, is_half_read=arrived < length)
            if arrived == length:
                break
            if not await self._more():
                raise ClientGone("the client left in the middle of a request's body", phase=Phase.REQUEST)
        request.body = bytes(memoryview(buffer)[:length]) if length < len(buffer) else bytes(buffer)
        del buffer[:length]

    async def _chunked_body(self, request: Request) -> None:
        """A chunked body, read by the decoder that reads engines' bodies: h11 takes bare LF and folded trailers."""
        limit = self.limits.max_body_bytes
        decoder = ChunkDecoder()
        body = bytearray()
        buffer = self._buffer
        while True:
            del buffer[: decode_into(body, decoder, buffer)]
            if decoder.error is not None:
                raise RequestRefused(400, "bad_request", f"the request's body is malformed: {decoder.error}")
            if len(body) > limit:
                raise _too_large(limit)
            if len(body) > self._held:
                await self._hold(len(body) - self._held, is_half_read=not decoder.is_done)
            if decoder.is_done:
                break
            if not await self._more():
                raise ClientGone("the client left in the middle of a request's body", phase=Phase.REQUEST)
        strict.check_trailers(decoder.trailer_names)
        request.body = bytes(body)

    async def _hold(self, size: int, *, is_half_read: bool) -> None:
        """Counts body bytes against the worker's budget; waits for room, up to ``client_body_s`` for all of a body."""
        if not self._budget.take_now(size, held=self._held, is_half_read=is_half_read):
            began_ns = time.monotonic_ns()
            async with in_task():
                with trio.move_on_after(max(0.0, (self._limit_s or math.inf) - self._room_ns / 1e9)) as limit:
                    await self._wait_for_room(size, is_half_read=is_half_read)
            waited_ns = time.monotonic_ns() - began_ns
            self._room_ns += waited_ns
            if self._limit_at_ns:
                self._limit_at_ns += waited_ns  # that others hold too much is not this client's fault: no 408 for it
            if limit.cancelled_caught:
                message = "too many request bodies are waiting to be served; try again"
                raise RequestRefused(503, "no_upstream", message, phase=Phase.QUEUE, retry_after_s=1)
        self._held += size

    async def _wait_for_room(self, size: int, *, is_half_read: bool) -> None:
        """Takes it as soon as there is some. Raises ClientGone where the client leaves meanwhile, and so makes some."""
        is_taken = False
        while not is_taken:
            if self.source.is_ending:
                raise ClientGone("the client left before its request had been read", phase=Phase.QUEUE)
            with trio.move_on_after(ROOM_LOOK_S):
                await self._budget.take(size, held=self._held, is_half_read=is_half_read)
                is_taken = True

    async def _send_continue(self) -> None:
        try:
            async with in_task():
                with trio.fail_after(self.timeouts.client_stall_s or math.inf):
                    await sockets.send_all(self.sock, _CONTINUE)
        except OSError:
            raise ClientGone("the client left before it sent the request's body", phase=Phase.REQUEST) from None


def _too_large(limit: int) -> ExchangeError:
    return RequestRefused(413, "body_too_large", f"the request's body is over {limit} bytes (limits.max_body_bytes)")


def make_room(waiting: Collection[ClientConnection]) -> None:
    """No more may be accepted: some leave that idle between two requests, or before the first, from the first on.

    Else whoever opens connections and says nothing keeps all others out for ``client_idle_s``. nginx does the same
    (``ngx_drain_connections``).
    """
    left = max(1, min(_MOST_LEAVING, len(waiting) // _ROOM_SHARE))
    for client in waiting:
        left -= client.stop_waiting()
        if not left:
            break
