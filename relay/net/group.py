"""The engines of one role in a pool, and the choice among them."""

from __future__ import annotations

import random
import time
from collections.abc import Collection
from typing import Final
from weakref import WeakSet

from relay.address import UpstreamConfig
from relay.core.balance import Seat, make_balancer
from relay.core.health import Attempt, Health, HealthRules
from relay.net.notices import Priority, say
from relay.net.pool import Upstream
from relay.net.shares import Shares

#: How old the other workers' loads may be at a pick, seconds for each engine. To take them in costs 0.05 to 0.17 µs an
#: engine with one other worker, 0.3 with seven, so it is at most some hundredths of the time, and no time at all while
#: nothing is picked. A few engines' are read anew for nearly every pick, a thousand's each 5 ms.
LOADS_AGE_S: Final = 5e-6


class Ask:
    """What a request asks a pool for: what a policy goes by, and whose turn it takes in the queue."""

    __slots__ = ("key", "prompt_bytes", "roles", "tenant")

    def __init__(self, roles: tuple[str, ...], key: bytes | None, prompt_bytes: int, tenant: bytes) -> None:
        self.roles = roles  #: an engine of each
        self.key = key  #: what the policy goes by
        self.prompt_bytes = prompt_bytes
        self.tenant = tenant  #: whose turn it takes


