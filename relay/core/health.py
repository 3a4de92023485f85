"""Whether an upstream may be used: two verdicts on it that are kept apart, and a pure state machine for each.

The active one comes from probes. The passive one, a circuit breaker, comes from requests: it is quicker, and sees what
probes do not (an engine whose API process answers ``/health`` while nothing is generated), but what clients do must
not move it. Engines answer bad input with 400 and also with 500 (sgl-project/sglang#25811, vllm-project/router#148), so
only what fails before an answer begins counts, and the statuses by which a gateway says that nobody was there.

The breaker opens after 5 failures in a row, or 10 among the last 20 results. The first rule is Envoy's
(`consecutive_gateway_failure`), and enough for an engine that is gone; the second is for one that fails every other
time, and so hardly ever five times in a row. It counts results and not seconds, as resilience4j does unless told: an
engine's requests take minutes or milliseconds, and no window of time suits both.

Once open, the upstream is left alone for a while that doubles each time it does not help. Then one request at a time is
its trial: success closes the breaker, failure opens it again. A result counts only if its attempt was begun under the
breaker's present state. So the hundred streams that break with an engine eject it once, not a hundred times over, and a
request from before does not close what a later one has opened.

When no upstream of a pool is available, but some are up, the least bad is used regardless: a request that may fail
beats one that is refused. Whatever is begun while the breaker is open is a trial.
"""

from __future__ import annotations

from enum import Enum
from math import inf
from typing import TYPE_CHECKING, Final

import msgspec

if TYPE_CHECKING:
    from random import Random

#: Failures in a row that open the breaker: Envoy's default.
CONSECUTIVE_FAILURES: Final = 5
#: Results looked back on, and how many failures among them open the breaker: half, resilience4j's default rate.
WINDOW_RESULTS: Final = 20
WINDOW_FAILURES: Final = 10

#: Seconds of the first ejection: one interval of probes, by whose end they have had their say.
EJECTION_S: Final = 5.0
#: Seconds of the longest: a trial risks one request, which fails over, so waiting longer than a minute gains nothing.
#: Also how long after the breaker has closed new trouble still counts as the old.
MAX_EJECTION_S: Final = 60.0

#: Seconds to wait for a trial that is under way, where somebody must be told a time.
_TRIAL_S: Final = 1.0
#: The share of an interval by which a probe may come early or late.
_PROBE_JITTER: Final = 0.1

_WINDOW: Final = (1 << WINDOW_RESULTS) - 1
_STREAK: Final = (1 << CONSECUTIVE_FAILURES) - 1
_MOST_DOUBLINGS: Final = 10  # far beyond MAX_EJECTION_S


class HealthRules(msgspec.Struct, frozen=True, kw_only=True):
    """What the configuration says of health."""

    #: Probes in a row that must fail, or pass, for the active verdict to turn.
    failures: int = 3
    successes: int = 2
    #: Seconds between probes.
    interval_s: float = 5.0
    #: Answers that count as failures, if they come before the first frame.
    statuses: tuple[int, ...] = (502, 503, 504)


class State(Enum):
    """What an upstream's health comes to, in the words of ``/-/status``."""

    HEALTHY = "healthy"
    UNHEALTHY = "unhealthy"  #: fails its probes
    EJECTED = "ejected"  #: fails requests, and is left alone
    HALF_OPEN = "half-open"  #: for one request at a time


