"""Whoever is let in, moved on or reconfigured, nothing is left over; and who is picked."""

from __future__ import annotations

import time
from collections import Counter, deque
from weakref import WeakSet

import msgspec
import pytest
import trio
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from relay.address import parse_upstream
from relay.config import FailoverConfig, HealthConfig, PoolConfig
from relay.core.health import CONSECUTIVE_FAILURES
from relay.errors import QueueFull
from relay.net.fleet import Fleet
from relay.net.group import Ask
from relay.net.place import Place
from relay.net.pool import Upstream
from relay.net.shares import Shares
from tests.net.pools import (
    ASK,
    RULES,
    URLS,
    assert_empty,
    bring_up,
    config_of,
    eject,
    engine_of,
    enter,
    enter_and_stay,
    group_of,
    leave,
    pool_of,
    take_down,
    upstreams,
)

# -- any sequence


class AnyTraffic(RuleBasedStateMachine):
    """Exchanges come, fail over and go while engines come, go, fail and return, and configurations change."""

    @initialize(
        balance=st.sampled_from(["least_outstanding", "round_robin", "random", "power_of_two", "prefix_affinity"]),
        most=st.integers(0, 2),
        pool_most=st.integers(0, 3),
    )
    def begin(self, balance: str, most: int, pool_most: int) -> None:
        self.pool = pool_of(*URLS[:2], most=most, balance=balance, max_in_flight=pool_most)
        self.places: list[Place] = []
        self.seen: set[Upstream] = set()

    def up(self, at: int) -> Upstream | None:
        ups = list(self.pool.upstreams)
        return ups[at % len(ups)] if ups else None

    @rule(prompt_bytes=st.integers(0, 100_000))
    def come(self, prompt_bytes: int) -> None:
        place = self.pool.enter_now(Ask(("serve",), b"key", prompt_bytes, b"me"))
        most = self.pool.config.max_in_flight
        is_room = not most or len(self.places) < most
        if place is None:
            # Of those that are up and closed every one is full; ejected ones only count where there is no such.
            closed = [up for up in self.pool.upstreams if up.health.is_up and not up.health.is_open]
            others = [up for up in self.pool.upstreams if up.health.is_up]
            assert not is_room or all(up.is_full for up in closed or others)
        else:
            assert is_room
            up = engine_of(place)
            assert up.health.is_up
            assert not up.config.max_in_flight or up.outstanding <= up.config.max_in_flight
            self.places.append(place)

    @precondition(lambda self: self.places)
    @rule(at=st.integers(0))
    def go(self, at: int) -> None:
        leave(self.places.pop(at % len(self.places)))

    @precondition(lambda self: self.places)
    @rule(at=st.integers(0))
    def fail_over(self, at: int) -> None:
        place = self.places[at % len(self.places)]
        before = engine_of(place)
        is_other = group_of(self.pool).has_other([before])
        if place.take_others(ASK, {"serve": [before]}):
            assert engine_of(place).health.is_up
            assert (engine_of(place) is not before) or not is_other

    @rule(at=st.integers(0), ok=st.booleans())
    def probe(self, at: int, ok: bool) -> None:
        if up := self.up(at):
            (bring_up if ok else take_down)(self.pool, up)

    @rule(at=st.integers(0))
    def break_down(self, at: int) -> None:
        if up := self.up(at):
            eject(self.pool, up)

    @rule(at=st.integers(0))
    def recover(self, at: int) -> None:
        up = self.up(at)
        if up and up.health.is_open:
            group_of(self.pool).begin(up).answered(200, time.monotonic())
            group_of(self.pool).refresh(up)

    @rule(urls=st.lists(st.sampled_from(URLS), unique=True), most=st.integers(0, 2), pool_most=st.integers(0, 3),
          balance=st.sampled_from(["least_outstanding", "round_robin"]))  # fmt: skip
    def reconfigure(self, urls: list[str], most: int, pool_most: int, balance: str) -> None:
        kept = {up.config: up for up in self.pool.upstreams if self.pool.config.balance == balance}
        self.seen |= set(self.pool.upstreams)
        wanted = upstreams(urls, max_in_flight=most)
        self.pool.reconfigure(
            PoolConfig(upstreams=wanted, max_in_flight=pool_most, balance=balance),  # type: ignore[arg-type]
            RULES,
        )
        assert {up.config for up in self.pool.upstreams} == set(wanted)
        for up in self.pool.upstreams:
            assert kept.get(up.config, up) is up
        assert all(up.is_leaving == (up not in set(self.pool.upstreams)) for up in self.seen)

    @invariant()
    def counts_are_right(self) -> None:
        if not hasattr(self, "pool"):
            return
        assert self.pool.in_flight == len(self.places)
        held = Counter(up for place in self.places for up, *_ in place._loads.values())
        for up in {*self.pool.upstreams, *self.seen, *held}:
            assert up.outstanding == held[up]
            assert (up.seat.prompt_bytes == 0) or held[up]

    def teardown(self) -> None:
        if hasattr(self, "pool"):
            for place in self.places:
                leave(place)
            assert_empty(self.pool, *self.seen)


