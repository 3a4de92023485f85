"""The control process: it owns sockets, admin side, probes and discovery; its workers carry the traffic.

All workers accept from the same listening sockets. Of sockets of their own (SO_REUSEPORT) the kernel picks one by a
hash of the addresses, whether its worker is idle or has ten thousand streams; what waits at one whose worker dies is
reset; and systemd passes one socket for all. With shared ones whoever is idle accepts, and what nobody has accepted yet
survives any worker.

With one worker there is no control process: `relay.daemon.worker` does both, in one process less, where nothing has to
be told to anybody, shared or added up.
"""

from __future__ import annotations

import signal
import time
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Final

import trio

from relay.config import Config
from relay.daemon import follower, systemd, worker
from relay.daemon.crew import GRACE_S, Crew
from relay.daemon.exposure import exposures, warn_of
from relay.daemon.forker import Forker
from relay.daemon.listeners import Listeners, StartError, open_listeners
from relay.daemon.reload import read_again, what_came_of
from relay.daemon.scoreboard import Scoreboard
from relay.net import tls
from relay.net.admin import Admin
from relay.net.callbacks import Callbacks, ListenError
from relay.net.guard import Guard, GuardError
from relay.net.notices import Priority, say
from relay.net.pump import Pump
from relay.net.roster import Roster
from relay.net.service import Service

#: How often a worker shows that its event loop turns, seconds; more often where systemd wants to know sooner.
BEAT_S: Final = 1.0
#: Workers that a reload may come to, those that drain included; at least twice as many as there are at the start.
ROOM: Final = 64


def run(config: Config, load_config: Callable[[], Config] | None = None) -> int:
    """Runs the daemon until SIGTERM or SIGINT; the process's exit status. `load_config` reads it again: SIGHUP."""
    count = worker.count_of(config)
    if count == 1:
        return worker.run(config, load_config)
    try:
        guard, tls_context = Guard.read(config.auth), tls.read(config)
        listeners, admin = open_listeners(config)
    except (GuardError, StartError, tls.TlsError) as exc:
        say(f"relay: {exc}", Priority.ERROR)
        return 1
    warn_of(exposures(listeners.sockets, guard))
    worker.raise_descriptor_limit()
    scoreboard = Scoreboard(max(ROOM, 2 * count))
    limit_s = systemd.watchdog_s()
    beat_s = BEAT_S if limit_s is None else min(BEAT_S, limit_s / 8)
    work = partial(follower.work, config, guard, tls_context, scoreboard, beat_s)
    forker = Forker(work, [*listeners.sockets, *admin.sockets])
    try:
        supervisor = Supervisor(config, guard, listeners, admin, load_config, scoreboard, forker)
        return trio.run(supervisor.run)
    finally:
        forker.close()


class Supervisor:
    """The control process's part."""

    def __init__(
        self,
        config: Config,
        guard: Guard,
        listeners: Listeners,
        admin: Listeners,
        load_config: Callable[[], Config] | None,
        scoreboard: Scoreboard,
        forker: Forker,
    ) -> None:
        self._started_with = config
        self._load_config = load_config
        self._listeners = listeners
        self._admin = admin
        self._forker = forker
        self._status = 0
        self._drain = trio.Event()
        self.service = Service(config, Pump(), None, guard=guard)
        self.crew = Crew(self.service, scoreboard, forker, listeners)
        self._callbacks = Callbacks(self.service, self.crew.call)
        self._reloading = trio.Lock()
        self.roster = Roster(self.service, self.crew.fleet_changed)

    def __repr__(self) -> str:
        return f"<Supervisor {self.crew!r}>"

    async def run(self) -> int:
        """Supervises until all workers have been told to end and have; the exit status."""
        try:
            await self._run()
        finally:
            self._listeners.close()
            self._admin.close()
        return self._status

    async def _run(self) -> None:
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals:
            try:
                prepared = await self._callbacks.prepare(self.service.config)
            except ListenError as exc:
                say(f"relay: {exc}", Priority.ERROR)
                self._status = 1
                return
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._obey, signals)
                nursery.start_soon(self._end)
                self._callbacks.nursery = nursery
                self._callbacks.take_on(prepared)
                for listener in self._admin.sockets:
                    nursery.start_soon(Admin(self.service, self.roster, self.reload, self.crew).serve, listener)
                await nursery.start(self.roster.run)
                nursery.start_soon(self.crew.run, worker.count_of(self.service.config), self._lose)
                await self.crew.begun()
                if self.service.is_ready:
                    self._announce()
                if (limit_s := systemd.watchdog_s()) is not None:
                    nursery.start_soon(self._feed_watchdog, limit_s)
                await self.crew.ended.wait()
                nursery.cancel_scope.cancel()

    def _announce(self) -> None:
        for url in self._listeners.urls:
            say(f"relay: listening on {url}")
        systemd.ready(f"serving on {', '.join(self._listeners.urls)}")

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
        priority = Priority.NOTICE
        try:
            said = f"reloaded: {await self.reload()}"
            await self.crew.settle()
        except ValueError as problem:
            said, priority = f"not reloaded: {problem}", Priority.ERROR
        say(f"relay: {said}", priority)
        systemd.ready(said)

    async def reload(self) -> str:
        """Takes on what the configuration file says now; what came of it. Raises ValueError: nothing changed.

        The workers are told of it in a moment: `Crew.settle`.
        """
        async with self._reloading:
            config, guard = read_again(self._load_config)
            tls.read(config)
            count = worker.count_of(config)
            if count > (most := self.crew.most_workers()):
                raise ValueError(f"daemon.workers: {count} are too many; allowed without a restart: {most} at present")
            prepared = await self._callbacks.prepare(config)
            try:
                if not self.service.is_ready:
                    raise StartError("the daemon is draining")
                known = exposures(self._listeners.sockets, self.service.guard)
                gone = self._listeners.change(config.listen.addresses)
            except StartError as exc:
                prepared.close()
                raise ValueError(str(exc)) from None
            for listener in gone:
                listener.close()
            self.roster.reconfigure(config, guard)
            self._callbacks.take_on(prepared)
            self.crew.resize(count)
            warn_of(exposures(self._listeners.sockets, guard) - known)
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
        async with trio.open_nursery() as nursery:
            nursery.start_soon(worker.tell_of_drain, self.crew.count_in_flight)
            daemon = self.service.config.daemon
            await trio.sleep(daemon.ready_delay_s)
            self._listeners.close()
            await trio.sleep(daemon.drain_s + worker.CUT_S + GRACE_S)
            self.crew.kill()
