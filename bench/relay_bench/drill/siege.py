"""A relay under attack beside healthy clients: what is seen of both, and of its memory, while the attack lasts."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final

import msgspec
import trio

from relay_bench.drill.attackers import Tally
from relay_bench.processes import memory_bytes

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Sequence

    from relay_bench.drill.attackers import Attack, Attackers
    from relay_bench.drill.healthy import Healthy
    from relay_bench.drill.report import Report
    from relay_bench.drill.stage import EngineChild, RelayChild

MIB: Final = 1 << 20
#: What a healthy client may wait at most, or twice what it has without an attack: people notice a stream that stands
#: still for a second, and it is several times what two cores that others share have made of 50 ms.
_LARGEST_MS: Final = 1000.0
#: Seconds between two looks at the relay's memory.
_LOOK_S: Final = 0.05


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """How large, and how long."""

    healthy: int = 100
    tokens: int = 100  #: of a healthy stream
    step_ms: float = 50.0
    window_s: float = 8.0  #: in which gaps are measured
    slow_readers: int = 1_000
    frame_bytes: int = 262_144  #: in each slow reader's stream, so that its buffers are full at once
    slowloris: int = 500
    bombs: int = 200
    head_bytes: int = 65_536  #: max_head_bytes
    body_bytes: int = 4 * MIB  #: max_body_bytes
    idle: int = 50_000
    max_connections: int = 20_000
    churn: int = 20  #: that come and go, at a time
    lookers: int = 200  #: beside them, that look whether they are let in before they go
    limit_s: float = 2.0  #: client_head_s and client_body_s
    patience_s: float = 10.0  #: beyond that, of attackers: bombs are megabytes each
    idle_s: float = 30.0  #: client_idle_s: of thousands of silent clients, the kernel loses a few last words
    #: By which the healthy clients' p99 gap may grow, times what it is without.
    slower: float = 2.0
    niceness: int = 19  #: of attackers: they are on other machines, and theirs is not the healthy clients' CPU
    seed: int = 0

    @property
    def buffered_bytes(self) -> int:
        """``max_buffered_bytes``: a quarter of the bombs' bodies."""
        return self.bombs * self.body_bytes // 4


class Peak:
    """By how many bytes a relay's memory has grown, at most, from what it was `before`."""

    def __init__(self, pid: int, before: int) -> None:
        self._pid = pid
        self._before = before
        self.bytes = 0

    def __repr__(self) -> str:
        return f"<Peak {self.bytes:+,}>"

    async def look(self) -> None:
        """Takes in what it is now."""
        self.bytes = max(self.bytes, await _memory_bytes(self._pid) - self._before)


class Siege:
    """An attack of the attackers' process; when it is over, what has become of it."""

    def __init__(self) -> None:
        self.tally = Tally()
        self.grown = 0  #: bytes of the relay's memory, at most

    def __repr__(self) -> str:
        return f"<Siege {self.tally}>"


class Site:
    """The relay under attack, and the healthy clients."""

    def __init__(
        self,
        report: Report,
        relay: RelayChild,
        engines: Sequence[EngineChild],
        healthy: Healthy,
        attackers: Attackers,
        plan: Plan,
        at_rest: int = 0,
    ) -> None:
        self.report = report
        self.relay = relay
        self.engines = engines
        self.at_rest = at_rest  #: the relay's descriptors when nobody is there
        self.healthy = healthy
        self.attackers = attackers
        self.plan = plan
        self.tallies: dict[str, Tally] = {}  #: of the attacks that are over, by name
        self.p99_ms = 0.0  #: of the healthy without any attack
        self.largest_ms = 0.0  #: the same

    def __repr__(self) -> str:
        return f"<Site {self.relay!r} {self.healthy!r}>"

    def judge(self, attack: str, criterion: str, is_kept: bool, seen: str) -> None:
        """One row of the table."""
        self.report.judge(f"{attack}: {criterion}", is_kept, seen)

    @asynccontextmanager
    async def under(self, name: str, attack: Attack) -> AsyncGenerator[Siege]:
        """Attacks from begin to end; then what the context was given is complete."""
        siege = Siege()
        async with self.memory_watched() as peak:
            await self.attackers.begin(attack)
            yield siege
            siege.tally = tally = self.tallies[name] = await self.attackers.end(attack.patience_s)
        siege.grown = peak.bytes
        self.judge_largest(name)
        came = f"{tally.begun:,} came, {attack.clients:,} at a time; for {tally.lull_s:.2f} s at most there was none"
        self.report.add(name, came)

    @asynccontextmanager
    async def memory_watched(self) -> AsyncGenerator[Peak]:
        """Looks at the relay's memory all the while."""
        pid = self.relay.process.pid
        peak = Peak(pid, await _memory_bytes(pid))

        async def watch() -> None:
            while True:
                await peak.look()
                await trio.sleep(_LOOK_S)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch)
            yield peak
            await peak.look()
            nursery.cancel_scope.cancel()

    async def judge_healthy(self, attack: str) -> None:
        """While the attack lasts: the healthy clients' gaps."""
        failed = len(self.healthy.failures)
        p99_ms = await self.healthy.p99_ms(self.plan.window_s)
        slower = self.plan.slower
        seen = f"{p99_ms:.1f} ms, without {self.p99_ms:.1f} ms"
        is_kept = 0 < p99_ms <= slower * self.p99_ms
        self.judge(attack, f"healthy p99 gap within {slower:g} × of without", is_kept, seen)
        failures = self.healthy.failures[failed:]
        self.judge(attack, "no healthy client fails", not failures, f"{len(failures)}: {failures[:1]}")

    def judge_largest(self, attack: str) -> None:
        """When the attack is over: the longest that a healthy client had to wait since the last was."""
        largest_ms, slower = self.healthy.largest_ms(), self.plan.slower
        bound = f"{_LARGEST_MS / 1e3:g} s, or {slower:g} × of without"
        is_kept = 0 < largest_ms <= max(_LARGEST_MS, slower * self.largest_ms)
        seen = f"{largest_ms:.1f} ms, without {self.largest_ms:.1f} ms"
        self.judge(attack, f"healthy largest gap within {bound}", is_kept, seen)

    def judge_memory(self, attack: str, grown: int, bound: float, why: str) -> None:
        """The relay's memory beside what the configuration lets it hold."""
        self.judge(attack, f"memory grows by no more than {bound / MIB:,.1f} MiB ({why})", grown <= bound,
                   f"{grown / MIB:+,.1f} MiB at most")  # fmt: skip

    def judge_told(self, attack: str, tally: Tally, *told: str) -> None:
        """What each attacker was told, and that it was told something."""
        is_kept = bool(tally.answers) and tally.answers.keys() <= {*told}
        self.judge(attack, f"told {' or '.join(told)}", is_kept, f"told {tally.told}")

    async def clients(self) -> int:
        """How many have a connection, by the relay's descriptors less those to engines, as these count them."""
        counts = [await engine.counts() for engine in self.engines]
        to_engines = sum(count["connections_open"] - 1 for count in counts)  # one asks
        return self.relay.descriptors() - self.at_rest - to_engines


async def _memory_bytes(pid: int) -> int:
    """By a thread: it takes the kernel 6 ms where there are 400 MiB, and healthy streams are timed meanwhile."""
    return await trio.to_thread.run_sync(memory_bytes, pid)
