"""Gaps between frames, kept small: thousands of streams have one each, and it is updated once per read."""

from __future__ import annotations

from math import ceil
from typing import Final

#: Steps per doubling: a bucket is at most 1/8 wide, so its middle is within 6.25 % of every value in it.
_STEPS: Final = 8
_STEP_BITS: Final = 3
#: Values are counted in units of 2**10 ns, about a microsecond; the last bucket takes all beyond about 20 minutes.
_UNIT_BITS: Final = 10
BUCKETS: Final[int] = _STEPS * 29  #: how many there are


class Histogram:
    """A log-linear histogram of times in nanoseconds, after HdrHistogram."""

    __slots__ = ("_counts", "_taken", "count", "max_ns")

    def __init__(self) -> None:
        self.count = 0
        self.max_ns = 0
        self._counts: dict[int, int] = {}  # by bucket, since the last `take`: the gaps of one stream are in few of them
        self._taken: dict[int, int] = {}  # and before it

    def add(self, ns: int) -> None:
        """Counts one value; negative ones (a clock is monotonic, but a bug is a bug) as 0."""
        if ns > self.max_ns:
            self.max_ns = ns
        self.count += 1
        index = units = max(0, ns >> _UNIT_BITS)
        if units >= _STEPS:
            shift = units.bit_length() - _STEP_BITS - 1
            index = min((shift << _STEP_BITS) + (units >> shift), BUCKETS - 1)
        self._counts[index] = self._counts.get(index, 0) + 1

    def add_zeros(self, number: int) -> None:
        """Counts `number` values of 0: frames that came in one read."""
        self._counts[0] = self._counts.get(0, 0) + number
        self.count += number

    def take(self) -> dict[int, int]:
        """What was counted since the last call, by bucket."""
        counts, self._counts = self._counts, {}
        add_to(self._taken, counts)
        return counts

    def quantile(self, q: float) -> int | None:
        """The least value that the share `q` of all values is not above, in ns; None where there is none.

        It is the middle of its bucket: within 6.25 %, or within a unit (a microsecond) where that is more. Of fewer
        than 100 values the 99th percentile is the greatest.
        """
        if not self.count:
            return None
        counts = dict(self._taken)
        add_to(counts, self._counts)
        rank = max(1, ceil(q * self.count))
        seen = 0
        for index in sorted(counts):
            seen += counts[index]
            if seen >= rank:
                return min(middle(index), self.max_ns)
        return self.max_ns


def add_to(counts: dict[int, int], more: dict[int, int]) -> None:
    """Adds counts by bucket."""
    for index, number in more.items():
        counts[index] = counts.get(index, 0) + number


def middle(index: int) -> int:
    """The middle of a bucket, in ns."""
    if index < _STEPS:
        return (index << _UNIT_BITS) + (1 << (_UNIT_BITS - 1)) if index else 0
    shift = (index >> _STEP_BITS) - 1
    low = (_STEPS + (index & (_STEPS - 1))) << shift
    return (low << _UNIT_BITS) + (1 << (shift + _UNIT_BITS - 1))
