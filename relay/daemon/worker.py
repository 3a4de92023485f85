"""The worker: one trio run that accepts clients and carries their traffic until it is told to stop.

Two nurseries: accepting inside, connections outside. A signal ends the inner one; the connections then have ``drain_s``
to finish, and what is left is cut with an error frame. A second signal cuts at once.
"""

from __future__ import annotations

import gc
import os
import resource
import signal
import socket
import ssl
import sys
import time
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import TYPE_CHECKING, Final

import trio

from relay.config import Config, LogConfig
from relay.core.timeline import Record, record_text
from relay.daemon import systemd
from relay.daemon.exposure import exposures, warn_of
from relay.daemon.key_limits import KeyLimits, OwnKeyLimits
from relay.daemon.listeners import Listeners, StartError, open_listeners
from relay.daemon.records import RecordWriter
from relay.daemon.reload import read_again, what_came_of
from relay.errors import ExchangeError, RequestRefused
from relay.net import callbacks, poller, sockets, tls
from relay.net.admin import Admin
from relay.net.downstream import LINGER_S, BodyBudget, ClientConnection, make_room
from relay.net.exchange import Exchange
from relay.net.guard import Guard, GuardError
from relay.net.notices import Priority, say, say_fault
from relay.net.pump import Pump
from relay.net.reply import refuse
from relay.net.roster import Roster
from relay.net.service import Service
from relay.net.tls import TlsListener

if TYPE_CHECKING:
    from relay.core.board import Block

#: Connections accepted in a row before other tasks run: a burst of new clients must not delay every stream.
ACCEPTS_PER_TURN: Final = 16
#: How long accepting pauses when descriptors or memory have run out, or all connections there may be are busy.
ACCEPT_PAUSE_S: Final = 0.1
#: Seconds between two complaints that accepting fails.
COMPLAINT_S: Final = 10.0
#: How often systemd is told how a drain goes on.
DRAIN_TOLD_S: Final = 5.0
#: Seconds that cut exchanges get for their error frames.
CUT_S: Final = 3.0


def run(config: Config, load_config: Callable[[], Config] | None = None) -> int:
    """Runs the daemon until SIGTERM or SIGINT; the process's exit status. `load_config` reads it again: SIGHUP."""
    try:
        guard, tls_context = Guard.read(config.auth), tls.read(config)
        listeners, admin = open_listeners(config)
    except (GuardError, StartError, tls.TlsError) as exc:
        say(f"relay: {exc}", Priority.ERROR)
        return 1
    warn_of(exposures(listeners.sockets, guard))
    raise_descriptor_limit()
    return trio.run(_run, config, listeners, admin, load_config, guard, tls_context)


async def _run(
    config: Config,
    listeners: Listeners,
    admin: Listeners,
    load_config: Callable[[], Config] | None,
    guard: Guard,
    tls_context: ssl.SSLContext | None,
) -> int:
    """A worker with what a process has around it: signals, and records on standard output. The exit status."""
    status = 0
    writer = RecordWriter(sys.stdout.fileno())
    sink = partial(record_sink, writer)
    worker = Worker(config, listeners, sink, admin, load_config, guard=guard, tls_context=tls_context)
    writer.on_drop = worker.service.tally.records_dropped
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(writer.run)
            nursery.start_soon(_obey, worker, signals, nursery)
            try:
                await nursery.start(worker.run)
            except callbacks.ListenError as exc:
                say(f"relay: {exc}", Priority.ERROR)
                status = 1
            else:
                # What lives as long as the process is not looked at again by the garbage collector.
                gc.collect()
                gc.freeze()
                for url in listeners.urls:
                    say(f"relay: listening on {url}")
                systemd.ready(f"serving on {', '.join(listeners.urls)}")
                if (limit_s := systemd.watchdog_s()) is not None:
                    nursery.start_soon(_feed_watchdog, limit_s / 2)
            await worker.stopped.wait()
            nursery.cancel_scope.cancel()
    return status


def record_sink(writer: RecordWriter, config: LogConfig) -> Callable[[Record], None] | None:
    """What writes a record in the configured form; None: nobody wants them."""
    match config.format:
        case "json":
            return lambda record: writer.put(record.encode() + b"\n")
        case "text":
            return lambda record: writer.put(record_text(record).encode() + b"\n")
        case _:
            return None


async def _feed_watchdog(interval_s: float) -> None:
    """A sign of life from the event loop that carries the traffic: where it hangs, systemd is to begin anew."""
    while True:
        systemd.feed_watchdog()
        await trio.sleep(interval_s)


async def tell_of_drain(left: Callable[[], int]) -> None:
    """Shows how many streams are left, and asks systemd for time, as long as somebody is there to ask.

    The drain itself ends within ``drain_s``; that may be more than the unit's ``TimeoutStopSec=``.
    """
    while True:
        systemd.draining(left(), 3 * DRAIN_TOLD_S)
        await trio.sleep(DRAIN_TOLD_S)


