"""What goes back to a client: heads, its socket's pace, error answers and error frames."""

from __future__ import annotations

import time
from contextlib import suppress
from email.utils import formatdate
from random import getrandbits
from typing import Final

import trio

from relay.core import dialect, headers
from relay.core.auth import CHALLENGE
from relay.core.frames import COMMENT, COMMENT_CHUNK
from relay.core.preface import Preface
from relay.core.request import Route
from relay.core.request_head import Request
from relay.core.timeline import Timeline, make_record, preface, server_timing
from relay.errors import ClientGone, ClientStalled, ExchangeError, OutOfResources, Phase, UpstreamAnswered
from relay.net import sockets
from relay.net.downstream import ClientConnection
from relay.net.fiber import in_task
from relay.net.service import Service

#: How long a client may take for an error answer or frame before the connection is closed all the same.
FAREWELL_S: Final = 2.0

_JSON: Final = (b"content-type", b"application/json")
#: How the head of a stream begins that no engine has begun yet.
_EARLY: Final = headers.head_start(200, b"", [], event_stream=True)
#: Stands for what is not known yet; in no value of a head, as those lose their control bytes.
_TO_COME: Final = b"\0"


class Reply:
    """The client's side of one exchange, from the first byte of the answer to the last."""

    def __init__(self, service: Service, client: ClientConnection, request: Request, request_id: str) -> None:
        self.service = service
        self.client = client
        self.request = request
        self.route = request.head.route
        self.id = request_id
        self.timeline = Timeline(request_started=client.request_started, request_read=time.monotonic())
        self.keep_alive = request.head.is_keep_alive
        self.takes_chunks = request.head.version >= b"1.1"
        self.status: int | None = None  #: what the client was told; None: nothing yet
        self.is_stream = False
        self.is_early = False  #: the head of a stream has gone out, and nothing yet of an engine
        self.is_torn = False  #: the client holds half a frame, so that nothing can be said behind it
        self.bytes_out = 0
        self._unsent = b""  # of the last comment, what the client's socket did not take
        self._is_blocked = False  # `send` is in the middle of something, or was when it was cancelled

    def __repr__(self) -> str:
        return f"<Reply {self.id} status={self.status} bytes={self.bytes_out}>"

    @property
    def is_committed(self) -> bool:
        """Whether the client has been given an answer, or some of it: there is no other any more."""
        return self.status is not None and not self.is_early

    def head(self, status: int, reason: bytes, fields: headers.Headers, framing: headers.Framing) -> bytes:
        """The head of an answer, with what the relay adds to it."""
        return self.head_from(headers.head_start(status, reason, fields), framing, headers.find(fields, b"date"))

    def head_from(self, start: headers.HeadStart, framing: headers.Framing, date: bytes | None = None) -> bytes:
        """The same, where its beginning is known; `date`: the engine's."""
        timing = b"" if self.is_early else server_timing(self.timeline, time.monotonic())
        return self._head(start, framing, date, timing)

    def preface(self, start: headers.HeadStart, framing: headers.Framing, date: bytes | None) -> Preface:
        """The same for an answer that is waited for.

        One made before draining began promises keep-alive: `Service.drain` takes it back.
        """
        before, _, after = self._head(start, framing, date, _TO_COME).partition(_TO_COME)
        return preface(self.timeline, before, after)

    def _head(self, start: headers.HeadStart, framing: headers.Framing, date: bytes | None, timing: bytes) -> bytes:
        return headers.response_head(
            start,
            framing=framing,
            keep_alive=self.keep_alive and not self.service.is_draining,
            date=date or _http_date(),
            request_id=self.id,
            server_timing=timing,
        )

    async def send(self, data: bytes) -> None:
        """Sends to the client, within ``client_stall_s`` for each piece its socket takes.

        Raises ClientGone, ClientStalled or OutOfResources.
        """
        phase = Phase.HEAD if self.status is None else Phase.DATA
        stall_s = self.service.config.timeouts.client_stall_s or float("inf")
        view = memoryview(self._unsent + data if self._unsent else data)
        self._unsent = b""
        while view:
            try:
                sent = self.client.sock.send(view)
            except BlockingIOError:
                sent = 0
            except OSError as exc:
                message = "the client closed its connection"
                raise sockets.shortage(exc, phase) or ClientGone(message, phase=phase) from None
            self.bytes_out += sent
            view = view[sent:]
            if view:
                self._is_blocked = True
                async with in_task():
                    with trio.move_on_after(stall_s) as limit:
                        await trio.lowlevel.wait_writable(self.client.sock)
                if limit.cancelled_caught:
                    message = f"the client read nothing for client_stall_s = {stall_s:g} s"
                    raise ClientStalled(message, phase=phase)
                self._is_blocked = False

    def comment(self) -> bool:
        """A comment for a client that waits for a stream, behind the head of one; False: the client is gone.

        Never waits: what its socket does not take goes out before whatever comes next, and until then no other does.
        """
        if self._unsent or self._is_blocked:
            return True
        data = COMMENT_CHUNK if self.takes_chunks else COMMENT
        if not self.is_early:
            self.is_early = self.is_stream = True
            self.status = 200
            data = self.head_from(_EARLY, "chunked" if self.takes_chunks else "close") + data
        try:
            sent = self.client.sock.send(data)
        except BlockingIOError:
            sent = 0
        except OSError as exc:
            if exc.errno not in sockets.SHORTAGES:
                return False
            sent = 0
        self.bytes_out += sent
        self._unsent = data[sent:]
        return True

    async def answer(self, status: int, body: bytes, *fields: tuple[bytes, bytes]) -> None:
        """Sends a whole JSON answer of the relay's own."""
        self.status = status
        head = self.head(status, b"", [_JSON, *fields], len(body))
        await self.send(head if self.request.head.method == b"HEAD" else head + body)

    async def pass_on(self, status: int, fields: headers.Headers, body: bytes) -> None:
        """Sends an engine's answer that was read whole.

        Raises UpstreamAnswered where the client has the head of a stream: what is said instead is `farewell`'s.
        """
        if self.is_early:
            raise refusal(status, fields, body, phase=Phase.PREFILL)
        self.status = status
        head = self.head(status, b"", fields, len(body))
        await self.send(head if self.request.head.method == b"HEAD" else head + body)

    async def farewell(self, failure: ExchangeError) -> None:
        """Tells the client what happened, where anything can still be said; the connection is then to be closed.

        The caller shields it, and bounds it by `FAREWELL_S`.
        """
        self.keep_alive = self.is_early = False
        if isinstance(failure, ClientGone):
            return
        with suppress(ClientGone, OutOfResources):
            if self.status is None and isinstance(failure, UpstreamAnswered):
                await self.pass_on(failure.status, failure.fields, failure.body)
            elif self.status is None:
                body = dialect.error_body(self.route, failure.status, failure.code, failure.message)
                await self.answer(failure.status, body, *_fields_of(failure))
            elif self.is_stream and not self.is_torn:
                frame = _error_frame(self.route, failure)
                await self.send(b"%x\r\n%b\r\n" % (len(frame), frame) if self.takes_chunks else frame)