class Group:
    """The engines of one role in a pool, and the policy that picks among them."""

    def __init__(
        self, role: str, balance: str, rules: HealthRules, rng: random.Random, leaving: WeakSet[Upstream]
    ) -> None:
        self.role = role
        self.upstreams: dict[str, Upstream] = {}  #: by URL
        self.balancer = make_balancer(balance, (), rng=rng)
        self._rules = rules
        self._rng = rng
        self._leaving = leaving  # where those go that are taken out
        self._by_seat: dict[Seat, Upstream] = {}
        self.shares: Shares | None = None  #: with other workers; None: there are none
        self._loads_until = 0.0
        self._ejected: set[Upstream] = set()  # to be looked at again when their time has come

    def __repr__(self) -> str:
        return f"<Group {self.role} {self.balancer!r}>"

    def set_rules(self, rules: HealthRules) -> None:
        """From now on health goes by these; what is known of each engine stays."""
        self._rules = rules
        for upstream in self.upstreams.values():
            upstream.health.go_by(rules)
            self.refresh(upstream)

    def add(self, config: UpstreamConfig) -> Upstream:
        """Puts in an engine. Raises ValueError if it is there."""
        upstream = Upstream(config, self.role, Health(self._rules, self._rng))
        upstream.before = self._leaving_at(config.url)
        self.balancer.add(upstream.seat)
        self.upstreams[upstream.config.url] = upstream
        self._by_seat[upstream.seat] = upstream
        self.refresh(upstream)  # those before it may have filled it
        return upstream

    def become(self, wanted: dict[str, UpstreamConfig], before: Group) -> None:
        """Has the engines `wanted` from now on, by URL; `before` is the group whose place this one takes, or this."""
        resolved = {url: upstream.config for url, upstream in before.upstreams.items() if upstream.is_resolved}
        for url in list(before.upstreams):
            if before is not self or wanted.get(url) != before.upstreams[url].config:
                before.remove(url)
        for url, config in wanted.items():
            if url not in self.upstreams:
                self.add(config).is_resolved = resolved.get(url) == config

    def remove(self, url: str) -> None:
        """Takes out an engine; what it is doing goes on. Raises KeyError if it is not there."""
        upstream = self.upstreams.pop(url)
        self.balancer.remove(upstream.seat)
        self._by_seat.pop(upstream.seat)
        self._ejected.discard(upstream)
        upstream.is_leaving = True
        upstream.before = []  # else each would keep the one before it, without end
        upstream.close_idle()
        self._leaving.add(upstream)

    def refresh(self, upstream: Upstream) -> None:
        """Takes note that an engine's health, or what it has to do, has changed."""
        if upstream.is_leaving:
            return
        health = upstream.health
        if health.is_open and health.is_up:
            if upstream not in self._ejected:
                self._ejected.add(upstream)
                say(f"relay: {upstream.config.url} is ejected: {upstream.last_error}", Priority.WARNING)
        elif upstream in self._ejected:
            self._ejected.discard(upstream)
            if health.is_up:
                say(f"relay: {upstream.config.url} is no longer ejected")
        is_available = health.is_available(time.monotonic()) and not upstream.is_full
        self.balancer.set_available(upstream.seat, is_available)

    def departed(self, upstream: Upstream) -> None:
        """An exchange has ended that held a load on an engine which is, or was, in this role."""
        if upstream.is_leaving:
            left = self._leaving_at(upstream.config.url)
            current = self.upstreams.get(upstream.config.url)
            if current is None:
                if upstream.shares is not None:
                    upstream.shares.set_load(upstream.number, sum(each.seat.load for each in left))
                return
            current.before, upstream = left, current
        upstream.show_load()
        if upstream.config.max_in_flight:
            self.refresh(upstream)

    def _leaving_at(self, url: str) -> list[Upstream]:
        """Those that were taken out at a URL, and still have something to do."""
        return [up for up in self._leaving if up.config.url == url and up.role == self.role and up.outstanding]

    def begin(self, upstream: Upstream) -> Attempt:
        """An attempt is about to be made: how it goes decides whether the engine is picked again."""
        attempt = upstream.health.begin()
        if upstream.health.is_open:
            self.refresh(upstream)  # one trial at a time
        return attempt

    def end(self, attempt: Attempt, upstream: Upstream) -> None:
        """It is over, however it went. Where it changed nothing, as nearly all, there is nothing to take note of."""
        if not attempt.is_ended:
            attempt.abandoned(time.monotonic())
        if attempt.may_change_availability:
            self.refresh(upstream)

    def has_other(self, tried: Collection[Upstream]) -> bool:
        """Whether an engine is left that could be picked."""
        for upstream in self.upstreams.values():  # noqa: SIM110 — once per request: half the time of any()
            if upstream not in tried and self._is_usable(upstream):
                return True
        return False

    def _is_usable(self, upstream: Upstream) -> bool:
        return upstream.health.is_up and not upstream.is_full

    def pick(self, ask: Ask, tried: Collection[Upstream] = ()) -> Upstream | None:
        """The engine for an attempt, none of those `tried`; None where all that are left are full or down."""
        if self._ejected:
            for upstream in list(self._ejected):
                self.refresh(upstream)
        if self.shares is not None:
            self._look_at_others(self.shares)
        seat = self.balancer.pick(ask.key, [upstream.seat for upstream in tried] if tried else ())
        return self._by_seat[seat] if seat is not None else self._last_resort(tried)

    def _look_at_others(self, shares: Shares) -> None:
        """Takes in what other workers have at the engines."""
        now = time.monotonic()
        if now < self._loads_until:
            return
        loads = shares.loads_of_others()
        for upstream in self.upstreams.values():
            self.balancer.set_others(upstream.seat, loads[upstream.number])
        self._loads_until = now + LOADS_AGE_S * len(self.upstreams)

    def _last_resort(self, tried: Collection[Upstream]) -> Upstream | None:
        """Where only failed requests speak against the engines that are left: the least bad of them."""
        if any(up.health.is_up and not up.health.is_open for up in self.upstreams.values() if up not in tried):
            return None  # it is full, and will have room
        left = [up for up in self._ejected if up not in tried and self._is_usable(up)]
        return min(left, key=lambda upstream: upstream.health.badness, default=None)

    def is_hopeless(self) -> bool:
        """Whether waiting would be in vain: no engine is up."""
        return not any(upstream.health.is_up for upstream in self.upstreams.values())

    def retry_after_s(self) -> int:
        """Whole seconds until an engine may be available."""
        now = time.monotonic()
        return max(1, round(min((up.health.retry_after_s(now) for up in self.upstreams.values()), default=1)))
