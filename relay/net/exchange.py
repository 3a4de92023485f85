"""One request through all its phases: the only module that knows both sides.

An exchange has one task (its client connection's), one `Pair` in the pump, and one cancel scope. The scope is how it is
interrupted, in whatever it waits for: the pump cancels it when the client hangs up, draining when its time is over, and
its deadline is ``total_s``. Up to the commit point, the first byte of an engine's answer, a failure leads to the next
attempt or to an error answer with its true status; after it, to an error frame and a closed connection, never to a clean
end.
"""

from __future__ import annotations

import time
import uuid
from email.utils import formatdate
from typing import Final

import trio

from relay.core import dialect, headers
from relay.core.frames import FrameRelay, Pieces
from relay.core.framing import BodyDecoder, BodyKind, decoder_for
from relay.core.histogram import Histogram
from relay.core.request import Route, peek, route_of
from relay.core.sse import looks_like_event_stream
from relay.core.timeline import Timeline, make_record, server_timing
from relay.errors import (
    NORMAL,
    ClientGone,
    ClientStalled,
    Draining,
    ExchangeError,
    NoUpstream,
    Phase,
    Side,
    UpstreamDisconnected,
    UpstreamProtocolError,
    UpstreamRefused,
    UpstreamTimeout,
)
from relay.net import sockets, upstream
from relay.net.downstream import ClientConnection, Request
from relay.net.pool import Upstream, UpstreamConnection
from relay.net.pump import Pair, Stop
from relay.net.service import Service, local_answer

#: How long a client may take for an error answer or frame before the connection is closed all the same.
FAREWELL_S: Final = 2.0
#: Of a JSON answer, at most this much is kept for its usage.
MOST_METERED_BYTES: Final = 1_048_576


class Opening:
    """An engine's answer up to the commit point: its head, and the first frame where it is an event stream."""

    __slots__ = ("answer", "connection", "first", "relay")

    def __init__(self, connection: UpstreamConnection, answer: upstream.Answer) -> None:
        self.connection = connection
        self.answer = answer
        self.relay: FrameRelay | None = None
        self.first = b""  #: what goes out with the head


