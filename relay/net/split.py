"""An attempt over two engines: one computes the prompt, the other goes on from there.

What is sent where, and in which order, is the connector's plan (`relay.core.connectors`); here are the four orders. The
decode leg runs on the exchange's pair, as a plain one would; the prefill leg beside it, read whole.
"""

from __future__ import annotations

import time
from random import SystemRandom
from typing import TYPE_CHECKING, Final

import httpx
import trio

from relay.config.endpoints import endpoint_of
from relay.core import headers
from relay.core.connectors.base import (
    Concurrent,
    DecodeFirst,
    DecodeOnly,
    Endpoint,
    LegRequest,
    Plan,
    Preflight,
    Sequential,
    SplitRequest,
    as_it_is,
)
from relay.core.editor import UsageEditor
from relay.core.request import Route
from relay.core.usage import cached_tokens
from relay.errors import (
    ExchangeError,
    Phase,
    RequestRefused,
    Side,
    UpstreamAnswered,
    UpstreamProtocolError,
    UpstreamTimeout,
)
from relay.net.delivery import Delivery
from relay.net.fetch import fetch, reason_of, transport_of
from relay.net.fiber import checkpoint_if_cancelled, in_task
from relay.net.leg import Leg
from relay.net.second_frame import see_second_frame
from relay.net.whole import WholeAnswer, ask_whole

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from types import TracebackType

    from relay.core.health import Attempt
    from relay.net.exchange import Exchange
    from relay.net.fleet import Pool
    from relay.net.group import Group
    from relay.net.opening import Opening
    from relay.net.place import Place
    from relay.net.pool import Upstream

#: Longest time for what must be asked of an engine before its first request.
PREFLIGHT_S: Final = 5.0
#: Longest answer to it: a line for each data-parallel rank.
MOST_PREFLIGHT_BYTES: Final = 1_048_576
#: How long a prefiller's answer may still come once its client has left: what it had sent by then, and no more.
LAST_WORD_S: Final = 1.0

_rng = SystemRandom()  # ids shared by two requests could mix up their keys and values


