"""Places and queues without an engine: whoever is let in, refused, cancelled or moved on, nothing is left over."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest
import trio
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from relay.address import UpstreamConfig, parse_upstream
from relay.config import Config, FailoverConfig, HealthConfig, PoolConfig
from relay.core.health import CONSECUTIVE_FAILURES, HealthRules
from relay.core.request import RequestFacts, Route
from relay.errors import NoUpstream, QueueFull, QueueTimeout, RequestRefused
from relay.net.fleet import Fleet, Place, Pool
from relay.net.group import Ask, Group
from relay.net.pool import Upstream

URLS = [f"http://10.0.0.{at}:8000" for at in range(1, 5)]
RULES = HealthRules()
ASK = Ask(("serve",), None, 100, b"me")
#: Beyond this no test waits.
PATIENCE_S = 5


def ask_of(tenant: bytes) -> Ask:
    return Ask(("serve",), None, 100, tenant)


def upstreams(urls: Sequence[str], **own: Any) -> tuple[UpstreamConfig, ...]:
    return tuple(msgspec.structs.replace(parse_upstream(url), **own) for url in urls)


def pool_of(*urls: str, most: int = 0, **settings: Any) -> Pool:
    """A pool; `most` is what each engine takes."""
    pool = Pool(PoolConfig(**settings), RULES, random.Random(1))
    pool.reconfigure(PoolConfig(upstreams=upstreams(urls, max_in_flight=most), **settings), RULES)
    return pool


def group_of(pool: Pool) -> Group:
    return pool.groups["serve"]


def enter(pool: Pool, ask: Ask = ASK) -> Place:
    place = pool.enter_now(ask)
    assert place is not None
    return place


def engine_of(place: Place) -> Upstream:
    return place.upstreams["serve"]


def leave(place: Place) -> None:
    place.__exit__(None, None, None)


def take_down(pool: Pool, *ups: Upstream) -> None:
    """As the probes would."""
    for up in ups:
        for _ in range(RULES.failures):
            up.health.on_probe(False, time.monotonic())
        group_of(pool).refresh(up)
    pool.advance()


def bring_up(pool: Pool, *ups: Upstream) -> None:
    for up in ups:
        for _ in range(RULES.successes):
            up.health.on_probe(True, time.monotonic())
        group_of(pool).refresh(up)
    pool.advance()


def eject(pool: Pool, *ups: Upstream) -> None:
    """As requests would."""
    for up in ups:
        for _ in range(CONSECUTIVE_FAILURES):
            group_of(pool).begin(up).failed(time.monotonic())
        group_of(pool).refresh(up)


def assert_empty(pool: Pool, *left: Upstream) -> None:
    """Nothing is in it, nor on its engines or those that have `left`."""
    assert (pool.in_flight, pool.queued) == (0, 0)
    for up in (*pool.upstreams, *left):
        assert (up.outstanding, up.seat.prompt_bytes) == (0, 0)


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
            group_of(self.pool).begin(up).succeeded(time.monotonic())
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
        held = Counter(up for place in self.places for up, _ in place._loads.values())
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
    trial.succeeded(time.monotonic())
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
    assert "3 in flight, 0 waiting" in full.value.message
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


# -- nobody is up


@pytest.mark.parametrize("urls", [[], URLS[:2]])
async def test_without_an_engine_that_is_up_nobody_waits(urls: list[str]) -> None:
    pool = pool_of(*urls, max_queue=5)
    take_down(pool, *pool.upstreams)
    assert pool.enter_now(ASK) is None
    with pytest.raises(NoUpstream) as refused:
        await pool.enter(ASK, 1)
    assert (refused.value.status, refused.value.code) == (503, "no_upstream")
    # until it has passed as many probes as it takes
    assert refused.value.retry_after_s == (RULES.successes * RULES.interval_s if urls else 1)


async def test_who_waits_when_the_last_goes_down_is_told(nursery: trio.Nursery) -> None:
    pool = pool_of(*URLS[:2], max_in_flight=1, max_queue=5)
    told: list[str] = []

    async def wait() -> None:
        with pytest.raises(NoUpstream):
            await pool.enter(ASK, 0)
        told.append("no_upstream")

    place = enter(pool)
    nursery.start_soon(wait)
    nursery.start_soon(wait)
    await trio.testing.wait_all_tasks_blocked()
    one, two = pool.upstreams
    take_down(pool, one)
    await trio.testing.wait_all_tasks_blocked()
    assert not told
    take_down(pool, two)
    await trio.testing.wait_all_tasks_blocked()
    assert told == ["no_upstream"] * 2
    leave(place)
    assert_empty(pool)


async def test_who_waits_in_a_pool_that_is_taken_out_is_told(nursery: trio.Nursery) -> None:
    fleet = Fleet(Config(pools=(PoolConfig(upstreams=upstreams(URLS[:1]), max_in_flight=1, max_queue=1),)))
    (pool,) = fleet.pools
    told = trio.Event()

    async def wait() -> None:
        with pytest.raises(NoUpstream):
            await pool.enter(ASK, 0)
        told.set()

    with enter(pool):
        nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        fleet.reconfigure(Config(pools=(PoolConfig(name="other", upstreams=upstreams(URLS[:1])),)))
        with trio.fail_after(PATIENCE_S):
            await told.wait()
    assert_empty(pool)


async def test_who_waits_in_a_pool_that_becomes_a_split_one_is_told(nursery: trio.Nursery) -> None:
    pool = pool_of(URLS[0], most=1, max_queue=1)
    told = trio.Event()

    async def wait() -> None:
        with pytest.raises(NoUpstream):
            await pool.enter(ASK, 0)
        told.set()

    with enter(pool):
        nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        pool.reconfigure(PoolConfig(prefill=upstreams(URLS[1:2]), decode=upstreams(URLS[2:3])), RULES)
        with trio.fail_after(PATIENCE_S):
            await told.wait()
    assert_empty(pool)


# -- the queue


async def enter_and_stay(pool: Pool, ask: Ask, order: list[bytes], places: list[Place]) -> None:
    places.append(await pool.enter(ask, 0))
    order.append(ask.tenant)


async def test_keys_take_turns(nursery: trio.Nursery) -> None:
    pool = pool_of(URLS[0], max_in_flight=1, max_queue=9)
    order: list[bytes] = []
    places = [enter(pool)]
    for tenant in (b"a", b"a", b"a", b"b", b"c", b"b"):
        nursery.start_soon(enter_and_stay, pool, ask_of(tenant), order, places)
        await trio.testing.wait_all_tasks_blocked()
    assert pool.queued == 6
    while places:
        leave(places.pop())
        await trio.testing.wait_all_tasks_blocked()
    assert order == [b"a", b"b", b"c", b"a", b"b", b"a"]
    assert_empty(pool)


async def test_nobody_overtakes_the_queue(nursery: trio.Nursery) -> None:
    pool = pool_of(URLS[0], max_in_flight=1, max_queue=1)
    order: list[bytes] = []
    places: list[Place] = []
    first = enter(pool)
    nursery.start_soon(enter_and_stay, pool, ask_of(b"waiter"), order, places)
    await trio.testing.wait_all_tasks_blocked()
    leave(first)  # the place is the waiter's, although it has not run yet
    assert pool.in_flight == 1
    assert pool.enter_now(ask_of(b"newcomer")) is None
    await trio.testing.wait_all_tasks_blocked()
    assert order == [b"waiter"]
    leave(places.pop())
    assert_empty(pool)


async def test_who_needs_less_does_not_overtake_who_needs_more(nursery: trio.Nursery) -> None:
    settings: dict[str, Any] = {
        "prefill": upstreams(URLS[:1], max_in_flight=1),
        "decode": upstreams(URLS[1:2], max_in_flight=2),
        "max_queue": 2,
    }
    pool = Pool(PoolConfig(**settings), RULES, random.Random(1))
    pool.reconfigure(PoolConfig(**settings), RULES)
    both, one = (Ask(roles, None, 1, b"me") for roles in (("prefill", "decode"), ("decode",)))
    places: list[Place] = []
    first = enter(pool, both)
    nursery.start_soon(enter_and_stay, pool, both, [], places)
    await trio.testing.wait_all_tasks_blocked()
    assert pool.queued == 1
    assert pool.enter_now(one) is None  # or a prefiller's queue would wait for as long as others come for decoders
    leave(first)
    await trio.testing.wait_all_tasks_blocked()
    with enter(pool, one):
        leave(places.pop())
    assert_empty(pool)


async def test_the_queue_is_bounded_and_its_wait_is(autojump_clock: trio.testing.MockClock) -> None:
    pool = pool_of(URLS[0], max_in_flight=1, max_queue=1)
    refused: list[QueueTimeout] = []

    async def wait() -> None:
        with pytest.raises(QueueTimeout) as timeout:
            await pool.enter(ASK, 7.0)
        refused.append(timeout.value)

    with enter(pool):
        began = trio.current_time()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            await trio.testing.wait_all_tasks_blocked()
            with pytest.raises(QueueFull, match="1 in flight, 1 waiting"):
                await pool.enter(ASK, 7.0)
        assert trio.current_time() - began == pytest.approx(7.0)
    (timeout,) = refused
    assert (timeout.status, timeout.code, timeout.outcome) == (429, "queue_full", "rQ")
    assert timeout.retry_after_s is not None
    assert "queue_s = 7 s" in timeout.message
    assert_empty(pool)


@pytest.mark.parametrize("what", ["engine up", "engine added", "trial due", "more room", "other engine in its place"])
async def test_what_ends_a_wait(what: str, nursery: trio.Nursery) -> None:
    pool = pool_of(*URLS[:2], most=1, max_queue=1)
    one, two = pool.upstreams
    places: list[Place] = []
    if what == "engine up":
        take_down(pool, two)
    elif what == "trial due":
        eject(pool, two)
    else:
        places.append(enter(pool))
    places.append(enter(pool))
    assert pool.enter_now(ASK) is None
    nursery.start_soon(enter_and_stay, pool, ASK, [], places)
    await trio.testing.wait_all_tasks_blocked()
    assert pool.queued == 1
    if what == "engine up":
        bring_up(pool, two)
    elif what == "engine added":
        group_of(pool).add(parse_upstream(URLS[2]))
        pool.advance()
    elif what == "trial due":
        two.health.ejected_until = time.monotonic()
        assert pool.enter_now(ASK) is None  # somebody comes, and sees that another may go
    elif what == "more room":
        pool.reconfigure(msgspec.structs.replace(pool.config, upstreams=upstreams(URLS[:2], max_in_flight=2)), RULES)
    else:
        pool.reconfigure(msgspec.structs.replace(pool.config, upstreams=upstreams(URLS[2:3])), RULES)
    await trio.testing.wait_all_tasks_blocked()
    assert pool.queued == 0
    assert engine_of(places[-1]) in set(pool.upstreams)
    for place in places:
        leave(place)
    assert_empty(pool, one, two)


@pytest.mark.parametrize("moment", ["waiting", "place freed before", "place freed after", "freed and cancelled twice"])
@pytest.mark.parametrize("by", ["cancel", "deadline"])
async def test_a_waiter_cancelled_at_any_moment_leaks_nothing(moment: str, by: str) -> None:
    pool = pool_of(URLS[0], most=1, max_queue=3)
    outcomes: list[str] = []

    async def wait(scope: trio.CancelScope) -> None:
        with scope:
            with await pool.enter(ASK, 0):  # as an exchange does
                outcomes.append("entered")
                await trio.lowlevel.checkpoint()
                outcomes.append("done")

    first = enter(pool)
    scopes = [trio.CancelScope() for _ in range(3)]
    async with trio.open_nursery() as nursery:
        for scope in scopes:
            nursery.start_soon(wait, scope)
            await trio.testing.wait_all_tasks_blocked()

        def strike() -> None:
            if by == "cancel":
                scopes[0].cancel()
            else:
                scopes[0].deadline = trio.current_time() - 1

        if moment == "waiting":
            strike()
            await trio.testing.wait_all_tasks_blocked()
            assert pool.queued == 2
            leave(first)
        elif moment == "place freed before":
            leave(first)
            strike()
        elif moment == "place freed after":
            strike()
            leave(first)
        else:
            leave(first)
            strike()
            scopes[1].cancel()
        with trio.fail_after(PATIENCE_S):
            await trio.testing.wait_all_tasks_blocked()
    assert scopes[0].cancelled_caught
    assert outcomes.count("done") == (1 if moment == "freed and cancelled twice" else 2)
    assert_empty(pool)


async def test_many_come_wait_and_leave_at_random() -> None:
    pool = pool_of(*URLS[:2], most=2, max_queue=10, max_in_flight=3)
    rng = random.Random(7)
    outcomes: Counter[str] = Counter()
    greatest = 0

    async def one(number: int) -> None:
        nonlocal greatest
        with trio.CancelScope() as scope:
            if rng.random() < 0.3:
                nursery.start_soon(cancel_after, scope, rng.randrange(30))
            try:
                place = pool.enter_now(ASK) or await pool.enter(ask_of(b"%d" % (number % 5)), 0)
            except QueueFull:
                outcomes["full"] += 1
                return
            with place:
                greatest = max(greatest, pool.in_flight)
                for _ in range(rng.randrange(10)):
                    await trio.lowlevel.checkpoint()
                if rng.random() < 0.3:
                    before = engine_of(place)
                    place.release("serve")
                    await trio.lowlevel.checkpoint()
                    place.take("serve", ASK, [before])
                await trio.lowlevel.checkpoint()
                outcomes["served"] += 1
        outcomes["left"] += scope.cancelled_caught

    async def cancel_after(scope: trio.CancelScope, turns: int) -> None:
        for _ in range(turns):
            await trio.lowlevel.checkpoint()
        scope.cancel()

    with trio.fail_after(PATIENCE_S):
        async with trio.open_nursery() as nursery:
            for number in range(1000):
                nursery.start_soon(one, number)
                for _ in range(rng.randrange(3)):
                    await trio.lowlevel.checkpoint()
    assert sum(outcomes.values()) == 1000
    assert min(outcomes[each] for each in ("served", "left", "full")) > 20, outcomes
    assert greatest == 3
    assert_empty(pool)


# -- other configurations


def config_of(*pools: PoolConfig, **tables: Any) -> Config:
    return Config(pools=pools, **tables)


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


@pytest.mark.parametrize(
    "tables",
    [
        {"health": HealthConfig(failures=1)},
        {"failover": FailoverConfig(statuses=())},
    ],
)
def test_other_rules_of_health_hold_for_all(tables: dict[str, Any]) -> None:
    pool_config = PoolConfig(upstreams=upstreams(URLS[:1], max_in_flight=2))
    fleet = Fleet(config_of(pool_config))
    (pool,) = fleet.pools
    (before,) = pool.upstreams
    place = enter(pool)
    fleet.reconfigure(config_of(pool_config, **tables))
    (after,) = pool.upstreams
    assert after is not before
    assert before.is_leaving
    leave(place)
    assert_empty(pool, before)


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


# -- pools by model


FLEET = Fleet(
    config_of(
        PoolConfig(name="first", models=("qwen3-32b", "qwen*", "a*z")),
        PoolConfig(name="second", models=("qwen-vl", "*-r1", "q.en")),
        PoolConfig(name="rest"),
    )
)
NAMED = Fleet(config_of(PoolConfig(name="first", models=("m", "org/*")), PoolConfig(name="second", models=("n",))))


@pytest.mark.parametrize(
    ("model", "pool"),
    [
        ("qwen3-32b", "first"),
        ("qwen-other", "first"),
        ("qwen-vl", "second"),  # a name comes before a pattern
        ("qwen-r1", "first"),  # the first pattern that fits
        ("deepseek-r1", "second"),
        ("az", "first"),
        ("a\nz", "first"),
        ("azx", "rest"),
        ("Qwen3", "rest"),
        ("q.en", "second"),
        ("qxen", "rest"),  # nothing but * is special
        ("", "rest"),
        ("x" * 100_000, "rest"),
    ],
)
def test_the_pool_for_a_model(model: str, pool: str) -> None:
    found = FLEET.serving(model)
    assert found is not None
    assert found.name == pool
    assert FLEET.pool_for(Route.CHAT, RequestFacts(is_json=True, size=1, model=model)) is found


@pytest.mark.parametrize("route", Route)
def test_requests_without_a_model_go_to_the_first_pool(route: Route) -> None:
    assert FLEET.pool_for(route, RequestFacts(is_json=True, size=1)).name == "first"


def test_a_model_that_nobody_serves() -> None:
    facts = RequestFacts(is_json=True, size=1, model="x")
    with pytest.raises(RequestRefused) as refused:
        NAMED.pool_for(Route.CHAT, facts)
    assert (refused.value.status, refused.value.code) == (404, "model_not_found")
    assert refused.value.message == "no pool serves the model 'x'; known: m, org/*, n"
    assert NAMED.pool_for(Route.OTHER, facts).name == "first"  # what `model` means there is not known


def test_a_body_that_is_not_json_names_no_pool() -> None:
    facts = RequestFacts(is_json=False, size=1)
    for fleet in (FLEET, NAMED):
        with pytest.raises(RequestRefused) as refused:
            fleet.pool_for(Route.CHAT, facts)
        assert (refused.value.status, refused.value.code) == (400, "invalid_json")
        assert fleet.pool_for(Route.OTHER, facts).name == "first"
    only = Fleet(config_of(PoolConfig()))
    assert only.pool_for(Route.CHAT, facts).name == "default"  # no choice to make: the engine is the judge


def test_models_are_those_that_a_request_would_reach() -> None:
    fleet = Fleet(
        config_of(
            PoolConfig(name="one", models=("a*",), upstreams=upstreams(URLS[:2])),
            PoolConfig(name="rest", upstreams=upstreams(URLS[2:4])),
        )
    )
    first, second, third, fourth = fleet.upstreams
    assert fleet.models() is None
    first.models = {"a1": msgspec.Raw(b'{"id":"a1","x":[1.50]}'), "b": msgspec.Raw(b'{"id":"b","of":"first"}')}
    second.models = {"a1": msgspec.Raw(b'{"id":"a1","of":"second"}'), "a2": msgspec.Raw(b'{"id":"a2"}')}
    third.models = {"b": msgspec.Raw(b'{"id":"b"}'), "a3": msgspec.Raw(b'{"id":"a3"}')}
    assert fleet.models() == (
        b'{"object":"list","data":[{"id":"a1","x":[1.50]},{"id":"a2"},{"id":"b"}]}'  # as the engines wrote them
    )
    second.health.on_probe(False, 0.0)
    assert fleet.models() == b'{"object":"list","data":[{"id":"a1","x":[1.50]},{"id":"b"}]}'
    for up in (first, third, fourth):
        up.health.on_probe(False, 0.0)
    assert fleet.models() is None
