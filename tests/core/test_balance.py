"""What all policies promise: whom they pick, whom never, and that loads come to nothing in the end."""

from __future__ import annotations

import random
from math import inf

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from relay.core.balance import POLICIES, Balancer, Load, Seat, make_balancer
from relay.core.balance.affinity import Affinity
from relay.core.balance.balancer import PROMPT_BYTES_PER_STREAM
from relay.core.balance.least import LeastOutstanding

NAMES = [f"http://10.0.0.{at}:8000" for at in range(6)]
KEYS = [None, b"alice", b"bob", b"carol"]


class AnyPolicy(RuleBasedStateMachine):
    """Members come, go, fail and change weight while requests are under way; a plain model knows who may be picked."""

    @initialize(policy=st.sampled_from(sorted(POLICIES)), seed=st.integers(0, 9))
    def begin(self, policy: str, seed: int) -> None:
        self.balancer = make_balancer(policy, [], rng=random.Random(seed))
        self.members: dict[str, Seat] = {}
        self.seats: list[Seat] = []  # those removed included
        self.loads: list[Load] = []

    @rule(name=st.sampled_from(NAMES), weight=st.integers(1, 5), is_available=st.booleans())
    def add(self, name: str, weight: int, is_available: bool) -> None:
        seat = Seat(name, weight)
        self.balancer.set_available(seat, is_available)
        if name in self.members:
            with pytest.raises(ValueError, match="is there already"):
                self.balancer.add(seat)
        else:
            self.balancer.add(seat)
            self.members[name] = seat
            self.seats.append(seat)

    @rule(name=st.sampled_from(NAMES))
    def remove(self, name: str) -> None:
        if name in self.members:
            self.balancer.remove(self.members.pop(name))
        else:
            with pytest.raises(KeyError):
                self.balancer.remove(Seat(name))

    @rule(at=st.integers(0), is_available=st.booleans())
    def set_available(self, at: int, is_available: bool) -> None:
        if self.seats:
            self.balancer.set_available(self.seats[at % len(self.seats)], is_available)

    @rule(key=st.sampled_from(KEYS), prompt_bytes=st.integers(0, 100_000), tried=st.sets(st.sampled_from(NAMES)))
    def pick_and_take(self, key: bytes | None, prompt_bytes: int, tried: set[str]) -> None:
        # A removed seat may be among those tried, and one that has failed may since have been marked.
        behind = [seat for seat in self.seats if seat.name in tried]
        candidates = {seat for seat in self.members.values() if seat.is_available} - set(behind)
        picked = self.balancer.pick(key, behind)
        if not candidates:
            assert picked is None
            return
        assert picked in candidates
        if isinstance(self.balancer, Affinity) and key is not None:
            assert picked.score <= self.balancer.bound or picked.score == min(seat.score for seat in candidates)
        elif isinstance(self.balancer, LeastOutstanding):
            assert picked.score == min(seat.score for seat in candidates)
        self.loads.append(self.balancer.take(picked, prompt_bytes))

    @rule(at=st.integers(0), times=st.integers(1, 2))
    def release(self, at: int, times: int) -> None:
        if self.loads:
            load = self.loads.pop(at % len(self.loads))
            for _ in range(times):
                load.release()

    @invariant()
    def counts_are_those_of_the_loads(self) -> None:
        for seat in getattr(self, "seats", []):
            held = [load.prompt_bytes for load in self.loads if load.seat is seat]
            assert (seat.streams, seat.prompt_bytes) == (len(held), sum(held))

    def teardown(self) -> None:
        for load in getattr(self, "loads", []):
            load.release()
        for seat in getattr(self, "seats", []):
            assert (seat.streams, seat.prompt_bytes, seat.score) == (0, 0, 0)


TestAnyPolicy = AnyPolicy.TestCase
TestAnyPolicy.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)


def balancer_of(policy: str, *weights: int, seed: int = 1) -> tuple[Balancer, list[Seat]]:
    seats = [Seat(f"http://10.0.{at >> 8}.{at & 255}:8000", weight) for at, weight in enumerate(weights)]
    return make_balancer(policy, seats, rng=random.Random(seed)), seats


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_a_fleet_of_none_and_of_one(policy: str) -> None:
    balancer, _ = balancer_of(policy)
    assert balancer.pick(b"key") is None
    balancer, [seat] = balancer_of(policy, 1)
    assert balancer.pick(b"key") is seat
    assert balancer.pick(b"key", [seat]) is None
    assert balancer.pick(b"key") is seat
    balancer.set_available(seat, False)
    assert balancer.pick(b"key") is None
    assert repr(balancer).endswith(" seats=1 available=0>")


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_failover_goes_through_all_and_ends(policy: str) -> None:
    balancer, seats = balancer_of(policy, 1, 5, 2, 2, 9)
    tried: list[Seat] = []
    while (seat := balancer.pick(b"key", tried)) is not None:
        assert seat not in tried
        tried.append(seat)
    assert set(tried) == set(seats)


@pytest.mark.parametrize("policy", ["least_outstanding", "round_robin", "power_of_two", "random"])
@pytest.mark.parametrize("count", [2, 3])
def test_a_seat_that_fails_is_not_everybodys_first_choice(policy: str, count: int) -> None:
    """A failover must not put the turn back to where the failure was."""
    balancer, seats = balancer_of(policy, *[1] * count)
    first_choices = 0
    for _ in range(300):
        if balancer.pick() is seats[0]:
            first_choices += 1
            assert balancer.pick(None, [seats[0]]) in seats[1:]
    # With least outstanding and three seats the failing one's neighbour takes its part of the failovers.
    assert first_choices == pytest.approx(300 / count, abs=45)


