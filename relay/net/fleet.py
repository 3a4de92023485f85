"""Which engine an exchange gets: pools by model, the engines of each, and the places in them.

Deciding is synchronous: whoever asks for a place gets one, with its load counted, or waits in the pool's queue until
someone's departure hands one over; no await lies between looking and taking. What an engine's health and its own limit
say is kept in its seat (`Seat.is_available`), so that picking among a thousand engines does not ask them all.
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from types import TracebackType
from typing import Self

import msgspec
import trio

from relay.address import UpstreamConfig
from relay.config import Config, PoolConfig
from relay.core.admission import DepartureRate, FairQueue
from relay.core.balance import Load, Seat, make_balancer
from relay.core.health import Attempt, Health, HealthRules
from relay.core.request import RequestFacts, Route
from relay.errors import NoUpstream, Phase, QueueFull, QueueTimeout, RequestRefused
from relay.net.pool import Upstream


class Ask:
    """What a request asks a pool for: what a policy goes by, and whose turn it takes in the queue."""

    __slots__ = ("key", "prompt_bytes", "tenant")

    def __init__(self, key: bytes | None, prompt_bytes: int, tenant: bytes) -> None:
        self.key = key
        self.prompt_bytes = prompt_bytes
        self.tenant = tenant  #: whose turn it takes


class Group:
    """The engines of one role in a pool, and the policy that picks among them."""

    def __init__(self, role: str, balance: str, rules: HealthRules, rng: random.Random) -> None:
        self.role = role
        self.upstreams: dict[str, Upstream] = {}  #: by URL
        self.balancer = make_balancer(balance, (), rng=rng)
        self.rules = rules
        self._rng = rng
        self._by_seat: dict[Seat, Upstream] = {}
        self._ejected: set[Upstream] = set()  # to be looked at again when their time has come

    def __repr__(self) -> str:
        return f"<Group {self.role} {self.balancer!r}>"

    def add(self, config: UpstreamConfig) -> Upstream:
        """Puts in an engine. Raises ValueError if it is there."""
        upstream = Upstream(config, self.role, Health(self.rules, self._rng))
        self.balancer.add(upstream.seat)
        self.upstreams[upstream.config.url] = upstream
        self._by_seat[upstream.seat] = upstream
        return upstream

    def become(self, wanted: dict[str, UpstreamConfig], before: Group) -> None:
        """Has the engines `wanted` from now on, by URL; `before` is the group whose place this one takes, or this."""
        resolved = {url for url, upstream in before.upstreams.items() if upstream.is_resolved}
        for url in list(before.upstreams):
            if before is not self or wanted.get(url) != before.upstreams[url].config:
                before.remove(url)
        for url, config in wanted.items():
            if url not in self.upstreams:
                self.add(config).is_resolved = url in resolved

    def remove(self, url: str) -> Upstream:
        """Takes out an engine; what it is doing goes on. Raises KeyError if it is not there."""
        upstream = self.upstreams.pop(url)
        self.balancer.remove(upstream.seat)
        self._by_seat.pop(upstream.seat)
        self._ejected.discard(upstream)
        upstream.is_leaving = True
        upstream.close_idle()
        return upstream

    def refresh(self, upstream: Upstream) -> None:
        """Takes note that an engine's health, or what it has to do, has changed."""
        if upstream.is_leaving:
            return
        health = upstream.health
        if health.is_open and health.is_up:
            self._ejected.add(upstream)
        else:
            self._ejected.discard(upstream)
        is_available = health.is_available(time.monotonic()) and not upstream.is_full
        self.balancer.set_available(upstream.seat, is_available)

    def begin(self, upstream: Upstream) -> Attempt:
        """An attempt is about to be made: how it goes decides whether the engine is picked again."""
        attempt = upstream.health.begin()
        if upstream.health.is_open:
            self.refresh(upstream)  # one trial at a time
        return attempt

    def has_other(self, tried: Collection[Upstream]) -> bool:
        """Whether an engine is left that could be picked."""
        return any(self._is_usable(upstream) for upstream in self.upstreams.values() if upstream not in tried)

    def _is_usable(self, upstream: Upstream) -> bool:
        return upstream.health.is_up and not upstream.is_full

    def pick(self, ask: Ask, tried: Collection[Upstream] = ()) -> Upstream | None:
        """The engine for an attempt, none of those `tried`; None where all that are left are full or down."""
        for upstream in list(self._ejected):
            self.refresh(upstream)
        seat = self.balancer.pick(ask.key, [upstream.seat for upstream in tried])
        return self._by_seat[seat] if seat is not None else self._last_resort(tried)

    def _last_resort(self, tried: Collection[Upstream]) -> Upstream | None:
        """Where only failed requests speak against the engines that are left: the least bad of them."""
        if any(up.health.is_up and not up.health.is_open for up in self.upstreams.values() if up not in tried):
            return None  # it is full, and will have room
        left = [up for up in self._ejected if up not in tried and self._is_usable(up)]
        return min(left, key=lambda upstream: upstream.health.badness, default=None)

    def is_hopeless(self, tried: Collection[Upstream] = ()) -> bool:
        """Whether waiting would be in vain: no engine is left that is up."""
        return not any(up.health.is_up for up in self.upstreams.values() if up not in tried)

    def retry_after_s(self) -> int:
        """Whole seconds until an engine may be available."""
        now = time.monotonic()
        return max(1, round(min((up.health.retry_after_s(now) for up in self.upstreams.values()), default=1)))


