"""The control process: it owns sockets, admin side, probes and discovery; its workers carry the traffic.

All workers accept from the same listening sockets. Of sockets of their own (SO_REUSEPORT) the kernel picks one by a
hash of the addresses, whether its worker is idle or has ten thousand streams; what waits at one whose worker dies is
reset; and systemd passes one socket for all. With shared ones whoever is idle accepts, and what nobody has accepted yet
survives any worker.

With one worker there is no control process: `relay.daemon.worker` does both, in one process less, where nothing has to
be told to anybody, shared or added up.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Final

import trio

from relay.config import Config
from relay.daemon import follower, systemd, worker
from relay.daemon.crew import Crew
from relay.daemon.exposure import warn_if_exposed
from relay.daemon.forker import Forker
from relay.daemon.reload import read_again, what_came_of
from relay.daemon.scoreboard import Scoreboard
from relay.net.admin import Admin
from relay.net.guard import Guard, GuardError
from relay.net.pump import Pump
from relay.net.roster import Roster
from relay.net.service import Service

#: How often a worker shows that its event loop turns, seconds; more often where systemd wants to know sooner.
BEAT_S: Final = 1.0
#: What workers get beyond ``drain_s`` before they are ended from outside.
GRACE_S: Final = 5.0


def run(config: Config, load_config: Callable[[], Config] | None = None) -> int:
    """Runs the daemon until SIGTERM or SIGINT; the process's exit status. `load_config` reads it again: SIGHUP."""
    count = count_of(config)
    if count == 1:
        return worker.run(config, load_config)
    try:
        guard = Guard.read(config.auth)
        listeners, admin_listener = worker.open_listeners(config)
    except (GuardError, worker.StartError) as exc:
        print(f"relay: {exc}", file=sys.stderr)
        return 1
    warn_if_exposed(listeners, guard)
    worker.raise_descriptor_limit()
    scoreboard = Scoreboard(count)
    limit_s = systemd.watchdog_s()
    beat_s = BEAT_S if limit_s is None else min(BEAT_S, limit_s / 8)
    forker = Forker(partial(follower.work, config, guard, listeners, scoreboard, beat_s), listeners, admin_listener)
    try:
        supervisor = Supervisor(config, guard, listeners, admin_listener, load_config, scoreboard, forker)
        return trio.run(supervisor.run)
    finally:
        forker.close()


def count_of(config: Config) -> int:
    """How many workers there are to be; "auto": one for each CPU the daemon may use."""
    workers = config.daemon.workers
    return len(os.sched_getaffinity(0)) if workers == "auto" else workers


class _Callbacks(dict[str, Callable[[bytes], None]]):
    """Whom decoders call back, in place of a worker's own table: all workers, of which one waits for the key."""

    def __init__(self, crew: Crew) -> None:
        self._crew = crew

    def __contains__(self, key: object) -> bool:
        return True

    def __missing__(self, key: str) -> Callable[[bytes], None]:
        return partial(self._crew.call, key)


class Supervisor:
    """The control process's part."""

    def __init__(
        self,
        config: Config,
        guard: Guard,
        listeners: list[socket.socket],
        admin_listener: socket.socket | None,
        load_config: Callable[[], Config] | None,
        scoreboard: Scoreboard,
        forker: Forker,
    ) -> None:
        self._started_with = config
        self._load_config = load_config
        self._listeners = listeners
        self._admin_listener = admin_listener
        self._forker = forker
        self._status = 0
        self._drain = trio.Event()
        self.service = Service(config, Pump(), None, guard=guard)
        self.crew = Crew(self.service, scoreboard, forker)
        self.service.callbacks = _Callbacks(self.crew)
        self.roster = Roster(self.service, self.crew.fleet_changed)

    def __repr__(self) -> str:
        return f"<Supervisor {self.crew!r}>"

    async def run(self) -> int:
        """Supervises until all workers have been told to end and have; the exit status."""
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._obey, signals)
                nursery.start_soon(self._end)
                await worker.serve_callbacks(self.service, nursery)
                if self._admin_listener is not None:
                    side = Admin(self.service, self.roster, self.reload, self.crew)
                    nursery.start_soon(side.serve, self._admin_listener)
                await nursery.start(self.roster.run)
                nursery.start_soon(self.crew.run, self._lose)
                await self.crew.begun()
                if self.service.is_ready:
                    self._announce()
                if (limit_s := systemd.watchdog_s()) is not None:
                    nursery.start_soon(self._feed_watchdog, limit_s)
                await self.crew.ended.wait()
                nursery.cancel_scope.cancel()
        return self._status

    def _announce(self) -> None:
        urls = [worker.url_of(listener) for listener in self._listeners]
        for url in urls:
            print(f"relay: listening on {url}", file=sys.stderr, flush=True)
        systemd.ready(f"serving on {', '.join(urls)}")

    async def _feed_watchdog(self, limit_s: float) -> None:
        """Signs of life, as long as each worker's event loop gives some; else systemd is to begin anew."""
        while True:
            if time.monotonic() - self.crew.oldest_beat < limit_s / 2:
                systemd.feed_watchdog()
            await trio.sleep(limit_s / 4)

    async def _obey(self, signals: AsyncIterator[int]) -> None:
        """SIGHUP reloads; the first signal to stop drains, the second cuts."""
        async for number in signals:
            if number == signal.SIGHUP:
                await self._reload_for_systemd()
            elif self.service.is_ready:
                self.stop()
            else:
                self.crew.cut()

    async def _reload_for_systemd(self) -> None:
        systemd.reloading("reading the configuration")
        try:
            said = f"reloaded: {self.reload()}"
            await self.crew.settle()
        except ValueError as problem:
            said = f"not reloaded: {problem}"
        print(f"relay: {said}", file=sys.stderr, flush=True)
        systemd.ready(said)

    def reload(self) -> str:
        """Takes on what the configuration file says now; what came of it. Raises ValueError: nothing changed.

        The workers are told of it in a moment: `Crew.settle`.
        """
        config, guard = read_again(self._load_config)
        self.roster.reconfigure(config, guard)
        return what_came_of(config, self._started_with)

    def stop(self) -> None:
        """Begins to drain."""
        systemd.stopping("draining")
        self.service.is_ready = False
        self.crew.drain()
        self._drain.set()

    def _lose(self) -> None:
        """No worker can be replaced any more: a new daemon can do better."""
        self._status = 1
        self.stop()

    async def _end(self) -> None:
        """Once it drains: lets go of the listeners when the workers do, and ends those that hang."""
        await self._drain.wait()
        daemon = self.service.config.daemon
        await trio.sleep(daemon.ready_delay_s)
        self._forker.close_listeners()
        for listener in self._listeners:
            listener.close()
        await trio.sleep(daemon.drain_s + worker.CUT_S + GRACE_S)
        self.crew.kill()
