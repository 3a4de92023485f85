"""Which engine an exchange gets: pools by model, the engines of each, and the places in them.

Deciding is synchronous: whoever asks for a place gets one, with its load counted, or waits in the pool's queue until
someone's departure hands one over; no await lies between looking and taking. What an engine's health and its own limit
say is kept in its seat (`Seat.is_available`), so that picking among a thousand engines does not ask them all.
"""

from __future__ import annotations

import random
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from weakref import WeakSet

import msgspec
import trio

from relay.config import Config, PoolConfig, StreamConfig
from relay.core.admission import DepartureRate, FairQueue
from relay.core.by_name import ByName
from relay.core.connectors import connector_named
from relay.core.health import HealthRules
from relay.core.request import RequestFacts, Route
from relay.errors import NoUpstream, Phase, QueueFull, QueueTimeout, RequestRefused
from relay.net.fiber import in_task
from relay.net.group import Ask, Group
from relay.net.place import Place
from relay.net.pool import Upstream
from relay.net.shares import Permits, Shares


def _policy(config: PoolConfig, role: str) -> str:
    """The policy for a role: affinity is to the prompt's keys and values, which are the prefiller's."""
    return "least_outstanding" if role == "decode" and config.balance.endswith("_affinity") else config.balance


class _Waiter:
    """A request in the queue."""

    __slots__ = ("ask", "place", "refusal", "task")

    def __init__(self, ask: Ask) -> None:
        self.ask = ask
        self.task = trio.lowlevel.current_task()
        self.place: Place | None = None
        self.refusal: NoUpstream | None = None  #: there is nothing to wait for any more


