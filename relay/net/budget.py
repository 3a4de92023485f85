"""How much of requests' bodies a worker holds."""

from __future__ import annotations

import trio


class BodyBudget:
    """How many bytes of request bodies a worker holds at once; beyond that, readers wait.

    Where bodies that are half read fill it, all of them wait, until ``client_body_s`` refuses the first and so makes
    room for the others. Nobody is let in beyond the limit to prevent that: its size is the promise.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0
        self._waiting = trio.lowlevel.ParkingLot()

    def __repr__(self) -> str:
        return f"<BodyBudget {self.used} of {self.limit}>"

    def take_now(self, size: int) -> bool:
        """Holds `size` more bytes, if there is room for them. What is alone may be larger than the limit."""
        if self.used and self.used + size > self.limit:
            return False
        self.used += size
        return True

    async def take(self, size: int) -> None:
        """Waits until `size` more bytes may be held; the caller bounds the wait."""
        while not self.take_now(size):
            await self._waiting.park()

    def resize(self, limit: int) -> None:
        """From now on there are so many; what is held already is not given up."""
        self.limit = limit
        self._waiting.unpark_all()

    def give_back(self, size: int) -> None:
        """Bytes taken before are no longer held."""
        self.used -= size
        if self._waiting:
            self._waiting.unpark_all()
