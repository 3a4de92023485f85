"""Memory and descriptors of a relay over time, and whether they stay what they are."""

from __future__ import annotations

import time
from statistics import fmean, linear_regression
from typing import TYPE_CHECKING, Final

import msgspec
import trio

from relay_bench.processes import descriptors, family, memory_bytes, own_memory_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence

#: What must stay what it is, and the unit it is told in. Of the PSS a part is pages of programs and libraries, which
#: moves with how many other processes share them, and is no growth of the relay's.
KINDS: Final = {"memory": "KiB", "descriptors": ""}


class Vitals(msgspec.Struct, frozen=True):
    """Of all the relay's processes together, at one moment."""

    at_s: float
    memory: float  #: KiB: anonymous and shared memory, no file's pages
    pss: float  #: KiB: with those
    descriptors: float


class Trend(msgspec.Struct, frozen=True):
    """Of one kind: means of the middle and the last third, and the straight line through both."""

    middle: float
    last: float
    per_minute: float
    growth: float  #: by that line, over its length

    def is_flat(self, share: float) -> bool:
        """Whether line and means say that it grows by no more than a share of what it is."""
        allowed = share * self.middle
        return self.growth <= allowed and self.last - self.middle <= allowed


def look(pid: int) -> Vitals:
    """The vitals now of a process and its descendants."""
    open_now = sum(map(descriptors, family(pid)))
    return Vitals(time.monotonic(), own_memory_bytes(pid) / 1024, memory_bytes(pid) / 1024, open_now)


async def watch(pid: int, every_s: float, seen: list[Vitals]) -> None:
    """Looks again and again, until cancelled."""
    while True:
        seen.append(look(pid))
        await trio.sleep(every_s)


def trend(seen: Sequence[Vitals], kind: str) -> Trend:
    """The trend of one of `KINDS`; the first third is for getting there. There must be six moments or more."""
    third = len(seen) // 3
    values = [getattr(one, kind) for one in seen]
    minutes = [one.at_s / 60 for one in seen]
    line = linear_regression(minutes[third:], values[third:])
    length = minutes[-1] - minutes[third]
    return Trend(fmean(values[third:-third]), fmean(values[-third:]), line.slope, line.slope * length)
