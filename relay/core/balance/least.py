"""Least outstanding: the seat that has the least to do for its weight."""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING

from relay.core.balance.balancer import Balancer, Seat

if TYPE_CHECKING:
    from collections.abc import Collection
    from random import Random


class LeastOutstanding(Balancer):
    """The least `Seat.score` wins; among equals whoever comes next after the last one picked.

    The search begins behind the last pick, not at a counter that goes up by one: of two equals that stand side by side
    in a long row, a counter would nearly always come upon the same one first.

    An idle seat scores 0 whatever its weight, so an idle fleet takes even turns: a weight tells how much a seat bears,
    and matters once it bears something.
    """

    def __init__(self, rng: Random) -> None:
        super().__init__(rng)
        self._turn = 0

    def pick(self, key: bytes | None = None, tried: Collection[Seat] = ()) -> Seat | None:
        """See `Balancer.pick`."""
        scores = self._scores
        hidden = self._in_row(tried) if tried else ()
        for seat in hidden:
            scores[seat.slot] = inf
        turn = self._turn
        slot = self._least()
        for seat in hidden:
            scores[seat.slot] = seat.score
        if hidden:
            self._turn = turn  # or of two seats, the one that fails would be first every time
        return None if slot is None else self._row[slot]

    def _least(self) -> int | None:
        scores = self._scores
        if not scores or (least := min(scores)) == inf:
            return None
        try:
            slot = scores.index(least, self._turn)
        except ValueError:
            slot = scores.index(least)
        self._turn = (slot + 1) % len(scores)
        return slot

    def _join(self, seat: Seat) -> None:
        super()._join(seat)
        # Workers and relays of one fleet, started alike, must not go through it in step.
        self._turn = self._rng.randrange(len(self._row))
