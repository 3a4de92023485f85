"""The semaphores behind limits that hold over all workers, as the control process keeps them; see `relay.net.shares`.

A limit that is lowered while more are held takes its permits back one by one, as they become free.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping

import trio

from relay.daemon.messages import Semaphores, parts


class Limit:
    """One limit's permits. Each is another, even where it has the number and the descriptor of one that is gone."""

    fd = -1

    def __init__(self, most: int) -> None:
        self.most = most  #: permits there should be
        self.issued = most  #: permits there are, free or held
        self.fd = os.eventfd(most, os.EFD_SEMAPHORE | os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.is_shrinking = False

    def __repr__(self) -> str:
        return f"<Limit {self.most} issued={self.issued}>"

    def fileno(self) -> int:
        """The descriptor, which stays this object's."""
        return self.fd

    def __del__(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)  # when also nobody waits for its permits any more

    def grow(self) -> None:
        """Issues the permits that there should be and are not."""
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
        self.by_number: dict[int, Limit] = {}
        self.nursery: trio.Nursery | None = None  #: where permits that are too many are waited for

    def __repr__(self) -> str:
        return f"<Limits {len(self.by_number)}>"

    def set(self, number: int, most: int) -> None:
        """From now on there are so many permits."""
        limit = self.by_number.get(number)
        if limit is None:
            self.by_number[number] = Limit(most)
            return
        limit.most = most
        limit.grow()
        if not limit.shrink() and not limit.is_shrinking and self.nursery is not None:
            limit.is_shrinking = True
            self.nursery.start_soon(self._shrink, limit)

    def orders(self, told: dict[int, Limit]) -> Iterator[tuple[Semaphores, list[Limit]]]:
        """What a worker that knows of `told` is to be sent, descriptors beside it; `told` is brought up to date."""
        if gone := [number for number in told if number not in self.by_number]:
            yield Semaphores(gone, are_gone=True), []
        new = [number for number, limit in self.by_number.items() if told.get(number) is not limit]
        for numbers in parts(new):
            yield Semaphores([*numbers], are_gone=False), [self.by_number[number] for number in numbers]
        told.clear()
        told.update(self.by_number)

    def give_back(self, held: Mapping[int, int]) -> None:
        """The permits of a worker that is gone, by number, are free again."""
        for number, count in held.items():
            if number in self.by_number:
                os.eventfd_write(self.by_number[number].fd, count)

    def drop(self, number: int) -> None:
        """What was limited is gone."""
        limit = self.by_number.pop(number, None)
        if limit is not None:
            limit.most = limit.issued  # nothing to wait for

    async def _shrink(self, limit: Limit) -> None:
        while not limit.shrink():
            await trio.lowlevel.wait_readable(limit.fd)
        limit.is_shrinking = False
