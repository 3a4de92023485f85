"""An attempt with one engine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from relay.core.connectors.base import LegRequest
from relay.net.delivery import Delivery
from relay.net.leg import Leg

if TYPE_CHECKING:
    from collections.abc import Callable

    from relay.net.exchange import Exchange
    from relay.net.fleet import Pool
    from relay.net.place import Place


class PlainAttempt:
    """One attempt of an exchange in a pool whose engines answer requests whole."""

    role: Final = "serve"

    def __init__(self, exchange: Exchange, pool: Pool, place: Place, may_go_on: Callable[[], bool]) -> None:
        self._exchange = exchange
        exchange.upstream = place.upstreams[self.role]
        self._leg = Leg(
            exchange,
            pool.groups[self.role],
            place.upstreams[self.role],
            LegRequest(exchange.body, exchange.attempt_id),
            failure_statuses=exchange.config.failover.statuses,
            may_go_on=may_go_on,
        )

    async def run(self) -> None:
        """Has the engine answer, and takes its answer to the client. Raises ExchangeError."""
        await Delivery(self._exchange, await self._leg.open()).run()
