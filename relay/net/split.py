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

from relay.core.aggregate import EngineError, aggregator_for
from relay.core.connectors.base import (
    Concurrent,
    DecodeFirst,
    DecodeOnly,
    Endpoint,
    Plan,
    Sequential,
    SplitRequest,
)
from relay.core.connectors.base import Leg as Sends
from relay.core.dialect import Meter
from relay.core.frames import Pieces
from relay.core.framing import ChunkDecoder, decode_into
from relay.core.request import Route
from relay.core.sse import split_frames
from relay.errors import ExchangeError, Phase, Side, UpstreamAnswered, UpstreamProtocolError, UpstreamTimeout
from relay.net import upstream as wire
from relay.net.delivery import Delivery
from relay.net.leg import Leg
from relay.net.whole import WholeAnswer, ask_whole

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from relay.net.exchange import Exchange
    from relay.net.fleet import Place, Pool
    from relay.net.opening import Opening
    from relay.net.pool import Upstream

#: How long a first frame without content waits for the one behind it: vLLM tells of a lost handle in its second frame,
#: of a stream that began with 200.
SECOND_FRAME_S: Final = 0.1
#: Longest time for what must be asked of an engine before its first request.
PREFLIGHT_S: Final = 5.0

_rng = SystemRandom()  # ids shared by two requests could mix up their keys and values