class Pool:
    """Engines that serve the same models, with the limits on their use."""

    def __init__(self, config: PoolConfig, rules: HealthRules, rng: random.Random) -> None:
        self._rng = rng
        self.config = config
        self.name = config.name
        self.stream = StreamConfig()  #: what holds for its streams
        self.session_field = config.session_header.lower().encode("ascii")
        self._leaving: WeakSet[Upstream] = WeakSet()  # until nothing holds them any more
        self.groups = {role: self._group(config, role, rules) for role in config.roles}
        self.connector = connector_named(config.connector)
        self.unresolved: dict[str, str] = {}  #: names to be resolved that are not, by URL, and why
        self.callback_url = ""  #: where decoders call back, if the connector has them do so
        self.number = 0  #: its cell in what workers share
        self.shares: Shares | None = None  #: with other workers; None: there are none
        self.permits: Permits | None = None  #: its limit's places, where it is one over several workers
        self.in_flight = 0  #: places taken
        self._queue: FairQueue[bytes, _Waiter] = FairQueue()
        self._departures = DepartureRate(time.monotonic())

    def __repr__(self) -> str:
        return f"<Pool {self.name} in_flight={self.in_flight} queued={self._queue.count}>"

    def reconfigure(self, config: PoolConfig, rules: HealthRules) -> None:
        """Takes on another configuration of the same name. Engines found by name are left to who resolves it."""
        self.session_field = config.session_header.lower().encode("ascii")
        if config.connector != self.config.connector:
            self.connector = connector_named(config.connector)
            for upstream in self.upstreams:
                upstream.endpoint = None
        before, self.groups = self.groups, {}
        for role in config.roles:
            group = before.pop(role, None)
            if group is None or config.balance != self.config.balance:
                # Another policy has other seats; what is under way is the old ones' load.
                new = self._group(config, role, rules)
            else:
                new = group
                new.set_rules(rules)
            configured = config.upstreams_of(role)
            wanted = {upstream.url: upstream for upstream in configured if not upstream.is_dns}
            if any(upstream.is_dns for upstream in configured) and group is not None:
                wanted = {url: up.config for url, up in group.upstreams.items() if up.is_resolved} | wanted
            new.become(wanted, group or new)
            self.groups[role] = new
        for group in before.values():
            group.become({}, group)
        self.config = config
        if self.shares is None:  # else engines that are new have yet to be told their limits: see `Follower`
            self.advance()

    def _group(self, config: PoolConfig, role: str, rules: HealthRules) -> Group:
        return Group(role, _policy(config, role), rules, self._rng, self._leaving)

    @property
    def leaving(self) -> list[Upstream]:
        """Engines that have been taken out, and still have something to do."""
        return sorted((up for up in self._leaving if up.outstanding), key=lambda upstream: upstream.added_at)

    @property
    def queued(self) -> int:
        """Requests that wait for a place."""
        return self._queue.count

    @property
    def upstreams(self) -> Iterator[Upstream]:
        """All engines, of all roles."""
        for group in self.groups.values():
            yield from group.upstreams.values()

    @property
    def is_split(self) -> bool:
        """Whether prompts are computed by other engines than those that go on from there."""
        return "decode" in self.groups

    def roles_for(self, route: Route) -> tuple[str, ...]:
        """The roles an exchange needs engines of; what does not generate goes to a decoder."""
        if "decode" not in self.groups:
            return ("serve",)
        return ("decode",) if route is Route.OTHER else ("prefill", "decode")

    def ask(self, route: Route, session: bytes | None, body: bytes, tenant: bytes) -> Ask:
        """What a request asks for; the policy of the first role decides what it goes by."""
        roles = self.roles_for(route)
        return Ask(roles, self.groups[roles[0]].balancer.key_of(session, body), len(body), tenant)

    def has_roles(self, ask: Ask) -> bool:
        """Whether the pool still has what was asked for: a reload may have split it, or joined it again."""
        return ask.roles[0] in self.groups  # it has both of a split pool's, or neither

    def has_others(self, place: Place, ask: Ask, tried: Mapping[str, Collection[Upstream]]) -> bool:
        """Whether, should the engines of `place` fail, there would be others for another attempt."""
        for role in ask.roles:
            group = self.groups.get(role)
            if group is not None and group.has_other([*tried.get(role, ()), place.upstreams[role]]):
                return True
        return False

    def enter_now(self, ask: Ask) -> Place | None:
        """A place with its engines taken, if one is to be had without waiting."""
        self.advance()  # one that was ejected may be tried again by now, and nothing else tells
        return None if self._queue.count else self._try_enter(ask)

    def _try_enter(self, ask: Ask) -> Place | None:
        if self.permits is not None:
            if not self.permits.take():
                return None
        elif self.config.max_in_flight and self.in_flight >= self.config.max_in_flight:
            return None
        place = Place(self, self.permits)
        for role in ask.roles:
            if role not in self.groups or place.take(role, ask) is None:
                place.give_up()
                return None
        self.in_flight += 1
        return place

    async def enter(self, ask: Ask, queue_s: float) -> Place:
        """A place, where there was none at once, after waiting for it up to `queue_s` seconds (0: no limit).

        Raises NoUpstream where no engine is up, QueueFull, or QueueTimeout.
        """
        async with in_task():  # before anything is looked at: others may have a turn here
            place = self.enter_now(ask)
            if place is not None:
                return place
            if (refusal := self._no_upstream(ask)) is not None:
                raise refusal
            elsewhere = 0.0 if self.shares is None else self.shares.load_of_others(self.number)
            if self._queue.count + elsewhere >= self.config.max_queue:
                raise self._full()
            return await self._wait(_Waiter(ask), queue_s)

    async def _wait(self, waiter: _Waiter, queue_s: float) -> Place:
        self._queue.push(waiter.ask.tenant, waiter)
        self._show_queue()

        def abort(_: object) -> trio.lowlevel.Abort:
            self._queue.remove(waiter.ask.tenant, waiter)
            self._show_queue()
            return trio.lowlevel.Abort.SUCCEEDED

        with trio.move_on_after(queue_s or float("inf")):
            await trio.lowlevel.wait_task_rescheduled(abort)
        if waiter.refusal is not None:
            raise waiter.refusal
        if waiter.place is None:
            message = f"no place at an engine within queue_s = {queue_s:g} s; try again later"
            raise QueueTimeout(message, phase=Phase.QUEUE, retry_after_s=self._retry_after_s())
        return waiter.place

    def leave(self) -> None:
        """A place is free again; called by `Place`."""
        self.in_flight -= 1
        self._departures.depart(time.monotonic())

    def advance(self) -> None:
        """Hands out what places there are to those who wait; called whenever one may have become free.

        Who waits for engines of which none is up is told so, as whoever comes now is.
        """
        while self._queue.count:
            waiter = self._queue.peek()
            waiter.place = self._try_enter(waiter.ask)
            if waiter.place is None:
                waiter.refusal = self._no_upstream(waiter.ask)
                if waiter.refusal is None:
                    return
            self._queue.pop()
            self._show_queue()
            trio.lowlevel.reschedule(waiter.task)

    def _show_queue(self) -> None:
        """Lets other workers see how many wait here: ``max_queue`` is over all of them."""
        if self.shares is not None:
            self.shares.set_load(self.number, self._queue.count)

    def _retry_after_s(self) -> int:
        return self._departures.retry_after_s(self._queue.count, time.monotonic())

    def _full(self) -> QueueFull:
        message = (
            f"pool {self.name} is full, and so is its queue of max_queue = {self.config.max_queue}; try again later"
        )
        return QueueFull(message, phase=Phase.QUEUE, retry_after_s=self._retry_after_s())

    def _no_upstream(self, ask: Ask) -> NoUpstream | None:
        """Why waiting would be in vain; None while it is not."""
        for role in ask.roles:
            group = self.groups.get(role)
            if group is None or group.is_hopeless():
                kind = "" if role == "serve" else f"{role} "
                message = f"no {kind}engine of pool {self.name} is up; see /-/status on the admin side"
                retry_after_s = 1 if group is None else group.retry_after_s()
                return NoUpstream(message, phase=Phase.CONNECT, retry_after_s=retry_after_s)
        return None

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
            pool.stream = config.stream_of(pool_config)
            self.pools.append(pool)
        for pool in known.values():
            for upstream in list(pool.upstreams):
                pool.groups[upstream.role].remove(upstream.config.url)
            pool.advance()
        self._by_model = ByName((model, pool) for pool in self.pools for model in pool.config.models)
        self._default = next((pool for pool in self.pools if not pool.config.models), None)
        self._models_matter = self._default is None or len(self.pools) > 1 or bool(config.prices)
        #: the pool of all requests, whatever their bodies say; None: there is none
        self.sole = None if self._models_matter else self.pools[0]

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
        return self._by_model.get(model) or self._default

    def pool_for(self, route: Route, facts: RequestFacts) -> Pool:
        """The pool a request goes to; the first, where it names no model. Raises RequestRefused."""
        first = self.pools[0]
        if facts.model is None:
            if route is not Route.OTHER and not facts.is_json and self._models_matter:
                message = "the body is not JSON, so it names no model to choose an engine, or a price, by"
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

    def drop_expired(self, max_idle_s: float) -> None:
        """Closes connections that have not been in use for so long, or that their engines have closed."""
        for upstream in self.upstreams:
            upstream.drop_expired(max_idle_s)

    def close_idle(self) -> None:
        """Closes every connection that is not in use."""
        for pool in self.pools:
            pool.close_idle()
