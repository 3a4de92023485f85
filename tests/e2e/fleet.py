"""A relay with pools and an admin side, and engines that do as the test says."""

from __future__ import annotations

import json
import re
import socket
import struct
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import msgspec
import trio
import trio.testing
from prometheus_client.parser import text_string_to_metric_families

from relay import config as settings
from relay.address import UpstreamConfig, parse_upstream
from relay.config import Config, HealthConfig, LogConfig, PoolConfig
from relay.core.health import CONSECUTIVE_FAILURES
from relay.core.status import Status
from relay.daemon.listeners import Listeners
from relay.daemon.worker import Worker
from relay.net import tls
from relay.net.pool import Upstream
from relay_bench.engine import Engine
from tests.conftest import RunningRelay
from tests.e2e.harness import GOOD_ANSWER, Answer, Client, ask, request, until

#: Each probe is heard at once.
WATCHED: Final = HealthConfig(interval_s=0.02, failures=1, successes=1)
UNWATCHED: Final = HealthConfig(interval_s=0.0)


def answer(status: int, body: bytes = b"{}", *fields: str) -> bytes:
    """An engine's answer with a length."""
    lines = [f"HTTP/1.1 {status} -", "content-type: application/json", f"content-length: {len(body)}", *fields]
    return ("\r\n".join(lines) + "\r\n\r\n").encode() + body


class FakeEngine:
    """An engine whose every answer the test decides while it runs."""

    def __init__(self, *models: str) -> None:
        self.url = ""
        self.health = 200  #: what ``/health`` answers; 0: nothing, ever
        self.models = list(models)
        self.answer = GOOD_ANSWER  #: what all else is answered with; empty: nothing
        self.then = "keep"  #: or ``fin``, ``rst``: how the connection goes on
        self.gate = trio.Event()  #: answers wait for it
        self.gate.set()
        self.asked: list[bytes] = []  #: heads of requests, but for the probes'
        self.probed: list[bytes] = []
        self.connections = 0  #: open

    def __repr__(self) -> str:
        return f"<FakeEngine {self.url} health={self.health} asked={len(self.asked)}>"

    @property
    def authority(self) -> str:
        return self.url.removeprefix("http://")

    def hold(self) -> None:
        """From now on no request is answered, until `gate` is set."""
        self.gate = trio.Event()

    async def serve(self, stream: trio.SocketStream) -> None:
        self.connections += 1
        try:
            await self._serve(stream)
        except trio.BrokenResourceError:
            pass  # its client left
        finally:
            self.connections -= 1

    async def _serve(self, stream: trio.SocketStream) -> None:
        buffer = bytearray()
        while True:
            while (end := buffer.find(b"\r\n\r\n") + 4) < 4:
                data = await stream.receive_some()
                if not data:
                    return
                buffer += data
            head = bytes(buffer[:end])
            length = re.search(rb"(?i)\r\ncontent-length: *(\d+)", head)
            while len(buffer) < end + int(length[1] if length else 0):
                data = await stream.receive_some()
                if not data:
                    return
                buffer += data
            buffer.clear()
            await self._answer(stream, head)
            if self.then != "keep" and not head.startswith(b"GET /health"):
                return

    async def _answer(self, stream: trio.SocketStream, head: bytes) -> None:
        if head.startswith(b"GET /health "):
            self.probed.append(head)
            if not self.health:
                await trio.sleep_forever()
            await stream.send_all(answer(self.health))
        elif head.startswith(b"GET /v1/models "):
            self.probed.append(head)
            data = [{"id": model, "object": "model", "of": self.url} for model in self.models]
            await stream.send_all(answer(200, json.dumps({"object": "list", "data": data}).encode()))
        else:
            self.asked.append(head)
            await self.gate.wait()
            await stream.send_all(self.answer)
            if self.then == "rst":
                stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