def test_an_unknown_policy() -> None:
    with pytest.raises(KeyError):
        make_balancer("fastest", [], rng=random.Random(1))


@pytest.mark.parametrize("weight", [0, -1])
def test_a_weight_is_at_least_1(weight: int) -> None:
    with pytest.raises(ValueError, match="less than 1"):
        Seat("http://10.0.0.1:8000", weight)


def test_a_score_counts_streams_and_prompts_by_weight() -> None:
    balancer, [seat] = balancer_of("least_outstanding", 2)
    loads = [balancer.take(seat, PROMPT_BYTES_PER_STREAM * 3), balancer.take(seat, 0)]
    assert seat.score == (2 + 3) / 2
    assert repr(seat) == "<Seat http://10.0.0.0:8000 weight=2 streams=2 prompt_bytes=12288>"
    for load in loads:
        load.release()
    assert seat.score == 0


def test_a_load_outlives_the_membership_of_its_seat() -> None:
    """What a removed seat gives back must not be taken off whoever stands in its place now."""
    balancer, [gone, other] = balancer_of("least_outstanding", 1, 1)
    load = balancer.take(gone, 10)
    balancer.remove(gone)
    balancer.take(other, 10)
    load.release()
    assert (gone.streams, other.streams) == (0, 1)
    balancer.add(gone)
    assert balancer.pick() is gone


def test_a_seat_that_comes_back_has_the_load_it_carries() -> None:
    balancer, [busy, other] = balancer_of("least_outstanding", 1, 1)
    balancer.set_available(busy, False)
    balancer.take(busy, 10)
    balancer.set_available(busy, True)
    assert {balancer.pick() for _ in range(5)} == {other}


def test_whether_a_removed_seat_is_available_is_noted() -> None:
    balancer, [gone, other] = balancer_of("round_robin", 1, 1)
    balancer.remove(gone)
    balancer.set_available(gone, False)
    balancer.set_available(gone, True)
    assert {balancer.pick() for _ in range(5)} == {other}
    assert len(balancer) == 1


# -- least outstanding


def test_seats_with_equally_little_to_do_take_turns() -> None:
    balancer, seats = balancer_of("least_outstanding", *[1] * 10)
    for seat in seats:
        if seat not in (seats[3], seats[4], seats[9]):
            balancer.take(seat, 0)
    picked = [balancer.pick() for _ in range(300)]
    assert {seat: picked.count(seat) for seat in set(picked)} == dict.fromkeys((seats[3], seats[4], seats[9]), 100)


def test_relays_that_start_alike_do_not_go_in_step() -> None:
    for policy in ("least_outstanding", "round_robin"):
        first = {balancer_of(policy, *[1] * 10, seed=seed)[0].pick().name for seed in range(40)}  # type: ignore[union-attr]
        assert len(first) > 5


def test_loads_come_out_by_weight() -> None:
    balancer, seats = balancer_of("least_outstanding", 1, 2, 5)
    for _ in range(80):
        seat = balancer.pick()
        assert seat is not None
        balancer.take(seat, 0)
    assert [seat.streams for seat in seats] == [10, 20, 50]


def test_a_score_moves_with_its_seat() -> None:
    """The last of the row takes the place of one that leaves."""
    balancer, seats = balancer_of("least_outstanding", 1, 1, 1)
    balancer.take(seats[0], 100_000)
    balancer.take(seats[1], 0)
    balancer.remove(seats[0])
    assert {balancer.pick() for _ in range(5)} == {seats[2]}


def test_nobody_is_hidden_for_longer_than_a_pick() -> None:
    balancer, seats = balancer_of("least_outstanding", 1, 1, 1)
    balancer.pick(None, [seats[0], seats[1], seats[1], Seat("http://elsewhere:8000")])
    assert max(seat.score for seat in seats) < inf
    assert {balancer.pick() for _ in range(3)} == set(seats)


# -- power of two


def test_the_busiest_of_all_is_never_picked() -> None:
    balancer, seats = balancer_of("power_of_two", *[1] * 5)
    balancer.take(seats[2], 0)
    assert {balancer.pick() for _ in range(300)} == {*seats} - {seats[2]}


def test_two_choices_keep_a_fleet_nearly_even() -> None:
    """With one random choice the busiest of 100 seats has some 20 of 1,000 streams; with two, 12 or 13."""
    balancer, seats = balancer_of("power_of_two", *[1] * 100)
    for _ in range(1000):
        seat = balancer.pick()
        assert seat is not None
        balancer.take(seat, 0)
    assert max(seat.streams for seat in seats) <= 14


@pytest.mark.parametrize("policy", ["least_outstanding", "power_of_two"])
def test_what_other_processes_have_there_counts(policy: str) -> None:
    busy, idle = Seat("http://a:1"), Seat("http://b:1")
    balancer = make_balancer(policy, [busy, idle], rng=random.Random(1))
    balancer.set_others(busy, 3.0)
    assert [balancer.take(idle, 0).seat for _ in range(2)] == [idle, idle]
    assert balancer.pick() is idle
    balancer.set_others(busy, 0.5)
    assert balancer.pick() is busy
    assert (busy.load, busy.score) == (0, 0.5)


def test_what_others_have_is_known_of_a_seat_that_joins_later() -> None:
    one, other = Seat("http://a:1"), Seat("http://b:1")
    balancer = make_balancer("least_outstanding", [one, other], rng=random.Random(1))
    balancer.set_available(one, False)
    balancer.set_others(one, 2.0)
    balancer.set_available(one, True)
    assert balancer.pick() is other
