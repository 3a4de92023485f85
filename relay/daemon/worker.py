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
import sys
import time
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Final

import trio

from relay.address import Address
from relay.config import Config
from relay.core.timeline import Record, record_text
from relay.daemon import systemd
from relay.daemon.exposure import warn_if_exposed
from relay.daemon.key_limits import KeyLimits, OwnKeyLimits
from relay.daemon.records import RecordWriter
from relay.daemon.reload import read_again, what_came_of
from relay.errors import ExchangeError, RequestRefused
from relay.net import callbacks, poller, sockets
from relay.net.admin import Admin
from relay.net.downstream import LINGER_S, BodyBudget, ClientConnection, make_room
from relay.net.exchange import Exchange
from relay.net.guard import Guard, GuardError
from relay.net.pump import Pump
from relay.net.reply import refuse
from relay.net.roster import Roster
from relay.net.service import Service

if TYPE_CHECKING:
    from relay.core.board import Block

#: Clients waiting to be accepted; the kernel caps it at net.core.somaxconn.
BACKLOG: Final = 4096
#: Connections accepted in a row before other tasks run: a burst of new clients must not delay every stream.
ACCEPTS_PER_TURN: Final = 16
#: How long accepting pauses when descriptors or memory have run out.
ACCEPT_PAUSE_S: Final = 0.1
#: Seconds between two complaints that accepting fails.
COMPLAINT_S: Final = 10.0
#: Seconds that cut exchanges get for their error frames.
CUT_S: Final = 3.0


class StartError(Exception):
    """The daemon cannot start; the message says what to do."""


def run(config: Config, load_config: Callable[[], Config] | None = None) -> int:
    """Runs the daemon until SIGTERM or SIGINT; the process's exit status. `load_config` reads it again: SIGHUP."""
    try:
        guard = Guard.read(config.auth)
        listeners, admin_listener = open_listeners(config)
    except (GuardError, StartError) as exc:
        print(f"relay: {exc}", file=sys.stderr)
        return 1
    warn_if_exposed(listeners, guard)
    raise_descriptor_limit()
    trio.run(_run, config, listeners, admin_listener, load_config, guard)
    return 0


async def _run(
    config: Config,
    listeners: list[socket.socket],
    admin_listener: socket.socket | None,
    load_config: Callable[[], Config] | None,
    guard: Guard,
) -> None:
    """A worker with what a process has around it: signals, and records on standard output."""
    writer = RecordWriter(sys.stdout.fileno())
    worker = Worker(config, listeners, record_sink(config, writer), admin_listener, load_config, guard=guard)
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(writer.run)
            nursery.start_soon(_obey, worker, signals)
            await nursery.start(worker.run)
            # What lives as long as the process is not looked at again by the garbage collector.
            gc.collect()
            gc.freeze()
            for listener in listeners:
                print(f"relay: listening on {url_of(listener)}", file=sys.stderr, flush=True)
            systemd.ready(f"serving on {', '.join(map(url_of, listeners))}")
            if (limit_s := systemd.watchdog_s()) is not None:
                nursery.start_soon(_feed_watchdog, limit_s / 2)
            await worker.stopped.wait()
            nursery.cancel_scope.cancel()


def record_sink(config: Config, writer: RecordWriter) -> Callable[[Record], None] | None:
    """What writes a record in the configured form; None: nobody wants them."""
    match config.log.format:
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


async def _obey(worker: Worker, signals: AsyncIterator[int]) -> None:
    """SIGHUP reloads; the first signal to stop drains, the second cuts."""
    async for number in signals:
        if number == signal.SIGHUP:
            systemd.reloading("reading the configuration")
            try:
                said = f"reloaded: {worker.reload()}"
            except ValueError as problem:
                said = f"not reloaded: {problem}"
            print(f"relay: {said}", file=sys.stderr, flush=True)
            systemd.ready(said)
        elif not worker.service.is_ready:
            worker.cut()
        else:
            systemd.stopping("draining")
            worker.stop()


