"""Health: what moves which verdict, what never does, and that no trial is ever lost."""

from __future__ import annotations

import random
from math import inf

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from relay.core.health import (
    CONSECUTIVE_FAILURES,
    EJECTION_S,
    MAX_EJECTION_S,
    WINDOW_FAILURES,
    WINDOW_RESULTS,
    Attempt,
    Health,
    HealthRules,
    State,
    next_probe_delay,
)

RULES = HealthRules(failures=3, successes=2, interval_s=5.0, statuses=(502, 503, 504))


def health_of(seed: int = 1) -> Health:
    return Health(RULES, random.Random(seed))


def ejected(now: float = 0.0, *, seed: int = 1) -> Health:
    health = health_of(seed)
    fail(health, CONSECUTIVE_FAILURES, now)
    assert health.state(now) is State.EJECTED
    return health


def fail(health: Health, times: int, now: float = 0.0) -> None:
    for _ in range(times):
        health.begin().failed(now)


# -- probes


def test_before_the_first_probe_it_counts_as_healthy() -> None:
    health = health_of()
    assert (health.is_probed, health.is_up, health.is_available(0.0)) == (False, True, True)
    assert health.state(0.0) is State.HEALTHY
    assert repr(health) == "<Health up, closed, ejections=0>"


@pytest.mark.parametrize("ok", [True, False])
def test_the_first_probe_decides_alone(ok: bool) -> None:
    health = health_of()
    health.on_probe(ok, 0.0)
    assert (health.is_probed, health.is_up, health.is_available(0.0)) == (True, ok, ok)


@pytest.mark.parametrize(
    ("probes", "states"),
    [
        ("+--+--", "111111"),  # never three in a row
        ("+---", "1110"),
        ("+---+", "11100"),
        ("+---++", "111001"),
        ("+---+-++", "11100001"),
        ("+---+-+-++", "1110000001"),
        ("--+-", "0011"),  # it has never been up: there is nothing it could come back to
        ("-+---+", "011100"),
        ("-++--+---", "011111110"),
    ],
)
def test_thresholds_count_in_a_row(probes: str, states: str) -> None:
    health = health_of()
    seen = ""
    for probe in probes:
        health.on_probe(probe == "+", 0.0)
        seen += str(int(health.is_up))
    assert seen == states


def test_who_fails_its_probes_is_never_available() -> None:
    health = health_of()
    health.on_probe(False, 0.0)
    for _ in range(50):
        health.begin().answered(200, 0.0)
    assert not health.is_available(inf)
    assert health.state(0.0) is State.UNHEALTHY


def test_passing_probes_do_not_close_the_breaker() -> None:
    """Engines answer /health while nothing else works."""
    health = ejected()
    for now in range(10):
        health.on_probe(True, now / 10)
    assert health.state(1.0) is State.EJECTED


def test_who_comes_back_by_its_probes_has_a_trial_at_once() -> None:
    """A restarted engine need not sit out what the one before it was given."""
    health = ejected()
    for _ in range(3):
        health.on_probe(False, 1.0)
    assert health.state(1.0) is State.UNHEALTHY
    health.on_probe(True, 1.5)
    health.on_probe(True, 2.0)
    assert health.state(2.0) is State.HALF_OPEN
    health.begin().answered(200, 2.0)
    assert health.state(2.0) is State.HEALTHY


# -- requests


def test_failures_in_a_row_open_the_breaker() -> None:
    health = health_of()
    fail(health, CONSECUTIVE_FAILURES - 1)
    health.begin().answered(200, 0.0)
    fail(health, CONSECUTIVE_FAILURES - 1)
    assert health.is_available(0.0)
    fail(health, 1)
    assert not health.is_available(0.0)


def test_half_of_the_last_results_open_it_too() -> None:
    """Never two failures in a row, and still every other request fails."""
    health = health_of()
    for _ in range(WINDOW_FAILURES - 1):
        health.begin().failed(0.0)
        health.begin().answered(200, 0.0)
    assert health.is_available(0.0)
    health.begin().failed(0.0)
    assert not health.is_available(0.0)


