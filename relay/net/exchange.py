"""One request through all its phases: what its attempts, legs and delivery work on, and what is left of it.

An exchange runs in its client connection's fiber and cancel scope, and has one `Pair` in the pump. The scope is how it
is interrupted, in whatever it waits for: the pump cancels it when the client hangs up, draining when its time is over,
and its deadline is ``total_s``. Up to the commit point, the first byte of an engine's answer, a failure leads to the
next attempt or to an error answer with its true status; after it, to an error frame and a closed connection, never to a
clean end. A client kept waiting may get the head of its stream earlier, with comments (``keepalive_comment_s``): other
attempts are made all the same, but an error is then a frame, too.
"""

from __future__ import annotations

import math
import time

import trio

from relay.config import StreamConfig
from relay.core import headers
from relay.core.conversion import convert
from relay.core.cost import Cost, Prices
from relay.core.dialect import Meter, refusal_text
from relay.core.document import MAX_MEMBERS
from relay.core.editor import UsageEditor
from relay.core.framing import Buffer
from relay.core.histogram import Histogram
from relay.core.request import RequestFacts, Route, may_stream, peek
from relay.core.request_head import Request
from relay.core.timeline import Record, make_record
from relay.errors import (
    NORMAL,
    ClientGone,
    Draining,
    ExchangeError,
    NoUpstream,
    Phase,
    RequestRefused,
    UpstreamAnswered,
    UpstreamTimeout,
)
from relay.net.downstream import ClientConnection
from relay.net.fiber import in_task
from relay.net.fleet import Pool
from relay.net.group import Ask
from relay.net.notices import say_fault
from relay.net.pair import Pair
from relay.net.place import Place
from relay.net.plain import PlainAttempt
from relay.net.pool import Upstream
from relay.net.reply import FAREWELL_S, Reply, new_id
from relay.net.service import Service, local_answer
from relay.net.split import SplitAttempt


