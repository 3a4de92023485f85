"""Round robin: seats in turn, each as often as its weight says, and as evenly spread as can be.

nginx's smooth round robin adds to every seat's credit on every pick: 33 µs for 1,000 seats here. Envoy's heap of
deadlines is fast, and lets a seat of weight 100 have most of 100 turns before the light ones' first.

Here seats of one weight form a group and simply take turns; only the few groups compete. Of those not ahead of their
share, the one whose next turn is due first has it: the quota method of apportionment (Balinski and Young 1975), which
never departs from a share by a whole turn. A group's turns, dealt out in order, keep that for each of its seats: after
n picks, a seat of weight w, of W in all, has had n·w/W turns, rounded down or up. What a pick costs grows with the
number of different weights (0.06 µs for each), not with that of seats.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from relay.core.balance.balancer import Balancer, Seat

if TYPE_CHECKING:
    from collections.abc import Collection
    from random import Random


class _Group:
    """Seats of one weight. Time is counted in rounds, in each of which every seat has as many turns as its weight."""

    __slots__ = ("due", "per_round", "ready", "seats", "start", "turns")

    def __init__(self) -> None:
        self.seats: deque[Seat] = deque()
        self.per_round = 0  #: turns of all its seats together
        self.ready = 0.0  #: a turn before this would be ahead of its share

    def ahead(self, now: float) -> float:
        """Turns it has had too early; less than 0: turns it is owed. Always about one, at most."""
        return (self.ready - now) * self.per_round

    def settle(self, per_round: int, ahead: float) -> None:
        """Counts anew, from time 0."""
        self.per_round = per_round
        self.turns = 0
        self.start = self.ready = ahead / per_round
        self.due = self.start + 1 / per_round  #: a turn after this would be behind

    def next_but(self, tried: Collection[Seat]) -> Seat | None:
        """Whose turn is next among those not `tried`."""
        return next((seat for seat in self.seats if seat not in tried), None)

    def serve(self) -> Seat:
        """The turn of the next seat."""
        self.turns += 1
        self.ready = self.due
        # Divided, not added up: shares that are equal stay equal to the last bit, however long it runs.
        self.due = self.start + (self.turns + 1) / self.per_round
        self.seats.rotate(-1)
        return self.seats[-1]


class RoundRobin(Balancer):
    """Weighted and smooth; see the module. After a change, groups keep what they are owed or have had too early."""

    def __init__(self, rng: Random) -> None:
        super().__init__(rng)
        self._groups: dict[int, _Group] = {}  # by weight
        self._picks = 0
        self._per_round = 0

    def pick(self, key: bytes | None = None, tried: Collection[Seat] = ()) -> Seat | None:
        """See `Balancer.pick`."""
        if not self._row:
            return None
        if out := self._in_row(tried):
            return self._stand_in(out)
        self._picks += 1
        now = self._picks / self._per_round
        first: _Group | None = None
        for group in self._groups.values():
            if group.ready < now and (first is None or group.due < first.due):
                first = group
        assert first is not None  # some are behind their share, as the sum of turns is that of shares
        return first.serve()

    def _stand_in(self, out: Collection[Seat]) -> Seat | None:
        """For a failover, who is due first; it keeps its turn.

        Otherwise, of two seats, the one that works would spend its turns on the failures of the other, which then would
        be the first choice of every request.
        """
        groups = sorted(self._groups.values(), key=lambda group: group.due)
        return next((seat for group in groups if (seat := group.next_but(out))), None)

    def _join(self, seat: Seat) -> None:
        super()._join(seat)
        group = self._groups.setdefault(seat.weight, _Group())
        # Anywhere: workers and relays of one fleet, started alike, must not go through it in step.
        group.seats.insert(self._rng.randrange(len(group.seats) + 1), seat)
        self._settle()

    def _leave(self, seat: Seat) -> None:
        super()._leave(seat)
        group = self._groups[seat.weight]
        group.seats.remove(seat)
        if not group.seats:
            del self._groups[seat.weight]
        self._settle()

    def _settle(self) -> None:
        """Begins a round with those that are there now, at time 0."""
        now = self._picks / self._per_round if self._picks else 0.0
        ahead = {weight: group.ahead(now) for weight, group in self._groups.items()}
        # What some are ahead, others are behind. Where one has gone, its part is shared out, or time, which is measured
        # in turns of all, would run apart from theirs.
        self._per_round = sum(weight * len(group.seats) for weight, group in self._groups.items())
        surplus = sum(ahead.values()) / max(self._per_round, 1)
        for weight, group in self._groups.items():
            per_round = weight * len(group.seats)
            group.settle(per_round, ahead[weight] - surplus * per_round)
        self._picks = 0