class Exchange:
    """One request and its response. `run` once."""

    def __init__(self, service: Service, client: ClientConnection, request: Request) -> None:
        self.service = service
        self.config = service.config
        self.client = client
        self.request = request
        self.route = route_of(request.target)
        self.facts = peek(request.body)
        self.id = headers.request_id(request.headers, _new_id)
        self.timeline = Timeline(request_started=client.request_started, request_read=time.monotonic())
        self.meter = dialect.Meter(self.route)
        self.gaps = Histogram()
        self.phase = Phase.REQUEST
        self.attempts = 0
        self.upstream: Upstream | None = None
        self.status: int | None = None  #: what the client was told; None: nothing yet
        self.is_stream = False
        self.bytes_out = 0
        self.keep_alive = request.is_keep_alive
        self.failure: ExchangeError | None = None
        self.is_complete = False  #: the answer went out to its end
        self.frames = 0
        self._is_cut = False
        self._is_torn = False  # the client holds half a frame: nothing can be said behind it
        self._scope = trio.CancelScope()
        self.pair: Pair

    def __repr__(self) -> str:
        return f"<Exchange {self.id} {self.request.target!r} phase={self.phase.name} status={self.status}>"

    async def run(self) -> bool:
        """Serves the request; True if the client's connection can take another. Writes one record, whatever happens."""
        service = self.service
        service.active.add(self)
        self.pair = service.pump.open(self.client.sock, self._scope.cancel)
        total_s = self.config.timeouts.total_s
        if total_s:
            self._scope.deadline = trio.current_time() + total_s
        try:
            with self._scope:
                try:
                    local = local_answer(service, self.request.target.partition(b"?")[0])
                    if local is None:
                        await self._serve()
                    else:
                        await self._answer_locally(*local)
                    self.is_complete = True
                except ExchangeError as failure:
                    self.failure = failure
            if self._scope.cancelled_caught:
                self.failure = self._interruption()
            if self.failure is not None:
                self.keep_alive = False
                await self._farewell(self.failure)
        finally:
            self.pair.close()
            service.active.discard(self)
            self.client.release()
            self._record()
        return self.keep_alive and not service.is_draining

    def cut(self) -> None:
        """Ends the exchange now: the worker has no more time to drain."""
        self._is_cut = True
        self._scope.cancel()

    async def _answer_locally(self, status: int, body: bytes) -> None:
        self.status = status
        head = self._response_head(status, b"", [(b"content-type", b"application/json")], len(body))
        await self._send(head if self.request.method == b"HEAD" else head + body)

    # -- before the commit point

    async def _serve(self) -> None:
        """Attempt after attempt until one has an answer, then that answer."""
        failover = self.config.failover
        no_more_after = time.monotonic() + failover.budget_s
        tried: list[Upstream] = []
        while True:
            chosen = self.service.pool.pick(tried)
            if chosen is None:
                raise NoUpstream("no engine is configured for this request", phase=Phase.CONNECT, retry_after_s=1)
            tried.append(chosen)
            self.upstream = chosen
            self.attempts += 1
            with chosen.load():
                may_go_on = self.attempts < failover.attempts and self.service.pool.has_other(tried)
                try:
                    opening = await self._attempt(chosen, may_go_on=may_go_on)
                except ExchangeError as failure:
                    if not (failure.may_retry and may_go_on and time.monotonic() < no_more_after):
                        raise
                    continue
                await self._finish(opening)
                return

    async def _attempt(self, chosen: Upstream, *, may_go_on: bool) -> Opening:
        """Asks one engine, and waits until there is something to commit to."""
        self.phase = Phase.CONNECT
        timeouts = self.config.timeouts
        connection = chosen.take_idle(timeouts.upstream_idle_s) or await self._dial(chosen)
        limit_s = timeouts.first_token_s
        try:
            with trio.CancelScope() as limit:
                self.pair.attach(connection.sock)
                self.phase = Phase.HEAD
                limit.deadline = trio.current_time() + (limit_s or float("inf"))
                try:
                    answer = await self._ask(connection)
                except upstream.ConnectionDied:
                    if not connection.is_reused:
                        raise
                    # The engine closed an idle connection just then: no failure of this attempt, so once more.
                    self.pair.detach()
                    connection.close()
                    connection = await self._dial(chosen)
                    self.pair.attach(connection.sock)
                    limit.deadline = trio.current_time() + (limit_s or float("inf"))
                    answer = await self._ask(connection)
                if may_go_on and answer.status in self.config.failover.statuses:
                    raise UpstreamRefused(f"{chosen.config.url} answered {answer.status}", phase=Phase.HEAD)
                opening = Opening(connection, answer)
                if await self._is_event_stream(opening):
                    await self._first_frame(opening)
                return opening
            message = f"{chosen.config.url} sent no token within first_token_s = {limit_s:g} s"
            raise UpstreamTimeout(message, phase=Phase.HEAD)
        except BaseException:
            self.pair.detach()
            connection.close()
            raise

    async def _dial(self, chosen: Upstream) -> UpstreamConnection:
        began = time.monotonic()
        try:
            return await chosen.dial(self.config.timeouts.connect_s)
        finally:
            self.timeline.add_connect(time.monotonic() - began)

    async def _ask(self, connection: UpstreamConnection) -> upstream.Answer:
        request = self.request
        head = headers.request_head(
            request.method,
            request.target,
            request.headers,
            host=connection.upstream.config.authority.encode("ascii"),
            body=len(request.body) if request.body or _has_body(request) else "none",
            version=request.version,
            client_ip=self.client.peer,
            scheme=b"http",
            original_host=request.host,
            request_id=self.id if self.attempts == 1 else f"{self.id}-{self.attempts}",
            identity=self.route is not Route.OTHER,
        )
        self.timeline.request_sent = time.monotonic()
        answer, interim = await upstream.ask(self.pair, connection, request.method, head, request.body)
        self.timeline.head = time.monotonic()
        for event in interim:
            if request.version >= b"1.1":
                await self._send(self._response_head(event.status_code, event.reason, list(event.headers), "none"))
        return answer

    async def _is_event_stream(self, opening: Opening) -> bool:
        """Whether the answer is relayed frame by frame: by its type, or where that lies, by its first bytes."""
        answer = opening.answer
        if answer.kind is BodyKind.NONE:
            return False
        if headers.is_event_stream(headers.content_type(answer.fields)):
            return True
        if not self.facts.wants_stream or self.route is Route.OTHER or answer.status != 200:
            return False
        while (verdict := looks_like_event_stream(_payload(answer))) is None:
            data = await upstream.receive(self.pair, opening.connection)
            if not data:
                return False
            answer.rest += data
        return verdict

    async def _first_frame(self, opening: Opening) -> None:
        """Reads until there is a whole frame to send."""
        answer = opening.answer
        relay = FrameRelay(
            answer.decoder,
            self.meter,
            is_chunked=self.request.version >= b"1.1",
            max_frame_bytes=self.config.stream.max_frame_bytes,
        )
        opening.relay = relay
        out: Pieces = []
        data = answer.rest
        while True:
            buffer = bytearray(data)
            relay.feed(buffer, memoryview(buffer), len(buffer), out)
            if relay.decoder.is_done:
                relay.finish(out)
            if out:
                opening.first = b"".join(out)
                return
            _check_body(relay, Phase.HEAD)
            data = await upstream.receive(self.pair, opening.connection)
            if not data:
                relay.decoder.at_close()
                _check_body(relay, Phase.HEAD)

    # -- after it

    async def _finish(self, opening: Opening) -> None:
        """Commits to an answer, relays it, and parks or closes the engine's connection."""
        connection = opening.connection
        is_clean = False
        try:
            if opening.relay is not None:
                self.is_stream = True
                await self._relay_stream(opening, opening.relay)
            else:
                await self._relay_body(opening)
            is_clean = opening.answer.is_reusable
        finally:
            self.pair.detach()
            if is_clean:
                connection.upstream.give_back(connection, self.config.timeouts.upstream_idle_s)
            else:
                connection.close()

    async def _relay_stream(self, opening: Opening, relay: FrameRelay) -> None:
        answer = opening.answer
        now_ns = time.monotonic_ns()
        framing: headers.Framing = "chunked" if relay.is_chunked else "close"
        self.keep_alive = self.keep_alive and relay.is_chunked
        head = self._response_head(answer.status, answer.reason, answer.fields, framing, event_stream=True)
        self.phase = Phase.DATA
        self.status = answer.status
        self._is_torn = True
        await self._send(head + opening.first)
        self._is_torn = False
        self.service.pump.frames += relay.finder.frames
        self.pair.last_read_ns = self.pair.last_frame_ns = now_ns
        if self.meter.saw_content:
            self.pair.content_read_ns, self.pair.content_sent_ns = now_ns, time.monotonic_ns()
        idle_s = self.config.timeouts.between_tokens_s
        try:
            await self._pump(relay, idle_s)
        finally:
            self.frames = relay.finder.frames
            self._is_torn = relay.is_unaligned or bool(self.pair.unsent)

    async def _pump(self, relay: FrameRelay, idle_s: float) -> None:
        """Lets the pump stream until the engine's body has ended, waiting for a full client in between."""
        while not relay.decoder.is_done:
            _check_body(relay, Phase.DATA)
            stop = await self.pair.stream(relay, self.gaps, idle_limit_s=idle_s)
            if stop is Stop.CLIENT_BLOCKED:
                await self._send(self.pair.unsent)
                self.pair.unsent = b""
            elif stop is not Stop.DONE:
                raise _failure_of(stop, relay, idle_s)

    async def _relay_body(self, opening: Opening) -> None:
        """An answer that is no event stream: its bytes as they come."""
        answer = opening.answer
        decoder = answer.decoder
        kind = answer.kind
        is_chunked = False
        framing: headers.Framing
        if kind is BodyKind.NONE:
            framing = "none"
        elif kind is BodyKind.LENGTH:
            framing = answer.length
        elif is_chunked := self.request.version >= b"1.1":
            framing = "chunked"
        else:
            framing = "close"
            self.keep_alive = False
        out = self._response_head(answer.status, answer.reason, answer.fields, framing)
        data = answer.rest
        kept = bytearray()
        while True:
            payload, excess = _decode(decoder, data)
            if excess:
                answer.is_reusable = False
            if len(kept) + len(payload) <= MOST_METERED_BYTES:
                kept += payload
            if payload:
                out += b"%x\r\n%b\r\n" % (len(payload), payload) if is_chunked else payload
            if decoder.is_done and is_chunked:
                out += b"0\r\n\r\n"
            self.phase = Phase.DATA
            self.status = answer.status
            await self._send(out)
            out = b""
            if decoder.is_done:
                break
            if decoder.error is not None:
                raise UpstreamProtocolError(str(decoder.error), phase=Phase.DATA)
            data = await self._read_body(opening.connection)
            if not data:
                decoder.at_close()
                if decoder.error is not None:
                    raise UpstreamDisconnected(str(decoder.error), phase=Phase.DATA)
        if self.route is not Route.OTHER:
            self.meter.take_body(bytes(kept))

    async def _read_body(self, connection: UpstreamConnection) -> bytes:
        limit_s = self.config.timeouts.between_tokens_s
        with trio.move_on_after(limit_s or float("inf")):
            return await upstream.receive(self.pair, connection)
        raise UpstreamTimeout(f"the engine was silent for between_tokens_s = {limit_s:g} s", phase=Phase.DATA)

    # -- to the client

    def _response_head(
        self,
        status: int,
        reason: bytes,
        fields: headers.Headers,
        framing: headers.Framing,
        *,
        event_stream: bool = False,
        extra: list[tuple[bytes, bytes]] | None = None,
    ) -> bytes:
        return headers.response_head(
            status,
            reason,
            fields,
            framing=framing,
            keep_alive=self.keep_alive and not self.service.is_draining,
            date=_http_date(),
            request_id=self.id,
            server_timing=server_timing(self.timeline, time.monotonic()),
            event_stream=event_stream,
            extra=extra or (),
        )

    async def _send(self, data: bytes) -> None:
        """Sends to the client, within ``client_stall_s`` for each piece its socket takes."""
        stall_s = self.config.timeouts.client_stall_s or float("inf")
        view = memoryview(data)
        while view:
            try:
                sent = self.client.sock.send(view)
            except BlockingIOError:
                with trio.move_on_after(stall_s) as limit:
                    await trio.lowlevel.wait_writable(self.client.sock)
                if limit.cancelled_caught:
                    raise ClientStalled("the client stopped reading", phase=self.phase) from None
            except OSError:
                raise ClientGone("the client closed its connection", phase=self.phase) from None
            else:
                self.bytes_out += sent
                view = view[sent:]

    async def _farewell(self, failure: ExchangeError) -> None:
        """Tells the client, if anyone is there and anything can still be said."""
        if isinstance(failure, ClientGone):
            return
        code, message, retry_after_s = failure.code, failure.message, failure.retry_after_s
        if self.status is None:
            self.status = failure.status
            await self._try_send(self.error_answer(failure.status, code, message, retry_after_s))
        elif self.is_stream and not self._is_torn:
            frame = dialect.error_frame(self.route, failure.status, code, message)
            if self.request.version >= b"1.1":
                frame = b"%x\r\n%b\r\n" % (len(frame), frame)
            await self._try_send(frame)

    def error_answer(self, status: int, code: str, message: str, retry_after_s: int | None = None) -> bytes:
        """A whole answer of the relay's own, after which the connection is closed."""
        self.keep_alive = False
        body = dialect.error_body(self.route, status, code, message)
        fields = [(b"content-type", b"application/json")]
        if retry_after_s is not None:
            fields.append((b"retry-after", b"%d" % retry_after_s))
        head = self._response_head(status, b"", fields, len(body))
        return head if self.request.method == b"HEAD" else head + body

    async def _try_send(self, data: bytes) -> None:
        with trio.move_on_after(FAREWELL_S, shield=True):
            try:
                await self._send(data)
            except ClientGone:
                pass

    def _interruption(self) -> ExchangeError:
        """Why the scope was cancelled."""
        if self.pair.is_gone:
            return ClientGone("the client closed its connection", phase=self.phase)
        if self._is_cut:
            return Draining("the relay is shutting down; try again", phase=self.phase, retry_after_s=1)
        return UpstreamTimeout(
            f"the exchange took longer than total_s = {self.config.timeouts.total_s:g} s", phase=self.phase
        )

    def _record(self) -> None:
        timeline, pair = self.timeline, self.pair
        timeline.ended = time.monotonic()
        if pair.content_sent_ns:
            timeline.first_content_read = pair.content_read_ns / 1e9
            timeline.first_content_sent = pair.content_sent_ns / 1e9
        failure = self.failure
        status = self.status
        if status is None and failure is not None:
            status = failure.status
        self.service.write_record(
            make_record(
                now=time.time(),
                id=self.id,
                client=self.client.peer,
                method=self.request.method.decode("ascii"),
                path=self.request.target.decode("ascii", "replace"),
                model=self.facts.model,
                pool=self.service.pool.name if self.upstream else None,
                upstream=self.upstream.config.url if self.upstream else None,
                status=status,
                outcome=failure.outcome if failure else NORMAL if self.is_complete else self._abandoned(),
                is_stream=self.is_stream,
                attempts=self.attempts,
                frames=self.frames,
                bytes_in=len(self.request.body),
                bytes_out=self.bytes_out + pair.bytes_out,
                error=self._error(),
                timeline=timeline,
                meter=self.meter,
                gaps=self.gaps,
            )
        )

    def _abandoned(self) -> str:
        """The outcome where the worker was stopped in the middle of the exchange."""
        return Side.RELAY.value + self.phase.value

    def _error(self) -> str | None:
        """What the record says went wrong, beyond the engine's own error."""
        if self.failure is not None:
            return self.failure.message
        if not self.is_complete:
            return "the relay was stopped"
        if self.is_stream and self.meter.expects_end_mark and not self.meter.saw_end and self.meter.error is None:
            return "the stream ended without its end mark"
        return None


