"""Where a worker sleeps: trio's poller and the pump's, in one wait.

trio sleeps in ``poll(timeout, maxevents)`` of its epoll object. `NestedPoller` stands in that object's place: it sleeps
in the pump's epoll instead, in which trio's own descriptor is registered, serves frames, and goes on with the exchanges
that what comes wakes (`relay.net.fiber`), until trio has something to do. Then it answers with trio's real ``poll(0)``,
if that has anything to tell. Nothing of this passes through trio's scheduler, and trio's deadlines and wake-ups work as
ever. Measured beside the alternatives (a task on a nested epoll, an instrument hook): half the CPU of the first at low
load, the same as the second without its traps.

trio has no public way to its epoll object, so `install` looks before it leaps: on a trio whose insides it does not
recognise it changes nothing, and the worker runs the pump as a task (`Pump.run_as_task`), with the same code serving.
"""

from __future__ import annotations

import select
from collections import deque
from collections.abc import Iterator, Sized
from contextlib import contextmanager
from typing import TYPE_CHECKING

import trio

if TYPE_CHECKING:
    from relay.net.pump import Pump


class NestedPoller:
    """Takes the place of trio's epoll object; everything but the waiting goes to the real one."""

    def __init__(self, real: select.epoll, pump: Pump) -> None:
        self.real = real
        self._turn = pump.turn
        self.register = real.register
        self.modify = real.modify
        self.unregister = real.unregister
        self.fileno = real.fileno
        self.close = real.close

    def poll(self, timeout: float = -1, maxevents: int = -1) -> list[tuple[int, int]]:
        """As `select.epoll.poll`; may come back empty before the timeout, which trio takes as a spurious wake-up."""
        # With a timeout of 0 tasks are runnable: serve what is ready all the same, or a busy trio would starve the
        # streams.
        return self.real.poll(0, maxevents) if self._turn(max(0, timeout)) else []


def _insides() -> tuple[object, Sized] | None:
    """trio's epoll holder for this run, and its queue of tasks that can run, if they look as in trio 0.30 to 0.35."""
    try:
        runner = trio._core._run.GLOBAL_RUN_CONTEXT.runner
        manager, runnable = runner.io_manager, runner.runq
    except AttributeError:
        return None
    is_known = isinstance(getattr(manager, "_epoll", None), select.epoll) and isinstance(runnable, deque)
    return (manager, runnable) if is_known else None


@contextmanager
def install(pump: Pump) -> Iterator[bool]:
    """Makes the current trio run sleep in the pump; yields False, and does nothing, where that is not possible."""
    insides = _insides()
    if insides is None:
        yield False
        return
    manager, pump.run_queue = insides
    real: select.epoll = manager._epoll  # type: ignore[attr-defined]
    pump.epoll.register(real.fileno(), select.EPOLLIN)
    manager._epoll = NestedPoller(real, pump)  # type: ignore[attr-defined]
    try:
        yield True
    finally:
        pump.run_queue = None
        manager._epoll = real  # type: ignore[attr-defined]
        pump.epoll.unregister(real.fileno())