TestAnyTraffic = AnyTraffic.TestCase


# -- who is picked


def test_one_that_fails_its_probes_is_never_picked_and_comes_back() -> None:
    pool = pool_of(*URLS[:2])
    one, two = pool.upstreams
    take_down(pool, one)
    for _ in range(10):
        with enter(pool) as place:
            assert engine_of(place) is two
    bring_up(pool, one)
    with enter(pool) as first, enter(pool) as second:
        assert {engine_of(first), engine_of(second)} == {one, two}
    assert_empty(pool)


def test_an_ejected_one_is_passed_over_while_there_is_another() -> None:
    pool = pool_of(*URLS[:2])
    one, two = pool.upstreams
    eject(pool, one)
    for _ in range(10):
        with enter(pool) as place:
            assert engine_of(place) is two


def test_when_its_time_has_come_it_gets_one_trial_at_a_time() -> None:
    pool = pool_of(*URLS[:2])
    one, two = pool.upstreams
    eject(pool, one)
    one.health.ejected_until = time.monotonic()
    places = [enter(pool) for _ in range(2)]
    assert {engine_of(place) for place in places} == {one, two}
    trial = group_of(pool).begin(one)
    more = [enter(pool) for _ in range(4)]
    assert {engine_of(place) for place in more} == {two}
    trial.answered(200, time.monotonic())
    group_of(pool).refresh(one)
    more += [enter(pool) for _ in range(4)]
    assert engine_of(more[-1]) is one
    for place in (*places, *more):
        leave(place)
    assert_empty(pool)


def test_a_trial_that_was_abandoned_makes_room_for_the_next() -> None:
    pool = pool_of(*URLS[:2])
    one, _ = pool.upstreams
    eject(pool, one)
    one.health.ejected_until = time.monotonic()
    trial = group_of(pool).begin(one)
    assert not one.seat.is_available
    trial.abandoned(time.monotonic())
    group_of(pool).refresh(one)
    assert one.seat.is_available


def test_the_last_resort_is_the_least_bad() -> None:
    pool = pool_of(*URLS[:3])
    one, two, three = pool.upstreams
    eject(pool, one, two, three)
    one.health.ejected_until = time.monotonic() + 30
    two.health.ejected_until = time.monotonic() + 20
    take_down(pool, three)
    for _ in range(5):
        with enter(pool) as place:
            assert engine_of(place) is two
    with enter(pool) as place:
        place.release("serve")
        assert place.take("serve", ASK, [two]) is one
        place.release("serve")
        assert place.take("serve", ASK, [two, one]) is None
    assert_empty(pool)


def test_ejected_ones_are_no_resort_while_a_good_one_is_only_full() -> None:
    pool = pool_of(*URLS[:2], most=1)
    one, two = pool.upstreams
    eject(pool, one)
    with enter(pool) as place:
        assert engine_of(place) is two
        assert pool.enter_now(ASK) is None
    assert_empty(pool)


def test_an_ejected_one_that_is_full_is_no_resort() -> None:
    pool = pool_of(URLS[0], most=1)
    (one,) = pool.upstreams
    eject(pool, one)
    with enter(pool):
        assert pool.enter_now(ASK) is None
    with enter(pool) as place:
        assert engine_of(place) is one


