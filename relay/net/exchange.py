"""One request through all its phases: the only module that knows both sides.

An exchange runs in its client connection's task and cancel scope, and has one `Pair` in the pump. The scope is how it
is interrupted, in whatever it waits for: the pump cancels it when the client hangs up, draining when its time is over,
and its deadline is ``total_s``. Up to the commit point, the first byte of an engine's answer, a failure leads to the
next attempt or to an error answer with its true status; after it, to an error frame and a closed connection, never to a
clean end.
"""

from __future__ import annotations

import math
import time
from typing import Final

import trio

from relay.core import headers
from relay.core.dialect import Meter
from relay.core.frames import LAST_CHUNK, FrameRelay
from relay.core.framing import BodyKind, decode_into
from relay.core.histogram import Histogram
from relay.core.request import Route, peek, route_of
from relay.core.timeline import make_record
from relay.errors import (
    NORMAL,
    ClientGone,
    Draining,
    ExchangeError,
    NoUpstream,
    Phase,
    RequestRefused,
    Side,
    UpstreamDisconnected,
    UpstreamProtocolError,
    UpstreamRefused,
    UpstreamTimeout,
)
from relay.net import upstream
from relay.net.downstream import ClientConnection, Request
from relay.net.opening import Opening
from relay.net.pool import Upstream, UpstreamConnection
from relay.net.pump import Pair, Stop
from relay.net.reply import FAREWELL_S, Reply, new_id
from relay.net.service import Service, local_answer

#: Of a JSON answer, at most this much is kept for its usage.
MOST_METERED_BYTES: Final = 1_048_576