class Exchange:
    """One request and its response. `run` once."""

    pair: Pair  #: set by `run`

    # What mostly stays as it begins: the class has it, so that an exchange need not be given it.
    phase = Phase.REQUEST
    is_forced = False  #: the engine streams, and the client gets one body
    is_streamed = False  #: the engine did stream
    editor: UsageEditor | None = None  #: changes the usage in the answer
    attempts = 0
    frames = 0
    pool: Pool | None = None
    upstream: Upstream | None = None
    prefill_upstream: Upstream | None = None
    failure: ExchangeError | None = None
    prices: Prices | None = None  #: of its model, as it began; None: there are none
    cost: Cost | None = None  #: known at its end, where its tokens and the model's prices are
    _facts: RequestFacts | None = None
    _meter: Meter | None = None

    def __init__(self, service: Service, client: ClientConnection, request: Request) -> None:
        self.service = service
        self.config = service.config
        self.client = client
        self.request = request
        self.route = request.head.route
        self.id = request.id or new_id()
        self.reply = Reply(service, client, request, self.id)
        self.timeline = self.reply.timeline
        self.body: Buffer = request.body  #: what engines get of it
        self.gaps = Histogram()

    def __repr__(self) -> str:
        return f"<Exchange {self.id} {self.request.head.target!r} phase={self.phase.name} {self.reply!r}>"

    async def run(self) -> bool:
        """Serves the request; True if the client's connection can take another. Writes one record, whatever happens."""
        service = self.service
        self.pair = service.pump.open(self.client.source, self.client.scope.cancel)
        service.active.add(self)
        if self.config.timeouts.total_s:
            async with in_task():  # else trio, asleep, would not hear of it
                self.client.scope.deadline = trio.current_time() + self.config.timeouts.total_s
        try:
            await self._serve()
        except ExchangeError as failure:
            self.failure = failure.settled()
        except Exception as exc:  # a fault of ours ends this exchange alone
            say_fault(exc)
            self.failure = ExchangeError("the relay failed; its standard error says how", phase=self.phase)
        except trio.Cancelled:
            self.failure = self._interruption()
            raise
        finally:
            try:
                if self.failure is not None:
                    self.client.is_torn = self.reply.is_committed
                    async with in_task():  # noqa: ASYNC102 - not cancelled on entry
                        with trio.move_on_after(FAREWELL_S, shield=True):
                            await self.reply.farewell(self.failure)
            finally:
                if self.config.timeouts.total_s:
                    self.client.scope.deadline = math.inf
                self.pair.close()
                service.active.discard(self)
                self.client.release()
                self._account()
        return self.reply.keep_alive and not service.is_draining

    def cut(self) -> None:
        """Ends the exchange now: the worker has no more time to drain."""
        self.client.scope.cancel()

    @property
    def facts(self) -> RequestFacts:
        """What the request's body says; read where it is first asked for, so that no engine need wait for it."""
        if self._facts is None:
            self._facts = peek(self.request.body)
        return self._facts

    @property
    def meter(self) -> Meter:
        """Of the present attempt's answer."""
        if self._meter is None:
            self._meter = Meter(self.route)
        return self._meter

    @property
    def expects_stream(self) -> bool:
        """Whether the engine was asked for one."""
        return self.is_forced or (self.facts.wants_stream and may_stream(self.route))

    def expect_answer(self) -> None:
        """Makes what the answer needs, now that the engine works and nobody waits for the relay."""
        _ = self.meter, self.facts

    @property
    def attempt_id(self) -> str:
        """The request id of the present attempt, where the engine leaves the choice."""
        return self.id if self.attempts == 1 else f"{self.id}-{self.attempts}"

    def commit(self, status: int) -> None:
        """The commit point: from here on there is no other attempt."""
        self.phase = Phase.DATA
        self.reply.status = status
        self.reply.is_early = False

    async def _serve(self) -> None:
        """A place in the pool, attempt after attempt until one has an answer, then that answer."""
        service = self.service
        if self.route is Route.OTHER:  # as is all that the relay answers itself
            local = local_answer(service, self.request.head.method, self.request.head.path)
            if local is not None:
                await self.reply.answer(*local)
                return
        self.pool = service.fleet.sole or service.fleet.pool_for(self.route, self.facts)
        stream = self.pool.stream
        self._convert(stream)
        if stream.keepalive_comment_s:
            self.pair.comment_every(stream.keepalive_comment_s, self.timeline.request_read, self._comment)
        ask = self._ask_for(self.pool)
        self.phase = Phase.QUEUE
        began = time.monotonic()
        self.timeline.queue_s = 0.0
        place = self.pool.enter_now(ask)
        if place is None:
            try:
                place = await self.pool.enter(ask, self.config.timeouts.queue_s)
            finally:
                self.timeline.queue_s = time.monotonic() - began
        with place:
            await self._attempts(self.pool, place, ask)

    def _convert(self, stream: StreamConfig) -> None:
        """What engines get instead of the client's request, and the client instead of their answer."""
        config, asks_usage = self.config, stream.include_usage == "always"
        if not (stream.force_stream or asks_usage or config.prices):
            return
        facts = self.facts
        converted = convert(
            self.route, facts, self.request.body, force_stream=stream.force_stream, ask_usage=asks_usage
        )
        if converted.is_unread and asks_usage and (self.request.key is not None or config.prices):
            message = (
                f"the body is no JSON object of at most {MAX_MEMBERS:,} members, so its usage could not be counted"
            )
            raise RequestRefused(400, "invalid_json", message)
        self.body, self.is_forced = converted.body, converted.is_forced
        self.prices = self.service.prices.of(facts.model)
        told = self.prices if config.cost.in_usage and may_stream(self.route) else None
        if converted.hides_usage or told is not None:
            self.editor = UsageEditor(hides_usage=converted.hides_usage, prices=told)

    def _comment(self) -> bool:
        """The client has heard nothing for a while: if it waits for a stream, it is told so; False: it is gone."""
        self.pair.preface = None  # what is said now begins with a head
        awaits_stream = self.expects_stream and not self.is_forced
        return self.reply.comment() if awaits_stream and not self.reply.is_committed else True

    def _ask_for(self, pool: Pool) -> Ask:
        request, session = self.request, None
        tenant = request.key.encode() if request.key else request.head.authorization or self.client.peer.encode()
        if pool.config.balance == "session_affinity":
            user = self.facts.user
            session = request.find(pool.session_field) or (user.encode() if user else None) or tenant
        return pool.ask(self.route, session, request.body, tenant)

    async def _attempts(self, pool: Pool, place: Place, ask: Ask) -> None:
        """Attempt after attempt, each with other engines, until one's answer has gone to the client."""
        failover = self.config.failover
        no_more_after = time.monotonic() + failover.budget_s
        tried: dict[str, list[Upstream]] = {}

        def may_go_on() -> bool:
            is_allowed = self.attempts < failover.attempts and time.monotonic() < no_more_after
            return is_allowed and pool.has_others(place, ask, tried)

        while True:
            if not pool.has_roles(ask):
                message = f"pool {pool.name} has been reconfigured meanwhile; try again"
                raise NoUpstream(message, phase=Phase.QUEUE, retry_after_s=1)
            self.attempts += 1
            kind = PlainAttempt if "serve" in ask.roles else SplitAttempt
            attempt = kind(self, pool, place, may_go_on)
            try:
                await attempt.run()
                return
            except ExchangeError as failure:
                if self.reply.is_committed or not failure.may_retry or not may_go_on():
                    raise
                tried.setdefault(attempt.role, []).append(place.upstreams[attempt.role])
                if not place.take_others(ask, tried):
                    raise
                self.service.tally.failed_over()
                failure.settled()
                self._forget_answer()

    def _forget_answer(self) -> None:
        """What was counted of the answer of an attempt that has failed: nothing of it has gone out."""
        self._meter = None
        self.frames, self.is_streamed = 0, False
        if self.editor is not None:
            self.editor.cached_tokens = None

    # -- the end

    def _interruption(self) -> ExchangeError:
        """Why the scope was cancelled."""
        if self.pair.is_gone:
            return ClientGone("the client closed its connection", phase=self.phase)
        total_s = self.config.timeouts.total_s
        if total_s and self.client.scope.deadline <= trio.current_time():
            return UpstreamTimeout(f"the exchange took longer than total_s = {total_s:g} s", phase=self.phase)
        return Draining("the relay is shutting down; try again", phase=self.phase, retry_after_s=1)

    def _account(self) -> None:
        """Counts the exchange, and writes its record."""
        timeline, pair = self.timeline, self.pair
        timeline.ended = time.monotonic()
        if pair.content_sent_ns:
            timeline.first_content_read = pair.content_read_ns / 1e9
            timeline.first_content_sent = pair.content_sent_ns / 1e9
        usage = self.meter.counted
        if self.prices is not None and usage is not None:
            self.cost = self.prices.cost(usage)
        self.service.tally.ended(self)
        if self.service.write_record is not None:
            self.service.write_record(self._record())

    @property
    def frames_so_far(self) -> int:
        """Frames passed on, while it still runs."""
        streaming = self.pair.relay
        return self.frames if streaming is None else streaming.finder.frames

    @property
    def outcome(self) -> str:
        """The record's two letters."""
        return NORMAL if self.failure is None else self.failure.outcome

    @property
    def status(self) -> int | None:
        """What the client was told, or would have been, had it stayed."""
        failure, status = self.failure, self.reply.status
        return failure.status if failure is not None and status is None else status

    @property
    def bytes_out(self) -> int:
        """Bytes of the answer that went to the client, its head included."""
        return self.reply.bytes_out + self.pair.bytes_out

    def _record(self) -> Record:
        return make_record(
            now=time.time(),
            id=self.id,
            client=self.client.peer,
            key=self.request.key,
            method=self.request.head.method.decode("ascii"),
            path=self.request.path,
            model=self.facts.model,
            pool=self.pool.name if self.pool else None,
            upstream=self.upstream.config.url if self.upstream else None,
            prefill_upstream=self.prefill_upstream.config.url if self.prefill_upstream else None,
            status=self.status,
            outcome=self.outcome,
            is_stream=self.reply.is_stream,
            is_streamed_upstream=self.is_streamed,
            attempts=self.attempts,
            frames=self.frames,
            bytes_in=len(self.request.body),
            bytes_out=self.bytes_out,
            cost=self.cost.total if self.cost else None,
            error=self._error(),
            timeline=self.timeline,
            meter=self.meter,
            gaps=self.gaps,
        )

    def _error(self) -> str | None:
        """What the record says went wrong, beyond the engine's own error."""
        failure, meter = self.failure, self.meter
        if isinstance(failure, UpstreamAnswered) and not headers.is_encoded(failure.fields):
            said = refusal_text(failure.body)
            return failure.message if said in failure.message else f"{failure.message}: {said}"
        if failure is not None:
            return failure.message
        if self.reply.is_stream and meter.expects_end_mark and not meter.saw_end and meter.error is None:
            return "the stream ended without its end mark"
        return None
