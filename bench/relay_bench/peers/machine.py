"""The machine under a comparison: whose core is whose, and what others take of it."""

from __future__ import annotations

import contextlib
import os
import resource
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from relay_bench import processes

if TYPE_CHECKING:
    from collections.abc import Iterator

#: Length of a look at a machine that should be quiet, seconds.
_LOOK_S: Final = 0.5
_TICKS: Final = os.sysconf("SC_CLK_TCK")


class Cores(msgspec.Struct, frozen=True):
    """Cores by what they are for; empty: nothing is pinned."""

    proxy: frozenset[int] = frozenset()
    harness: frozenset[int] = frozenset()

    def __str__(self) -> str:
        if not self.proxy:
            return "not pinned"
        return f"proxies on core {min(self.proxy)}, load and engines on {', '.join(map(str, sorted(self.harness)))}"


@contextlib.contextmanager
def cores(*, pin: bool) -> Iterator[Cores]:
    """The last core for the proxy, the others for load and engines, to which this process is kept meanwhile."""
    before = os.sched_getaffinity(0)
    if not pin or len(before) < 2:
        yield Cores()
        return
    proxy = frozenset({max(before)})
    os.sched_setaffinity(0, before - proxy)
    try:
        yield Cores(proxy, frozenset(before - proxy))
    finally:
        os.sched_setaffinity(0, before)


@contextlib.contextmanager
def kept_to(wanted: frozenset[int]) -> Iterator[None]:
    """What is started within runs on these cores, with all its threads; this process only meanwhile."""
    if not wanted:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, wanted)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


class Watch:
    """CPU time that others took on this machine, the hypervisor's own included, from here on."""

    def __init__(self) -> None:
        self._machine = machine_busy_s()
        self._ours = _own_cpu_s()
        self._began = time.monotonic()

    def foreign_cores(self) -> float:
        """As so many cores, on average so far."""
        busy_s = machine_busy_s() - self._machine - (_own_cpu_s() - self._ours)
        return max(busy_s, 0.0) / max(time.monotonic() - self._began, 1e-9)


def machine_busy_s() -> float:
    """Seconds of processes and of the hypervisor's other guests since the machine started (proc_stat(5)).

    Without interrupts, which are nobody's: on loopback they are the network's part of our own packets.
    """
    user, nice, system, _, _, _, _, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
    return (user + nice + system + steal) / _TICKS


def _own_cpu_s() -> float:
    """Of this process, its living descendants, and those that have ended."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return processes.cpu_ns(os.getpid()) / 1e9 + ended.ru_utime + ended.ru_stime


def wait_for_quiet(bound: float, limit_s: float) -> float:
    """Waits until others take less than `bound` cores, at most `limit_s`; what they took at last."""
    end = time.monotonic() + limit_s
    while True:
        watch = Watch()
        time.sleep(_LOOK_S)
        foreign = watch.foreign_cores()
        if foreign < bound or time.monotonic() >= end:
            return foreign
