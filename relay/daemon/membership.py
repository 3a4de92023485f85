"""Who is in the fleet, and what is limited there and of keys, as the control process tells its workers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import trio

from relay.daemon.key_limits import Bucket, KeyLimits
from relay.daemon.limits import Limit, Limits
from relay.daemon.messages import HasFileno, KeyLimit, KeySemaphores, Member, PoolMembers, Semaphores
from relay.daemon.scoreboard import MOST_NUMBERS, Numbers, Scoreboard, Subject
from relay.net.fleet import Pool
from relay.net.notices import Priority, say
from relay.net.pool import Upstream
from relay.net.service import Service


class Told:
    """The limits that a worker knows."""

    def __init__(self) -> None:
        self.limits: dict[int, Limit] = {}
        self.key_limits: dict[KeyLimit, Limit | Bucket] = {}

    def __repr__(self) -> str:
        return f"<Told limits={len(self.limits)} key_limits={len(self.key_limits)}>"


class Membership:
    """A service's fleet with a number for each engine and pool, and the semaphores of all limits. `run` it."""

    def __init__(self, service: Service, scoreboard: Scoreboard) -> None:
        self._service = service
        self._scoreboard = scoreboard
        self._numbers = Numbers(scoreboard, on_lack=_warn_of_lack)
        self._limits = Limits()
        self.key_limits = KeyLimits(scoreboard)

    def __repr__(self) -> str:
        return f"<Membership {self._numbers!r} {self._limits!r}>"

    async def run(self) -> None:
        """Has limits hold until cancelled."""
        async with trio.open_nursery() as nursery:
            self._limits.nursery = nursery
            await self.key_limits.run()

    def fleet(self) -> list[PoolMembers]:
        """The fleet as it is now, and its limits as they are to be."""
        pools = [self._members(pool) for pool in self._service.fleet.pools]
        subjects = {(pool.name, "", "") for pool in pools}
        subjects |= {(pool.name, member.role, member.config.url) for pool in pools for member in pool.members}
        # Whoever has something to do still keeps its number: should it come back meanwhile, that counts.
        subjects |= {subject for subject, number in self._numbers if not self._scoreboard.is_clear(number)}
        for number in self._numbers.keep(subjects):
            self._limits.drop(number)
        self.key_limits.settle(self._service.guard.limits)
        return pools

    def orders(self, told: Told) -> Iterator[tuple[Semaphores | KeySemaphores, Sequence[HasFileno]]]:
        """What a worker that knows of `told`, which is brought up to date, is to be sent before the `fleet`."""
        yield from self._limits.orders(told.limits)
        yield from self.key_limits.orders(told.key_limits)

    def give_back(self, held: Mapping[int, int]) -> None:
        """The permits of a worker that is gone, by number, are free again."""
        self._limits.give_back(held)
        self.key_limits.give_back(held)

    def _members(self, pool: Pool) -> PoolMembers:
        number, is_limited = self._number((pool.name, "", ""), pool.config.max_in_flight)
        members = [self._member(pool, upstream) for upstream in pool.upstreams]
        return PoolMembers(pool.name, number, is_limited, pool.callback_url, members)

    def _member(self, pool: Pool, upstream: Upstream) -> Member:
        config, health = upstream.config, upstream.health
        number, is_limited = self._number((pool.name, upstream.role, config.url), config.max_in_flight)
        models = None if upstream.models is None else {name: bytes(raw) for name, raw in upstream.models.items()}
        return Member(
            role=upstream.role,
            config=config,
            number=number,
            is_limited=is_limited,
            is_resolved=upstream.is_resolved,
            is_probed=health.is_probed,
            is_up=health.is_up,
            has_been_up=health.has_been_up,
            error=upstream.last_error,
            error_at=upstream.last_error_at,
            probe_s=upstream.probe_s,
            models=models,
        )

    def _number(self, subject: Subject, most: int) -> tuple[int | None, bool]:
        """The number of a pool or an engine, and whether it has a limit over all workers."""
        number = self._numbers.of(subject)
        if number is None:
            return None, False
        if most:
            self._limits.set(number, most)
        return number, most > 0


def _warn_of_lack(subject: Subject) -> None:
    pool, _, url = subject
    say(f"relay: {url or pool}: more than {MOST_NUMBERS} engines; its limit is each worker's", Priority.WARNING)
