"""The control process: it owns sockets, admin side, probes and discovery; its workers carry the traffic.

All workers accept from the same listening sockets. Of sockets of their own (SO_REUSEPORT) the kernel picks one by a
hash of the addresses, whether its worker is idle or has ten thousand streams; what waits at one whose worker dies is
reset; and systemd passes one socket for all. With shared ones whoever is idle accepts, and what nobody has accepted yet
survives any worker.

With one worker there is no control process: see `relay.daemon.alone`.
"""

from __future__ import annotations

import signal
import time
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Final

import trio

from relay.config import Config
from relay.daemon import alone, follower, systemd
from relay.daemon.crew import Crew
from relay.daemon.exposure import warn_of, warnings_of
from relay.daemon.forker import Forker
from relay.daemon.listeners import Listeners, StartError, announce, announce_admin, open_listeners
from relay.daemon.process import CUT_S, GRACE_S, count_of, raise_descriptor_limit, receive_signals, tell_of_drain
from relay.daemon.reload import ReloadBySignal, left_for_restart, read_again, reload_and_tell
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


def run(config: Config, load_config: Callable[[], Config] | None = None, *, source: str = "relay serve") -> int:
    """Runs the daemon until SIGTERM or SIGINT; the process's exit status. `load_config` reads it again: SIGHUP.

    `source` is the file that the configuration is of. Where one that it names cannot be used, the status is 1 and not
    the configuration's own: it may come later (a mount, a certificate), and systemd tries again.
    """
    try:
        raise_descriptor_limit()
        guard, files = Guard.read(config.auth), tls.read(config)
        listeners, admin = open_listeners(config)
    except StartError as exc:
        say(f"relay: {exc}", Priority.ERROR)
        return 1
    except (GuardError, tls.TlsError) as exc:
        say("\n".join(f"{source}:{problem}" for problem in exc.problems), Priority.ERROR)
        return 1
    tls.take_on(files)
    warn_of(warnings_of(listeners.sockets, guard, config.limits))
    if (count := count_of(config)) == 1:
        return trio.run(alone.serve, config, guard, files.server, listeners, admin, load_config)
    scoreboard = Scoreboard(max(ROOM, 2 * count))
    limit_s = systemd.watchdog_s()
    beat_s = BEAT_S if limit_s is None else min(BEAT_S, limit_s / 8)
    work = partial(follower.work, config, guard, files.server, scoreboard, beat_s)
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
        self._is_announced = False
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
        with receive_signals() as signals:
            try:
                prepared = await self._callbacks.prepare(self.service.config)
            except ListenError as exc:
                say(f"relay: {exc}", Priority.ERROR)
                self._status = 1
                return
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self.obey, signals, nursery)
                nursery.start_soon(self._end)
                self._callbacks.nursery = nursery
                self._callbacks.take_on(prepared)
                for listener in self._admin.sockets:
                    nursery.start_soon(Admin(self.service, self.roster, self.reload, self.crew).serve, listener)
                await nursery.start(self.roster.run)
                nursery.start_soon(self.crew.run, lambda: count_of(self.service.config), self._on_forker_gone)
                await self.crew.begun()
                if self.service.is_ready:
                    announce(self._listeners.urls)
                    announce_admin(self._admin.urls, self.service.config.admin.address)
                    systemd.ready(f"serving on {', '.join(self._listeners.urls)}")
                    self._is_announced = True
                if (limit_s := systemd.watchdog_s()) is not None:
                    nursery.start_soon(self._feed_watchdog, limit_s)
                await self.crew.ended.wait()
                nursery.cancel_scope.cancel()

    @property
    def _is_serving(self) -> bool:
        """Whether clients and systemd have been told so, and it is still so."""
        return self._is_announced and self.service.is_ready

    async def _feed_watchdog(self, limit_s: float) -> None:
        """Signs of life, as long as each worker's event loop gives some; else systemd is to begin anew."""
        while True:
            if time.monotonic() - self.crew.oldest_beat < limit_s / 2:
                systemd.feed_watchdog()
            await trio.sleep(limit_s / 4)

    async def obey(self, signals: AsyncIterator[int], nursery: trio.Nursery) -> None:
        """SIGHUP reloads, in the background; the first signal to stop drains, the second cuts."""
        by_signal = ReloadBySignal(self.reload, lambda: self._is_serving)
        async for number in signals:
            if number == signal.SIGHUP:
                nursery.start_soon(by_signal.run)
            elif self.service.is_ready:
                self.stop()
            else:
                self.crew.cut()

    async def reload(self) -> str:
        """Takes on what the configuration file says now, and tells of it: see `reload_and_tell`."""
        return await reload_and_tell(self._reload, self.crew.settle)

    async def _reload(self) -> str:
        """What takes a restart; the workers are told in a moment.

        Raises ValueError, or OSError where descriptors are short: nothing changed.
        """
        async with self._reloading:
            config, guard = read_again(self._load_config)
            files = tls.read(config)
            count = count_of(config)
            if count > (most := self.crew.most_workers()):
                raise ValueError(f"daemon.workers: {count} are too many; allowed without a restart: {most} at present")
            prepared = await self._callbacks.prepare(config)
            try:
                if not self.service.is_ready:
                    raise ValueError("the daemon is draining")
                self.crew.key_limits.prepare(guard.limits)
                known = warnings_of(self._listeners.sockets, self.service.guard, self.service.config.limits)
                urls = self._listeners.urls
                gone = self._listeners.change(config.listen.addresses)
            except (ValueError, OSError):
                prepared.close()
                self.crew.key_limits.settle(self.service.guard.limits)
                raise
            for listener in gone:
                listener.close()
            tls.take_on(files)
            self.roster.reconfigure(config, guard)
            self._callbacks.take_on(prepared)
            self.crew.resize(count)
            announce(self._listeners.urls, urls)
            warn_of(warnings_of(self._listeners.sockets, guard, config.limits) - known)
            return left_for_restart(config, self._started_with)

    def stop(self) -> None:
        """Begins to drain."""
        systemd.stopping("draining")
        self.service.is_ready = False
        self.crew.drain()
        self._drain.set()

    def _on_forker_gone(self) -> None:
        """No worker can be replaced any more: a new daemon can do better."""
        self._status = 1
        self.stop()

    async def _end(self) -> None:
        """Once it drains: lets go of the listeners when the workers do, and ends those that hang."""
        await self._drain.wait()
        async with trio.open_nursery() as nursery:
            daemon = self.service.config.daemon
            nursery.start_soon(tell_of_drain, self.crew.count_in_flight, daemon)
            await trio.sleep(daemon.ready_delay_s)
            self._listeners.close()
            await trio.sleep(daemon.drain_s + CUT_S + GRACE_S)
            self.crew.kill()