async def serve_callbacks(service: Service, background: trio.Nursery) -> None:
    """Listens for the decoders that call back."""
    for pool in service.fleet.pools:
        if pool.is_split and pool.connector.calls_back:
            await background.start(callbacks.serve, service, pool)


def open_listeners(config: Config) -> tuple[list[socket.socket], socket.socket | None]:
    """The listening sockets, and the admin side's: systemd's where it passes some, else the configured addresses."""
    passed = systemd.listen_fds()
    admin_fds = [fd for fd, name in passed if name == "admin"]
    admin_listener = None
    if admin_fds:
        admin_listener = socket.socket(fileno=admin_fds[0])
    elif config.admin.address is not None:
        admin_listener = _listen(config.admin.address)
    listeners = [socket.socket(fileno=fd) for fd, name in passed if name != "admin"]
    return listeners or [_listen(address) for address in config.listen.addresses], admin_listener


def _listen(address: Address) -> socket.socket:
    try:
        if address.unix_path is not None:
            return _listen_unix(address.unix_path)
        family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)  # as nginx: [::] is not also 0.0.0.0
            sock.bind((address.host, address.port))
            sock.listen(BACKLOG)
        except OSError:
            sock.close()
            raise
    except OSError as exc:
        raise StartError(f"cannot listen on {address}: {exc.strerror}") from None
    return sock