@pytest.mark.parametrize(("is_up", "is_ejected", "is_full", "is_other"), [
    (True, False, False, True),
    (True, True, False, True),  # better than none
    (False, False, False, False),
    (True, False, True, False),
])  # fmt: skip
def test_whether_another_is_left_to_fail_over_to(is_up: bool, is_ejected: bool, is_full: bool, is_other: bool) -> None:
    pool = pool_of(*URLS[:2], most=1)
    one, two = pool.upstreams
    group = group_of(pool)
    assert not group.has_other([one, two])
    if is_ejected:
        eject(pool, two)
    if not is_up:
        take_down(pool, two)
    load = group.balancer.take(two.seat, 1) if is_full else None
    assert group.has_other([one]) == is_other
    if load is not None:
        load.release()


async def test_limits_of_engine_and_pool() -> None:
    pool = pool_of(*URLS[:2], most=2, max_in_flight=3)
    places = [enter(pool) for _ in range(3)]
    assert max(Counter(map(engine_of, places)).values()) == 2
    assert pool.enter_now(ASK) is None
    with pytest.raises(QueueFull) as full:
        await pool.enter(ASK, 1)
    assert (full.value.status, full.value.outcome, full.value.retry_after_s) == (429, "RQ", 1)
    assert "max_queue = 0" in full.value.message
    pool.reconfigure(msgspec.structs.replace(pool.config, max_in_flight=0), RULES)
    places.append(enter(pool))
    assert Counter(map(engine_of, places)) == dict.fromkeys(pool.upstreams, 2)
    assert pool.enter_now(ASK) is None
    for place in places:
        leave(place)
    assert_empty(pool)


async def test_a_place_left_by_failing_over_is_handed_on(nursery: trio.Nursery) -> None:
    pool = pool_of(*URLS[:2], most=1, max_queue=1)
    one, two = pool.upstreams
    eject(pool, two)
    places: list[Place] = []
    place = enter(pool)
    assert engine_of(place) is one
    nursery.start_soon(enter_and_stay, pool, ASK, [], places)  # the one that is well will have room
    await trio.testing.wait_all_tasks_blocked()
    assert pool.queued == 1
    assert place.take_others(ASK, {"serve": [one]})
    assert engine_of(place) is two
    await trio.testing.wait_all_tasks_blocked()
    assert [engine_of(each) for each in places] == [one]
    for each in (place, *places):
        leave(each)
    assert_empty(pool)


def test_a_pool_that_was_given_other_roles_has_no_others() -> None:
    pool = pool_of(*URLS[:2], most=1)
    before = list(pool.upstreams)
    tried: dict[str, list[Upstream]] = {"serve": []}
    with enter(pool) as place:
        assert pool.has_others(place, ASK, tried)
        pool.reconfigure(PoolConfig(prefill=upstreams(URLS[2:3]), decode=upstreams(URLS[3:])), RULES)
        assert not pool.has_others(place, ASK, tried)
        assert not place.take_others(ASK, {"serve": [engine_of(place)]})
    assert_empty(pool, *before)


# -- other configurations


def test_what_stays_keeps_its_health_loads_and_its_place() -> None:
    config = config_of(PoolConfig(upstreams=upstreams(URLS[:2])))
    fleet = Fleet(config)
    (pool,) = fleet.pools
    one, two = pool.upstreams
    take_down(pool, one)
    place = enter(pool)
    fleet.reconfigure(config_of(PoolConfig(upstreams=upstreams(URLS[1:3]), models=("m",), max_in_flight=9)))
    assert fleet.pools == [pool]
    kept, new = pool.upstreams
    assert kept is two
    assert new.config.url == URLS[2]
    assert (kept.outstanding, pool.in_flight) == (1, 1)
    assert (one.is_leaving, two.is_leaving) == (True, False)
    assert fleet.serving("m") is pool
    assert fleet.serving("other") is None
    leave(place)
    assert_empty(pool)


