"""When Python looks for unreachable objects among all there are.

By itself it does whenever the old ones have become a quarter more. With thousands of connections open that stops every
stream for a tenth of a second, and where connections come and go it does so every few seconds, although none of them
leaves anything to be found: what an exchange consists of goes with its last reference (the tests of faults and of
cancellation make sure). So a worker looks only when it holds twice the memory of the last time, which bounds what a
mistake of ours, or a library's, could cost. Young objects are looked through as ever.
"""

from __future__ import annotations

import gc
import sys
from typing import Final

import trio

#: Seconds between two looks at how much there is.
LOOK_S: Final = 1.0
#: By how many of Python's memory blocks (60 bytes on average) it may always grow.
SLACK_BLOCKS: Final = 200_000
_NEVER: Final = 2**31 - 1


class Garbage:
    """Collects the old garbage of this process. To be made when all is there that lives as long as the process."""

    def __init__(self) -> None:
        gc.collect()
        gc.freeze()  # and that is not looked at again
        young, middle, _ = gc.get_threshold()
        gc.set_threshold(young, middle, _NEVER)
        self.collections = 0
        self._most_blocks = self._allowed()

    def __repr__(self) -> str:
        return f"<Garbage collections={self.collections} at {self._most_blocks} blocks>"

    async def watch(self) -> None:
        """Collects when it has to be, until cancelled."""
        while True:
            await trio.sleep(LOOK_S)
            self.look()

    def look(self) -> None:
        """Collects if there is too much."""
        if sys.getallocatedblocks() > self._most_blocks:
            gc.collect()
            self.collections += 1
            self._most_blocks = self._allowed()
        else:
            self._most_blocks = min(self._most_blocks, self._allowed())

    @staticmethod
    def _allowed() -> int:
        return 2 * sys.getallocatedblocks() + SLACK_BLOCKS