def test_a_few_failures_among_many_do_not() -> None:
    health = health_of()
    for _ in range(100):
        fail(health, 3)
        assert health.is_available(0.0)
        for _ in range(4):
            health.begin().answered(200, 0.0)
    assert WINDOW_RESULTS * 3 / 7 < WINDOW_FAILURES


@pytest.mark.parametrize("status", [200, 204, 301, 400, 401, 404, 408, 413, 422, 429, 499, 500, 501, 529, 599])
def test_what_an_engine_answers_to_a_client_never_counts_against_it(status: int) -> None:
    health = health_of()
    for _ in range(100):
        health.begin().answered(status, 0.0)
    assert health.is_available(0.0)


@pytest.mark.parametrize("status", RULES.statuses)
def test_what_a_gateway_answers_counts(status: int) -> None:
    health = health_of()
    for _ in range(CONSECUTIVE_FAILURES):
        health.begin().answered(status, 0.0)
    assert not health.is_available(0.0)


def test_clients_that_leave_neither_harm_nor_help() -> None:
    health = health_of()
    for _ in range(100):
        health.begin().abandoned(0.0)
    fail(health, CONSECUTIVE_FAILURES - 1)
    health.begin().abandoned(0.0)
    health.begin().answered(500, 0.0)
    assert health.is_available(0.0)
    fail(health, 1)
    assert not health.is_available(0.0)


def test_who_refuses_a_request_is_well() -> None:
    health = health_of()
    for status in (400, 404, 429):
        fail(health, CONSECUTIVE_FAILURES - 1)
        health.begin().answered(status, 0.0)
    assert health.is_available(0.0)
    broken = ejected()
    broken.begin().answered(404, broken.ejected_until)
    assert broken.state(broken.ejected_until) is State.HEALTHY


def test_an_attempt_ends_once() -> None:
    health = health_of()
    attempt = health.begin()
    for _ in range(100):
        attempt.failed(0.0)
    assert attempt.is_ended
    assert health.is_available(0.0)


def test_all_streams_that_break_at_once_eject_once() -> None:
    health = health_of()
    attempts = [health.begin() for _ in range(200)]
    for attempt in attempts:
        attempt.failed(1.0)
    assert health.badness[0] == 1
    assert health.ejected_until <= 1.0 + EJECTION_S


# -- the trial


def test_one_trial_at_a_time() -> None:
    health = ejected()
    assert not health.is_available(health.ejected_until - 0.001)
    now = health.ejected_until
    assert health.state(now) is State.HALF_OPEN
    assert health.is_available(now)
    trial = health.begin()
    assert not health.is_available(now)
    assert not health.is_available(inf)
    trial.answered(200, now)
    assert health.state(now) is State.HEALTHY


def test_a_trial_that_fails_ejects_again() -> None:
    health = ejected()
    now = health.ejected_until
    health.begin().failed(now)
    assert health.state(now) is State.EJECTED
    assert health.badness[0] == 2


@pytest.mark.parametrize("status", [None, 500])
def test_a_trial_that_tells_nothing_leaves_its_place_to_another(status: int | None) -> None:
    health = ejected()
    now = health.ejected_until
    trial = health.begin()
    if status is None:
        trial.abandoned(now)
    else:
        trial.answered(status, now)
    trial.abandoned(now)
    assert health.is_available(now)
    health.begin()
    assert not health.is_available(now)


def test_what_was_begun_before_the_ejection_says_nothing_after_it() -> None:
    health = health_of()
    old = [health.begin() for _ in range(3)]
    fail(health, CONSECUTIVE_FAILURES)
    now = health.ejected_until
    old[0].answered(200, now)
    assert health.state(now) is State.HALF_OPEN
    trial = health.begin()
    old[1].failed(now)
    old[2].abandoned(now)
    assert not health.is_available(now)
    trial.answered(200, now)
    assert health.is_available(now)


