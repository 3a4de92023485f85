"""The semaphores behind limits that hold over all workers, as the control process keeps them; see `relay.net.shares`.

A limit that is lowered while more are held takes its permits back one by one, as they become free.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

import trio


class _Semaphore:
    def __init__(self, most: int) -> None:
        self.most = most  #: permits there should be
        self.issued = most  #: permits there are, free or held
        self.fd = os.eventfd(most, os.EFD_SEMAPHORE | os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.is_shrinking = False

    def grow(self) -> None:
        if self.most > self.issued:
            os.eventfd_write(self.fd, self.most - self.issued)
            self.issued = self.most

    def shrink(self) -> bool:
        """Takes back what is free; False while some that are held are still too many."""
        try:
            while self.issued > self.most:
                os.eventfd_read(self.fd)
                self.issued -= 1
        except BlockingIOError:
            return False
        return True


class Limits:
    """All of them, by number."""

    def __init__(self) -> None:
        self._semaphores: dict[int, _Semaphore] = {}
        self.nursery: trio.Nursery | None = None  #: where permits that are too many are waited for

    def __repr__(self) -> str:
        return f"<Limits {len(self._semaphores)}>"

    @property
    def fds(self) -> Mapping[int, int]:
        """The semaphores' descriptors."""
        return {number: semaphore.fd for number, semaphore in self._semaphores.items()}

    def set(self, number: int, most: int) -> None:
        """From now on there are so many permits."""
        semaphore = self._semaphores.get(number)
        if semaphore is None:
            self._semaphores[number] = _Semaphore(most)
            return
        semaphore.most = most
        semaphore.grow()
        if not semaphore.shrink() and not semaphore.is_shrinking and self.nursery is not None:
            semaphore.is_shrinking = True
            self.nursery.start_soon(self._shrink, semaphore)

    def give_back(self, held: Mapping[int, int]) -> None:
        """The permits of a worker that is gone, by number, are free again."""
        for number, count in held.items():
            if number in self._semaphores:
                os.eventfd_write(self._semaphores[number].fd, count)

    def drop(self, number: int) -> None:
        """What was limited is gone."""
        semaphore = self._semaphores.pop(number, None)
        if semaphore is not None:
            semaphore.most = semaphore.issued  # nothing to wait for
            if not semaphore.is_shrinking:
                os.close(semaphore.fd)

    async def _shrink(self, semaphore: _Semaphore) -> None:
        while not semaphore.shrink():
            await trio.lowlevel.wait_readable(semaphore.fd)
        semaphore.is_shrinking = False