def _has_body(request: Request) -> bool:
    return headers.find(request.headers, b"content-length") is not None or (
        headers.find(request.headers, b"transfer-encoding") is not None
    )


def _check_body(relay: FrameRelay, phase: Phase) -> None:
    if relay.decoder.error is not None:
        raise UpstreamDisconnected(f"the engine's answer is cut: {relay.decoder.error}", phase=phase)


def _payload(answer: upstream.Answer) -> bytes:
    """The beginning of an answer's body, decoded apart from the body itself."""
    return _decode(decoder_for(answer.kind, answer.fields), answer.rest)[0]


def _decode(decoder: BodyDecoder, data: bytes) -> tuple[bytes, bool]:
    """The payload in `data`, and whether bytes are left behind the body's end."""
    parts = []
    position = 0
    while position < len(data) and not decoder.is_done and decoder.error is None:
        begin, end, position = decoder.next(data, position, len(data))
        parts.append(data[begin:end])
    return b"".join(parts), position < len(data)


def _failure_of(stop: Stop, relay: FrameRelay, idle_s: float) -> ExchangeError:
    """What a stream that the pump gave back unfinished died of."""
    if stop is Stop.CLIENT_GONE:
        return ClientGone("the client closed its connection", phase=Phase.DATA)
    if stop is Stop.UPSTREAM_IDLE:
        return UpstreamTimeout(f"the engine was silent for between_tokens_s = {idle_s:g} s", phase=Phase.DATA)
    if stop is Stop.UPSTREAM_MALFORMED:
        return UpstreamProtocolError(f"the engine's stream is malformed: {relay.decoder.error}", phase=Phase.DATA)
    how = "reset" if stop is Stop.UPSTREAM_RESET else "closed"
    return UpstreamDisconnected(f"the engine {how} its connection in the middle of the stream", phase=Phase.DATA)


