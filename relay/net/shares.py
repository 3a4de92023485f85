"""What a worker shares with the daemon's others: how much each has at every engine, and the places of a limit.

Loads are numbers in shared memory, an array for each worker, written by it alone and read by all. A place is a permit
of an `eventfd` semaphore (EFD_SEMAPHORE): a read takes one or fails, in one system call, whichever worker asks, so a
limit holds exactly over all of them; and the descriptor is readable while there are some, which is what who waits in
another worker needs. A permit is noted in shared memory too, so that those of a worker that dies can be given back: it
is noted after it is taken, and struck out before it is given back, so that one who dies between the two costs the limit
a permit, and never exceeds it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from typing import TypeAlias

import trio

#: One worker's, each about the engine or pool whose number is its index.
Cells: TypeAlias = "memoryview[float]"


class Semaphore:
    """The places of one limit, as a worker sees them."""

    def __init__(self, fd: int, number: int, held: Cells) -> None:
        self.fd = fd
        self._number = number
        self._held = held

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._number} held={self._held[self._number]:g}>"

    def take(self) -> bool:
        """Takes a permit, if there is one."""
        try:
            os.eventfd_read(self.fd)
        except BlockingIOError:
            return False
        self._held[self._number] += 1
        return True

    def give_back(self) -> None:
        """A permit taken before is free again."""
        self._held[self._number] -= 1
        os.eventfd_write(self.fd, 1)

    def __del__(self) -> None:
        os.close(self.fd)  # when the last place that holds one is gone


class Permits(Semaphore):
    """The places of a limit that requests wait for."""

    def __init__(self, fd: int, number: int, held: Cells) -> None:
        super().__init__(fd, number, held)
        self.is_exhausted = False  #: none was left when one was asked for, and none has become free since
        self.on_free: Callable[[], None] = lambda: None  #: called when one may be had again after there was none
        self._scope = trio.CancelScope()
        self._exhausted = trio.Event()

    def take(self) -> bool:
        """Takes a permit, if there is one.

        Once there was none, only `watch` finds the next: so those who wait here and in other workers have the same
        chance, and a worker that gives one back has no head start.
        """
        if self.is_exhausted:
            return False
        if not super().take():
            self.is_exhausted = True
            self._exhausted.set()
            return False
        return True

    async def watch(self) -> None:
        """Looks out for permits whenever there was none, until `retire`."""
        with self._scope:
            while True:
                await self._exhausted.wait()
                await trio.lowlevel.wait_readable(self.fd)
                self._exhausted = trio.Event()
                self.is_exhausted = False
                self.on_free()

    def retire(self) -> None:
        """No more are taken; those that are held are given back as ever."""
        self._scope.cancel()


class Shares:
    """A worker's part in what is shared."""

    def __init__(self, loads: Cells, held: Cells, others: Sequence[Cells] = ()) -> None:
        self.held = held
        self._loads = loads
        self.others = others  #: their loads
        self._used = 0  # cells that stand for something

    def __repr__(self) -> str:
        return f"<Shares used={self._used} others={len(self.others)}>"

    def set_load(self, number: int, load: float) -> None:
        """Shows the others what this worker has at an engine, in streams, or waiting for a pool."""
        self._loads[number] = load
        if number >= self._used:
            self._used = number + 1

    def load_of_others(self, number: int) -> float:
        """What all others together have at one."""
        return math.fsum(cells[number] for cells in self.others)

    def loads_of_others(self) -> list[float]:
        """What all others together have at each engine, by its number."""
        rows = [[*cells[: self._used]] for cells in self.others]
        if len(rows) == 1:
            return rows[0]
        return [*map(math.fsum, zip(*rows, strict=True))] if rows else [0.0] * self._used
