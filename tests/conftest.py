"""What end-to-end tests stand on: a relay worker in the test's own trio run, on real sockets."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final, NoReturn

import pytest
import trio
from hypothesis import settings

from relay.address import UpstreamConfig, parse_upstream
from relay.config import Config, HealthConfig, LogConfig, PoolConfig
from relay.core.timeline import Record
from relay.daemon.listeners import Listeners
from relay.daemon.worker import Worker
from relay.net import pump, tls

# How long an example takes says more of the machine than of the code.
settings.register_profile("relay", deadline=None)
settings.load_profile("relay")

#: Of tests that change a method of the pump, or of what it calls: which cannot be done where they are compiled.
changes_pump = pytest.mark.skipif(not pump.__file__.endswith(".py"), reason="the pump is compiled")

#: No test waits longer than this for anything.
TEST_LIMIT_S = 20.0

#: Where this is ``1``, what a test needs of the machine has to be there: see `not_here`.
_ALL: Final = os.environ.get("RELAY_TEST_ALL") == "1"


def not_here(needs: str) -> NoReturn:
    """Skips a test that needs what this machine has not; fails it with ``RELAY_TEST_ALL=1``."""
    if _ALL:
        pytest.fail(f"RELAY_TEST_ALL=1, and it needs {needs}")
    pytest.skip(f"needs {needs}")


@pytest.fixture(scope="session")
def node_environment() -> dict[str, str]:
    """Where node finds npm's eventsource-parser."""
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        not_here("node and npm")
    root = subprocess.run([npm, "root", "-g"], capture_output=True, text=True, check=True, timeout=60).stdout.strip()
    if not os.path.isdir(f"{root}/eventsource-parser"):
        not_here("npm's eventsource-parser: npm install -g eventsource-parser")
    return {**os.environ, "NODE_PATH": root}


class RunningRelay:
    """A worker that serves, and the records it has written."""

    def __init__(self, config: Config, listener: socket.socket) -> None:
        self.records: list[Record] = []
        self._written = trio.Event()
        self.worker = Worker(config, Listeners([listener]), lambda _: self._write, tls_context=tls.read(config).server)
        self.port: int = listener.getsockname()[1] if listener.family == socket.AF_INET else 0

    def _write(self, record: Record) -> None:
        self.records.append(record)
        self._written.set()

    async def record(self, number: int = 1) -> Record:
        """The `number`-th record, once it has been written."""
        with trio.fail_after(TEST_LIMIT_S):
            while len(self.records) < number:
                self._written = trio.Event()
                await self._written.wait()
        return self.records[number - 1]

    async def connect(self) -> trio.SocketStream:
        """A client connection."""
        return await trio.open_tcp_stream("127.0.0.1", self.port)


@asynccontextmanager
async def running_relay(
    *upstreams: str | UpstreamConfig, listener: socket.socket | None = None, models: tuple[str, ...] = (), **tables: Any
) -> AsyncIterator[RunningRelay]:
    """A relay in front of `upstreams`, on a free port or `listener`; further arguments are configuration tables."""
    engines = (parse_upstream(url) if isinstance(url, str) else url for url in upstreams)
    pool = PoolConfig(models=models, upstreams=tuple(engines))
    tables.setdefault("health", HealthConfig(interval_s=0.0))  # an engine played by the test expects no probes
    config = Config(pools=(pool,), log=LogConfig(format="off"), **tables)
    listener = listener or socket.create_server(("127.0.0.1", 0), backlog=512)
    if config.listen.tls is not None:
        listener = tls.TlsListener(fileno=listener.detach())
    relay = RunningRelay(config, listener)
    async with trio.open_nursery() as nursery:
        await nursery.start(relay.worker.run)
        try:
            yield relay
        finally:
            relay.worker.stop()
            relay.worker.cut()
            with trio.move_on_after(5, shield=True):
                await relay.worker.stopped.wait()
            nursery.cancel_scope.cancel()
            assert not relay.worker.service.active
            assert all(upstream.outstanding == 0 for upstream in relay.worker.service.fleet.upstreams)
            assert relay.worker.budget.used == 0
