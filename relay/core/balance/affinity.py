"""Affinity: requests of one key go to one seat, as long as it bears no more than its part.

Rendezvous hashing (Thaler and Ravishankar 1998): each seat has a distance from each key, which depends on nothing but
these two, and the nearest seat is the key's. So a seat that joins takes from each of the others a few keys and moves
none between them; one that leaves spreads its keys over all.

Where the distance is a hash of both, all seats must be asked: 300 µs for 1,000. Here it is one that can be searched for
(multi-probe consistent hashing, Appleton and O'Reilly 2015, arXiv:1505.00062): a seat has points on a circle, a key has
probes, and their distance is the shortest way on from any probe to any point. One bisection per probe finds the nearest
seat, and steps on from there the next ones in order. Nothing is cached, so the first pick of a key costs what all cost.

Bounded load (Mirrokni, Thorup and Zadimoghaddam 2018; HAProxy's ``hash-balance-factor``): a seat that has too much
outstanding is passed over for the next in the key's order.
"""

from __future__ import annotations

from bisect import bisect_left
from hashlib import blake2b
from heapq import heapify, heapreplace
from itertools import islice
from struct import Struct
from typing import TYPE_CHECKING, Final

from relay.core.balance.balancer import Seat
from relay.core.balance.least import LeastOutstanding
from relay.core.balance.prompt import prompt_prefix

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator
    from random import Random

#: A seat is passed over when its score is above this many times the mean score (HAProxy recommends 1.25 to 2) …
BOUND_FACTOR: Final = 1.25
#: … and this much more, in streams per weight. An engine decodes a few streams about as fast as one, while the cache
#: that another seat lacks costs a whole prefill; without it, a fleet with little to do would have hardly any affinity.
BOUND_SLACK: Final = 8.0

# 16 points for each unit of weight, and 8 probes: over 1,000 seats of one weight, shares of keys depart from the mean
# by 6 % (standard deviation), a little less than on a ring with 160 points a seat, with a tenth of the points.
_POINTS_PER_WEIGHT: Final = 16
_PROBES: Final = Struct("<8Q")
_CIRCLE: Final = (1 << 64) - 1

#: Points looked at before giving up on affinity. At most 1/BOUND_FACTOR of all seats can be above the bound.
_MOST_STEPS: Final = 64


class Affinity(LeastOutstanding):
    """What both affinities share; without a key, least outstanding.

    A change costs about 0.3 ms at 1,000 seats of weight 2.5: where a seat leaves, to delete its points; where one
    joins, in the next pick, to sort a list of which all but the new points are in order.
    """

    def __init__(self, rng: Random) -> None:
        super().__init__(rng)
        self._points: list[int] = []  # on the circle, in order if sorted
        self._is_sorted = True
        self._owners: dict[int, Seat] = {}

    def pick(self, key: bytes | None = None, tried: Collection[Seat] = ()) -> Seat | None:
        """See `Balancer.pick`."""
        if key is not None and self._points:
            scores, bound = self._scores, self.bound
            for seat in islice(self._nearest(key), _MOST_STEPS):
                if scores[seat.slot] <= bound and seat not in tried:
                    return seat
        return super().pick(None, tried)

    @property
    def bound(self) -> float:
        """The score above which a seat is passed over. There is always a seat below: the least is below the mean."""
        return BOUND_FACTOR * sum(self._scores) / len(self._scores) + BOUND_SLACK

    def _nearest(self, key: bytes) -> Iterator[Seat]:
        """The seats in order of their distance from a key, some repeatedly, without end."""
        points, owners = self._sorted_points(), self._owners
        count = len(points)
        ways = []  # from each probe: the distance gone, and the place of the point reached
        for probe in _PROBES.unpack(blake2b(key, digest_size=_PROBES.size).digest()):
            place = bisect_left(points, probe) % count
            ways.append(((points[place] - probe) & _CIRCLE, place))
        heapify(ways)
        while True:
            gone, place = ways[0]
            yield owners[points[place]]
            after = (place + 1) % count
            heapreplace(ways, (gone + ((points[after] - points[place]) & _CIRCLE), after))

    def _sorted_points(self) -> list[int]:
        if not self._is_sorted:
            self._points.sort()
            self._is_sorted = True
        return self._points

    def _join(self, seat: Seat) -> None:
        super()._join(seat)
        for point in _points_of(seat):
            self._owners[point] = seat
            self._points.append(point)
        self._is_sorted = False

    def _leave(self, seat: Seat) -> None:
        super()._leave(seat)
        points = self._sorted_points()
        for point in _points_of(seat):
            del self._owners[point]
            del points[bisect_left(points, point)]


def _points_of(seat: Seat) -> list[int]:
    """Where a seat stands, from its name alone: the same in every process. That two share a point is past belief."""
    points: list[int] = []
    for number in range(seat.weight * _POINTS_PER_WEIGHT // 8):
        points += _PROBES.unpack(blake2b(f"{number} {seat.name}".encode(), digest_size=_PROBES.size).digest())
    return points


class SessionAffinity(Affinity):
    """By what the configuration calls a session."""

    def key_of(self, session: bytes | None, body: bytes | bytearray) -> bytes | None:
        """The session."""
        return session or None


class PrefixAffinity(Affinity):
    """By how the prompt begins, so that the engine has it in its prefix cache: see `prompt_prefix`."""

    def key_of(self, session: bytes | None, body: bytes | bytearray) -> bytes | None:
        """A hash of the prompt's beginning; None where the body has no prompt."""
        prefix = prompt_prefix(body)
        return blake2b(prefix, digest_size=16).digest() if prefix else None
