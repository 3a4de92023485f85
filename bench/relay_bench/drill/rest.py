"""What must hold when the last client has left: nothing is counted, held or open that is not in use."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import msgspec

from relay_bench.drill.report import Report
from relay_bench.drill.stage import holds
from relay_bench.processes import peers

if TYPE_CHECKING:
    from collections.abc import Sequence

    from relay_bench.drill.stage import EngineChild, RelayChild


class Rest(msgspec.Struct, frozen=True):
    """What is left in relay and engines."""

    in_flight: int = 0  #: exchanges of the relay, and places in its pool
    queued: int = 0
    loads: int = 0  #: in flight by the engines' seats
    running: int = 0  #: requests by the engines' own count, queued there or running
    descriptors: int = 0  #: of the relay, open at each look, beyond those at its start and its idle connections
    connections: int = 0  #: open by the engines' own count, beyond the relay's idle ones

    @property
    def is_complete(self) -> bool:
        """Whether nothing is. An engine may have closed a connection that the relay still believes idle."""
        counts = (self.in_flight, self.queued, self.loads, self.running)
        return not any(counts) and self.descriptors <= 0 and self.connections <= 0


class Look:
    """Looks, one after the other. What probes open is closed by the next look, what has leaked is open at each.

    `descriptors` is how many the relay had open at its start.
    """

    def __init__(self, relay: RelayChild, engines: Sequence[EngineChild], descriptors: int) -> None:
        self._relay = relay
        self._engines = engines
        self._at_start = descriptors
        self._lasting = relay.open_files()

    def __repr__(self) -> str:
        return f"<Look {len(self._lasting)} descriptors last>"

    async def again(self) -> Rest:
        """What is left now."""
        status = await self._relay.status()
        self._lasting &= self._relay.open_files()
        pools = status.pools
        upstreams = [upstream for pool in pools for upstream in pool.upstreams]
        counts = [await engine.counts() for engine in self._engines]
        idle = sum(upstream.idle for upstream in upstreams)
        return Rest(
            in_flight=status.in_flight + sum(pool.in_flight for pool in pools),
            queued=sum(pool.queued for pool in pools),
            loads=sum(upstream.in_flight for upstream in upstreams),
            running=sum(count["queued"] + count["running"] for count in counts),
            descriptors=len(self._lasting) - idle - self._at_start,
            connections=sum(count["connections_open"] - 1 for count in counts) - idle,  # one asks
        )

    def lasting(self) -> str:
        """What was open at each look, by what it refers to or whom it leads to."""
        far = peers()
        found = Counter(far.get(name, name.partition(":[")[0]) for _, name in self._lasting)
        return ", ".join(f"{name} × {number}" for name, number in sorted(found.items()))


async def judge_rest(
    report: Report, relay: RelayChild, engines: Sequence[EngineChild], descriptors: int, limit_s: float
) -> None:
    """All clients have left: whether everything comes to rest within a time."""
    looks = Look(relay, engines, descriptors)
    rest = await looks.again()

    async def is_complete() -> bool:
        nonlocal rest
        rest = await looks.again()
        return rest.is_complete

    await holds(is_complete, limit_s)
    left = rest.in_flight + rest.queued + rest.loads
    report.judge(
        "all load counts are back at zero",
        not left,
        f"in flight {rest.in_flight}, queued {rest.queued}, at engines {rest.loads}",
    )
    report.judge("the engines run nothing", not rest.running, f"{rest.running} queued or running")
    has_leaked = rest.descriptors > 0 or rest.connections > 0
    report.judge(
        "no connection has leaked",
        not has_leaked,
        f"beyond the idle ones: {max(rest.descriptors, 0)} descriptors of the relay, "
        f"{max(rest.connections, 0)} connections of the engines{f'; {looks.lasting()}' if has_leaked else ''}",
    )


async def records_of(report: Report, relay: RelayChild) -> list[dict[str, Any]]:
    """Stops the relay; its records. It must end well, and have met no fault of its own."""
    await relay.stop()
    status, faults = relay.process.returncode, relay.faults
    report.judge(
        "the relay has met no fault of its own, and ends in order",
        status == 0 and not faults,
        f"status {status}{', ' + faults[0] if faults else ''}",
    )
    return relay.records()
