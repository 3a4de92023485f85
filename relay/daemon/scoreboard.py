"""The memory that all processes of a daemon share: for each worker a slot that it alone writes, and all read.

One anonymous mapping, made before the first fork. A slot outlives its worker: the next in it goes on counting in the
same board, so a worker that dies takes no counts with it. Pages that nobody writes cost nothing.

    slot     board    BOARD_BYTES      metrics, see `relay.core.board`
             loads    float64 each     what is outstanding at an engine, in streams; what waits for a pool
             held     float64 each     permits held of a limit
             beat     float64          when the event loop last turned (monotonic clock, which all processes share)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from mmap import mmap
from typing import Final

from relay.core.board import BOARD_BYTES, retire

#: Engines and pools at once; a number beyond stands for nobody, see `Numbers`.
MOST_NUMBERS: Final = 4096
#: Keys whose requests at once are limited, and those that no longer are while some of theirs go on: their cells.
KEY_NUMBERS: Final = range(MOST_NUMBERS, MOST_NUMBERS + 4000)
#: Engines of one role and pool, or the pool itself (role and URL empty); or a key (the first two are).
Subject = tuple[str, str, str]

_CELL: Final = 8
_PAGE: Final = 4096
_CELLS: Final = MOST_NUMBERS + KEY_NUMBERS.stop
_SLOT_BYTES: Final = BOARD_BYTES + -(-(_CELLS + 1) * _CELL // _PAGE) * _PAGE


class Slot:
    """One worker's part."""

    def __init__(self, memory: memoryview) -> None:
        self.board = memory[:BOARD_BYTES]
        cells = memory[BOARD_BYTES:].cast("d")
        self.loads: memoryview[float] = cells[:MOST_NUMBERS]
        self.held: memoryview[float] = cells[MOST_NUMBERS:_CELLS]
        self._beat: memoryview[float] = cells[_CELLS : _CELLS + 1]

    def __repr__(self) -> str:
        return f"<Slot streams={math.fsum(self.loads):g} beat={self.beat:.3f}>"

    @property
    def beat(self) -> float:
        """When the worker's event loop last turned; 0: never."""
        return self._beat[0]

    def set_beat(self, now: float) -> None:
        """The event loop turns."""
        self._beat[0] = now

    def vacate(self) -> dict[int, int]:
        """Its worker is gone: nothing is outstanding there any more. Answers the permits it held, by number."""
        held = {number: max(0, int(count)) for number, count in enumerate(self.held) if count}
        for cells in (self.loads, self.held):
            for number, value in enumerate(cells):
                if value:
                    cells[number] = 0.0
        retire(self.board)
        return held


class Scoreboard:
    """All slots, with `room` for so many. Make it before the first fork."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.slots: list[Slot] = []  #: those that have been asked for; nothing looks into the others' pages
        self._memory = memoryview(mmap(-1, room * _SLOT_BYTES))

    def __repr__(self) -> str:
        return f"<Scoreboard {self.slots!r}>"

    def slot(self, at: int) -> Slot:
        """A slot by its number, from 0."""
        for number in range(len(self.slots), at + 1):
            self.slots.append(Slot(self._memory[number * _SLOT_BYTES : (number + 1) * _SLOT_BYTES]))
        return self.slots[at]

    def is_clear(self, number: int) -> bool:
        """Whether nobody has anything outstanding under a number."""
        return not any(slot.held[number] or (number < MOST_NUMBERS and slot.loads[number]) for slot in self.slots)


class Numbers:
    """Which cell stands for whom; a number is given anew once its subject is gone and its cells are clear."""

    def __init__(
        self,
        scoreboard: Scoreboard,
        numbers: range = range(MOST_NUMBERS),
        on_lack: Callable[[Subject], None] = lambda subject: None,
    ) -> None:
        self._scoreboard = scoreboard
        self._on_lack = on_lack  # told of a subject that there is none for, once
        self._lacking: set[Subject] = set()
        self._of: dict[Subject, int] = {}
        self._gone: list[int] = []
        self._unused = iter(numbers)

    def __repr__(self) -> str:
        return f"<Numbers used={len(self._of)} gone={len(self._gone)}>"

    def __iter__(self) -> Iterator[tuple[Subject, int]]:
        """Whom there are numbers for, and which."""
        return iter(self._of.items())

    def of(self, subject: Subject) -> int | None:
        """A subject's number; None: there are too many."""
        number = self._of.get(subject)
        if number is None:
            number = self._free()
            if number is not None:
                self._of[subject] = number
            elif subject not in self._lacking:
                self._lacking.add(subject)
                self._on_lack(subject)
        return number

    def keep(self, subjects: set[Subject]) -> list[int]:
        """Only these are left; answers the numbers of those that are gone."""
        gone = [self._of.pop(subject) for subject in self._of.keys() - subjects]
        self._gone += gone
        self._lacking &= subjects
        return gone

    def _free(self) -> int | None:
        for at, number in enumerate(self._gone):
            if self._scoreboard.is_clear(number):
                return self._gone.pop(at)
        return next(self._unused, None)