class Place:
    """An exchange's part of a pool: its slot, and the loads it has put on engines. Given back whole, once."""

    __slots__ = ("_loads", "_pool", "upstream")

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._loads: list[tuple[Group, Upstream, Load]] = []
        self.upstream: Upstream | None = None  #: the engine taken last

    def take(self, group: Group, ask: Ask, tried: Collection[Upstream] = ()) -> Upstream | None:
        """Picks an engine and counts the exchange as its load; None where there is none."""
        upstream = group.pick(ask, tried)
        if upstream is not None:
            self._loads.append((group, upstream, group.balancer.take(upstream.seat, ask.prompt_bytes)))
            if upstream.config.max_in_flight:
                group.refresh(upstream)
            self.upstream = upstream
        return upstream

    def release_loads(self) -> None:
        """Gives back the loads, and keeps the slot: the next attempt is to take another engine."""
        while self._loads:
            group, upstream, load = self._loads.pop()
            load.release()
            if upstream.config.max_in_flight:
                group.refresh(upstream)
        self._pool.advance()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.leave()
        self.release_loads()


class _Waiter:
    """A request in the queue."""

    __slots__ = ("place", "task", "try_take")

    def __init__(self, try_take: Callable[[], Place | None]) -> None:
        self.try_take = try_take
        self.task = trio.lowlevel.current_task()
        self.place: Place | None = None


class Pool:
    """Engines that serve the same models, with the limits on their use."""

    def __init__(self, config: PoolConfig, rules: HealthRules, rng: random.Random) -> None:
        self._rng = rng
        self.config = config
        self.name = config.name
        self.session_field = config.session_header.lower().encode("ascii")
        self.groups = {"serve": Group("serve", config.balance, rules, rng)}
        self.in_flight = 0  #: places taken
        self._queue: FairQueue[bytes, _Waiter] = FairQueue()
        self._departures = DepartureRate(time.monotonic())

    def __repr__(self) -> str:
        return f"<Pool {self.name} in_flight={self.in_flight} queued={len(self._queue)}>"

    def reconfigure(self, config: PoolConfig, rules: HealthRules) -> None:
        """Takes on another configuration of the same name. Engines found by name are left to who resolves it."""
        self.session_field = config.session_header.lower().encode("ascii")
        group = self.serving
        wanted = {upstream.url: upstream for upstream in config.upstreams if not upstream.is_dns}
        if config.balance != self.config.balance or rules != group.rules:
            # Another policy has other seats; what is under way is the old ones' load.
            self.groups["serve"] = Group("serve", config.balance, rules, self._rng)
        for url, upstream in group.upstreams.items():
            if upstream.is_resolved and any(one.is_dns for one in config.upstreams):
                wanted.setdefault(url, upstream.config)
        self.serving.become(wanted, group)
        self.config = config
        self.advance()

    @property
    def queued(self) -> int:
        """Requests that wait for a place."""
        return len(self._queue)

    @property
    def upstreams(self) -> Iterator[Upstream]:
        """All engines, of all roles."""
        for group in self.groups.values():
            yield from group.upstreams.values()

    @property
    def serving(self) -> Group:
        """The engines that answer requests whole."""
        return self.groups["serve"]

    def enter_now(self, ask: Ask) -> Place | None:
        """A place with an engine taken, if one is to be had without waiting."""
        return None if self._queue else self._try_enter(ask)

    def _try_enter(self, ask: Ask) -> Place | None:
        if self.config.max_in_flight and self.in_flight >= self.config.max_in_flight:
            return None
        place = Place(self)
        if place.take(self.serving, ask) is None:
            return None
        self.in_flight += 1
        return place

    async def enter(self, ask: Ask, queue_s: float) -> Place:
        """A place after waiting for it, up to `queue_s` seconds (0: no limit).

        Raises NoUpstream where no engine is up, QueueFull, or QueueTimeout.
        """
        if self.serving.is_hopeless():
            raise self._no_upstream(self.serving)
        if len(self._queue) >= self.config.max_queue:
            raise self._full()
        return await self._wait(ask.tenant, _Waiter(lambda: self._try_enter(ask)), queue_s)

    async def _wait(self, tenant: bytes, waiter: _Waiter, queue_s: float) -> Place:
        self._queue.push(tenant, waiter)

        def abort(_: object) -> trio.lowlevel.Abort:
            self._queue.remove(tenant, waiter)
            return trio.lowlevel.Abort.SUCCEEDED

        with trio.move_on_after(queue_s or float("inf")):
            await trio.lowlevel.wait_task_rescheduled(abort)
        if waiter.place is None:
            message = f"no place at an engine within queue_s = {queue_s:g} s; try again later"
            raise QueueTimeout(message, phase=Phase.QUEUE, retry_after_s=self._retry_after_s())
        return waiter.place

    def leave(self) -> None:
        """A place is free again; called by `Place`."""
        self.in_flight -= 1
        self._departures.depart(time.monotonic())

    def advance(self) -> None:
        """Hands out what places there are to those who wait; called whenever one may have become free."""
        while self._queue:
            waiter = self._queue.peek()
            place = waiter.try_take()
            if place is None:
                return
            self._queue.pop()
            waiter.place = place
            trio.lowlevel.reschedule(waiter.task)

    def _retry_after_s(self) -> int:
        return self._departures.retry_after_s(len(self._queue), time.monotonic())

    def _full(self) -> QueueFull:
        message = f"pool {self.name} is full: {self.in_flight} in flight, {len(self._queue)} waiting; try again later"
        return QueueFull(message, phase=Phase.QUEUE, retry_after_s=self._retry_after_s())

    def _no_upstream(self, group: Group) -> NoUpstream:
        message = f"no engine of pool {self.name} is up; see /-/status on the admin side"
        return NoUpstream(message, phase=Phase.CONNECT, retry_after_s=group.retry_after_s())

    def close_idle(self) -> None:
        """Closes every connection that is not in use."""
        for upstream in self.upstreams:
            upstream.close_idle()


