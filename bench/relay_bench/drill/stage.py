"""Engines and relay of a drill: processes of their own, as from their command lines, so that they can be killed."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import httpx
import msgspec
import trio
from prometheus_client.parser import text_string_to_metric_families

from relay.core.status import Status, UpstreamStatus
from relay_bench.drill.report import DrillError
from relay_bench.processes import descriptors, family, open_files
from relay_bench.servers import said_url

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Mapping, Sequence

T = TypeVar("T")

#: Seconds for a process to say where it listens, for it to end, or for an answer about it.
PATIENCE_S: Final = 20.0
#: Seconds between two looks at what has no event to wait for.
LOOK_S: Final = 0.02
#: An engine's line for a request that it has begun, or ended.
_LOGGED: Final = re.compile(r"<RequestRecord (\S+) \S+ (\w+) tokens_sent=(\d+)>")
#: Looks of which the best counts.
_LOOKS: Final = 10


class Scene(msgspec.Struct, frozen=True, kw_only=True):
    """Which relay a drill is held with."""

    command: tuple[str, ...] = (sys.executable, "-m", "relay")
    #: Configuration on top of the drill's own, as TOML has it: ``{"failover.attempts": "1"}``; ``pool.`` for its pool.
    settings: Mapping[str, str] = {}
    #: Seconds until everything must have come to rest behind the last request.
    settle_s: float = 10.0


class Child:
    """A process that says on standard error where it listens."""

    def __init__(self, process: trio.Process, said: Path) -> None:
        self.process = process
        self._said = said
        self.url = ""

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.url} pid={self.process.pid}>"

    @property
    def address(self) -> tuple[str, int]:
        """Where it listens."""
        host, _, port = self.url.removeprefix("http://").rpartition(":")
        return host, int(port)

    async def wait_listening(self) -> None:
        """Waits for its word. Raises `DrillError`."""
        with trio.move_on_after(PATIENCE_S):
            while self.process.returncode is None:
                self.url = said_url(self._said.read_text())
                if self.url:
                    return
                await trio.sleep(LOOK_S)
                self.process.poll()
        raise DrillError(f"{self._said.stem} did not start: {self._said.read_text().strip()}")

    async def kill(self) -> None:
        """Ends it as the kernel's out-of-memory killer would."""
        self.process.kill()
        await self.process.wait()

    async def stop(self) -> None:
        """Ends it in order. Raises `DrillError` where it takes too long."""
        self.process.send_signal(signal.SIGTERM)
        with trio.move_on_after(PATIENCE_S):
            await self.process.wait()
            return
        raise DrillError(f"{self!r} does not end")


class EngineChild(Child):
    """A built-in engine."""

    @property
    def was_killed(self) -> bool:
        """Whether it has ended by `kill`."""
        return self.process.returncode == -signal.SIGKILL

    def log(self) -> Iterator[tuple[str, str, int]]:
        """With ``--log``: id, state and tokens sent of every request, as it began (``queued``) and as it ended."""
        with self._said.open() as lines:
            for line in lines:
                if found := _LOGGED.search(line):
                    yield found[1], found[2], int(found[3])

    async def counts(self) -> dict[str, int]:
        """What ``/sim/requests`` counts."""
        async with _http() as client:
            found: dict[str, int] = (await client.get(f"{self.url}/sim/requests")).json()
        return found