class Health:
    """The health of one upstream; `now` is seconds of one monotonic clock. Before its first probe it counts as up."""

    def __init__(self, rules: HealthRules, rng: Random) -> None:
        self.rules = rules
        self._rng = rng
        self.is_probed = False  #: its first probe has ended
        self.is_up = True  #: the active verdict
        self.has_been_up = False  #: by a probe's word
        self._passes = 0  # probes in a row
        self._failures = 0
        self.is_open = False  #: the passive verdict: the breaker is open
        self.ejected_until = -inf  #: while open: when the next trial may begin
        self._round = 0  # how often the breaker has changed its state
        self._results = 0  # under its present state, one bit each: the last is the lowest, 1 is a failure
        self._trials = 0  # under way
        self._ejections = 0  # of the present trouble
        self._closed_at = -inf

    def __repr__(self) -> str:
        probes = "up" if self.is_up else "down"
        breaker = f"open until {self.ejected_until:.3f} trials={self._trials}" if self.is_open else "closed"
        return f"<Health {probes}, {breaker}, ejections={self._ejections}>"

    def state(self, now: float) -> State:
        """Both verdicts in one word."""
        if not self.is_up:
            return State.UNHEALTHY
        if not self.is_open:
            return State.HEALTHY
        return State.EJECTED if now < self.ejected_until else State.HALF_OPEN

    def is_available(self, now: float) -> bool:
        """Whether the next request may go to it."""
        return self.is_up and (not self.is_open or (now >= self.ejected_until and not self._trials))

    def go_by(self, rules: HealthRules) -> None:
        """Other rules from now on. Where nobody probes any more it is up, as nobody would ever say so again."""
        self.rules = rules
        if not rules.interval_s:
            self.is_up = True
            self._passes = self._failures = 0

    @property
    def badness(self) -> tuple[int, float]:
        """Less is better, among upstreams that are up: those that have helped last, then those due first."""
        return (self._ejections, self.ejected_until) if self.is_open else (0, -inf)

    def retry_after_s(self, now: float) -> float:
        """Seconds until it may be available, at the earliest."""
        if not self.is_up:
            return max(1, self._wanted_passes - self._passes) * self.rules.interval_s
        if self.is_available(now):
            return 0.0
        return max(self.ejected_until - now, _TRIAL_S)

    # -- probes

    def on_probe(self, ok: bool, now: float) -> None:
        """A probe has ended.

        The first one's verdict stands at once (HAProxy's ``init-state up``): nothing has ever said anything else. So
        does the first good one: what ``successes`` guards against is an engine that comes and goes.
        """
        self._passes = self._passes + 1 if ok else 0
        self._failures = 0 if ok else self._failures + 1
        if self.is_up and not ok and (not self.is_probed or self._failures >= self.rules.failures):
            self.is_up = False
        elif not self.is_up and self._passes >= self._wanted_passes:
            self.is_up = True
            # It has come back, probably as a new process: what the breaker knows is of the old one. One trial shows.
            self.ejected_until = min(self.ejected_until, now)
        self.is_probed = True
        self.has_been_up = self.has_been_up or ok

    @property
    def _wanted_passes(self) -> int:
        """Good probes in a row that bring it back, or in."""
        return self.rules.successes if self.has_been_up else 1

    def on_verdict(self, is_up: bool, now: float) -> None:
        """Another process has probed, and come to this."""
        if is_up and not self.is_up:
            self.ejected_until = min(self.ejected_until, now)  # as in `on_probe`
        self.is_up = is_up
        self.is_probed = True

    # -- requests

    def begin(self) -> Attempt:
        """A request is about to be sent, be it as `is_available` says or as a last resort."""
        self._trials += self.is_open
        return Attempt(self, self._round)

    def _end(self, round_: int, is_failure: bool | None, now: float) -> None:
        """An attempt begun in `round_` has ended; None: it says nothing of the upstream."""
        if round_ != self._round:
            return
        self._trials -= self.is_open
        if is_failure is None:
            return
        if self.is_open:
            if is_failure:
                self._open(now)
            else:
                self._close(now)
            return
        self._results = (self._results << 1 | is_failure) & _WINDOW
        is_streak = self._results & _STREAK == _STREAK
        if is_streak or self._results.bit_count() >= WINDOW_FAILURES:
            if now - self._closed_at >= MAX_EJECTION_S:
                self._ejections = 0
            self._open(now)

    def _open(self, now: float) -> None:
        longest = min(MAX_EJECTION_S, EJECTION_S * 2.0 ** min(self._ejections, _MOST_DOUBLINGS))
        # Not less than half, and never all workers and relays at the same moment.
        self.ejected_until = now + longest * self._rng.uniform(0.5, 1.0)
        self._ejections += 1
        self._turn(is_open=True)

    def _close(self, now: float) -> None:
        self._closed_at = now
        self._turn(is_open=False)

    def _turn(self, *, is_open: bool) -> None:
        self.is_open = is_open
        self._round += 1
        self._results = 0
        self._trials = 0


class Attempt:
    """One request to an upstream, from before it is dialled. Its first outcome counts; what is told later does not."""

    __slots__ = ("_health", "_round", "is_ended")

    def __init__(self, health: Health, round_: int) -> None:
        self._health = health
        self._round = round_
        self.is_ended = False

    def failed(self, now: float) -> None:
        """No connection, a reset, or a timeout, before the first frame."""
        self._end(True, now)

    def answered(self, status: int, now: float) -> None:
        """The engine answers: a head, and for a stream the first frame, are there.

        A gateway's status is a failure. Any other from 500 on says nothing, as it may be the request's fault; below
        that, the engine is well, whatever it thinks of the request.
        """
        if status in self._health.rules.statuses:
            self._end(True, now)
        else:
            self._end(None if status >= 500 else False, now)

    def abandoned(self, now: float) -> None:
        """It ended without telling anything of the engine, as the client left: a trial's place is free again."""
        self._end(None, now)

    @property
    def may_change_availability(self) -> bool:
        """Whether its end can have: a trial's place is free again, or the breaker has turned since it began."""
        return self._health.is_open or self._round != self._health._round

    def _end(self, is_failure: bool | None, now: float) -> None:
        if not self.is_ended:
            self.is_ended = True
            self._health._end(self._round, is_failure, now)


def next_probe_delay(interval_s: float, rng: Random) -> float:
    """Seconds to the next probe: the interval on average, a little off it, so that probes do not come in volleys."""
    return interval_s * rng.uniform(1 - _PROBE_JITTER, 1 + _PROBE_JITTER)
