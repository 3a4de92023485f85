"""The limits of keys, kept in one place and taken from by several workers."""

from __future__ import annotations

import os
from contextlib import suppress

import pytest

from relay.config import KeyLimitsConfig
from relay.core.board import Board
from relay.daemon.key_limits import Bucket, KeyLimits, OwnKeyLimits, impose
from relay.daemon.limits import Limit
from relay.daemon.messages import KeyLimit
from relay.daemon.scoreboard import Scoreboard
from relay.errors import RateLimited
from relay.net.keyring import Keyring, Tokens, Visit
from tests.daemon.shortage import descriptors, descriptors_left


class Workers:
    """Two workers of a daemon, and who keeps the limits."""

    def __init__(self) -> None:
        self.scoreboard = Scoreboard(2)
        self.scoreboard.slot(1)
        self.limits = KeyLimits(self.scoreboard)
        self.keyrings = [Keyring(Board(slot.board)) for slot in self.scoreboard.slots]
        self.told: list[dict[KeyLimit, Limit | Bucket]] = [{}, {}]
        self.wanted: dict[str, KeyLimitsConfig] = {}

    def limit(self, **wanted: KeyLimitsConfig) -> None:
        """These are the limits from now on, and both are told."""
        self.wanted = wanted
        self.limits.settle(wanted)
        for keys, slot, told in zip(self.keyrings, self.scoreboard.slots, self.told, strict=True):
            for limit, source in self.limits.changes(told):
                impose(keys, limit, None if source is None else os.dup(source.fd), slot.held)

    def enter(self, at: int, name: str = "alice") -> Visit | None:
        """A request to one of them; None: it is refused."""
        try:
            return self.keyrings[at].of(name).enter(self.wanted.get(name, KeyLimitsConfig()))
        except RateLimited:
            return None


def test_requests_at_once_are_counted_over_all_workers() -> None:
    workers = Workers()
    workers.limit(alice=KeyLimitsConfig(max_in_flight=3))
    visits = [workers.enter(at) for at in (0, 1, 0, 1, 0)]
    assert [visit is not None for visit in visits] == [True, True, True, False, False]
    assert visits[1] is not None
    visits[1].end()
    assert workers.enter(0) is not None
    assert workers.enter(1) is None
    assert all(workers.enter(0, "bob") for _ in range(9))


def test_what_a_dead_worker_had_is_given_back() -> None:
    workers = Workers()
    workers.limit(alice=KeyLimitsConfig(max_in_flight=2))
    assert workers.enter(0)
    assert workers.enter(1)
    assert workers.enter(1) is None
    workers.limits.give_back(workers.scoreboard.slots[0].vacate())
    assert workers.enter(1)
    assert workers.enter(1) is None


def test_a_limit_can_change_and_end_while_requests_are_under_way() -> None:
    workers = Workers()
    workers.limit(alice=KeyLimitsConfig(max_in_flight=1))
    first = workers.enter(0)
    assert first is not None
    workers.limit(alice=KeyLimitsConfig(max_in_flight=2))
    second = workers.enter(1)
    assert second is not None
    assert workers.enter(0) is None
    workers.limit()
    assert all(workers.enter(1) for _ in range(5))
    first.end()
    second.end()
    workers.limit(alice=KeyLimitsConfig(max_in_flight=1))
    assert workers.enter(0)
    assert workers.enter(1) is None


def test_a_limit_that_went_and_came_back_is_told_anew() -> None:
    """Another in its place may have its number, and its descriptor."""
    scoreboard = Scoreboard(1)
    keyring, held = Keyring(Board(scoreboard.slot(0).board)), scoreboard.slots[0].held
    limits, told = KeyLimits(scoreboard), dict[KeyLimit, Limit | Bucket]()
    wanted = KeyLimitsConfig(requests_per_minute=1, max_in_flight=1)
    for config in ({"alice": wanted}, {}, {"alice": wanted}):
        limits.settle(config)
        if config:  # in between nobody tells the worker
            for limit, source in limits.changes(told):
                impose(keyring, limit, None if source is None else os.dup(source.fd), held)
            keyring.of("alice").enter(wanted).end()
    assert [*limits.changes(told)] == []


