"""What a process of the daemon has around its work: records on standard output, descriptors, and time to end in."""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Final

import trio

from relay.config import Config, DaemonConfig, LimitsConfig, LogConfig
from relay.core.timeline import Record, record_text
from relay.daemon import systemd
from relay.daemon.listeners import StartError
from relay.daemon.records import RecordWriter
from relay.net.notices import say

#: Seconds that cut exchanges get for their error frames.
CUT_S: Final = 3.0
#: What workers get beyond ``drain_s`` and `CUT_S` before they are ended from outside.
GRACE_S: Final = 5.0
#: How often systemd is told how a drain goes on: workers count what they have as often. And for how long it is to wait
#: each time.
DRAIN_TOLD_S: Final = 1.0
DRAIN_EXTENDED_S: Final = 15.0
_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
#: Fewer descriptors are no limit to serve under: the processes themselves have some twenty.
_LEAST_DESCRIPTORS: Final = 64
#: What a process has beside its connections, with some to spare.
_OWN_DESCRIPTORS: Final = 32
#: ``max_connections`` by default is what no machine should exceed: nobody is told before there is room for so few.
_FEW_CONNECTIONS: Final = 1024


def count_of(config: Config) -> int:
    """How many workers there are to be; "auto": one for each CPU the daemon may use."""
    workers = config.daemon.workers
    return len(os.sched_getaffinity(0)) if workers == "auto" else workers


def raise_descriptor_limit() -> None:
    """Two descriptors per stream: takes what the hard limit allows, as nginx's worker_rlimit_nofile would.

    Raises StartError where that is next to nothing.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if 0 <= hard < _LEAST_DESCRIPTORS:  # less: RLIM_INFINITY
        raise StartError(f"open files are limited to {hard}; raise that (ulimit -Hn, LimitNOFILE=): 2 for each stream")


def shortages(limits: LimitsConfig) -> set[str]:
    """A line where the descriptors a process may have are too few for as many connections as are allowed."""
    most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    room = max(0, most - _OWN_DESCRIPTORS) // 2
    allowed = limits.max_connections
    wanted = _FEW_CONNECTIONS if allowed == LimitsConfig().max_connections else allowed
    if most < 0 or room >= wanted:  # less: RLIM_INFINITY
        return set()
    cure = "raise that (ulimit -Hn, LimitNOFILE=): 2 for each stream; or lower limits.max_connections"
    return {f"open files are limited to {most}, enough for {room} of {allowed} connections; {cure}"}


def prepare_signals() -> None:
    """Until `receive_signals` a SIGHUP waits, which would end a process that does not listen for it yet.

    And what means something to nginx and HAProxy (open the logs again, upgrade) means nothing here, not the end.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def receive_signals() -> Iterator[AsyncIterator[int]]:
    """The signals to stop and to reload as they come, first of all the one that was held.

    To be called once: those that come afterwards are ignored, or they would be the process's exit status.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    _act_on_signals(lambda *_: None)  # what trio puts back, for a moment; to ignore them now would lose the one held
    try:
        with trio.open_signal_receiver(*_SIGNALS) as signals:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
            try:
                yield signals
            finally:
                signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    finally:
        _act_on_signals(signal.SIG_IGN)


def _act_on_signals(action: Callable[[int, FrameType | None], None] | signal.Handlers) -> None:
    for number in _SIGNALS:
        signal.signal(number, action)


def record_sink(writer: RecordWriter, config: LogConfig) -> Callable[[Record], None] | None:
    """What writes a record in the configured form; None: nobody wants them."""
    match config.format:
        case "json":
            return lambda record: writer.put(record.encode() + b"\n")
        case "text":
            return lambda record: writer.put(record_text(record).encode() + b"\n")
        case _:
            return None


async def tell_of_drain(left: Callable[[], int], config: DaemonConfig) -> None:
    """Shows how many streams are left, and asks systemd for time, as long as somebody is there to ask.

    The drain itself ends within ``drain_s``; that may be more than the unit's ``TimeoutStopSec=``.
    """
    is_told = not config.drain_s  # then there is no time to tell of
    while True:
        count = left()
        systemd.draining(count, DRAIN_EXTENDED_S)
        if count and not is_told:
            is_told = True
            say(f"relay: draining for at most {config.drain_s:g} s, {count} in flight; a second signal cuts")
        await trio.sleep(DRAIN_TOLD_S)