class RelayChild(Child):
    """A relay, with its admin side on a unix socket."""

    def __init__(self, process: trio.Process, folder: Path) -> None:
        super().__init__(process, folder / "relay.err")
        self._folder = folder

    async def status(self) -> Status:
        """What ``/-/status`` says."""
        return msgspec.json.decode(await self._ask("GET", "/-/status"), type=Status)

    async def upstreams(self) -> tuple[UpstreamStatus, ...]:
        """The engines of its only pool."""
        return (await self.status()).pools[0].upstreams

    async def exchanges(self) -> list[dict[str, Any]]:
        """What ``/-/exchanges`` lists: those in flight."""
        found: list[dict[str, Any]] = msgspec.json.decode(await self._ask("GET", "/-/exchanges"))
        return found

    async def add(self, url: str) -> None:
        """Puts an engine into its pool."""
        await self._ask("POST", "/-/upstreams", {"url": url})

    async def remove(self, url: str) -> None:
        """Takes an engine out of its pool."""
        await self._ask("DELETE", "/-/upstreams", {"url": url})

    async def _ask(self, method: str, path: str, body: dict[str, str] | None = None) -> bytes:
        async with _http(f"{self._folder}/admin") as client:
            answer = await client.request(method, f"http://relay{path}", json=body)
        if not answer.is_success:
            raise DrillError(f"the relay answers {method} {path} with {answer.status_code}: {answer.text.strip()}")
        return answer.content

    @property
    def faults(self) -> list[str]:
        """What it has said of errors in itself."""
        said = self._said.read_text().splitlines()
        return [line for line in said if line.startswith(("relay: internal error", "Traceback"))]

    async def metrics(self) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
        """A scrape's samples, by name and labels."""
        text = (await self._ask("GET", "/metrics")).decode()
        return {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

    def descriptors(self) -> int:
        """How many the process and its descendants have open."""
        return sum(map(descriptors, family(self.process.pid)))

    async def descriptors_at_rest(self) -> int:
        """How many stay open for a while: probes open some, and close them again."""
        lasting = self.open_files()
        for _ in range(_LOOKS):
            await trio.sleep(LOOK_S)
            lasting &= self.open_files()
        return len(lasting)

    def open_files(self) -> set[tuple[tuple[int, str], str]]:
        """What the process and its descendants have open: each descriptor, and what it refers to."""
        return set(open_files(self.process.pid).items())

    def records(self) -> list[dict[str, Any]]:
        """The records it has written; all of them, once it has stopped."""
        return list(self.records_as(dict[str, Any]))

    def records_as(self, type_: type[T]) -> Iterator[T]:
        """The records one by one, as another type."""
        decode = msgspec.json.Decoder(type_).decode
        with (self._folder / "relay.out").open("rb") as lines:
            yield from map(decode, lines)


class Stage:
    """Starts processes; all are killed when the `stage` is left."""

    def __init__(self, scene: Scene, folder: Path) -> None:
        self.scene = scene
        self.folder = folder
        self.children: list[Child] = []

    async def engines(self, number: int, *flags: str) -> list[EngineChild]:
        """So many engines, on free ports."""
        started = [await self._engine("127.0.0.1:0", flags) for _ in range(number)]
        for engine in started:
            await engine.wait_listening()
        return started

    async def engine_again(self, before: EngineChild, *flags: str) -> EngineChild:
        """An engine where another has been."""
        engine = await self._engine(before.url.removeprefix("http://"), flags)
        await engine.wait_listening()
        return engine

    async def _engine(self, listen: str, flags: Sequence[str]) -> EngineChild:
        said = self.folder / f"engine{len(self.children)}.err"
        command = (sys.executable, "-m", "relay_bench", "engine", "--listen", listen, *flags)
        engine = EngineChild(await _open(command, said), said)
        self.children.append(engine)
        return engine

    async def relay(self, engines: Iterable[EngineChild], settings: Mapping[str, str]) -> RelayChild:
        """A relay before some engines. `settings` are the drill's; the scene's stand above them."""
        own = {
            "listen.addresses": '["127.0.0.1:0"]',
            "admin.address": f'"unix:{self.folder}/admin"',
            "pool.upstreams": str([engine.url for engine in engines]),
        }
        return await self.relay_of({**own, **settings, **self.scene.settings}, ())

    async def relay_of(self, settings: Mapping[str, str], pools: Sequence[Mapping[str, str]]) -> RelayChild:
        """A relay with all its settings, and further pools'."""
        config = self.folder / "relay.toml"
        config.write_text(_toml(settings, pools))
        command = (*self.scene.command, "serve", "--config", str(config))
        process = await _open(command, self.folder / "relay.err", self.folder / "relay.out")
        relay = RelayChild(process, self.folder)
        self.children.append(relay)
        await relay.wait_listening()
        return relay


def pace(ttft_ms: float, step_ms: float) -> tuple[str, ...]:
    """An engine's flags: the time to its first token, and between the others."""
    return "--ttft-ms", f"{ttft_ms:g}", "--step-ms", f"{step_ms:g}"


@asynccontextmanager
async def stage(scene: Scene) -> AsyncGenerator[Stage, None]:
    """A place to start processes in."""
    with tempfile.TemporaryDirectory(prefix="relay-drill-") as folder:
        here = Stage(scene, Path(folder))
        try:
            yield here
        finally:
            with trio.CancelScope(shield=True, deadline=trio.current_time() + PATIENCE_S):
                for child in here.children:
                    await child.kill()


async def _open(command: Sequence[str], stderr: Path, stdout: Path | None = None) -> trio.Process:
    with stderr.open("wb") as err, (stdout or Path(os.devnull)).open("wb") as out:
        return await trio.lowlevel.open_process(command, stdin=subprocess.DEVNULL, stdout=out, stderr=err)


def _http(unix_path: str | None = None) -> httpx.AsyncClient:
    """A client for a question or two. There is no TLS here, and reading certificates takes longer than an answer."""
    transport = httpx.AsyncHTTPTransport(uds=unix_path, verify=False, trust_env=False)
    return httpx.AsyncClient(transport=transport, timeout=PATIENCE_S, trust_env=False)


def _toml(settings: Mapping[str, str], more_pools: Sequence[Mapping[str, str]]) -> str:
    """Dotted keys, and behind them the pools' own."""
    pool = {name.removeprefix("pool."): value for name, value in settings.items() if name.startswith("pool.")}
    lines = [f"{name} = {value}" for name, value in settings.items() if not name.startswith("pool.")]
    for own in (pool, *more_pools):
        lines += ["[[pool]]", *(f"{name} = {value}" for name, value in own.items())]
    return "\n".join(lines) + "\n"


async def holds(condition: Callable[[], Any], limit_s: float) -> bool:
    """Whether an asynchronous condition comes true within a time."""
    with trio.move_on_after(limit_s):
        while not await condition():  # noqa: ASYNC110 — other processes have no events
            await trio.sleep(LOOK_S)
        return True
    return False