class SplitAttempt:
    """One attempt of an exchange in a split pool."""

    def __init__(self, exchange: Exchange, pool: Pool, place: Place, may_go_on: Callable[[], bool]) -> None:
        self._exchange = exchange
        self._pool = pool
        self._groups = dict(pool.groups)  # as they are now: a reload may take a role away between the legs
        self._place = place
        self._may_go_on = may_go_on
        self.role = "prefill"  #: whose engine an error is about
        self._failure: ExchangeError | None = None
        self._refusal: WholeAnswer | None = None

    async def run(self) -> None:
        """Has the engines answer, and takes the answer to the client. Raises ExchangeError."""
        try:
            if self._pool.connector.may_recompute and self._exchange.route is not Route.OTHER:
                self._editor.request = self._exchange.body
            plan = await self._plan()
            match plan:
                case DecodeOnly(decode=sends):
                    self._place.release("prefill")
                    await self._deliver(await self._open(self._decode_leg(sends)))
                case Sequential():
                    await self._in_sequence(plan)
                case Concurrent():
                    await self._at_once(plan)
                case DecodeFirst():
                    await self._decode_first(plan)
        except ExchangeError as failure:
            if failure.side is Side.UPSTREAM:
                self._forget_endpoint()
            raise

    @property
    def _editor(self) -> UsageEditor:
        exchange = self._exchange
        if exchange.editor is None:
            exchange.editor = UsageEditor()
        return exchange.editor

    async def _plan(self) -> Plan:
        exchange, pool, place = self._exchange, self._pool, self._place
        prefiller, decoder = place.upstreams.get("prefill"), place.upstreams["decode"]
        request = SplitRequest(exchange.route, exchange.body, exchange.id, exchange.attempts, pool.callback_url)
        if decoder.endpoint is None:
            decoder.endpoint = endpoint_of(decoder.config, pool.config.connector, "decode")
        endpoint = None if prefiller is None else await self._ready(prefiller)
        try:
            if endpoint is None:
                return as_it_is(request)
            return pool.connector.plan(request, endpoint, decoder.endpoint, _rng)
        except ValueError as problem:
            raise RequestRefused(400, "invalid_json", f"a split pool has to read the body: {problem}") from None

    async def _ready(self, prefiller: Upstream) -> Endpoint:
        """The prefiller's addresses, with what has to be asked for first."""
        if prefiller.endpoint is None:
            prefiller.endpoint = endpoint_of(prefiller.config, self._pool.config.connector, "prefill")
        preflight = self._pool.connector.preflight(prefiller.endpoint)
        if preflight is not None:
            self._exchange.phase = Phase.PREFILL
            with _Judged(self._exchange, self._groups["prefill"], prefiller):
                async with in_task():
                    prefiller.endpoint = await _ask_first(preflight)
        return prefiller.endpoint

    def _forget_endpoint(self) -> None:
        """What was asked of the prefiller may be true no more: it may have been started anew."""
        if "prefill" in self._place.upstreams:
            self._place.upstreams["prefill"].endpoint = None

    # -- the orders

    async def _in_sequence(self, plan: Sequential) -> None:
        exchange, pool = self._exchange, self._pool
        exchange.phase = Phase.PREFILL
        answer = await self._prefill(plan.prefill, last_word_s=LAST_WORD_S if pool.config.drain_kv else 0.0)
        if answer.status >= 400:
            await self._pass_on(answer)
            return
        hand_over = plan.hand_over(answer.body)
        self._place.release("prefill")
        if hand_over.is_missing:
            exchange.service.tally.prefilled_without_kv(pool, self._place.upstreams["prefill"])
            if pool.config.on_missing_kv == "error":
                raise UpstreamProtocolError("the prefiller's answer holds no handle", phase=Phase.PREFILL)
        if pool.config.cached_tokens_from == "prefill" and hand_over.holds_kv:
            cached = cached_tokens(answer.body)  # the decoder counts all it was handed over
            if cached is not None:
                self._editor.cached_tokens = cached
        leg = self._decode_leg(hand_over.decode)
        try:
            await checkpoint_if_cancelled()
            opening = await self._open(leg)
        except BaseException:
            if hand_over.holds_kv and not leg.is_sent and pool.config.drain_kv:
                exchange.service.drains.start(exchange, pool, hand_over, leg.upstream, is_bound=plan.binds_decoder)
            raise
        await self._deliver(opening)

    async def _at_once(self, plan: Concurrent) -> None:
        is_prefilled = trio.Event()

        async def prefill() -> WholeAnswer:
            answer = await self._prefill(plan.prefill, is_beside=True)
            if answer.status < 400:
                is_prefilled.set()
            return answer

        async def decode(leg: Leg) -> None:
            opening = await self._open(leg)
            if opening.answer.status < 400:  # nothing is committed to before both have answered
                try:
                    await is_prefilled.wait()
                except BaseException:
                    leg.give_up(opening.connection)
                    raise
            await self._deliver(opening)

        leg = self._decode_leg(plan.decode)
        await self._side_by_side(prefill, lambda: decode(leg))

    async def _decode_first(self, plan: DecodeFirst) -> None:
        callbacks = self._exchange.service.callbacks
        message = b""
        is_called = trio.Event()

        def call(body: bytes) -> None:
            nonlocal message
            if not is_called.is_set():
                message = body
                is_called.set()

        async def prefill() -> WholeAnswer:
            await is_called.wait()
            return await self._prefill(plan.prefill(message), is_beside=True)

        async def decode(leg: Leg) -> None:
            await self._deliver(await self._open(leg))

        leg = self._decode_leg(plan.decode)
        callbacks[plan.key] = call
        try:
            await self._side_by_side(prefill, lambda: decode(leg))
        finally:
            del callbacks[plan.key]

    async def _side_by_side(
        self, prefill: Callable[[], Awaitable[WholeAnswer]], decode: Callable[[], Awaitable[None]]
    ) -> None:
        """Runs both legs; either's failure ends the other, and so does the end of the decode leg."""

        async def beside(scope: trio.CancelScope) -> None:
            try:
                if await self._is_prefilled_by(prefill):
                    self._place.release("prefill")
                    return
            except ExchangeError as failure:
                self._fail("prefill", failure)
            scope.cancel()

        is_delivered = False
        try:
            async with in_task(), trio.open_nursery() as nursery:
                nursery.start_soon(beside, nursery.cancel_scope)
                try:
                    await decode()
                    is_delivered = True
                except ExchangeError as failure:
                    self._fail("decode", failure)
                nursery.cancel_scope.cancel()
        except* trio.Cancelled:  # noqa: ASYNC103 - a nursery makes a group of them; below, one is made of it
            pass
        if not is_delivered:
            await checkpoint_if_cancelled()
            await self._conclude()

    async def _is_prefilled_by(self, prefill: Callable[[], Awaitable[WholeAnswer]]) -> bool:
        """Whether the prefill leg went well; once the client gets what is generated, that is all the same."""
        try:
            answer = await prefill()
        except ExchangeError:
            if self._is_generating:
                return True
            raise
        if answer.status >= 400 and not self._is_generating:
            self._refusal = answer
            return False
        return True

    @property
    def _is_generating(self) -> bool:
        """Whether the decoder has gone on from the prompt, and the client has seen it."""
        reply = self._exchange.reply
        return reply.is_committed and (self._exchange.meter.saw_content or not reply.is_stream)

    def _fail(self, role: str, failure: ExchangeError) -> None:
        if self._failure is None:
            self.role, self._failure = role, failure.settled()

    async def _conclude(self) -> None:
        """What has come of both legs, where it is not an answer that went out."""
        if self._refusal is not None and not self._exchange.reply.is_committed:
            await self._pass_on(self._refusal)
        elif self._refusal is not None:
            message = f"the prefiller refused the request ({self._refusal.status}) while the decoder was streaming"
            raise UpstreamProtocolError(message, phase=Phase.DATA)
        elif self._failure is not None:
            raise self._failure

    async def _pass_on(self, refusal: WholeAnswer) -> None:
        """The prefiller's own refusal is the answer."""
        if not headers.is_encoded(refusal.fields):
            self._exchange.meter.take_body(refusal.body, status=refusal.status)
        await self._exchange.reply.pass_on(*refusal)

    # -- the legs

    async def _prefill(self, sends: LegRequest, *, is_beside: bool = False, last_word_s: float = 0.0) -> WholeAnswer:
        """The prefiller's answer, if it is one or a refusal (4xx). Raises ExchangeError for all else."""
        exchange, upstream = self._exchange, self._place.upstreams["prefill"]
        exchange.prefill_upstream = upstream
        limit_s = exchange.config.timeouts.prefill_s
        began = time.monotonic()
        try:
            with _Judged(exchange, self._groups["prefill"], upstream) as attempt:
                try:
                    answer = await ask_whole(exchange, upstream, sends, limit_s=limit_s, last_word_s=last_word_s)
                except trio.TooSlowError:
                    message = f"the prefiller did not answer within prefill_s = {limit_s:g} s"
                    raise UpstreamTimeout(message, phase=Phase.PREFILL) from None
                exchange.timeline.prefilled = time.monotonic()
                attempt.answered(answer.status, exchange.timeline.prefilled)
                exchange.service.tally.upstream_answered(exchange, upstream, answer.status)
                if answer.status >= 500:
                    message = f"the prefiller answered {answer.status}"
                    raise UpstreamAnswered(message, phase=Phase.PREFILL, **answer._asdict())
                return answer
        finally:
            exchange.timeline.add_prefill(time.monotonic() - began, is_beside=is_beside)

    def _decode_leg(self, sends: LegRequest) -> Leg:
        exchange = self._exchange
        # In a split pool a 500 is a failed attempt too: a lost handle shows as one.
        statuses = (*exchange.config.failover.statuses, 500)
        group, upstream = self._groups["decode"], self._place.upstreams["decode"]
        return Leg(
            exchange, group, upstream, sends, failure_statuses=statuses, may_go_on=self._may_go_on, holds_first=True
        )

    async def _open(self, leg: Leg) -> Opening:
        self.role = "decode"
        self._exchange.upstream = leg.upstream
        opening = await leg.open()
        if opening.answer.status in leg.failure_statuses:
            self._forget_endpoint()
        try:
            await see_second_frame(self._exchange.pair, opening)
        except BaseException as exc:
            leg.give_up(opening.connection)
            is_refusal = isinstance(exc, UpstreamAnswered) and exc.status < 500  # the request's own fault
            if isinstance(exc, ExchangeError) and exc.side is Side.UPSTREAM and not is_refusal:
                self._exchange.service.tally.upstream_failed(self._exchange, leg.upstream, exc)
            raise
        return opening

    async def _deliver(self, opening: Opening) -> None:
        self._exchange.timeline.answered = time.monotonic()  # whatever was waited for until now was the engines'
        await Delivery(self._exchange, opening).run()


