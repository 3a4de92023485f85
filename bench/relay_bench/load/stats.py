"""Numbers about many numbers: histograms that can be added up, exact percentiles, paired bootstrap intervals."""

from __future__ import annotations

import math
import statistics
from typing import TYPE_CHECKING, Final

import msgspec

if TYPE_CHECKING:
    import random
    from collections.abc import Iterable, Sequence

#: Steps per doubling: a bucket is at most 1/256 wide, so its middle is within 0.2 % of every value in it.
_STEP_BITS: Final = 8
#: Samples that a bootstrap draws, and the share of them beyond each end of its interval.
_RESAMPLES: Final = 1000
_TAIL: Final = 0.025


class Histogram(msgspec.Struct):
    """A log-linear histogram of times in ns, after HdrHistogram: exact below 512 ns; two can be added up.

    Sum, squares and extremes are kept exactly, so mean and standard deviation are. The finer sister of
    `relay.core.histogram`, which is made for thousands of live streams.
    """

    counts: dict[int, int] = {}
    count: int = 0
    total: int = 0
    squares: float = 0.0
    min_ns: int = 0
    max_ns: int = 0

    def add(self, ns: int) -> None:
        """Counts a value; a negative one (only a stepped wall clock makes one) as 0."""
        ns = max(ns, 0)
        shift = max(ns.bit_length() - _STEP_BITS - 1, 0)
        index = (shift << _STEP_BITS) + (ns >> shift)
        self.counts[index] = self.counts.get(index, 0) + 1
        self.min_ns = ns if not self.count else min(self.min_ns, ns)
        self.max_ns = max(self.max_ns, ns)
        self.count += 1
        self.total += ns
        self.squares += float(ns) * ns

    def merge(self, other: Histogram) -> None:
        """Adds the values of `other`."""
        if not other.count:
            return
        for index, number in other.counts.items():
            self.counts[index] = self.counts.get(index, 0) + number
        self.min_ns = min(self.min_ns, other.min_ns) if self.count else other.min_ns
        self.max_ns = max(self.max_ns, other.max_ns)
        self.count += other.count
        self.total += other.total
        self.squares += other.squares

    def clear(self) -> None:
        """Forgets all values."""
        self.counts.clear()
        self.count = self.total = self.min_ns = self.max_ns = 0
        self.squares = 0.0

    @property
    def mean_ns(self) -> float | None:
        """The exact mean; None where there is no value."""
        return self.total / self.count if self.count else None

    @property
    def std_ns(self) -> float | None:
        """The population's standard deviation; None where there is no value."""
        if not self.count:
            return None
        mean = self.total / self.count
        return math.sqrt(max(self.squares / self.count - mean * mean, 0.0))

    def quantile_ns(self, q: float) -> float | None:
        """The value at share `q` of all, within 0.2 %; None where there is none."""
        if not self.count:
            return None
        rank = q * (self.count - 1)
        seen = 0
        for index in sorted(self.counts):
            seen += self.counts[index]
            if seen > rank:
                return min(max(middle_ns(index), self.min_ns), self.max_ns)
        return self.max_ns

    def steps(self) -> list[tuple[float, float]]:
        """The cumulative distribution: ``(ns, share of values up to there)``, rising."""
        seen = 0
        points: list[tuple[float, float]] = []
        for index in sorted(self.counts):
            seen += self.counts[index]
            points.append((min(max(middle_ns(index), self.min_ns), self.max_ns), seen / self.count))
        return points


def middle_ns(index: int) -> float:
    """The middle of a bucket."""
    shift = max((index >> _STEP_BITS) - 1, 0)
    low = (index - (shift << _STEP_BITS)) << shift
    return low + ((1 << shift) - 1) / 2


def histogram_of(values_ns: Iterable[int]) -> Histogram:
    """A histogram of `values_ns`."""
    histogram = Histogram()
    for value in values_ns:
        histogram.add(value)
    return histogram


def percentile(ordered: Sequence[float], q: float) -> float:
    """The value at share `q` of sorted values, interpolated linearly as numpy does by default."""
    rank = q * (len(ordered) - 1)
    low = math.floor(rank)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (rank - low)


class Interval(msgspec.Struct, frozen=True):
    """An estimate and its confidence interval."""

    low: float
    estimate: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval says which way the difference goes."""
        return self.low > 0 or self.high < 0


def paired_interval(rounds: Sequence[Sequence[float]], rng: random.Random) -> Interval:
    """The median, and its 95 % percentile-bootstrap interval, of paired differences that came in rounds.

    Rounds are drawn first, then differences within each: requests of one round share its weather (a burst, another
    process on the machine), and drawing them as if they did not would make the interval too narrow. Raises
    `ValueError` where there is no difference at all.
    """
    rounds = [list(values) for values in rounds if values]
    if not rounds:
        raise ValueError("no pair of requests succeeded on both sides")
    drawn = []
    for _ in range(_RESAMPLES):
        sample: list[float] = []
        for values in rng.choices(rounds, k=len(rounds)):
            sample += rng.choices(values, k=len(values))
        drawn.append(statistics.median(sample))
    drawn.sort()
    estimate = statistics.median([value for values in rounds for value in values])
    return Interval(percentile(drawn, _TAIL), estimate, percentile(drawn, 1 - _TAIL))
