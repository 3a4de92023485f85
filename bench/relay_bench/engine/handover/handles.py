"""What an engine holds for others: given, and taken at most once."""

from __future__ import annotations

from typing import Final

import trio

#: How many handles are remembered as taken, so that a second taker is refused at once instead of waiting.
_REMEMBERED: Final = 10_000


class Handles:
    """The handles of one engine.

    What nobody takes is held for ever: there is no timer here, so what is stranded is seen.
    """

    def __init__(self) -> None:
        self.given = 0
        self.taken = 0
        self.held: set[str] = set()
        self._taken: dict[str, None] = {}  # oldest first
        self._arrivals: dict[str, trio.Event] = {}
        self._takers: dict[str, trio.Event] = {}

    def give(self, handle: str) -> None:
        """From now on, this is held."""
        self.given += 1
        self.held.add(handle)
        arrival = self._arrivals.pop(handle, None)
        if arrival is not None:
            arrival.set()

    def take(self, handle: str) -> bool:
        """Somebody has fetched what it names; whether it was there."""
        if handle not in self.held:
            return False
        self.held.remove(handle)
        self.taken += 1
        self._taken[handle] = None
        if len(self._taken) > _REMEMBERED:
            del self._taken[next(iter(self._taken))]
        return True

    async def take_soon(self, handle: str) -> bool:
        """`take`, once it is there; what was taken before does not come again. The caller sets the limit."""
        self._takers.setdefault(handle, trio.Event()).set()
        try:
            while handle not in self.held and handle not in self._taken:
                await self._arrivals.setdefault(handle, trio.Event()).wait()
        finally:
            self._takers.pop(handle, None)
        return self.take(handle)

    async def taker(self, handle: str) -> None:
        """Returns once somebody waits in `take_soon`. The caller sets the limit."""
        await self._takers.setdefault(handle, trio.Event()).wait()

    def as_dict(self) -> dict[str, int]:
        """Counts, for ``/sim/requests``."""
        return {"handles_given": self.given, "handles_taken": self.taken, "handles_held": len(self.held)}

    def __repr__(self) -> str:
        return f"<Handles {self.as_dict()}>"
