"""Affinity: who has which keys, who gets them when seats come and go, and when a seat is passed over."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relay.core.balance import Load, Seat, make_balancer
from relay.core.balance.affinity import BOUND_FACTOR, BOUND_SLACK, Affinity
from relay.core.balance.balancer import PROMPT_BYTES_PER_STREAM

KEYS = [b"key %d" % number for number in range(4000)]


def fleet(count: int, *, seed: int = 1, weights: dict[int, int] | None = None) -> tuple[Affinity, list[Seat]]:
    seats = [Seat(f"http://10.0.0.{at}:8000", (weights or {}).get(at, 1)) for at in range(count)]
    balancer = make_balancer("session_affinity", seats, rng=random.Random(seed))
    assert isinstance(balancer, Affinity)
    return balancer, seats


def owners(balancer: Affinity) -> dict[bytes, Seat]:
    """Whose each key is, while nobody has anything to do."""
    found = {key: balancer.pick(key) for key in KEYS}
    return {key: seat for key, seat in found.items() if seat is not None}


def test_a_key_has_one_seat_in_every_process() -> None:
    """Not in this one alone: who is named below must not change, as relays of several versions share a fleet."""
    balancer, _ = fleet(5, seed=1)
    other = make_balancer(
        "session_affinity", [Seat(f"http://10.0.0.{at}:8000") for at in (3, 1, 4, 0, 2)], rng=random.Random(2)
    )
    keys = (b"alice", b"bob", b"carol", b"dave", b"\xff\x00")
    for asked in (balancer, other):
        picked = [seat.name for key in keys if (seat := asked.pick(key))]
        assert picked == [f"http://10.0.0.{at}:8000" for at in (2, 2, 1, 2, 4)]


@pytest.mark.parametrize("count", [2, 3, 10, 40])
def test_keys_are_spread_evenly(count: int) -> None:
    balancer, seats = fleet(count)
    shares = Counter(owners(balancer).values())
    for seat in seats:
        assert 0.6 < shares[seat] * count / len(KEYS) < 1.4


def test_keys_are_spread_by_weight() -> None:
    balancer, seats = fleet(8, weights={0: 4, 1: 4})
    shares = Counter(owners(balancer).values())
    assert shares[seats[0]] + shares[seats[1]] == pytest.approx(len(KEYS) * 8 / 14, rel=0.15)


@pytest.mark.parametrize("count", [2, 3, 10, 40])
def test_who_joins_takes_its_part_and_moves_nothing_else(count: int) -> None:
    balancer, _ = fleet(count)
    before = owners(balancer)
    joined = Seat("http://10.1.1.1:8000")
    balancer.add(joined)
    after = owners(balancer)
    moved = [key for key in KEYS if after[key] is not before[key]]
    assert {after[key] for key in moved} == {joined}
    assert 0.5 < len(moved) * (count + 1) / len(KEYS) < 1.5
    # From all, not from a neighbour alone; of 98 random keys, a few of 40 seats have none.
    assert len({before[key] for key in moved}) > 0.75 * count
    balancer.remove(joined)
    assert owners(balancer) == before


@pytest.mark.parametrize("count", [3, 10])
def test_who_leaves_spreads_its_keys_over_all_others(count: int) -> None:
    balancer, seats = fleet(count)
    before = owners(balancer)
    balancer.set_available(seats[1], False)
    after = owners(balancer)
    moved = [key for key in KEYS if after[key] is not before[key]]
    assert moved == [key for key in KEYS if before[key] is seats[1]]
    shares = Counter(after[key] for key in moved)
    assert set(shares) == {*seats} - {seats[1]}
    assert max(shares.values()) < 2.5 * len(moved) / (count - 1)
    balancer.set_available(seats[1], True)
    assert owners(balancer) == before


@given(st.sampled_from(KEYS), st.integers(2, 12))
@settings(max_examples=80, deadline=None)
def test_the_next_in_order_is_whose_the_key_would_be_without_the_first(key: bytes, count: int) -> None:
    """So a failover goes where the requests will go, too, once the seat has been found to be down."""
    balancer, seats = fleet(count)
    tried: list[Seat] = []
    while (seat := balancer.pick(key, tried)) is not None:
        without, others = fleet(count)
        for gone in tried:
            without.remove(others[seats.index(gone)])
        assert without.pick(key) is others[seats.index(seat)]
        tried.append(seat)
    assert len(tried) == count


def test_a_first_choice_stays_until_it_is_above_the_bound() -> None:
    balancer, _ = fleet(4)
    first = balancer.pick(b"alice")
    assert first is not None
    second = balancer.pick(b"alice", [first])
    assert second is not None
    loads: list[Load] = []
    while first.score <= balancer.bound and len(loads) < 100:
        assert balancer.pick(b"alice") is first
        loads.append(balancer.take(first, 0))
    assert first.score > BOUND_FACTOR * first.score / 4 + BOUND_SLACK
    assert balancer.pick(b"alice") is second
    loads.pop().release()
    assert balancer.pick(b"alice") is first


def test_a_busy_fleet_is_no_reason_to_leave_a_seat() -> None:
    """What counts is the mean: all have much to do, none too much."""
    balancer, seats = fleet(4)
    first = balancer.pick(b"alice")
    for seat in seats:
        for _ in range(100):
            balancer.take(seat, PROMPT_BYTES_PER_STREAM)
    assert balancer.pick(b"alice") is first


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 200_000)), max_size=120), st.integers(1, 30))
@settings(max_examples=60, deadline=None)
def test_no_seat_above_the_bound_is_picked(requests: list[tuple[int, int]], count: int) -> None:
    """Few keys with much to do each: without the bound, four seats would have it all."""
    balancer, seats = fleet(count)
    for key, prompt_bytes in requests:
        seat = balancer.pick(KEYS[key])
        assert seat is not None
        total = sum(seat.score for seat in seats)
        assert seat.score <= BOUND_FACTOR * total / count + BOUND_SLACK
        balancer.take(seat, prompt_bytes)


def test_one_hot_key_is_spread_within_the_bound() -> None:
    balancer, seats = fleet(10)
    for _ in range(1000):
        seat = balancer.pick(b"hot")
        assert seat is not None
        balancer.take(seat, 0)
    assert max(seat.streams for seat in seats) <= BOUND_FACTOR * 100 + BOUND_SLACK + 1


def test_without_a_key_the_least_outstanding_is_picked() -> None:
    balancer, seats = fleet(5)
    for seat in seats[:4]:
        balancer.take(seat, 0)
    assert {balancer.pick(None) for _ in range(10)} == {seats[4]}


def test_where_only_tried_seats_are_within_the_bound_the_least_of_the_others_is_picked() -> None:
    balancer, seats = fleet(3)
    for _ in range(100):
        balancer.take(seats[0], 0)
        balancer.take(seats[1], 0)
    balancer.take(seats[1], 0)
    assert balancer.pick(b"alice", [seats[2]]) is seats[0]


def test_what_a_policy_goes_by() -> None:
    body = b'{"messages":[{"role":"user","content":"Hello"}]}'
    for policy in ("least_outstanding", "power_of_two", "random", "round_robin"):
        assert make_balancer(policy, [], rng=random.Random(1)).key_of(b"alice", body) is None
    by_session = make_balancer("session_affinity", [], rng=random.Random(1))
    assert by_session.key_of(b"alice", body) == b"alice"
    assert by_session.key_of(b"", body) is None
    assert by_session.key_of(None, body) is None
    by_prefix = make_balancer("prefix_affinity", [], rng=random.Random(1))
    assert by_prefix.key_of(None, body) == by_prefix.key_of(b"alice", bytearray(body)) != None  # noqa: E711
    assert by_prefix.key_of(None, body) != by_prefix.key_of(None, body.replace(b"Hello", b"Goodbye"))
    assert by_prefix.key_of(b"alice", b"") is None
    assert by_prefix.key_of(b"alice", b'{"model":"tiny"}') is None