def test_a_last_resort_is_a_trial_too() -> None:
    """All are ejected and the least bad is used: it works, so it is back, and the stragglers do not matter."""
    health = ejected()
    first, second = health.begin(), health.begin()
    first.answered(200, 0.1)
    assert health.state(0.1) is State.HEALTHY
    second.failed(0.2)
    fail(health, CONSECUTIVE_FAILURES - 1, 0.2)
    assert health.is_available(0.2)
    fail(health, 1, 0.2)
    assert health.is_available(health.ejected_until)


def test_last_resorts_that_fail_together_eject_once_more() -> None:
    health = ejected()
    for attempt in [health.begin() for _ in range(50)]:
        attempt.failed(0.1)
    assert health.badness[0] == 2


def test_ejections_grow_to_a_cap_and_never_stop() -> None:
    health = ejected()
    lengths = [health.ejected_until]
    for _ in range(2000):
        now = health.ejected_until
        health.begin().failed(now)
        lengths.append(health.ejected_until - now)
    for number, length in enumerate(lengths):
        longest = min(MAX_EJECTION_S, EJECTION_S * 2 ** min(number, 20))
        assert longest / 2 - 1e-6 <= length <= longest + 1e-6
    assert max(lengths) > MAX_EJECTION_S * 0.9


def test_ejections_of_one_engine_differ_between_workers() -> None:
    assert len({ejected(seed=seed).ejected_until for seed in range(20)}) == 20


@pytest.mark.parametrize(("quiet_s", "ejections"), [(MAX_EJECTION_S - 1, 2), (MAX_EJECTION_S, 1)])
def test_trouble_that_soon_returns_is_the_old_one(quiet_s: float, ejections: int) -> None:
    health = ejected()
    now = health.ejected_until
    health.begin().answered(200, now)
    fail(health, CONSECUTIVE_FAILURES, now + quiet_s)
    assert health.badness[0] == ejections


# -- for those who have to choose, or to wait


def test_the_least_bad() -> None:
    healthy, once, later, twice = health_of(), ejected(0.0), ejected(20.0), ejected(0.0)
    twice.begin().failed(0.1)
    assert sorted([twice, later, once, healthy], key=lambda health: health.badness) == [healthy, once, later, twice]


def test_when_to_come_again() -> None:
    health = ejected()
    until = health.ejected_until
    assert health_of().retry_after_s(0.0) == 0
    assert health.retry_after_s(0.0) == until
    assert health.retry_after_s(until) == 0
    health.begin()
    assert health.retry_after_s(until) == 1.0
    health.on_probe(False, 0.0)
    assert health.retry_after_s(0.0) == RULES.interval_s  # its first good probe lets it in
    health.on_probe(True, 0.0)
    for _ in range(RULES.failures):
        health.on_probe(False, 0.0)
    assert health.retry_after_s(0.0) == 2 * RULES.interval_s
    health.on_probe(True, 0.0)
    assert health.retry_after_s(0.0) == RULES.interval_s


@given(st.floats(0.01, 3600), st.integers(0, 1000))
def test_probes_come_about_every_interval(interval_s: float, seed: int) -> None:
    rng = random.Random(seed)
    delays = [next_probe_delay(interval_s, rng) for _ in range(20)]
    assert all(0.9 * interval_s <= delay <= 1.1 * interval_s for delay in delays)
    assert len(set(delays)) > 1


