"""The queue beside a naive one, its fairness, and what those who find it full are told."""

from __future__ import annotations

import random
from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from relay.core.admission import DepartureRate, FairQueue

KEYS = "abc"


class NaiveQueue:
    """The same by definition: keys in the order of their turns, and everybody's items in the order they came."""

    def __init__(self) -> None:
        self.turns: list[str] = []
        self.items: list[tuple[str, int]] = []

    def push(self, key: str, item: int) -> None:
        if key not in self.turns:
            self.turns.append(key)
        self.items.append((key, item))

    def first(self) -> int:
        return next(item for key, item in self.items if key == self.turns[0])

    def pop(self) -> int:
        item, key = self.first(), self.turns.pop(0)
        self.items.remove((key, item))
        if any(other == key for other, _ in self.items):
            self.turns.append(key)
        return item

    def remove(self, key: str, item: int) -> None:
        self.items.remove((key, item))
        if not any(other == key for other, _ in self.items):
            self.turns.remove(key)


class AnyQueue(RuleBasedStateMachine):
    """Whatever is done to both, they agree."""

    def __init__(self) -> None:
        super().__init__()
        self.queue: FairQueue[str, int] = FairQueue()
        self.naive = NaiveQueue()
        self.pushed = 0

    @rule(key=st.sampled_from(KEYS))
    def push(self, key: str) -> None:
        self.pushed += 1
        self.queue.push(key, self.pushed)
        self.naive.push(key, self.pushed)

    @precondition(lambda self: self.naive.items)
    @rule()
    def pop(self) -> None:
        assert self.queue.pop() == self.naive.pop()

    @precondition(lambda self: self.naive.items)
    @rule(at=st.integers(0))
    def remove(self, at: int) -> None:
        key, item = self.naive.items[at % len(self.naive.items)]
        self.queue.remove(key, item)
        self.naive.remove(key, item)

    @rule(key=st.sampled_from(KEYS))
    def what_is_not_there(self, key: str) -> None:
        with pytest.raises((KeyError, ValueError)):
            self.queue.remove(key, -1)

    @invariant()
    def they_agree(self) -> None:
        assert self.queue.count == len(self.naive.items)
        assert repr(self.queue) == f"<FairQueue {len(self.naive.items)} waiting, {len(self.naive.turns)} keys>"
        if self.naive.items:
            assert self.queue.peek() == self.naive.first()
        else:
            with pytest.raises(StopIteration):
                self.queue.peek()
            with pytest.raises(KeyError):
                self.queue.pop()


TestAnyQueue = AnyQueue.TestCase


@given(st.lists(st.sampled_from(KEYS), max_size=60))
def test_keys_take_turns_and_items_of_one_key_keep_their_order(keys: list[str]) -> None:
    queue: FairQueue[str, tuple[str, int]] = FairQueue()
    for number, key in enumerate(keys):
        queue.push(key, (key, number))
    out = [queue.pop() for _ in keys]
    assert not queue.count
    left = Counter(keys)
    for key in KEYS:
        assert [number for other, number in out if other == key] == [at for at, each in enumerate(keys) if each == key]
    turns = [key for key, _ in out]
    for (at, key), (_, following) in pairwise(enumerate(turns)):
        left[key] -= 1
        # Nobody comes twice in a row while another waits, and nobody waits longer than a round.
        assert key != following or all(not left[other] for other in KEYS if other != key)
        for other in KEYS:
            assert not left[other] or other in turns[at + 1 : at + 1 + len(KEYS)]


def test_a_thousand_of_one_key_delay_another_by_one() -> None:
    queue: FairQueue[str, str] = FairQueue()
    for _ in range(1000):
        queue.push("busy", "busy")
    queue.push("rare", "rare")
    assert [queue.pop(), queue.pop()] == ["busy", "rare"]


# -- Retry-After


@pytest.mark.parametrize(
    ("departures", "waiting", "now", "wanted"),
    [
        ([], 0, 0.0, 1),  # it has only begun
        ([], 1000, 29.9, 1),
        ([], 0, 30.0, 60),  # nothing has left for long
        ([10.0], 0, 10.0, 10),  # one in ten seconds
        ([10.0], 1, 10.0, 20),
        ([10.0, 10.0], 1, 10.0, 10),
        ([100.0], 0, 100.0, 30),  # one in the window
        ([100.0], 0, 129.9, 30),
        ([100.0], 0, 130.0, 60),  # out of it
        ([100.0] * 30, 0, 100.0, 1),  # one a second
        ([100.0] * 30, 9, 100.0, 10),
        ([100.0] * 30, 500, 100.0, 60),
        ([0.0] * 10, 0, 0.0, 1),  # no rate is made of no time
        ([0.0] * 10, 20, 0.0, 3),
    ],
)
def test_retry_after(departures: list[float], waiting: int, now: float, wanted: int) -> None:
    rate = DepartureRate(0.0)
    for at in departures:
        rate.depart(at)
    assert rate.retry_after_s(waiting, now) == wanted


def test_more_departures_than_are_remembered_are_counted_over_their_own_time() -> None:
    rate = DepartureRate(0.0)
    for number in range(5000):  # 500 a second
        rate.depart(100 + number / 500)
    assert rate.retry_after_s(4899, 110.0) == 10


@given(st.lists(st.floats(0, 200), max_size=50), st.integers(0, 10_000), st.integers(0, 10_000), st.floats(200, 300))
def test_it_is_always_a_wait_that_makes_sense(times: list[float], waiting: int, more: int, now: float) -> None:
    rate = DepartureRate(0.0)
    for at in sorted(times):
        rate.depart(at)
    short, long = rate.retry_after_s(waiting, now), rate.retry_after_s(waiting + more, now)
    assert 1 <= short <= long <= 60


@given(st.integers(1, 200), st.integers(0, 200), st.integers(0, 3))
def test_it_is_the_time_that_a_steady_pool_takes(per_window: int, waiting: int, seed: int) -> None:
    rng = random.Random(seed)
    rate = DepartureRate(0.0)
    for at in sorted(rng.uniform(70.001, 100) for _ in range(per_window)):
        rate.depart(at)
    took = (waiting + 1) * 30 / per_window
    assert abs(rate.retry_after_s(waiting, 100.0) - min(max(took, 1), 60)) <= 1
