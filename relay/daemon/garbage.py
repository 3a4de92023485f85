"""When Python looks for unreachable objects among all there are.

By itself it does whenever the old ones have become a quarter more. With thousands of connections open that stops every
stream for a tenth of a second, and where connections come and go it does so every few seconds, although none of them
leaves anything to be found: what an exchange consists of goes with its last reference (the tests of faults and of
cancellation make sure). So a worker looks only when its memory is twice that of the last time, which bounds what a
mistake of ours or a library's could cost, and every ten minutes, for descriptors that nothing else would close (a probe
that is cancelled in a TLS handshake leaves one: see `relay.net.fetch`). Young objects are looked through as ever.

And then it gives back to the system what the C library keeps of freed memory, which by itself is only what lies at the
heap's end: a worker that had thousands of streams would stay as large as it was then.
"""

from __future__ import annotations

import ctypes
import gc
import os
import time
from typing import Final

import trio

#: Seconds between two looks at how much memory there is, and the longest between two collections.
LOOK_S: Final = 1.0
LONGEST_S: Final = 600.0
#: How much the memory may always grow.
SLACK_BYTES: Final = 64 << 20
_NEVER: Final = 2**31 - 1
_PAGE_BYTES: Final = os.sysconf("SC_PAGE_SIZE")
#: malloc_trim(3), which takes some 0.2 ms for each MiB that is given back; None: a C library without it.
_trim: Final = getattr(ctypes.CDLL(None), "malloc_trim", None)


class Garbage:
    """Collects the old garbage of this process, once `settle` has been called."""

    def __init__(self) -> None:
        self.collections = 0
        try:
            self._statm = os.open("/proc/self/statm", os.O_RDONLY | os.O_CLOEXEC)  # now: later there may be none
        except OSError:  # there is no /proc: the time decides alone
            self._statm = -1
        self._most_bytes = 0
        self._last = 0.0

    def __del__(self) -> None:
        if self._statm >= 0:
            os.close(self._statm)

    def __repr__(self) -> str:
        return f"<Garbage collections={self.collections} at {self._most_bytes} bytes>"

    def settle(self) -> None:
        """All is there that lives as long as the process: nobody looks at it again, nor does Python by itself."""
        gc.collect()
        gc.freeze()
        young, middle, _ = gc.get_threshold()
        gc.set_threshold(young, middle, _NEVER)
        self._most_bytes = _most_beside(self.resident_bytes())
        self._last = time.monotonic()

    def resident_bytes(self) -> int:
        """The memory of this process (proc_pid_statm(5)); 0 where that is not to be had."""
        if self._statm < 0:
            return 0
        return int(os.pread(self._statm, 256, 0).split()[1]) * _PAGE_BYTES

    async def watch(self) -> None:
        """Collects when it has to be, until cancelled."""
        while True:
            await trio.sleep(LOOK_S)
            self.look(self.resident_bytes(), time.monotonic())

    def look(self, held_bytes: int, now: float) -> None:
        """Collects if there is too much, or the last time is long ago."""
        if held_bytes > self._most_bytes or now - self._last > LONGEST_S:
            gc.collect()
            if _trim is not None:
                _trim(0)
            self.collections += 1
            self._most_bytes = _most_beside(held_bytes)  # less, where the next look finds so
            self._last = now
        else:
            self._most_bytes = min(self._most_bytes, _most_beside(held_bytes))


def _most_beside(held_bytes: int) -> int:
    return 2 * held_bytes + SLACK_BYTES