@pytest.mark.parametrize("left", range(9))
def test_limits_change_as_a_whole_or_not_at_all(left: int) -> None:
    """What is new takes eight descriptors: two for places, three for a minute's requests."""
    before = {"alice": KeyLimitsConfig(max_in_flight=1)}
    after = {
        "alice": KeyLimitsConfig(requests_per_minute=2),
        "bob": KeyLimitsConfig(max_in_flight=3, requests_per_minute=4),
    }
    keyring = Keyring(Board(Scoreboard(1).slot(0).board))
    limits = OwnKeyLimits(keyring)

    def accepted(name: str) -> int:
        """Of five requests at once."""
        visits: list[Visit] = []
        with suppress(RateLimited):
            visits.extend(keyring.of(name).enter(KeyLimitsConfig()) for _ in range(5))
        for visit in visits:
            visit.end()
        return len(visits)

    limits.settle(before)
    assert [accepted("alice"), accepted("bob")] == [1, 5]
    opened = descriptors()
    if left < 8:
        with descriptors_left(left), pytest.raises(OSError, match="Too many open files"):
            limits.prepare(after)
        limits.settle(before)
        assert [accepted("alice"), accepted("bob")] == [1, 5]
        assert descriptors() == opened
    with descriptors_left(8):
        limits.prepare(after)
        limits.settle(after)
    assert [accepted("alice"), accepted("bob")] == [2, 3]
    limits.settle({})
    assert [accepted("alice"), accepted("bob")] == [5, 5]


def test_requests_a_minute_are_counted_over_all_workers_and_take_no_place_when_refused() -> None:
    workers = Workers()
    workers.limit(alice=KeyLimitsConfig(requests_per_minute=3, max_in_flight=5))
    visits = [workers.enter(at) for at in (0, 1, 0, 1)]
    assert [visit is not None for visit in visits] == [True, True, True, False]
    assert sum(slot.held[at] for slot in workers.scoreboard.slots for at in range(len(slot.held))) == 3
    for visit in visits[:3]:
        assert visit is not None
        visit.end()
    assert workers.enter(1) is None  # the minute is not over


@pytest.mark.parametrize("per_minute", [1, 7, 60, 4096, 50_000])
def test_a_bucket_holds_a_minutes_worth_and_fills_evenly(per_minute: int) -> None:
    bucket = Bucket(per_minute, 0.0)
    tokens = Tokens(os.dup(bucket.fd))
    now = 0.0
    taken = 0
    while tokens.take():
        taken += 1
    assert taken == per_minute
    for _ in range(600):  # ten minutes, looked at each second, and all taken at once
        now += 1.0
        bucket.refill(now)
        while tokens.take():
            taken += 1
    assert abs(taken - 11 * per_minute) <= 1
    bucket.refill(now + 3600)  # it does not save up
    assert bucket.free == per_minute


@pytest.mark.parametrize("per_minute", [60, 5000, 50_000])
def test_a_bucket_that_is_never_empty_is_filled_up_again(per_minute: int) -> None:
    """What is read of a pipe's first page makes no room in it."""
    bucket = Bucket(per_minute, 0.0)
    tokens = Tokens(os.dup(bucket.fd))
    for at in range(1, 100):
        for _ in range(min(97, per_minute)):
            assert tokens.take()
        bucket.refill(60.0 * at)
        assert bucket.free == per_minute


def test_a_bucket_of_another_size_keeps_what_is_in_it() -> None:
    bucket = Bucket(60, 0.0)
    tokens = Tokens(os.dup(bucket.fd))
    for _ in range(50):
        assert tokens.take()
    bucket.set(50_000, 0.0)
    assert bucket.free == 10
    bucket.refill(60.0)
    assert bucket.free == 50_000
    bucket.set(5, 60.0)
    assert bucket.free == 5


def test_a_key_that_is_refused_is_told_when_to_come_again() -> None:
    workers = Workers()
    workers.limit(alice=KeyLimitsConfig(requests_per_minute=4), bob=KeyLimitsConfig(max_in_flight=1))
    for name, retry_after_s, setting in (("alice", 15, "requests_per_minute"), ("bob", 1, "max_in_flight")):
        while workers.enter(0, name):
            pass
        with pytest.raises(RateLimited, match=f"key {name} .*{setting}") as refusal:
            workers.keyrings[1].of(name).enter(workers.wanted[name])
        assert (refusal.value.status, refusal.value.code, refusal.value.outcome) == (429, "rate_limit_exceeded", "RR")
        assert refusal.value.retry_after_s == retry_after_s


def test_a_worker_that_has_not_heard_yet_that_a_limit_is_gone_refuses_nobody() -> None:
    workers = Workers()
    workers.limit(alice=KeyLimitsConfig(requests_per_minute=2))
    assert [workers.enter(0) is not None for _ in range(3)] == [True, True, False]
    workers.limits.settle({})
    assert all(workers.enter(0) for _ in range(3))