class AnyOrder(RuleBasedStateMachine):
    """Probes, requests and time in any order. The relay keeps to `is_available`, but for last resorts."""

    @initialize(seed=st.integers(0, 5))
    def begin(self, seed: int) -> None:
        self.health = health_of(seed)
        self.now = 0.0
        self.open: list[Attempt] = []
        self.trials: list[Attempt] = []  # those under way that were begun since the breaker opened
        self.probes: list[bool] = []

    @rule(seconds=st.sampled_from([0.0, 0.5, 3.0, 100.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule(ok=st.booleans())
    def probe(self, ok: bool) -> None:
        self.health.on_probe(ok, self.now)
        self.probes.append(ok)

    @precondition(lambda self: self.health.is_available(self.now))
    @rule()
    def request(self) -> None:
        assert self.health.is_up
        assert self.health.state(self.now) in (State.HEALTHY, State.HALF_OPEN)
        if self.health.is_open:
            assert not self.trials
            assert self.now >= self.health.ejected_until
        self.start()
        assert self.health.is_available(self.now) is not self.health.is_open

    @precondition(lambda self: not self.health.is_available(self.now))
    @rule()
    def last_resort(self) -> None:
        self.start()

    def start(self) -> None:
        attempt = self.health.begin()
        self.open.append(attempt)
        if self.health.is_open:
            self.trials.append(attempt)

    @precondition(lambda self: self.open)
    @rule(
        at=st.integers(0),
        outcome=st.sampled_from(["failed", "failed", "answered", "abandoned"]),
        times=st.integers(1, 2),
    )
    def end(self, at: int, outcome: str, times: int) -> None:
        was_open, until = self.health.is_open, self.health.ejected_until
        attempt = self.open.pop(at % len(self.open))
        for _ in range(times):
            if outcome == "answered":
                attempt.answered(200, self.now)
            else:
                getattr(attempt, outcome)(self.now)
        if outcome == "abandoned":
            assert (self.health.is_open, self.health.ejected_until) == (was_open, until)
        if outcome == "failed":
            assert self.health.is_open >= was_open
        if outcome == "answered":
            assert self.health.is_open <= was_open
        if self.health.is_open != was_open or self.health.ejected_until != until:
            self.trials = []
        self.trials = [trial for trial in self.trials if trial is not attempt]

    @invariant()
    def active_verdict_is_a_function_of_the_probes(self) -> None:
        if not hasattr(self, "health"):
            return
        is_up = True
        for at, ok in enumerate(self.probes):
            failing = at == 0 or not any(self.probes[max(0, at - 2) : at + 1])
            passing = (at > 0 and self.probes[at - 1]) or not any(self.probes[:at])
            is_up = (is_up or passing) if ok else is_up and not (failing and (at == 0 or at >= 2))
        assert self.health.is_up is is_up

    @invariant()
    def waiting_is_bounded_and_true(self) -> None:
        if not hasattr(self, "health"):
            return
        wait = self.health.retry_after_s(self.now)
        assert 0 <= wait <= max(MAX_EJECTION_S, RULES.successes * RULES.interval_s)
        assert (wait == 0) is self.health.is_available(self.now)

    def teardown(self) -> None:
        """Once all requests are over, time and probes bring anyone back: no trial's place has been lost."""
        if hasattr(self, "health"):
            for attempt in self.open:
                attempt.abandoned(self.now)
            for _ in range(RULES.successes):
                self.health.on_probe(True, self.now)
            assert self.health.is_available(self.now + MAX_EJECTION_S)


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


# -- probes of another process


def test_another_process_has_probed() -> None:
    health = health_of()
    health.on_verdict(False, 0.0)
    assert (health.is_probed, health.state(0.0)) == (True, State.UNHEALTHY)
    health.on_verdict(True, 1.0)
    assert health.state(1.0) is State.HEALTHY


def test_one_that_another_process_finds_up_again_gets_a_trial_at_once() -> None:
    health = ejected(0.0)
    health.on_verdict(False, 0.0)
    health.on_verdict(True, 0.1)
    assert health.state(0.1) is State.HALF_OPEN
    still = ejected(0.0)
    still.on_verdict(True, 0.1)  # it was not down: what requests say stands
    assert still.state(0.1) is State.EJECTED
