"""The worker: it accepts clients and carries their traffic until it is told to stop.

Two nurseries: accepting inside, connections outside. To stop ends the inner one; the connections then have ``drain_s``
to finish, and what is left is cut with an error frame.
"""

from __future__ import annotations

import socket
import ssl
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import trio

from relay.config import Config, LogConfig
from relay.core.request_head import HeadReader
from relay.core.timeline import Record
from relay.daemon.exposure import warn_of, warnings_of
from relay.daemon.key_limits import KeyLimits, OwnKeyLimits
from relay.daemon.listeners import Listeners, announce
from relay.daemon.process import CUT_S, count_of
from relay.daemon.reload import left_for_restart, read_again, reload_and_tell
from relay.errors import ExchangeError, RequestRefused
from relay.net import callbacks, poller, sockets, tls
from relay.net.admin import Admin
from relay.net.budget import BodyBudget
from relay.net.downstream import LINGER_S, ClientConnection, make_room
from relay.net.exchange import Exchange
from relay.net.fiber import Fiber
from relay.net.guard import Guard
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
#: How often idle connections to engines are looked through, seconds; ``upstream_idle_s`` can be exceeded by as much.
EXPIRY_LOOK_S: Final = 1.0
#: Seconds between two complaints that accepting fails.
COMPLAINT_S: Final = 10.0


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
        self._started_with = config
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
        self._begun = trio.Event()  # there is all that a reload changes
        self._reloading = trio.Lock()
        self.budget = BodyBudget(config.limits.max_buffered_bytes)
        self._heads = HeadReader()
        self.connections: set[ClientConnection] = set()
        self._waiting: dict[ClientConnection, None] = {}  # of these, for a request; who has waited longest is the first
        self.is_announced = False  #: clients and systemd have been told that it serves
        self.stopped = trio.Event()  #: drained, and all that is left closed
        self._stop = trio.Event()
        self._departure = trio.Event()  # set, and made anew, whenever a connection has ended
        self._cut = trio.CancelScope()
        self._handlers: trio.Nursery | None = None  # None: not yet
        self._accepting: trio.Nursery | None = None  # None: not yet, or not any more
        self._accepts: dict[socket.socket, trio.CancelScope] = {}
        self._complained_at = float("-inf")

    def __repr__(self) -> str:
        return f"<Worker connections={len(self.connections)}>"

    @property
    def is_serving(self) -> bool:
        """Whether clients and systemd have been told so, and it is still so."""
        return self.is_announced and self.service.is_ready

    def stop(self) -> None:
        """Begins to drain."""
        self.service.is_ready = False
        self._stop.set()

    async def reload(self) -> str:
        """Takes on what the configuration file says now, and tells of it: see `reload_and_tell`.

        Streams in flight, and connections open already, go on under what they began with.
        """
        return await reload_and_tell(self._reload)

    async def _reload(self) -> str:
        """What takes a restart. Raises ValueError, or OSError where descriptors are short: nothing changed."""
        await self._begun.wait()
        assert self._key_limits is not None
        async with self._reloading:
            config, guard = read_again(self._load_config)
            files = tls.read(config)
            prepared = await self._callbacks.prepare(config)
            try:
                if not self.service.is_ready:
                    raise ValueError("the daemon is draining")
                self._key_limits.prepare(guard.limits)
                known = warnings_of(self.listeners.sockets, self.service.guard, self.service.config.limits)
                urls = self.listeners.urls
                self.listeners.change(config.listen.addresses)
            except (ValueError, OSError):
                prepared.close()
                self._key_limits.settle(self.service.guard.limits)
                raise
            self.take_on(config)
            self.take_on_tls(files)
            self.roster.reconfigure(config, guard)
            self._key_limits.settle(guard.limits)
            self._callbacks.take_on(prepared)
            self.accept_anew()
            announce(self.listeners.urls, urls)
            warn_of(warnings_of(self.listeners.sockets, guard, config.limits) - known)
            # A control process has what workers are forked from, and that is there before trio runs.
            is_alone = config.daemon.workers == self._started_with.daemon.workers or count_of(config) == 1
            return left_for_restart(config, self._started_with, () if is_alone else ("daemon.workers",))

    def take_on(self, config: Config) -> None:
        """What a worker itself has of another configuration; its fleet's part is its fleet's."""
        self.budget.resize(config.limits.max_buffered_bytes)
        self.service.write_record = self._record_sink(config.log)

    def take_on_tls(self, files: tls.Files) -> None:
        """Certificates and keys that connections begin with from now on."""
        tls.take_on(files)
        self.tls_context = files.server or self.tls_context

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
        """Ends at once, with whatever is still open."""
        self._cut.cancel()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serves, from `task_status.started` on, until stopped and drained. Raises ListenError: it cannot begin."""
        try:
            with self._cut:
                await self._serve_and_drain(task_status.started)
            if self._handlers is None:  # cut before it served
                task_status.started()
        finally:
            self.listeners.close()
            self._admin.close()
            self.service.fleet.close_idle()
            self.pump.epoll.close()
            self.stopped.set()

    async def _serve_and_drain(self, on_started: Callable[[], None]) -> None:
        await self.open_callbacks()
        with poller.install(self.pump) as is_installed:
            async with trio.open_nursery() as background:
                if not is_installed:
                    background.start_soon(self.pump.run_as_task)
                self.service.drains.nursery = background
                background.start_soon(self.service.tally.run, self.service)
                background.start_soon(self._drop_expired)
                await self.look_after_fleet(background)
                self._begun.set()
                async with trio.open_nursery() as self._handlers:
                    async with trio.open_nursery() as accepting:
                        self._accepting = accepting
                        self.accept_anew()
                        on_started()
                        await self._stop.wait()
                        await trio.sleep(self.service.config.daemon.ready_delay_s)
                        self._accepting = None
                        accepting.cancel_scope.cancel()
                    await self._drain(self._handlers)
                background.cancel_scope.cancel()

    async def _drop_expired(self) -> None:
        """Closes connections to engines that nobody uses any more: traffic may have stopped."""
        while True:
            await trio.sleep(EXPIRY_LOOK_S)
            self.service.fleet.drop_expired(self.service.config.timeouts.upstream_idle_s)

    async def open_callbacks(self) -> None:
        """Listens for decoders. Raises ListenError."""
        self._prepared = await self._callbacks.prepare(self.service.config)

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
        return len(self.connections) >= self.service.config.limits.max_connections

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
                make_room(self._waiting)
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
                config, admit = self.service.config, self.service.admit
                timeouts, limits = config.timeouts, config.limits
                client = ClientConnection(source, address, timeouts, limits, self.budget, self._heads, admit)
                self.connections.add(client)
                self._waiting[client] = None
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
                        await Fiber(self._exchange(client), in_pump=self.pump.is_nested).run()
                except ExchangeError as refusal:
                    failure = refusal.settled()
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
            self._waiting.pop(client, None)
            self._departure.set()
            self._departure = trio.Event()

    async def _exchange(self, client: ClientConnection) -> None:
        """One request of a connection after the other. Raises ExchangeError: one that is not served."""
        waiting = self._waiting
        while not self.service.is_draining:
            request = await client.next_request()
            waiting.pop(client, None)
            if request is None or not await Exchange(self.service, client, request).run():
                return
            waiting[client] = None

    async def _drain(self, handlers: trio.Nursery) -> None:
        """Waits for the open exchanges, within ``drain_s``; then ends them with an error frame."""
        self.service.drain()
        self.listeners.close()
        for client in self.connections:
            client.stop_waiting()
        with trio.move_on_after(self.service.config.daemon.drain_s):
            while self.connections:
                await self._departure.wait()
        for exchange in list(self.service.active):
            exchange.cut()
        with trio.move_on_after(CUT_S):
            while self.connections:
                await self._departure.wait()
        handlers.cancel_scope.cancel()
