"""What the kernel's accounts say of a process and all its descendants, its limits, and the processor it runs on."""

from __future__ import annotations

import os
import platform
import resource
from pathlib import Path

_TICK_NS = 1_000_000_000 // os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")


def family(pid: int) -> list[int]:
    """A process and its descendants, as far as they are alive."""
    found = [pid]
    for one in found:
        try:
            for children in Path(f"/proc/{one}/task").glob("*/children"):
                found += map(int, children.read_text().split())
        except OSError:  # it has just ended, or this kernel keeps no list of children
            continue
    return found


def cpu_ns(pid: int) -> int:
    """CPU time of the family: from the scheduler's statistics, exact to the ns, or else in ticks of 10 ms."""
    return sum(map(_cpu_ns, family(pid)))


def run_delay_ns() -> int:
    """How long this process was ready to run while others had the cores; 0 where the kernel does not say."""
    try:
        return int(Path("/proc/self/schedstat").read_text().split()[1])
    except (OSError, IndexError):
        return 0


def memory_bytes(pid: int) -> int:
    """Resident memory of the family; pages that several of its processes share count for each."""
    total = 0
    for one in family(pid):
        try:
            total += int(Path(f"/proc/{one}/statm").read_text().split()[1]) * _PAGE
        except (OSError, IndexError):
            continue
    return total


def raise_descriptor_limit() -> None:
    """Takes all the descriptors that the hard limit allows; children inherit it. The usual soft limit is 1,024."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def processor() -> str:
    """The processor's name; where the kernel does not say, its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _cpu_ns(pid: int) -> int:
    try:
        return sum(int(path.read_text().split()[0]) for path in Path(f"/proc/{pid}/task").glob("*/schedstat"))
    except (OSError, IndexError):
        pass
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return (int(fields[11]) + int(fields[12])) * _TICK_NS