class Fleet:
    """All pools."""

    def __init__(self, config: Config) -> None:
        self._rng = random.Random()
        self.pools: list[Pool] = []
        self.reconfigure(config)

    def reconfigure(self, config: Config) -> None:
        """Takes on another configuration: what stays the same goes on as it is, with its health and connections."""
        health = config.health
        rules = HealthRules(
            failures=health.failures,
            successes=health.successes,
            interval_s=health.interval_s,
            statuses=config.failover.statuses,
        )
        known = {pool.name: pool for pool in self.pools}
        self.pools = []
        for pool_config in config.pools:
            pool = known.pop(pool_config.name, None) or Pool(pool_config, rules, self._rng)
            pool.reconfigure(pool_config, rules)
            self.pools.append(pool)
        for pool in known.values():
            for upstream in list(pool.upstreams):
                pool.groups[upstream.role].remove(upstream.config.url)
        self._by_name = {model: pool for pool in self.pools for model in pool.config.models if "*" not in model}
        self._by_pattern = [
            (re.compile(".*".join(map(re.escape, model.split("*"))), re.DOTALL), pool)
            for pool in self.pools
            for model in pool.config.models
            if "*" in model
        ]
        self._default = next((pool for pool in self.pools if not pool.config.models), None)

    def __repr__(self) -> str:
        return f"<Fleet {self.pools!r}>"

    @property
    def upstreams(self) -> Iterable[Upstream]:
        """All engines of all pools."""
        for pool in self.pools:
            yield from pool.upstreams

    @property
    def is_probed(self) -> bool:
        """Whether each engine has been asked once."""
        return all(upstream.health.is_probed for upstream in self.upstreams)

    def serving(self, model: str) -> Pool | None:
        """The pool for a model: the one that names it, else the first whose pattern fits, else the one for the rest."""
        named = self._by_name.get(model)
        if named is not None:
            return named
        for pattern, pool in self._by_pattern:
            if pattern.fullmatch(model):
                return pool
        return self._default

    def pool_for(self, route: Route, facts: RequestFacts) -> Pool:
        """The pool a request goes to; the first, where it names no model. Raises RequestRefused."""
        first = self.pools[0]
        if facts.model is None:
            if route is not Route.OTHER and not facts.is_json and not (first is self._default and len(self.pools) == 1):
                message = "the body is not JSON, so it names no model to choose an engine by"
                raise RequestRefused(400, "invalid_json", message)
            return first
        pool = self.serving(facts.model)
        if pool is not None:
            return pool
        if route is Route.OTHER:
            return first  # the relay does not know what this body's `model` means
        known = ", ".join(model for pool in self.pools for model in pool.config.models)
        raise RequestRefused(404, "model_not_found", f"no pool serves the model {facts.model!r}; known: {known}")

    def models(self) -> bytes | None:
        """The answer to ``GET /v1/models``: what the engines have said of theirs; None while nobody has.

        Only what a request would reach is listed: an engine may know models that another pool serves.
        """
        found: dict[str, msgspec.Raw] = {}
        is_known = False
        for pool in self.pools:
            for upstream in pool.upstreams:
                if upstream.models is None or not upstream.health.is_up:
                    continue
                is_known = True
                for model, entry in upstream.models.items():
                    if self.serving(model) is pool:
                        found.setdefault(model, entry)
        return msgspec.json.encode({"object": "list", "data": [*found.values()]}) if is_known else None

    def close_idle(self) -> None:
        """Closes every connection that is not in use."""
        for pool in self.pools:
            pool.close_idle()
