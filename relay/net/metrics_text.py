"""``GET /metrics``: the sum of all boards in Prometheus's text format, by its own client library.

The library's registry of counters is not used: its values live in one process, or in a file for each. Here it writes
down what `relay.core.board` has counted.
"""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Iterable, Iterator
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from relay.core import board
from relay.core.metrics import FAMILIES, CounterFamily, Family, HistogramFamily

if TYPE_CHECKING:
    from relay.core.board import Block

#: Of what `metrics_text` answers.
CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"

_PAGE_BYTES: Final = resource.getpagesize()
_TICKS_PER_S: Final = os.sysconf("SC_CLK_TCK")


def metrics_text(blocks: Iterable[Block], extra: Iterable[Collector] = ()) -> bytes:
    """All metrics of the boards, added up, and what else `extra` collects; each board flushed by its writer before."""
    registry = CollectorRegistry(auto_describe=False)
    for collector in (_Boards(blocks), *extra):
        registry.register(collector)
    return generate_latest(registry)


class _Boards(Collector):
    """Every family, also those without a series yet, so that its help can be read."""

    def __init__(self, blocks: Iterable[Block]) -> None:
        self._blocks = blocks

    def collect(self) -> Iterator[Metric]:
        series: dict[str, list[tuple[board.Key, list[float]]]] = {family.name: [] for family in FAMILIES}
        for (name, *labels), cells in sorted(board.total(self._blocks).items()):
            series[name].append((tuple(labels), cells))
        return (_metric(family, series[family.name]) for family in FAMILIES)


def _metric(family: Family, series: Iterable[tuple[board.Key, list[float]]]) -> Metric:
    """A family in the library's terms."""
    if isinstance(family, HistogramFamily):
        histogram = HistogramMetricFamily(family.name, family.help, labels=family.labels)
        bounds = [*map(floatToGoString, family.bounds), "+Inf"]
        for labels, (*counts, total) in series:
            histogram.add_metric(labels, [*zip(bounds, accumulate(counts), strict=True)], total)
        return histogram
    make = CounterMetricFamily if isinstance(family, CounterFamily) else GaugeMetricFamily
    metric = make(family.name, family.help, labels=family.labels)
    for labels, (value,) in series:
        metric.add_metric(labels, value)
    return metric


class ProcessUsage(NamedTuple):
    """What a process has taken of the machine, or several together."""

    cpu_s: float
    virtual_bytes: float
    resident_bytes: float
    started: float  #: since the epoch
    open_fds: int
    max_fds: int


class Processes(Collector):
    """The standard process metrics, of all processes of the daemon together.

    The library's own collector is for one process, and reads ``/proc/stat``, which the unit's ``ProcSubset=pid`` hides.
    Memory that processes share counts for each. CPU time includes children that have ended and been waited for by this
    process, so that a worker's death does not make the counter fall; start time is the oldest's.
    """

    def __init__(self, pids: Iterable[int]) -> None:
        self._pids = pids

    def collect(self) -> Iterator[Metric]:
        """What `prometheus_client` asks for at each scrape; nothing if none of the processes is left."""
        usages = [usage for pid in self._pids if (usage := process_usage(pid)) is not None]
        if not usages:
            return
        ended = os.times()
        cpu_s = sum(usage.cpu_s for usage in usages) + ended.children_user + ended.children_system
        yield CounterMetricFamily("process_cpu_seconds_total", "User and system CPU time, in seconds.", cpu_s)
        for name, help_text, value in (
            ("virtual_memory_bytes", "Virtual memory size.", sum(usage.virtual_bytes for usage in usages)),
            ("resident_memory_bytes", "Resident memory size.", sum(usage.resident_bytes for usage in usages)),
            ("start_time_seconds", "Start of the first process, since the epoch.", min(u.started for u in usages)),
            ("open_fds", "Open file descriptors.", sum(usage.open_fds for usage in usages)),
            ("max_fds", "Limit on open file descriptors, of all processes.", sum(usage.max_fds for usage in usages)),
        ):
            yield GaugeMetricFamily(f"process_{name}", help_text, value)


def process_usage(pid: int) -> ProcessUsage | None:
    """What a process has taken so far (proc(5)); None if it is gone or not to be looked at."""
    proc = Path("/proc", str(pid))
    try:
        # Behind the name, which may hold anything, the third field comes first.
        fields = (proc / "stat").read_bytes().rpartition(b")")[2].split()
        open_fds = len(os.listdir(proc / "fd"))
        # From the file rather than by prlimit(2), which a system call filter may answer with SIGSYS.
        limits = (proc / "limits").read_text().splitlines()
    except OSError:
        return None
    user, system, started, virtual, resident = (int(fields[number - 3]) for number in (14, 15, 22, 23, 24))
    max_fds = next(int(line.split()[3]) for line in limits if line.startswith("Max open files"))
    boot = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
    return ProcessUsage(
        cpu_s=(user + system) / _TICKS_PER_S,
        virtual_bytes=virtual,
        resident_bytes=resident * _PAGE_BYTES,
        started=boot + started / _TICKS_PER_S,
        open_fds=open_fds,
        max_fds=max_fds,
    )
