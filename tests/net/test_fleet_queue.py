"""Waiting for a place: in turn, up to a limit, not in vain, and without a trace once given up."""

from __future__ import annotations

import random
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
import pytest
import trio

from relay.address import parse_upstream
from relay.config import Config, PoolConfig
from relay.errors import NoUpstream, QueueFull, QueueTimeout
from relay.net import poller
from relay.net.fiber import Fiber
from relay.net.fleet import Fleet, Pool
from relay.net.group import Ask
from relay.net.place import Place
from relay.net.pump import Pump
from relay.net.source import Source
from tests.net.pools import (
    ASK,
    PATIENCE_S,
    RULES,
    URLS,
    ask_of,
    assert_empty,
    bring_up,
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

# -- nobody is up


@pytest.mark.parametrize("urls", [[], URLS[:2]])
async def test_without_an_engine_that_is_up_nobody_waits(urls: list[str]) -> None:
    pool = pool_of(*urls, max_queue=5)
    take_down(pool, *pool.upstreams)
    assert pool.enter_now(ASK) is None
    with pytest.raises(NoUpstream) as refused:
        await pool.enter(ASK, 1)
    assert (refused.value.status, refused.value.code) == (503, "no_upstream")
    assert refused.value.retry_after_s == (RULES.interval_s if urls else 1)  # one good probe, as none has been up yet


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
            with pytest.raises(QueueFull, match="max_queue = 1"):
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


# -- where exchanges are stepped by the pump


@pytest.fixture
def pump() -> Iterator[Pump]:
    pump = Pump()
    yield pump
    pump.epoll.close()


@contextmanager
def sources(pump: Pump, number: int) -> Iterator[tuple[list[Source], Callable[[], None]]]:
    """Sockets under a pump, and what has all of them reported in one turn, in their order."""
    pairs = [socket.socketpair() for _ in range(number)]
    for near, _ in pairs:
        near.setblocking(False)
    made = [pump.add(near) for near, _ in pairs]

    def strike() -> None:
        for _, far in pairs:
            far.send(b"x")

    try:
        yield made, strike
    finally:
        for source, (_, far) in zip(made, pairs, strict=True):
            source.close()
            far.close()


async def test_a_place_that_is_left_as_one_goes_to_wait_is_found(pump: Pump) -> None:
    """One finds no place, another leaves its own in the same turn of the pump: nobody would tell the first later."""
    pool = pool_of(URLS[0], max_in_flight=1, max_queue=5)
    held = enter(pool)

    async def come(source: Source) -> None:
        await source.wait_readable()
        assert pool.enter_now(ASK) is None
        leave(await pool.enter(ASK, PATIENCE_S))

    async def go(source: Source) -> None:
        await source.wait_readable()
        leave(held)

    with sources(pump, 2) as ((one, two), strike), poller.install(pump):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(Fiber(come(one), in_pump=True).run)
            nursery.start_soon(Fiber(go(two), in_pump=True).run)
            await trio.testing.wait_all_tasks_blocked()
            strike()
    assert_empty(pool)


async def test_those_who_come_in_one_turn_are_not_more_than_the_queue_holds(pump: Pump) -> None:
    pool = pool_of(URLS[0], max_in_flight=1, max_queue=2)
    held = enter(pool)
    told: list[str] = []

    async def come(source: Source) -> None:
        await source.wait_readable()
        assert pool.enter_now(ASK) is None
        try:
            leave(await pool.enter(ASK, PATIENCE_S))
            told.append("served")
        except QueueFull:
            told.append("full")

    with sources(pump, 5) as (all_of_them, strike), poller.install(pump):
        async with trio.open_nursery() as nursery:
            for source in all_of_them:
                nursery.start_soon(Fiber(come(source), in_pump=True).run)
            await trio.testing.wait_all_tasks_blocked()
            strike()
            await trio.testing.wait_all_tasks_blocked()
            assert told == ["full"] * 3
            leave(held)
    assert sorted(told) == ["full"] * 3 + ["served"] * 2
    assert_empty(pool)