def _new_id() -> str:
    return uuid.uuid4().hex


_date = (0, b"")


def _http_date() -> bytes:
    """The ``Date`` of this second (RFC 9110 §6.6.1)."""
    global _date
    now = int(time.time())
    if _date[0] != now:
        _date = (now, formatdate(now, usegmt=True).encode("ascii"))
    return _date[1]


async def refuse(service: Service, client: ClientConnection, failure: ExchangeError) -> None:
    """Answers a request that could not be read, and records it."""
    now = time.time()
    if not isinstance(failure, ClientGone):
        body = dialect.error_body(Route.OTHER, failure.status, failure.code, failure.message)
        fields = [(b"content-type", b"application/json")]
        head = headers.response_head(
            failure.status,
            b"",
            fields,
            framing=len(body),
            keep_alive=False,
            date=_http_date(),
            request_id=_new_id(),
        )
        with trio.move_on_after(FAREWELL_S):
            try:
                await sockets.send_all(client.sock, head + body)
            except OSError:
                pass
    service.write_record(
        make_record(
            now=now,
            id=None,
            client=client.peer,
            method=None,
            path=None,
            model=None,
            pool=None,
            upstream=None,
            status=failure.status,
            outcome=failure.outcome,
            is_stream=False,
            attempts=0,
            frames=0,
            bytes_in=0,
            bytes_out=0,
            error=failure.message,
            timeline=None,
            meter=None,
            gaps=None,
        )
    )
