"""What the kernel's accounts say of a process and all its descendants, its limits, and the processor it runs on."""

from __future__ import annotations

import contextlib
import os
import platform
import random
import resource
import socket
import sys
import time
from pathlib import Path

_PAGE = os.sysconf("SC_PAGE_SIZE")
#: What clock_getcpuclockid(3) puts below a process's number: its own time on a core, which has no name in Python.
_CPUCLOCK_SCHED = 2
#: Below it stand the ports of services (RFC 6335 §6: the system's, and the best known of users').
_LEAST_PORT = 10000


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
    """CPU time of the family, by the kernel's clock of each process, in which threads that have ended still count.

    0 of one that has ended. Raises OSError where the kernel does not tell of one that is alive.
    """
    return sum(map(_cpu_ns, family(pid)))


def run_delay_ns() -> int:
    """How long this process was ready to run while others had the cores; 0 where the kernel does not say."""
    try:
        return int(Path("/proc/self/schedstat").read_text().split()[1])
    except (OSError, IndexError):
        return 0


def memory_bytes(pid: int, *, alone: bool = False) -> int:
    """Memory of the family, or of one process `alone`: proportional set size (PSS).

    A page that n processes share counts for an n-th in each.
    """
    return sum(map(_memory_bytes, [pid] if alone else family(pid)))


def own_memory_bytes(pid: int) -> int:
    """Memory of the family that is no file's: anonymous and shared memory, as PSS counts them.

    Pages of programs and libraries are not in it: others share them, too, and what of them is ours by PSS moves as
    those come and go. Where the kernel does not tell them apart (before 5.3), it is the PSS.
    """
    return sum(map(_own_memory_bytes, family(pid)))


def _own_memory_bytes(pid: int) -> int:
    own = _pss_bytes(pid, "Pss_Anon:", "Pss_Shmem:")
    return _memory_bytes(pid) if own is None else own


def _pss_bytes(pid: int, *kinds: str) -> int | None:
    """What the kernel counts for a process, of some kinds together; None where it does not say."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:  # another user's process, or one that has ended
        return None
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith(kinds)]
    return sum(found) if found else None


def _memory_bytes(pid: int) -> int:
    pss = _pss_bytes(pid, "Pss:")
    if pss is not None:
        return pss
    # What is resident, shared or not.
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE
    except (OSError, IndexError):
        return 0


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nobody listens on, and that the kernel gives to nobody until it is listened on.

    Of those it gives (ip(7), ip_local_port_range) any connection may get one meanwhile, and there are thousands.
    """
    first_given = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    ports = range(_LEAST_PORT, max(first_given, _LEAST_PORT))
    for port in random.sample(ports, len(ports)):
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def descriptors(pid: int) -> int:
    """How many a process has open, its descendants' not among them."""
    try:
        return len(os.listdir(f"/proc/{pid}/fd"))
    except OSError:  # it has just ended
        return 0


def open_files(pid: int) -> dict[tuple[int, str], str]:
    """What each descriptor of the family refers to, as the kernel names it: a path, ``socket:[…]``, ``pipe:[…]``."""
    found = {}
    for one in family(pid):
        for link in _listed(f"/proc/{one}/fd"):
            with contextlib.suppress(OSError):  # closed meanwhile
                found[one, link.name] = os.readlink(link)
    return found


def peers() -> dict[str, str]:
    """The far end of each TCP connection of this machine over IPv4, and its state, by its name in `open_files`."""
    found = {}
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        _, _, remote, state, *_, inode = line.split()[:10]
        address, _, port = remote.partition(":")
        host = socket.inet_ntoa(int(address, 16).to_bytes(4, sys.byteorder))
        found[f"socket:[{inode}]"] = f"{host}:{int(port, 16)} state {int(state, 16)}"
    return found


def _listed(folder: str) -> list[Path]:
    try:
        return list(Path(folder).iterdir())
    except OSError:  # its process has just ended
        return []


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
        return time.clock_gettime_ns((~pid << 3) | _CPUCLOCK_SCHED)
    except OSError:
        if Path(f"/proc/{pid}").exists():  # this kernel, or who confines us, does not tell
            raise
        return 0  # it has ended
