"""A worker's metrics: what each exchange adds to its board."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

import trio

from relay.core import metrics
from relay.core.board import BOARD_BYTES, Board, Buckets
from relay.core.cost import Sum
from relay.core.metrics import GaugeFamily
from relay.errors import ExchangeError, Side, UpstreamRecomputed
from relay.net.notices import Priority, say

if TYPE_CHECKING:
    from relay.core.board import Block
    from relay.net.exchange import Exchange
    from relay.net.fleet import Pool
    from relay.net.pool import Upstream
    from relay.net.service import Service

#: How often what is under way is looked at: gaps of running streams, gauges, and the event loop's lag.
BEAT_S: Final = 1.0
#: Seconds between two complaints about a prefiller: it is set up wrongly, and each request shows it.
COMPLAINT_S: Final = 60.0

_FAILED: Final = metrics.RESPONSE_CLASSES.index("failed")


class Tally:
    """Counts exchanges as they end, and folds in the gaps of those that go on."""

    def __init__(self, block: Block | None = None) -> None:
        self.block: Block = block if block is not None else bytearray(BOARD_BYTES)
        self.board = Board(self.block)
        board = self.board
        self._frames = board.counter(metrics.FRAMES)
        self._frames_counted = 0
        self._bytes_in, self._bytes_out = (board.counter(metrics.BYTES, direction) for direction in metrics.DIRECTIONS)
        self._duration = board.histogram(metrics.REQUEST_DURATION)
        self._added = {stage: board.histogram(metrics.ADDED, stage) for stage in metrics.STAGES}
        self._cost = Sum(board.counter(metrics.COST))
        self._failovers = board.counter(metrics.FAILOVERS)
        self._shown: set[tuple[GaugeFamily, tuple[str, ...]]] = set()  # gauges, with their labels
        self._lag = board.histogram(metrics.EVENT_LOOP_LAG)

    def __repr__(self) -> str:
        return f"<Tally {self.board!r}>"

    def upstream_answered(self, exchange: Exchange, upstream: Upstream, status: int) -> None:
        """An engine has answered."""
        upstream.server_errors += status >= 500
        self._response(exchange, upstream, min(status // 100, 5) - 1)

    def upstream_failed(self, exchange: Exchange, upstream: Upstream, failure: ExchangeError) -> None:
        """An attempt failed by its engine's fault."""
        upstream.failures += 1
        upstream.note_error(failure.message)
        self.board.counter(metrics.UPSTREAM_FAILURES, failure.phase.name.lower()).add()
        self._response(exchange, upstream, _FAILED)

    def _response(self, exchange: Exchange, upstream: Upstream, at: int) -> None:
        counter = upstream.responses[at]
        if counter is None:
            labels = (exchange.pool.name if exchange.pool else "", upstream.role, upstream.config.url)
            counter = self.board.counter(metrics.UPSTREAM_RESPONSES, *labels, metrics.RESPONSE_CLASSES[at])
            upstream.responses[at] = counter
        counter.add()

    def failed_over(self) -> None:
        """Another attempt is made because one has failed."""
        self._failovers.add()

    def prefilled_without_kv(self, pool: Pool, prefiller: Upstream) -> None:
        """A prefiller's answer held no handle: one line, however often it happens."""
        self.board.counter(metrics.PREFILL_WITHOUT_KV).add()
        now = time.monotonic()
        if now - prefiller.lack_told_at >= COMPLAINT_S:
            prefiller.lack_told_at = now
            is_error = pool.config.on_missing_kv == "error"
            result = "the request fails (on_missing_kv)" if is_error else "a decoder computes the prompt again"
            say(
                f"relay: pool {pool.name}: {prefiller.config.url} prefilled and gave no handle, so {result}; if it "
                f"goes on, look at its --kv-transfer-config, and the pool's connector: {pool.config.connector}",
                Priority.WARNING,
            )

    def drained(self, *, is_done: bool) -> None:
        """A handle whose client had left was freed, or could not be."""
        self.board.counter(metrics.KV_DRAINS, metrics.DRAIN_RESULTS[not is_done]).add()

    def records_dropped(self, number: int) -> None:
        """So many records could not be written."""
        self.board.counter(metrics.RECORDS_DROPPED).add(number)

    def refused(self, failure: ExchangeError, bytes_out: int) -> None:
        """A request that never became an exchange: it could not be read, or was not let in; its answer's bytes."""
        self._bytes_out.add(bytes_out)
        self.board.counter(metrics.REQUESTS, "", "", str(failure.status), failure.outcome).add()
        if _has_left(failure):
            self.board.counter(metrics.CLIENT_DISCONNECTS, failure.phase.name.lower()).add()

    def ended(self, exchange: Exchange) -> None:
        """An exchange has ended."""
        board, timeline = self.board, exchange.timeline
        pool = exchange.pool.name if exchange.pool else ""
        status = exchange.status
        labels = (pool, exchange.route, str(status) if status else "", exchange.outcome)
        board.counter(metrics.REQUESTS, *labels).add()
        if timeline.ended is not None:
            self._duration.observe(timeline.ended - timeline.request_started)
        self._bytes_in.add(len(exchange.request.body))
        self._bytes_out.add(exchange.bytes_out)
        failure = exchange.failure
        if isinstance(failure, UpstreamRecomputed):
            board.counter(metrics.RECOMPUTED).add()
        if failure is not None and _has_left(failure):
            board.counter(metrics.CLIENT_DISCONNECTS, failure.phase.name.lower()).add()
        if exchange.pool is None:
            return
        self._times(exchange, pool)
        self._tokens(exchange, pool)
        if exchange.cost is not None:
            self._cost.add(exchange.cost.total)
        key = exchange.request.key
        if key is not None:
            exchange.service.keys.of(key).spend(exchange.meter.usage, exchange.cost)
        self.fold(exchange)

    def _times(self, exchange: Exchange, pool: str) -> None:
        timeline = exchange.timeline
        if timeline.queue_s:
            self._added["queue"].observe(timeline.queue_s)
        if timeline.connect_s is not None:
            self._added["connect"].observe(timeline.connect_s)
        if timeline.prefill_s is not None:
            self.board.histogram(metrics.PREFILL).observe(timeline.prefill_s)
        handover_s = timeline.handover_s
        if handover_s is not None:
            self.board.histogram(metrics.HANDOVER).observe(handover_s)
        ttft_s = timeline.ttft_s
        if ttft_s is not None:
            self.board.histogram(metrics.FIRST_TOKEN, pool, exchange.facts.model or "").observe(ttft_s)
        own = timeline.relay_s(
            timeline.first_content_sent or timeline.head, timeline.first_content_read or timeline.head
        )
        if own is not None:
            self._added["relay"].observe(own)

    def _tokens(self, exchange: Exchange, pool: str) -> None:
        usage = exchange.meter.usage
        if usage is not None:
            model = exchange.facts.model or ""
            for kind, number in usage.by_kind():
                self.board.counter(metrics.TOKENS, pool, model, kind).add(number)

    def fold(self, exchange: Exchange) -> None:
        """Adds the gaps that an exchange's stream has had since the last time."""
        if exchange.gaps.count and exchange.pool is not None:
            self._gaps(exchange).fold(exchange.gaps)

    def _gaps(self, exchange: Exchange) -> Buckets:
        assert exchange.pool is not None
        return self.board.histogram(metrics.INTER_FRAME, exchange.pool.name, exchange.facts.model or "")

    def take_in(self, service: Service) -> None:
        """Brings the board up to date with what is under way."""
        frames = service.pump.frames
        self._frames.add(frames - self._frames_counted)
        self._frames_counted = frames
        for exchange in service.active:
            self.fold(exchange)
        self.board.flush()
        gauges = dict(_gauges(service))
        for (family, labels), value in gauges.items():
            self.board.gauge(family, *labels).set(value)
        for family, labels in self._shown - gauges.keys():  # of what has left
            self.board.gauge(family, *labels).clear()
        self._shown = set(gauges)

    async def run(self, service: Service) -> None:
        """Takes in what is under way each second, and notes how late that was, until cancelled."""
        due = time.monotonic() + BEAT_S
        while True:
            await trio.sleep(max(0.0, due - time.monotonic()))
            self._lag.observe(time.monotonic() - due)
            self.take_in(service)
            due = time.monotonic() + BEAT_S


def _has_left(failure: ExchangeError) -> bool:
    """Whether the client ended it, and was not given up as too slow."""
    return failure.side is Side.CLIENT and not failure.is_timeout


def _gauges(service: Service) -> Iterator[tuple[tuple[GaugeFamily, tuple[str, ...]], float]]:
    """What there is now of pools and engines."""
    for pool in service.fleet.pools:
        yield (metrics.IN_FLIGHT, (pool.name,)), pool.in_flight
        yield (metrics.QUEUE_DEPTH, (pool.name,)), pool.queued
        for upstream in pool.leaving:
            yield (metrics.UPSTREAM_IN_FLIGHT, (pool.name, upstream.role, upstream.config.url)), upstream.outstanding
        for role, group in pool.groups.items():
            number_up = 0
            for upstream in group.upstreams.values():
                labels = (pool.name, role, upstream.config.url)
                is_healthy = upstream.health.is_up and not upstream.health.is_open
                number_up += is_healthy
                yield (metrics.UPSTREAM_HEALTHY, labels), is_healthy
                yield (metrics.UPSTREAM_IN_FLIGHT, labels), upstream.streams
            yield (metrics.UPSTREAMS_UP, (pool.name, role)), number_up