def _listen_unix(path: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        try:
            sock.bind(path)
        except OSError:
            if not _is_abandoned(path):
                raise
            os.unlink(path)
            sock.bind(path)
        sock.listen(BACKLOG)
    except OSError:
        sock.close()
        raise
    return sock


def _is_abandoned(path: str) -> bool:
    """Whether a socket file is left over from a process that died: nobody listens on it any more."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            return True
        except OSError:
            return False
        return False


def url_of(listener: socket.socket) -> str:
    """Where a listener can be reached, with the port the kernel picked."""
    name = listener.getsockname()
    if listener.family == socket.AF_UNIX:
        return f"unix:{name}"
    return Address(name[0], name[1]).url


def raise_descriptor_limit() -> None:
    """Two descriptors per stream: takes what the hard limit allows, as nginx's worker_rlimit_nofile would."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


class Worker:
    """Carries the traffic of some listeners until `stop`, then drains."""

    def __init__(
        self,
        config: Config,
        listeners: list[socket.socket],
        write_record: Callable[[Record], None] | None,
        admin_listener: socket.socket | None = None,
        load_config: Callable[[], Config] | None = None,
        board: Block | None = None,
        guard: Guard | None = None,
    ) -> None:
        self.config = self._started_with = config
        self._load_config = load_config
        self.listeners = listeners
        self.admin_listener = admin_listener
        self.pump = Pump()
        self.service = Service(config, self.pump, write_record, board, guard)
        self.roster = Roster(self.service)
        self._key_limits: KeyLimits | None = None  #: None: another process keeps them
        self.budget = BodyBudget(config.limits.max_buffered_bytes)
        self.connections: set[ClientConnection] = set()
        self.stopped = trio.Event()  #: drained, and all that is left closed
        self._stop = trio.Event()
        self._departure = trio.Event()  # set, and made anew, whenever a connection has ended
        self._handlers: trio.Nursery | None = None
        self._complained_at = float("-inf")

    def __repr__(self) -> str:
        return f"<Worker connections={len(self.connections)}>"

    def stop(self) -> None:
        """Begins to drain."""
        self.service.is_ready = False
        self._stop.set()

    def reload(self) -> str:
        """Takes on what the configuration file says now; answers what came of it. Raises ValueError: nothing changed.

        Streams in flight, and connections open already, go on under what they began with.
        """
        config, guard = read_again(self._load_config)
        said = what_came_of(config, self._started_with)
        self.config = config
        self.roster.reconfigure(config, guard)
        if self._key_limits is not None:
            self._key_limits.settle(guard.limits)
        self.budget.limit = config.limits.max_buffered_bytes
        return said

    def cut(self) -> None:
        """Ends at once whatever is still open."""
        if self._handlers is not None:
            self._handlers.cancel_scope.cancel()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serves, from `task_status.started` on, until stopped and drained."""
        try:
            with poller.install(self.pump) as is_installed:
                async with trio.open_nursery() as background:
                    if not is_installed:
                        background.start_soon(self.pump.run_as_task)
                    self.service.drains.nursery = background
                    background.start_soon(self.service.tally.run, self.service)
                    await self.look_after_fleet(background)
                    async with trio.open_nursery() as self._handlers:
                        async with trio.open_nursery() as accepting:
                            for listener in self.listeners:
                                listener.setblocking(False)
                                accepting.start_soon(self._accept, listener, self._handlers)
                            task_status.started()
                            await self._stop.wait()
                            await trio.sleep(self.config.daemon.ready_delay_s)
                            accepting.cancel_scope.cancel()
                        await self._drain(self._handlers)
                    background.cancel_scope.cancel()
        finally:
            self._close_listeners()
            if self.admin_listener is not None:
                self.admin_listener.close()
            self.service.fleet.close_idle()
            self.pump.epoll.close()
            self.stopped.set()

    async def look_after_fleet(self, background: trio.Nursery) -> None:
        """Begins what keeps the fleet as it should be; comes back when it is fit for requests."""
        if self.admin_listener is not None:
            side = Admin(self.service, self.roster, self.reload)
            background.start_soon(side.serve, self.admin_listener)
        self._key_limits = OwnKeyLimits(self.service.keys)
        self._key_limits.settle(self.service.guard.limits)
        background.start_soon(self._key_limits.run)
        await serve_callbacks(self.service, background)
        await background.start(self.roster.run)

    @property
    def _is_full(self) -> bool:
        return len(self.connections) >= self.config.limits.max_connections

    async def _accept(self, listener: socket.socket, handlers: trio.Nursery) -> None:
        while True:
            await trio.lowlevel.wait_readable(listener)
            while self._is_full:  # and somebody waits
                make_room(self.connections)
                await self._departure.wait()
            for _ in range(ACCEPTS_PER_TURN):
                if self._is_full:
                    break
                try:
                    sock, peer = listener.accept()
                    sock.setblocking(False)
                    sockets.set_no_delay(sock)
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
                client = ClientConnection(
                    self.pump.add(sock), address, config.timeouts, config.limits, self.budget, admit
                )
                self.connections.add(client)
                handlers.start_soon(self._serve, client)
            await trio.lowlevel.checkpoint()

    def _complain(self, exc: OSError) -> None:
        """One line, however often it happens."""
        now = time.monotonic()
        if now - self._complained_at >= COMPLAINT_S:
            self._complained_at = now
            print(f"relay: cannot accept: {exc.strerror}; trying again", file=sys.stderr, flush=True)

    async def _serve(self, client: ClientConnection) -> None:
        """One client connection; nothing leaves this task as an exception but cancellation."""
        must_linger = False
        failure: ExchangeError | None = None
        try:
            with client.scope:
                while not self.service.is_draining:
                    try:
                        request = await client.next_request()
                    except ExchangeError as refusal:
                        failure = refusal
                        break
                    if request is None:
                        break
                    if not await Exchange(self.service, client, request).run():
                        break
            if client.scope.cancelled_caught:
                failure = client.interruption()
            if failure is not None:
                await refuse(self.service, client, failure)
            must_linger = client.has_unread or isinstance(failure, RequestRefused)
        except Exception as exc:  # a fault of ours: this connection ends, the others do not
            print(f"relay: internal error: {exc!r}", file=sys.stderr, flush=True)
            sys.excepthook(type(exc), exc, exc.__traceback__)
        finally:
            if must_linger:
                with trio.move_on_after(LINGER_S, shield=True):
                    await client.linger()
            client.close()
            self.connections.discard(client)
            self._departure.set()
            self._departure = trio.Event()

    def _close_listeners(self) -> None:
        for listener in self.listeners:
            listener.close()

    async def _drain(self, handlers: trio.Nursery) -> None:
        """Waits for the open exchanges, within ``drain_s``; then ends them with an error frame."""
        self.service.is_draining = True
        self._close_listeners()
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