def test_other_rules_of_health_hold_for_engines_that_stay() -> None:
    """And for those that come; what is known of each engine, and what it does, is not forgotten."""
    urls = upstreams(URLS[:1], max_in_flight=1)
    fleet = Fleet(config_of(PoolConfig(upstreams=urls)))
    (pool,) = fleet.pools
    (engine,) = pool.upstreams
    place = enter(pool)
    more = PoolConfig(upstreams=(*urls, *upstreams(URLS[1:2])))
    other = {"health": HealthConfig(failures=1), "failover": FailoverConfig(statuses=(500,))}
    fleet.reconfigure(config_of(more, **other))
    both = list(pool.upstreams)
    assert both[0] is engine
    assert (engine.outstanding, engine.is_full) == (1, True)
    for upstream in both:
        health, now = upstream.health, time.monotonic()
        for _ in range(CONSECUTIVE_FAILURES):
            health.begin().answered(503, now)  # none of the statuses any more
        assert not health.is_open
        for _ in range(CONSECUTIVE_FAILURES):
            health.begin().answered(500, now)
        assert health.is_open
        health.on_probe(True, now)
        health.on_probe(False, now)  # one is enough
        assert not health.is_up
    leave(place)
    assert_empty(pool)


def test_engines_found_by_name_stay_unless_the_name_goes() -> None:
    named = parse_upstream("dns+http://engines:8000")
    pool = pool_of(URLS[0])
    pool.reconfigure(PoolConfig(upstreams=(parse_upstream(URLS[0]), named)), RULES)
    found = group_of(pool).add(named.at("10.0.0.9"))
    found.is_resolved = True
    pool.reconfigure(PoolConfig(upstreams=(named,), max_in_flight=3), RULES)
    assert list(pool.upstreams) == [found]
    pool.reconfigure(PoolConfig(upstreams=(named,), balance="random"), RULES)
    (again,) = pool.upstreams
    assert (again.config, again.is_resolved) == (found.config, True)
    pool.reconfigure(PoolConfig(upstreams=(named, parse_upstream("http://10.0.0.9:8000")), balance="random"), RULES)
    (own,) = pool.upstreams
    assert (own.config.authority, own.is_resolved) == ("10.0.0.9:8000", False)
    pool.reconfigure(PoolConfig(upstreams=upstreams(URLS[:1])), RULES)
    assert [up.config.url for up in pool.upstreams] == URLS[:1]


def test_engines_that_come_back_under_load_leave_nothing_behind() -> None:
    """Each generation's request ends when two more have come: what it holds on to must not grow."""
    pool = pool_of(URLS[0], most=9)
    group = group_of(pool)
    (config,) = [upstream.config for upstream in pool.upstreams]
    places = deque([enter(pool), enter(pool)])
    seen: WeakSet[Upstream] = WeakSet()
    for _ in range(20):
        seen.add(group.upstreams[config.url])
        group.remove(config.url)
        group.add(config)
        places.append(enter(pool))
        leave(places.popleft())
    current = group.upstreams[config.url]
    assert (current.outstanding, current.streams) == (1, 2)
    assert [upstream.outstanding for upstream in pool.leaving] == [1]
    assert len(seen) == 1
    for place in places:
        leave(place)
    assert (current.streams, pool.leaving) == (0, [])


def test_what_goes_on_at_one_that_is_gone_is_shown_to_other_workers() -> None:
    pool = pool_of(URLS[0])
    group = group_of(pool)
    shares = Shares(memoryview(bytearray(80)).cast("d"), memoryview(bytearray(80)).cast("d"))
    places = []
    for _ in range(2):
        (upstream,) = pool.upstreams
        upstream.number, upstream.shares = 3, shares
        places.append(enter(pool))
        group.remove(upstream.config.url)
        group.add(upstream.config)
    group.remove(URLS[0])
    leave(places[0])
    assert shares._loads[3] == pytest.approx(1, abs=0.1)
    leave(places[1])
    assert shares._loads[3] == 0


def test_standard_error_tells_once_of_who_is_ejected_and_once_of_its_return(capsys: pytest.CaptureFixture[str]) -> None:
    pool = pool_of(*URLS[:2])
    group = group_of(pool)
    upstream = group.upstreams[URLS[0]]
    upstream.note_error("the engine answered 503")
    for _ in range(2 * CONSECUTIVE_FAILURES):  # those beyond are trials that fail as well
        attempt = group.begin(upstream)
        attempt.failed(time.monotonic())
        group.end(attempt, upstream)
    assert capsys.readouterr().err == f"relay: {URLS[0]} is ejected: the engine answered 503\n"
    attempt = group.begin(upstream)
    attempt.answered(200, time.monotonic())
    group.end(attempt, upstream)
    assert capsys.readouterr().err == f"relay: {URLS[0]} is no longer ejected\n"