class SplitAttempt:
    """One attempt of an exchange in a split pool."""

    def __init__(self, exchange: Exchange, pool: Pool, place: Place, *, may_go_on: bool) -> None:
        self._exchange = exchange
        self._pool = pool
        self._place = place
        self._may_go_on = may_go_on
        self.role = "prefill"  #: whose engine an error is about
        self._failure: ExchangeError | None = None
        self._refusal: WholeAnswer | None = None

    async def run(self) -> None:
        """Has the engines answer, and takes the answer to the client. Raises ExchangeError."""
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

    async def _plan(self) -> Plan:
        exchange, pool, place = self._exchange, self._pool, self._place
        prefiller, decoder = place.upstreams.get("prefill"), place.upstreams["decode"]
        if prefiller is None or exchange.route is Route.OTHER:
            return DecodeOnly(Sends(exchange.body, exchange.attempt_id))
        request = SplitRequest(exchange.route, exchange.body, exchange.id, exchange.attempts, pool.callback_url)
        return pool.connector.plan(request, await self._ready(prefiller), _endpoint(pool, decoder), _rng)

    async def _ready(self, prefiller: Upstream) -> Endpoint:
        """The prefiller's addresses, with what has to be asked for first."""
        if prefiller.endpoint is None:
            prefiller.endpoint = _endpoint(self._pool, prefiller)
        preflight = self._pool.connector.preflight(prefiller.endpoint)
        if preflight is not None:
            transport = httpx.AsyncHTTPTransport(verify=False, trust_env=False)
            try:
                async with httpx.AsyncClient(transport=transport, trust_env=False, timeout=PREFLIGHT_S) as client:
                    answer = (await client.get(preflight.url)).raise_for_status()
                prefiller.endpoint = preflight.parse(answer.content)
            except (httpx.HTTPError, ValueError) as exc:
                message = f"{preflight.url} was of no use: {exc}"
                raise UpstreamProtocolError(message, phase=Phase.PREFILL) from None
        return prefiller.endpoint

    # -- the orders

    async def _in_sequence(self, plan: Sequential) -> None:
        answer = await self._prefill(plan.prefill)
        if answer.status >= 400:
            await self._exchange.reply.pass_on(*answer)
            return
        hand_over = plan.hand_over(answer.body)
        self._place.release("prefill")
        if hand_over.is_missing:
            self._exchange.service.tally.prefilled_without_kv()
            if self._pool.config.on_missing_kv == "error":
                raise UpstreamProtocolError("the prefiller's answer holds no handle", phase=Phase.PREFILL)
        leg = self._decode_leg(hand_over.decode)
        try:
            opening = await self._open(leg)
        except BaseException:
            if hand_over.holds_kv and not leg.is_sent and self._pool.config.drain_kv:
                bound = leg.upstream if plan.binds_decoder else None
                self._exchange.service.drains.start(self._exchange, self._pool, hand_over.decode, bound)
            raise
        await self._deliver(opening)

    async def _at_once(self, plan: Concurrent) -> None:
        is_prefilled = trio.Event()

        async def prefill(scope: trio.CancelScope) -> None:
            if await self._beside(scope, lambda: self._prefill(plan.prefill)):
                self._place.release("prefill")
                is_prefilled.set()

        leg = self._decode_leg(plan.decode)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(prefill, nursery.cancel_scope)
            await self._guarded(nursery.cancel_scope, leg, is_prefilled.wait)
        await self._conclude()

    async def _decode_first(self, plan: DecodeFirst) -> None:
        callbacks = self._exchange.service.callbacks
        message = b""
        is_called = trio.Event()

        def call(body: bytes) -> None:
            nonlocal message
            if not is_called.is_set():
                message = body
                is_called.set()

        async def prefill(scope: trio.CancelScope) -> None:
            await is_called.wait()
            if await self._beside(scope, lambda: self._prefill(plan.prefill(message))):
                self._place.release("prefill")

        leg = self._decode_leg(plan.decode)
        callbacks[plan.key] = call
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(prefill, nursery.cancel_scope)
                await self._guarded(nursery.cancel_scope, leg, None)
                nursery.cancel_scope.cancel()
        finally:
            del callbacks[plan.key]
        await self._conclude()

    async def _beside(self, scope: trio.CancelScope, prefill: Callable[[], Awaitable[WholeAnswer]]) -> bool:
        """Runs the prefill leg while the decode leg runs; its failure ends that. True if it went well."""
        try:
            answer = await prefill()
        except ExchangeError as failure:
            if self._failure is None:
                self.role, self._failure = "prefill", failure
        else:
            if answer.status < 400:
                return True
            self._refusal = answer
        scope.cancel()
        return False

    async def _guarded(self, scope: trio.CancelScope, leg: Leg, before: Callable[[], Awaitable[None]] | None) -> None:
        """Runs the decode leg while the prefill leg runs; `before` is waited for before anything is committed to."""
        try:
            opening = await self._open(leg)
            if before is not None:
                try:
                    await before()
                except BaseException:
                    leg.close(opening.connection, is_reusable=False)
                    raise
            await self._deliver(opening)
        except ExchangeError as failure:
            if self._failure is None:
                self.role, self._failure = "decode", failure
            scope.cancel()

    async def _conclude(self) -> None:
        """What has come of both legs, where it is not an answer that went out."""
        if self._refusal is not None and self._exchange.reply.status is None:
            await self._exchange.reply.pass_on(*self._refusal)
        elif self._refusal is not None:
            message = f"the prefiller refused the request ({self._refusal.status}) while the decoder was streaming"
            raise UpstreamProtocolError(message, phase=Phase.PREFILL)
        elif self._failure is not None:
            raise self._failure

    # -- the legs

    async def _prefill(self, sends: Sends) -> WholeAnswer:
        """The prefiller's answer, if it is one or a refusal (4xx). Raises ExchangeError for all else."""
        exchange, upstream = self._exchange, self._place.upstreams["prefill"]
        group = self._pool.groups["prefill"]
        exchange.prefill_upstream = upstream
        if exchange.phase is not Phase.DATA:
            exchange.phase = Phase.PREFILL
        limit_s = exchange.config.timeouts.prefill_s
        began = time.monotonic()
        attempt = group.begin(upstream)
        try:
            with trio.fail_after(limit_s or float("inf")):
                answer = await ask_whole(exchange, upstream, sends)
            attempt.answered(answer.status, time.monotonic())
            if answer.status >= 500:
                message = f"{upstream.config.url} answered {answer.status} to the prefill leg"
                raise UpstreamAnswered(message, phase=Phase.PREFILL, **answer._asdict())
            return answer
        except trio.TooSlowError:
            failure: ExchangeError = UpstreamTimeout(
                f"{upstream.config.url} did not answer within prefill_s = {limit_s:g} s", phase=Phase.PREFILL
            )
            self._blame(upstream, failure)
            attempt.failed(time.monotonic())
            raise failure from None
        except ExchangeError as failure:
            failure.phase = Phase.PREFILL
            self._blame(upstream, failure)
            attempt.failed(time.monotonic())
            raise
        finally:
            attempt.abandoned(time.monotonic())
            group.refresh(upstream)
            exchange.timeline.add_prefill(time.monotonic() - began)

    def _blame(self, upstream: Upstream, failure: ExchangeError) -> None:
        if failure.side is Side.UPSTREAM:
            upstream.failures += 1
            upstream.last_error = failure.message
            upstream.endpoint = None  # it may come back as another
            self._exchange.service.tally.upstream_failed(failure.phase)

    def _decode_leg(self, sends: Sends) -> Leg:
        exchange = self._exchange
        # In a split pool a 500 is a failed attempt too: a lost handle shows as one.
        statuses = (*exchange.config.failover.statuses, 500)
        upstream = self._place.upstreams["decode"]
        exchange.upstream = upstream
        group = self._pool.groups["decode"]
        return Leg(exchange, group, upstream, sends, failure_statuses=statuses, may_go_on=self._may_go_on)

    async def _open(self, leg: Leg) -> Opening:
        self.role = "decode"
        opening = await leg.open()
        try:
            await self._see_second_frame(opening)
        except BaseException:
            leg.close(opening.connection, is_reusable=False)
            raise
        return opening

    async def _see_second_frame(self, opening: Opening) -> None:
        """A stream that begins without content may go on with an error: then that is the answer. Waits a moment."""
        exchange, relay = self._exchange, opening.relay
        meter = exchange.meter
        if relay is None:
            return
        with trio.move_on_after(SECOND_FRAME_S):
            while not relay.decoder.is_done and not _says_something(meter):
                data = await wire.receive(exchange.pair, opening.connection)
                if not data:
                    return  # the pump will see that too
                out: Pieces = []
                buffer = bytearray(data)
                relay.feed(buffer, memoryview(buffer), len(buffer), out)
                if relay.decoder.is_done:
                    relay.finish(out)
                opening.first += b"".join(out)
        if meter.error is not None and not meter.saw_content:
            raise _as_answer(exchange.route, opening.first, meter.error, is_chunked=relay.is_chunked)

    async def _deliver(self, opening: Opening) -> None:
        await Delivery(self._exchange, opening).run()