class _Judged:
    """Tells a prefiller's health how an attempt with it went; errors are of the prefill phase."""

    # No generator: to enter and leave one takes three times as long.
    __slots__ = ("_attempt", "_exchange", "_group", "_upstream")

    def __init__(self, exchange: Exchange, group: Group, upstream: Upstream) -> None:
        self._exchange = exchange
        self._group = group
        self._upstream = upstream
        self._attempt: Attempt

    def __enter__(self) -> Attempt:
        self._attempt = self._group.begin(self._upstream)
        return self._attempt

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if isinstance(error, ExchangeError):
                error.phase = Phase.PREFILL
                if error.side is Side.UPSTREAM:  # and not the relay, out of descriptors
                    self._attempt.failed(time.monotonic())
                    self._exchange.service.tally.upstream_failed(self._exchange, self._upstream, error)
        finally:
            self._group.end(self._attempt, self._upstream)


async def _ask_first(preflight: Preflight) -> Endpoint:
    """What an engine has to be asked before its first request. Raises UpstreamProtocolError."""
    transport = transport_of()
    try:
        with trio.fail_after(PREFLIGHT_S):
            status, body = await fetch(transport, preflight.url, most_bytes=MOST_PREFLIGHT_BYTES)
        if status != 200:
            raise ValueError(f"status {status}")
        return preflight.parse(body)
    except trio.TooSlowError:
        message = f"the prefiller's bootstrap server did not answer within {PREFLIGHT_S:g} s"
        raise UpstreamProtocolError(message, phase=Phase.PREFILL) from None
    except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError) as exc:
        message = f"the prefiller's bootstrap server was of no use: {reason_of(exc)}"
        raise UpstreamProtocolError(message, phase=Phase.PREFILL) from None
    finally:
        await transport.aclose()