@asynccontextmanager
async def fakes(*models: str) -> AsyncIterator[list[FakeEngine]]:
    """One engine for each of `models`, which is the only one it lists."""
    engines = [FakeEngine(model) for model in models]
    async with trio.open_nursery() as nursery:
        for engine in engines:
            listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
            engine.url = f"http://127.0.0.1:{listeners[0].socket.getsockname()[1]}"
            await nursery.start(trio.serve_listeners, engine.serve, listeners)
        yield engines
        nursery.cancel_scope.cancel()


class RunningFleet(RunningRelay):
    """A worker with an admin side."""

    def __init__(self, config: Config, load_config: Callable[[], Config] | None = None) -> None:
        listener, admin = (socket.create_server(("127.0.0.1", 0), backlog=512) for _ in range(2))
        self.listener = listener if config.listen.tls is None else tls.TlsListener(fileno=listener.detach())
        super().__init__(config, self.listener)
        found, side = Listeners([self.listener]), Listeners([admin])
        files = tls.read(config)
        tls.take_on(files)
        self.worker = Worker(config, found, lambda _: self._write, side, load_config, tls_context=files.server)
        self.admin_port: int = admin.getsockname()[1]

    async def admin(self, method: str, path: str, body: Any = b"") -> Answer:
        """Asks the admin side; what is not bytes is sent as JSON."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        head = f"{method} {path} HTTP/1.1\r\nhost: admin\r\ncontent-length: {len(data)}\r\n\r\n"
        return await ask(self.admin_port, head.encode() + data if method != "HEAD" else f"{head}".encode())

    @property
    def upstreams(self) -> dict[str, Upstream]:
        """All engines, by URL."""
        return {upstream.config.url: upstream for upstream in self.worker.service.fleet.upstreams}

    def is_up(self, engine: FakeEngine) -> bool:
        return self.upstreams[engine.url].health.is_up

    @property
    def queued(self) -> int:
        return sum(pool.queued for pool in self.worker.service.fleet.pools)


def pool_of(*urls: str, name: str = "default", most: int = 0, **settings: Any) -> PoolConfig:
    """A pool of engines that take `most` exchanges each."""
    return PoolConfig(name=name, upstreams=engines_of(urls, most=most), **settings)


def engines_of(urls: Sequence[str], *, most: int = 0) -> tuple[UpstreamConfig, ...]:
    return tuple(msgspec.structs.replace(parse_upstream(url), max_in_flight=most) for url in urls)


def config_of(*pools: PoolConfig, **tables: Any) -> Config:
    """Without probes, unless `tables` has ``health``."""
    return Config(pools=pools, log=LogConfig(format="off"), **{"health": UNWATCHED, **tables})


@asynccontextmanager
async def running_fleet(
    *pools: PoolConfig, load_config: Callable[[], Config] | None = None, **tables: Any
) -> AsyncIterator[RunningFleet]:
    """A relay with these pools, on free ports; when it has ended, nothing may be left over."""
    relay = RunningFleet(config_of(*pools, **tables), load_config)
    service = relay.worker.service
    known = set(service.fleet.upstreams)
    async with trio.open_nursery() as nursery:
        await nursery.start(relay.worker.run)
        yield relay
        known |= set(service.fleet.upstreams)
        relay.worker.stop()
        relay.worker.cut()
        with trio.move_on_after(5, shield=True):
            await relay.worker.stopped.wait()
        nursery.cancel_scope.cancel()
    assert not service.active
    assert all((upstream.outstanding, upstream.idle) == (0, 0) for upstream in known), known
    assert all((pool.in_flight, pool.queued) == (0, 0) for pool in service.fleet.pools)
    assert relay.worker.budget.used == 0


async def close_kept(worker: Worker) -> None:
    """Closes the connections to engines that are kept for other exchanges, each of which could have carried one.

    Nothing is under way on them, and no engine has closed its end: what was cut short is closed, and never kept.
    """
    await trio.testing.wait_all_tasks_blocked()  # the pump has heard of all that has come
    for upstream in worker.service.fleet.upstreams:
        kept = upstream.idle
        good = [connection for _ in range(kept) if (connection := upstream.take_idle(0.0)) is not None]
        for connection in good:
            connection.close()
        assert len(good) == kept, upstream


async def eject(relay: RunningFleet, engine: FakeEngine, data: bytes) -> None:
    """Has an engine fail one request after the other until it is left alone; the requests are answered by others."""
    good, engine.answer = engine.answer, answer(503)
    before = len(engine.asked)
    while not relay.upstreams[engine.url].health.is_open:
        await ask(relay.port, data)
        assert len(engine.asked) <= before + CONSECUTIVE_FAILURES
    engine.answer = good


@asynccontextmanager
async def waiting(relay: RunningFleet, data: bytes, number: int = 1) -> AsyncIterator[list[Client]]:
    """Clients whose requests are in the queue."""
    before = relay.queued
    clients = [await Client.connect(relay.port) for _ in range(number)]
    try:
        for at, client in enumerate(clients, 1):
            await client.send(data)
            await until(lambda at=at: relay.queued >= before + at)  # type: ignore[misc]
        yield clients
    finally:
        for client in clients:
            client.stream.socket.close()


async def status_of(relay: RunningFleet) -> Status:
    got = await relay.admin("GET", "/-/status")
    assert (got.status, got.headers["content-type"]) == (200, "application/json")
    return msgspec.json.decode(got.payload, type=Status)


@asynccontextmanager
async def streams(relay: RunningFleet, engine: Engine, number: int) -> AsyncIterator[list[Client]]:
    """Streams of eleven frames of which two have come; a step takes long enough to do something meanwhile."""
    clients = [await Client.connect(relay.port) for _ in range(number)]
    try:
        for at, client in enumerate(clients):
            body = {"max_tokens": 8, "stream_options": {"include_usage": True}}
            await client.send(request(body=body, sim_step_ms="60", x_request_id=f"stream-{at}"))
            await client.frames(2)
        yield clients
    finally:
        for client in clients:
            client.stream.socket.close()


async def assert_whole(*clients: Client) -> None:
    """The streams go on to their end."""
    for client in clients:
        got = await client.answer()
        assert (got.status, got.end, len(got.frames)) == (200, "whole", 11)
        assert got.frames[-1] == b"data: [DONE]\n\n"


def samples(text: bytes) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """Every sample of a scrape, by name and labels."""
    found = {}
    for family in text_string_to_metric_families(text.decode()):
        assert family.documentation
        for sample in family.samples:
            key = (sample.name, frozenset(sample.labels.items()))
            assert key not in found
            found[key] = sample.value
    return found


class Scrape:
    """A scrape's samples."""

    def __init__(self, got: Answer) -> None:
        assert got.status == 200
        assert got.headers["content-type"].startswith("text/plain; version=")
        self._samples = samples(got.payload)

    def __call__(self, name: str, **labels: str) -> float | None:
        return self._samples.get((name, frozenset(labels.items())))

    def sum(self, name: str, **labels: str) -> float:
        """Of all series that have these labels, whatever else they have."""
        wanted = set(labels.items())
        return sum(value for (other, own), value in self._samples.items() if other == name and wanted <= own)

    def labels(self, name: str) -> list[Mapping[str, str]]:
        return [dict(labels) for other, labels in self._samples if other == name]


class ConfigFile:
    """A file that changes while the relay runs."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def pools(self, *pools: tuple[str, str], extra: str = "") -> None:
        """Each a name and the URL of its engine; the second and later ones serve the model of their name."""
        text = "[health]\ninterval_s = 0\n[log]\nformat = 'off'\n" + extra
        for at, (name, url) in enumerate(pools):
            models = f"['{name}']" if at else "[]"
            text += f"\n[[pool]]\nname = '{name}'\nupstreams = ['{url}']\nmodels = {models}\n"
        self.path.write_text(text)

    def load(self) -> Config:
        return settings.load(self.path)