def _says_something(meter: Meter) -> bool:
    """Whether a stream has shown what it will be."""
    return meter.saw_content or meter.saw_end or meter.error is not None


def _endpoint(pool: Pool, upstream: Upstream) -> Endpoint:
    config = upstream.config
    endpoint = Endpoint(
        url=config.url,
        host=config.host,
        kv_address=config.kv_address,
        bootstrap=config.bootstrap,
        bootstrap_port=config.bootstrap_port or None,
    )
    return pool.connector.complete(endpoint, "prefill" if upstream.role == "prefill" else "decode")


def _as_answer(route: Route, sent: bytes, message: str, *, is_chunked: bool) -> ExchangeError:
    """The error of a stream's first frames as the answer the engine would have given without a stream."""
    payload = bytearray()
    if is_chunked:
        decode_into(payload, ChunkDecoder(), sent)
    else:
        payload += sent
    aggregator = aggregator_for(route, max_bytes=len(payload) + 1024)
    try:
        for begin, end in split_frames(payload, 0, len(payload)):
            aggregator.feed(payload[begin:end])
    except EngineError as error:
        fields = [(b"content-type", b"application/json")]
        return UpstreamAnswered(message, phase=Phase.HEAD, status=error.status, fields=fields, body=error.body)
    return UpstreamProtocolError(message, phase=Phase.HEAD)