def refusal(status: int, fields: headers.Headers, body: bytes, *, phase: Phase) -> UpstreamAnswered:
    """An engine's answer that would have gone to the client as it is, had that not been promised a stream."""
    if headers.is_encoded(fields):
        body = b""  # nothing that could be said in a frame
    who = "prefiller" if phase is Phase.PREFILL else "engine"
    failure = UpstreamAnswered(f"the {who} answered {status}", phase=phase, status=status, fields=fields, body=body)
    failure.may_retry = False
    return failure


def _error_frame(route: Route, failure: ExchangeError) -> bytes:
    if isinstance(failure, UpstreamAnswered):
        return dialect.refusal_frame(route, failure.status, failure.code, failure.message, failure.body)
    return dialect.error_frame(route, failure.status, failure.code, failure.message)


def _fields_of(failure: ExchangeError) -> list[tuple[bytes, bytes]]:
    """What an error answer's head holds beside its type."""
    fields = []
    if failure.retry_after_s is not None:
        fields.append((b"retry-after", b"%d" % failure.retry_after_s))
    if failure.status == 401:
        fields.append(CHALLENGE)
    if failure.status == 405:
        fields.append((b"allow", b"GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS"))  # RFC 9110 §15.5.6
    return fields


async def refuse(service: Service, client: ClientConnection, failure: ExchangeError) -> None:
    """Answers a request that could not be read, or was not let in, and records it."""
    request = client.refused
    client.release()
    request_id = (request and request.id) or new_id()
    bytes_out = 0
    if not isinstance(failure, ClientGone):
        route = request.head.route if request else Route.OTHER
        body = dialect.error_body(route, failure.status, failure.code, failure.message)
        head = headers.response_head(
            headers.head_start(failure.status, b"", [_JSON, *_fields_of(failure)]),
            framing=len(body),
            keep_alive=False,
            date=_http_date(),
            request_id=request_id,
        )
        data = head if request and request.head.method == b"HEAD" else head + body
        with trio.move_on_after(FAREWELL_S), suppress(OSError):
            await sockets.send_all(client.sock, data)
            bytes_out = len(data)
    service.tally.refused(failure, bytes_out)
    if service.write_record is None:
        return
    timeline = None
    if request is not None:  # which began when its first byte came
        timeline = Timeline(client.request_started, time.monotonic())
        timeline.ended = time.monotonic()
    service.write_record(
        make_record(
            now=time.time(),
            id=request_id,
            client=client.peer,
            key=request.key if request else None,
            method=request.head.method.decode("ascii") if request else None,
            path=request.path if request else None,
            status=failure.status,
            outcome=failure.outcome,
            bytes_out=bytes_out,
            error=failure.message,
            timeline=timeline,
        )
    )


def new_id() -> str:
    """A request id for a client that sent none."""
    return f"{getrandbits(128):032x}"  # unique, not secret: a name for finding things in logs


_date = (0, b"")


def _http_date() -> bytes:
    """The ``Date`` of this second (RFC 9110 §6.6.1)."""
    global _date
    now = int(time.time())
    if _date[0] != now:
        _date = (now, formatdate(now, usegmt=True).encode("ascii"))
    return _date[1]
