"""How much of requests' bodies a worker holds."""

from __future__ import annotations

from typing import Final

import trio

#: One part in so many of the limit is for bodies that are complete with what is asked for.
_RESERVE: Final = 8


class BodyBudget:
    """How many bytes of request bodies a worker holds at once; beyond that, readers wait.

    Bodies that are half read may fill it up to a reserve. So they keep out neither each other's ends nor requests that
    come whole; where they have filled the rest, they wait until ``client_body_s`` refuses the first. Nobody is let in
    beyond the limit: its size is the promise.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0
        self._waiting = trio.lowlevel.ParkingLot()

    def __repr__(self) -> str:
        return f"<BodyBudget {self.used} of {self.limit}>"

    def take_now(self, size: int, *, held: int = 0, is_half_read: bool = False) -> bool:
        """Holds `size` more bytes of a body, of which so many are `held`, if there is room for them.

        What is alone may be larger than the limit.
        """
        limit = self.limit - (self.limit // _RESERVE if is_half_read else 0)
        if self.used > held and self.used + size > limit:
            return False
        self.used += size
        return True

    async def take(self, size: int, *, held: int = 0, is_half_read: bool = False) -> None:
        """Waits until `size` more bytes may be held; the caller bounds the wait."""
        while not self.take_now(size, held=held, is_half_read=is_half_read):
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