class Exchange:
    """One request and its response. `run` once."""

    def __init__(self, service: Service, client: ClientConnection, request: Request) -> None:
        self.service = service
        self.config = service.config
        self.client = client
        self.request = request
        self.route = route_of(request.target)
        self.facts = peek(request.body)
        self.id = headers.request_id(request.headers, new_id)
        self.reply = Reply(service, client, request, self.route, self.id)
        self.timeline = self.reply.timeline
        self.meter = Meter(self.route)
        self.gaps = Histogram()
        self.phase = Phase.REQUEST
        self.attempts = 0
        self.frames = 0
        self.upstream: Upstream | None = None
        self.failure: ExchangeError | None = None
        self.is_complete = False  #: the answer went out to its end
        self.pair: Pair

    def __repr__(self) -> str:
        return f"<Exchange {self.id} {self.request.target!r} phase={self.phase.name} {self.reply!r}>"

    async def run(self) -> bool:
        """Serves the request; True if the client's connection can take another. Writes one record, whatever happens."""
        service = self.service
        service.active.add(self)
        self.pair = service.pump.open(self.client.sock, self.client.scope.cancel)
        if self.config.timeouts.total_s:
            self.client.scope.deadline = trio.current_time() + self.config.timeouts.total_s
        try:
            await self._serve()
            self.is_complete = True
        except ExchangeError as failure:
            self.failure = failure
        except trio.Cancelled:
            self.failure = self._interruption()
            raise
        finally:
            if self.failure is not None:
                with trio.move_on_after(FAREWELL_S, shield=True):
                    await self.reply.farewell(self.failure)
            if self.config.timeouts.total_s:
                self.client.scope.deadline = math.inf
            self.pair.close()
            service.active.discard(self)
            self.client.release()
            self._record()
        return self.reply.keep_alive and not service.is_draining

    def cut(self) -> None:
        """Ends the exchange now: the worker has no more time to drain."""
        self.client.scope.cancel()

    # -- before the commit point

    async def _serve(self) -> None:
        """Attempt after attempt until one has an answer, then that answer."""
        local = local_answer(self.service, self.request.target.partition(b"?")[0])
        if local is not None:
            await self.reply.answer(*local)
            return
        self._check_model()
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

    def _check_model(self) -> None:
        """Refuses what the pool does not serve. Requests that name no model are for any engine."""
        pool, model = self.service.pool, self.facts.model
        if not pool.config.models or self.route is Route.OTHER:
            return
        if not self.facts.is_json:
            raise RequestRefused(
                400, "invalid_json", "the body is not JSON, so it names no model to choose an engine by"
            )
        if model is not None and not pool.serves(model):
            known = ", ".join(pool.config.models)
            raise RequestRefused(404, "model_not_found", f"no pool serves the model {model!r}; known: {known}")

    async def _attempt(self, chosen: Upstream, *, may_go_on: bool) -> Opening:
        """Asks one engine, and waits until there is something to commit to."""
        self.phase = Phase.CONNECT
        connection = chosen.take_idle(self.config.timeouts.upstream_idle_s)
        if connection is not None:
            try:
                return await self._open(connection, may_go_on=may_go_on)
            except upstream.ConnectionDied:
                # The engine closed an idle connection just then: no failure of this attempt, so once more.
                self.phase = Phase.CONNECT
        return await self._open(await self._dial(chosen), may_go_on=may_go_on)

    async def _dial(self, chosen: Upstream) -> UpstreamConnection:
        began = time.monotonic()
        try:
            return await chosen.dial(self.config.timeouts.connect_s)
        finally:
            self.timeline.add_connect(time.monotonic() - began)

    async def _open(self, connection: UpstreamConnection, *, may_go_on: bool) -> Opening:
        """Sends the request, and reads the answer up to the commit point, within ``first_token_s``."""
        limit_s = self.config.timeouts.first_token_s
        url = connection.upstream.config.url
        self.phase = Phase.HEAD
        try:
            self.pair.attach(connection.sock)
            self.pair.limit(limit_s)
            opening = Opening(connection, await self._ask(connection))
            if may_go_on and opening.answer.status in self.config.failover.statuses:
                raise UpstreamRefused(f"{url} answered {opening.answer.status}", phase=Phase.HEAD)
            is_expected = self.facts.wants_stream and self.route is not Route.OTHER
            if await opening.is_event_stream(self.pair, is_expected=is_expected):
                await opening.read_first_frame(
                    self.pair,
                    self.meter,
                    is_chunked=self.reply.takes_chunks,
                    max_frame_bytes=self.config.stream.max_frame_bytes,
                )
            self.timeline.answered = time.monotonic()
            return opening
        except trio.TooSlowError:
            self._drop(connection)
            message = f"{url} sent no token within first_token_s = {limit_s:g} s"
            raise UpstreamTimeout(message, phase=Phase.HEAD) from None
        except BaseException:
            self._drop(connection)
            raise

    def _drop(self, connection: UpstreamConnection) -> None:
        """Closes the engine's connection, which frees the engine at once."""
        self.pair.detach()
        connection.close()

    async def _ask(self, connection: UpstreamConnection) -> upstream.Answer:
        request = self.request
        head = headers.request_head(
            request.method,
            request.target,
            request.headers,
            host=connection.upstream.config.authority.encode("ascii"),
            body=len(request.body) if request.has_body else "none",
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
        if request.version >= b"1.1":
            for event in interim:
                fields = list(event.headers)
                await self.reply.send(self.reply.head(event.status_code, event.reason, fields, "none"))
        return answer

    # -- after it

    async def _finish(self, opening: Opening) -> None:
        """Commits to an answer, relays it, and parks or closes the engine's connection."""
        connection = opening.connection
        is_reusable = False
        try:
            if opening.relay is not None:
                is_reusable = await self._relay_stream(opening, opening.relay)
            else:
                is_reusable = await self._relay_body(opening)
        finally:
            if is_reusable:
                self.pair.detach()
                connection.upstream.give_back(connection, self.config.timeouts.upstream_idle_s)
            else:
                self._drop(connection)

    async def _relay_stream(self, opening: Opening, relay: FrameRelay) -> bool:
        """Head and first frame in one write, then the pump; True if the engine's connection can be used again."""
        answer, reply, pair = opening.answer, self.reply, self.pair
        now_ns = time.monotonic_ns()
        framing: headers.Framing = "chunked" if relay.is_chunked else "close"
        reply.keep_alive = reply.keep_alive and relay.is_chunked
        head = reply.head(answer.status, answer.reason, answer.fields, framing, event_stream=True)
        self._commit(answer.status)
        reply.is_stream = reply.is_torn = True
        await reply.send(head + opening.first)
        reply.is_torn = False
        self.service.pump.frames += relay.finder.frames
        pair.last_read_ns = pair.last_frame_ns = now_ns
        if self.meter.saw_content:
            pair.content_read_ns, pair.content_sent_ns = now_ns, time.monotonic_ns()
        try:
            await self._pump(relay)
        finally:
            self.frames = relay.finder.frames
            reply.is_torn = relay.is_unaligned or bool(pair.unsent) or pair.stop is Stop.FAULT
        return answer.is_reusable and not relay.has_excess

    async def _pump(self, relay: FrameRelay) -> None:
        """Lets the pump stream until the engine's body has ended, waiting for a full client in between."""
        idle_s = self.config.timeouts.between_tokens_s
        while not relay.decoder.is_done:
            if relay.decoder.error is not None:
                raise _failure_of(Stop.UPSTREAM_MALFORMED, relay, idle_s)
            stop = await self.pair.stream(relay, self.gaps, idle_limit_s=idle_s)
            if stop is Stop.CLIENT_BLOCKED:
                await self.reply.send(self.pair.unsent)
                self.pair.unsent = b""
                self.pair.last_read_ns = time.monotonic_ns()  # the client's delay is not the engine's silence
            elif stop is not Stop.DONE:
                raise _failure_of(stop, relay, idle_s)

    async def _relay_body(self, opening: Opening) -> bool:
        """An answer that is no event stream, as it comes; True if the engine's connection can be used again."""
        answer, reply, decoder = opening.answer, self.reply, opening.answer.decoder
        framing = self._body_framing(answer)
        out = reply.head(answer.status, answer.reason, answer.fields, framing)
        kept = bytearray()
        data = answer.rest
        while True:
            payload = bytearray()
            has_excess = decode_into(payload, decoder, data) < len(data)
            if len(kept) + len(payload) <= MOST_METERED_BYTES:
                kept += payload
            if payload:
                out += b"%x\r\n%b\r\n" % (len(payload), bytes(payload)) if framing == "chunked" else payload
            if decoder.is_done and framing == "chunked":
                out += LAST_CHUNK
            self._commit(answer.status)
            await reply.send(out)
            out = b""
            if decoder.is_done:
                break
            if decoder.error is not None:
                raise UpstreamProtocolError(f"the engine's answer is malformed: {decoder.error}", phase=Phase.DATA)
            data = await self._read_body(opening.connection)
            if not data:
                decoder.at_close()
                if decoder.error is not None:
                    raise UpstreamDisconnected(f"the engine's answer is cut: {decoder.error}", phase=Phase.DATA)
        if self.route is not Route.OTHER:
            self.meter.take_body(bytes(kept))
        return answer.is_reusable and not has_excess

    def _body_framing(self, answer: upstream.Answer) -> headers.Framing:
        """How the client is told where a body ends: as the engine tells it, where the client's version allows."""
        if answer.kind is BodyKind.NONE:
            return "none"
        if answer.kind is BodyKind.LENGTH:
            return answer.length
        if self.reply.takes_chunks:
            return "chunked"
        self.reply.keep_alive = False
        return "close"

    async def _read_body(self, connection: UpstreamConnection) -> bytes:
        limit_s = self.config.timeouts.between_tokens_s
        self.pair.limit(limit_s)
        try:
            return await upstream.receive(self.pair, connection)
        except UpstreamDisconnected as exc:
            raise UpstreamDisconnected(exc.message, phase=Phase.DATA) from None
        except trio.TooSlowError:
            message = f"the engine was silent for between_tokens_s = {limit_s:g} s"
            raise UpstreamTimeout(message, phase=Phase.DATA) from None

    def _commit(self, status: int) -> None:
        """The commit point: from here on there is no other attempt."""
        self.phase = Phase.DATA
        self.reply.status = status

    # -- the end

    def _interruption(self) -> ExchangeError:
        """Why the scope was cancelled."""
        if self.pair.is_gone:
            return ClientGone("the client closed its connection", phase=self.phase)
        total_s = self.config.timeouts.total_s
        if total_s and self.client.scope.deadline <= trio.current_time():
            return UpstreamTimeout(f"the exchange took longer than total_s = {total_s:g} s", phase=self.phase)
        return Draining("the relay is shutting down; try again", phase=self.phase, retry_after_s=1)

    def _record(self) -> None:
        if self.service.write_record is None:
            return
        timeline, pair, reply, failure = self.timeline, self.pair, self.reply, self.failure
        timeline.ended = time.monotonic()
        if pair.content_sent_ns:
            timeline.first_content_read = pair.content_read_ns / 1e9
            timeline.first_content_sent = pair.content_sent_ns / 1e9
        if failure is not None:
            outcome = failure.outcome
        else:
            outcome = NORMAL if self.is_complete else Side.RELAY.value + self.phase.value
        self.service.write_record(
            make_record(
                now=time.time(),
                id=self.id,
                client=self.client.peer,
                method=self.request.method.decode("ascii"),
                path=self.request.path,
                model=self.facts.model,
                pool=self.service.pool.name if self.upstream else None,
                upstream=self.upstream.config.url if self.upstream else None,
                status=failure.status if failure is not None and reply.status is None else reply.status,
                outcome=outcome,
                is_stream=reply.is_stream,
                attempts=self.attempts,
                frames=self.frames,
                bytes_in=len(self.request.body),
                bytes_out=reply.bytes_out + pair.bytes_out,
                error=self._error(),
                timeline=timeline,
                meter=self.meter,
                gaps=self.gaps,
            )
        )

    def _error(self) -> str | None:
        """What the record says went wrong, beyond the engine's own error."""
        if self.failure is not None:
            return self.failure.message
        if not self.is_complete:
            return "the relay was stopped"
        meter = self.meter
        if self.reply.is_stream and meter.expects_end_mark and not meter.saw_end and meter.error is None:
            return "the stream ended without its end mark"
        return None


def _failure_of(stop: Stop, relay: FrameRelay, idle_s: float) -> ExchangeError:
    """What a stream that the pump gave back unfinished died of."""
    if stop is Stop.CLIENT_GONE:
        return ClientGone("the client closed its connection", phase=Phase.DATA)
    if stop is Stop.FAULT:
        return ExchangeError("the relay failed; its standard error says how", phase=Phase.DATA)
    if stop is Stop.UPSTREAM_IDLE:
        return UpstreamTimeout(f"the engine was silent for between_tokens_s = {idle_s:g} s", phase=Phase.DATA)
    if stop is Stop.UPSTREAM_MALFORMED:
        return UpstreamProtocolError(f"the engine's stream is malformed: {relay.decoder.error}", phase=Phase.DATA)
    how = "reset" if stop is Stop.UPSTREAM_RESET else "closed"
    return UpstreamDisconnected(f"the engine {how} its connection in the middle of the stream", phase=Phase.DATA)
