"""Gaps between frames, kept small: thousands of streams have one each, and it is updated once per read."""

from __future__ import annotations

from array import array
from math import ceil
from typing import Final

#: Steps per doubling: a bucket is at most 1/8 wide, so its middle is within 6.25 % of every value in it.
_STEPS = 8
_STEP_BITS = 3
#: Values are counted in units of 2**10 ns, about a microsecond; the last bucket takes all beyond about 20 minutes.
_UNIT_BITS = 10
BUCKETS: Final[int] = _STEPS * 29  #: how many there are


class Histogram:
    """A log-linear histogram of times in nanoseconds, after HdrHistogram."""

    __slots__ = ("count", "counts", "max_ns")

    def __init__(self) -> None:
        self.count = 0
        self.max_ns = 0
        self.counts: array[int] | None = None  # made with the first value: many exchanges have none

    def add(self, ns: int) -> None:
        """Counts one value; negative ones (a clock is monotonic, but a bug is a bug) as 0."""
        counts = self.counts
        if counts is None:
            counts = self.counts = array("I", bytes(4 * BUCKETS))
        if ns > self.max_ns:
            self.max_ns = ns
        self.count += 1
        units = ns >> _UNIT_BITS
        if units < _STEPS:
            counts[max(0, units)] += 1
            return
        shift = units.bit_length() - _STEP_BITS - 1
        index = (shift << _STEP_BITS) + (units >> shift)
        counts[index if index < BUCKETS else BUCKETS - 1] += 1

    def add_zeros(self, number: int) -> None:
        """Counts `number` values of 0: frames that came in one read."""
        if self.counts is None:
            self.counts = array("I", bytes(4 * BUCKETS))
        self.counts[0] += number
        self.count += number

    def quantile(self, q: float) -> int | None:
        """The least value that the share `q` of all values is not above, in ns; None where there is none.

        It is the middle of its bucket: within 6.25 %, or within a unit (a microsecond) where that is more. Of fewer
        than 100 values the 99th percentile is the greatest.
        """
        if not self.count or self.counts is None:
            return None
        rank = max(1, ceil(q * self.count))
        seen = 0
        for index, number in enumerate(self.counts):
            seen += number
            if seen >= rank:
                return min(middle(index), self.max_ns)
        return self.max_ns


def middle(index: int) -> int:
    """The middle of a bucket, in ns."""
    if index < _STEPS:
        return (index << _UNIT_BITS) + (1 << (_UNIT_BITS - 1)) if index else 0
    shift = (index >> _STEP_BITS) - 1
    low = (_STEPS + (index & (_STEPS - 1))) << shift
    return (low << _UNIT_BITS) + (1 << (shift + _UNIT_BITS - 1))