async def _obey(worker: Worker, signals: AsyncIterator[int], nursery: trio.Nursery) -> None:
    """SIGHUP reloads; the first signal to stop drains, the second cuts."""
    async for number in signals:
        if number == signal.SIGHUP:
            systemd.reloading("reading the configuration")
            priority = Priority.NOTICE
            try:
                said = f"reloaded: {await worker.reload()}"
            except ValueError as problem:
                said, priority = f"not reloaded: {problem}", Priority.ERROR
            say(f"relay: {said}", priority)
            systemd.ready(said)
        elif not worker.service.is_ready:
            worker.cut()
        else:
            systemd.stopping("draining")
            worker.stop()
            nursery.start_soon(tell_of_drain, lambda: len(worker.service.active))


def count_of(config: Config) -> int:
    """How many workers there are to be; "auto": one for each CPU the daemon may use."""
    workers = config.daemon.workers
    return len(os.sched_getaffinity(0)) if workers == "auto" else workers


def raise_descriptor_limit() -> None:
    """Two descriptors per stream: takes what the hard limit allows, as nginx's worker_rlimit_nofile would."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


class Worker:
    """Carries the traffic of some listeners until `stop`, then drains."""

    def __init__(
        self,
        config: Config,
        listeners: Listeners,
        record_sink: Callable[[LogConfig], Callable[[Record], None] | None],
        admin: Listeners | None = None,
        load_config: Callable[[], Config] | None = None,
        board: Block | None = None,
        guard: Guard | None = None,
        tls_context: ssl.SSLContext | None = None,
    ) -> None:
        self.config = self._started_with = config
        self._load_config = load_config
        self.listeners = listeners
        self.tls_context = tls_context  #: what connections of a `TlsListener` are made from
        self._admin = admin or Listeners()
        self._record_sink = record_sink
        self.pump = Pump()
        self.service = Service(config, self.pump, record_sink(config.log), board, guard)
        self.roster = Roster(self.service)
        self._callbacks = callbacks.Callbacks(self.service, callbacks.deliver(self.service.callbacks))
        self._key_limits: KeyLimits | None = None  #: None: another process keeps them
        self._prepared = callbacks.Prepared({}, {})
        self._reloading = trio.Lock()
        self.budget = BodyBudget(config.limits.max_buffered_bytes)
        self.connections: set[ClientConnection] = set()
        self.stopped = trio.Event()  #: drained, and all that is left closed
        self._stop = trio.Event()
        self._departure = trio.Event()  # set, and made anew, whenever a connection has ended
        self._handlers: trio.Nursery | None = None
        self._accepting: trio.Nursery | None = None  # None: not yet, or not any more
        self._accepts: dict[socket.socket, trio.CancelScope] = {}
        self._complained_at = float("-inf")

    def __repr__(self) -> str:
        return f"<Worker connections={len(self.connections)}>"

    def stop(self) -> None:
        """Begins to drain."""
        self.service.is_ready = False
        self._stop.set()

    async def reload(self) -> str:
        """Takes on what the configuration file says now; answers what came of it. Raises ValueError: nothing changed.

        Streams in flight, and connections open already, go on under what they began with.
        """
        async with self._reloading:
            config, guard = read_again(self._load_config)
            tls_context = tls.read(config)
            prepared = await self._callbacks.prepare(config)
            try:
                if not self.service.is_ready:
                    raise StartError("the daemon is draining")
                known = exposures(self.listeners.sockets, self.service.guard)
                self.listeners.change(config.listen.addresses)
            except StartError as exc:
                prepared.close()
                raise ValueError(str(exc)) from None
            self.take_on(config)
            self.tls_context = tls_context or self.tls_context
            self.roster.reconfigure(config, guard)
            if self._key_limits is not None:
                self._key_limits.settle(guard.limits)
            self._callbacks.take_on(prepared)
            self.accept_anew()
            warn_of(exposures(self.listeners.sockets, guard) - known)
            # A control process has what workers are forked from, and that is there before trio runs.
            is_alone = config.daemon.workers == self._started_with.daemon.workers or count_of(config) == 1
            return what_came_of(config, self._started_with, left=() if is_alone else ("daemon.workers",))

    def take_on(self, config: Config) -> None:
        """What a worker itself has of another configuration; its fleet's part is its fleet's."""
        self.config = config
        self.budget.limit = config.limits.max_buffered_bytes
        self.service.write_record = self._record_sink(config.log)

    def accept_anew(self) -> None:
        """Accepts at the `listeners` there are now, and at no others."""
        if self._accepting is None or self._handlers is None:
            return
        wanted = self.listeners.sockets
        for listener in self._accepts.keys() - {*wanted}:
            self._accepts.pop(listener).cancel()
        for listener in wanted:
            if listener not in self._accepts:
                scope = self._accepts[listener] = trio.CancelScope()
                self._accepting.start_soon(self._accept, listener, scope, self._handlers)

    def cut(self) -> None:
        """Ends at once whatever is still open."""
        if self._handlers is not None:
            self._handlers.cancel_scope.cancel()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serves, from `task_status.started` on, until stopped and drained. Raises ListenError: it cannot begin."""
        try:
            await self.open_callbacks()
            with poller.install(self.pump) as is_installed:
                async with trio.open_nursery() as background:
                    if not is_installed:
                        background.start_soon(self.pump.run_as_task)
                    self.service.drains.nursery = background
                    background.start_soon(self.service.tally.run, self.service)
                    await self.look_after_fleet(background)
                    async with trio.open_nursery() as self._handlers:
                        async with trio.open_nursery() as accepting:
                            self._accepting = accepting
                            self.accept_anew()
                            task_status.started()
                            await self._stop.wait()
                            await trio.sleep(self.config.daemon.ready_delay_s)
                            self._accepting = None
                            accepting.cancel_scope.cancel()
                        await self._drain(self._handlers)
                    background.cancel_scope.cancel()
        finally:
            self.listeners.close()
            self._admin.close()
            self.service.fleet.close_idle()
            self.pump.epoll.close()
            self.stopped.set()

    async def open_callbacks(self) -> None:
        """Listens for decoders. Raises ListenError."""
        self._prepared = await self._callbacks.prepare(self.config)

    async def look_after_fleet(self, background: trio.Nursery) -> None:
        """Begins what keeps the fleet as it should be; comes back when it is fit for requests."""
        for listener in self._admin.sockets:
            background.start_soon(Admin(self.service, self.roster, self.reload).serve, listener)
        self._key_limits = OwnKeyLimits(self.service.keys)
        self._key_limits.settle(self.service.guard.limits)
        background.start_soon(self._key_limits.run)
        self._callbacks.nursery = background
        self._callbacks.take_on(self._prepared)
        await background.start(self.roster.run)

    @property
    def _is_full(self) -> bool:
        return len(self.connections) >= self.config.limits.max_connections

    async def _accept(self, listener: socket.socket, scope: trio.CancelScope, handlers: trio.Nursery) -> None:
        """Accepts until `scope` is cancelled, as clients are to connect elsewhere; then the socket is closed."""
        with scope:
            listener.setblocking(False)
            await self._accept_at(listener, handlers)
        listener.close()

    async def _accept_at(self, listener: socket.socket, handlers: trio.Nursery) -> None:
        while True:
            await trio.lowlevel.wait_readable(listener)
            while self._is_full:  # and somebody waits
                make_room(self.connections)
                with trio.move_on_after(ACCEPT_PAUSE_S):
                    await self._departure.wait()
            for _ in range(ACCEPTS_PER_TURN):
                if self._is_full:
                    break
                try:
                    sock, peer = listener.accept()
                    sock.setblocking(False)
                    sockets.set_no_delay(sock)
                    if isinstance(listener, TlsListener) and self.tls_context is not None:
                        sock = tls.wrap(self.tls_context, sock)
                    source = self.pump.add(sock)
                except BlockingIOError:
                    break
                except ConnectionAbortedError:
                    continue
                except OSError as exc:
                    # Out of descriptors or memory: what is open goes on, and new clients wait in the backlog.
                    self._complain(exc)
                    await trio.sleep(ACCEPT_PAUSE_S)
                    break
                address = peer[0] if isinstance(peer, tuple) else "unix"
                config, admit = self.config, self.service.admit
                client = ClientConnection(source, address, config.timeouts, config.limits, self.budget, admit)
                self.connections.add(client)
                handlers.start_soon(self._serve, client)
            await trio.lowlevel.checkpoint()

    def _complain(self, exc: OSError) -> None:
        """One line, however often it happens."""
        now = time.monotonic()
        if now - self._complained_at >= COMPLAINT_S:
            self._complained_at = now
            say(f"relay: cannot accept: {exc.strerror}; trying again", Priority.ERROR)

    async def _serve(self, client: ClientConnection) -> None:
        """One client connection; nothing leaves this task as an exception but cancellation."""
        must_linger = False
        failure: ExchangeError | None = None
        try:
            with client.scope:
                try:
                    if await client.begin():
                        await self._exchange(client)
                except ExchangeError as refusal:
                    failure = refusal
            if failure is not None:
                await refuse(self.service, client, failure)
            must_linger = client.has_unread or isinstance(failure, RequestRefused)
        except Exception as exc:  # a fault of ours: this connection ends, the others do not
            say_fault(exc)
        finally:
            if must_linger:
                with trio.move_on_after(LINGER_S, shield=True):
                    await client.linger()
            client.close()
            self.connections.discard(client)
            self._departure.set()
            self._departure = trio.Event()

    async def _exchange(self, client: ClientConnection) -> None:
        """One request of a connection after the other. Raises ExchangeError: one that is not served."""
        while not self.service.is_draining:
            request = await client.next_request()
            if request is None or not await Exchange(self.service, client, request).run():
                return

    async def _drain(self, handlers: trio.Nursery) -> None:
        """Waits for the open exchanges, within ``drain_s``; then ends them with an error frame."""
        self.service.is_draining = True
        self.listeners.close()
        for client in self.connections:
            client.stop_waiting()
        with trio.move_on_after(self.config.daemon.drain_s):
            while self.connections:
                await self._departure.wait()
        for exchange in list(self.service.active):
            exchange.cut()
        with trio.move_on_after(CUT_S):
            while self.connections:
                await self._departure.wait()
        handlers.cancel_scope.cancel()
