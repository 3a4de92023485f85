"""What a service is doing: its pools, engines and exchanges, as the admin side tells them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import relay
from relay.core.status import DRAINING, ExchangeStatus, PoolStatus, Status, UpstreamStatus

if TYPE_CHECKING:
    from relay.core.board import Block
    from relay.net.fleet import Pool
    from relay.net.pool import Upstream
    from relay.net.service import Service


class Crew(Protocol):
    """Those who carry the traffic."""

    @property
    def blocks(self) -> Sequence[Block]:
        """Where their boards are; up to date after `statuses`."""
        ...

    @property
    def pids(self) -> Sequence[int]:
        """All processes of the daemon."""
        ...

    async def statuses(self) -> list[Status]:
        """What each of them is doing."""
        ...

    async def exchanges(self) -> list[ExchangeStatus]:
        """Theirs in flight."""
        ...

    async def settle(self) -> None:
        """Waits until they know of all that has changed. Raises ValueError where one does not answer."""
        ...


def status_of(service: Service) -> Status:
    """What a service is doing, but for its rates, and how long it has."""
    now = time.monotonic()
    return Status(
        version=relay.__version__,
        state="ready" if service.is_ready else DRAINING,
        uptime_s=0.0,
        in_flight=len(service.active),
        frames=service.pump.frames,
        pools=tuple(_pool(pool, now) for pool in service.fleet.pools),
    )


def _pool(pool: Pool, now: float) -> PoolStatus:
    return PoolStatus(
        name=pool.name,
        models=pool.config.models,
        policy=pool.config.balance,
        in_flight=pool.in_flight,
        max_in_flight=pool.config.max_in_flight,
        queued=pool.queued,
        unresolved=dict(pool.unresolved),
        upstreams=tuple(_upstream(upstream, now) for upstream in (*pool.upstreams, *pool.leaving)),
    )


def _upstream(upstream: Upstream, now: float) -> UpstreamStatus:
    return UpstreamStatus(
        url=upstream.config.url,
        role=upstream.role,
        state=DRAINING if upstream.is_leaving else upstream.health.state(now).value,
        weight=upstream.config.weight,
        in_flight=upstream.outstanding,
        max_in_flight=upstream.config.max_in_flight,
        idle=upstream.idle,
        failures=upstream.failures,
        server_errors=upstream.server_errors,
        last_error=upstream.last_error,
        last_error_age_s=None if upstream.last_error is None else round(now - upstream.last_error_at, 3),
        probe_ms=None if upstream.probe_s is None else round(upstream.probe_s * 1000, 3),
        age_s=round(now - upstream.added_at, 3),
    )


def exchanges_of(service: Service) -> list[ExchangeStatus]:
    """Those in flight, in no order."""
    now = time.monotonic()
    return [
        ExchangeStatus(
            id=exchange.id,
            client=exchange.client.peer,
            path=exchange.request.path,
            model=exchange.facts.model,
            pool=exchange.pool.name if exchange.pool else None,
            upstream=exchange.upstream.config.url if exchange.upstream else None,
            phase=exchange.phase.name.lower(),
            attempts=exchange.attempts,
            frames=exchange.frames_so_far,
            age_ms=round((now - exchange.timeline.request_started) * 1000, 3),
        )
        for exchange in service.active
    ]
