"""The engine as a whole: listen, accept, and run the decode loop beside the connections."""

from __future__ import annotations

import errno
import os
import socket
import stat
import sys
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import trio

from relay_bench.engine.connection import Connection
from relay_bench.engine.handover import connector_named
from relay_bench.engine.ledger import Ledger
from relay_bench.engine.scheduler import Scheduler

if TYPE_CHECKING:
    from relay_bench.engine.config import EngineConfig

#: Connections the kernel holds until they are accepted; it caps this at net.core.somaxconn.
_BACKLOG: Final = 4096
#: Accepted in one turn, so that a burst of new connections does not hold up the running streams for long.
_ACCEPTS_PER_TURN: Final = 16
#: Seconds to wait when descriptors have run out.
_NO_DESCRIPTORS_PAUSE_S: Final = 0.1


class Engine:
    """A running engine: where it listens, and what it has done."""

    def __init__(self, config: EngineConfig, listener: socket.socket) -> None:
        self.config = config
        self.ledger = Ledger(cache_blocks=config.prefix_cache_blocks)
        self.kv_port = 0  #: of the listener for other engines, if there is one
        if listener.family == socket.AF_UNIX:
            self.host, self.port = "", 0
            self.url = config.listen
        else:
            self.host, self.port = listener.getsockname()[:2]
            self.url = f"http://[{self.host}]:{self.port}" if ":" in self.host else f"http://{self.host}:{self.port}"

    def stats(self) -> dict[str, int]:
        """Counts: queued, running, completed, aborted, failed, served, connections_open, connections_accepted."""
        return self.ledger.stats()

    def requests(self) -> list[dict[str, Any]]:
        """The latest generating requests, oldest first, as ``/sim/requests`` reports them."""
        return [record.as_dict() for record in self.ledger.records]

    def last(self, path: str = "") -> dict[str, str]:
        """The latest request's ``head``, ``body`` and ``raw_body`` in latin-1, as ``/sim/last`` reports them."""
        return self.ledger.last(path)

    def __repr__(self) -> str:
        return f"<Engine {self.url} {self.stats()}>"


async def serve_engine(
    config: EngineConfig, *, task_status: trio.TaskStatus[Engine] = trio.TASK_STATUS_IGNORED
) -> None:
    """Run an engine until cancelled; ``await nursery.start(serve_engine, config)`` returns the `Engine`.

    Raises OSError and ValueError where it cannot listen, or is told what cannot be.
    """
    connector_named(config.connector, config.role)
    with ExitStack() as stack:
        listeners = [stack.enter_context(closing(open_listener(address))) for address in _addresses(config)]
        engine = Engine(config, listeners[0])
        if len(listeners) > 1:
            engine.kv_port = listeners[1].getsockname()[1]
        try:
            async with trio.open_nursery() as nursery:
                scheduler = Scheduler(engine.ledger, nursery, max_seqs=config.max_seqs, jitter=config.jitter)
                nursery.start_soon(scheduler.run)
                for listener in listeners:
                    nursery.start_soon(_accept, listener, engine, scheduler, nursery)
                task_status.started(engine)
        finally:
            for listener in listeners:
                trio.lowlevel.notify_closing(listener)
            _remove_path(config.listen)


def _addresses(config: EngineConfig) -> list[str]:
    """Where to listen: for clients, then for other engines, on the same host."""
    if not config.kv_port:
        return [config.listen]
    if config.listen.startswith("unix:"):
        raise ValueError("--kv-port needs an engine that listens on HOST:PORT")
    return [config.listen, f"{config.listen.rpartition(':')[0]}:{config.kv_port}"]


def open_listener(address: str) -> socket.socket:
    """A listening, non-blocking socket for ``HOST:PORT``, ``[V6]:PORT`` or ``unix:/path``."""
    if address.startswith("unix:"):
        return _listen_unix(Path(address.removeprefix("unix:")))
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdecimal() or int(port) > 65535:
        raise ValueError(f"{address!r}: wanted HOST:PORT, [::1]:PORT or unix:/path")
    family, *_, where = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(where)
        listener.listen(_BACKLOG)
    except OSError:
        listener.close()
        raise
    listener.setblocking(False)
    return listener


def _remove_path(address: str) -> None:
    if address.startswith("unix:"):
        Path(address.removeprefix("unix:")).unlink(missing_ok=True)


def _listen_unix(path: Path) -> socket.socket:
    with suppress(FileNotFoundError):
        if stat.S_ISSOCK(os.stat(path).st_mode):  # left behind by an engine that was killed
            path.unlink()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(str(path))
        listener.listen(_BACKLOG)
    except OSError:
        listener.close()
        raise
    listener.setblocking(False)
    return listener


async def _accept(listener: socket.socket, engine: Engine, scheduler: Scheduler, nursery: trio.Nursery) -> None:
    while True:
        await trio.lowlevel.wait_readable(listener)
        for _ in range(_ACCEPTS_PER_TURN):
            try:
                sock, _address = listener.accept()
            except BlockingIOError:
                break
            except OSError as error:
                if error.errno not in {errno.EMFILE, errno.ENFILE}:
                    continue  # that client has left again
                print("relay-bench engine: out of file descriptors (ulimit -n)", file=sys.stderr)
                await trio.sleep(_NO_DESCRIPTORS_PAUSE_S)
                break
            sock.setblocking(False)
            if sock.family != socket.AF_UNIX:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            engine.ledger.connections_accepted += 1
            connection = Connection(sock, engine.config, engine.ledger, scheduler)
            nursery.start_soon(connection.serve)
