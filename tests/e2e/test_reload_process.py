"""What a reload changes of the processes themselves, one or several, while streams go on."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from relay_bench.engine import Engine
from tests.e2e.children import START_S, Child, child
from tests.e2e.harness import Answer, Client, request, until
from tests.e2e.test_reload import admin_of
from tests.e2e.test_workers import children_of

#: Asks for 22 frames in a second.
SLOW: dict[str, Any] = {"body": {"max_tokens": 20}, "sim_step_ms": "50"}


class Daemon:
    """A relay that is told by its file alone where to listen, on unix sockets in a directory."""

    def __init__(self, directory: Path, engine: Engine) -> None:
        self.directory = directory
        self.admin = admin_of(directory)
        self._engine = engine

    def write(self, *listen: str, workers: int, log: str = "off") -> None:
        addresses = [f"unix:{self.directory}/{name}" for name in listen]
        self.path.write_text(
            f"[listen]\naddresses = {addresses}\n[admin]\naddress = 'unix:{self.directory}/admin'\n"
            f"[daemon]\nworkers = {workers}\n[log]\nformat = '{log}'\n[health]\ninterval_s = 0\n"
            f"[[pool]]\nupstreams = ['{self._engine.url}']\n"
        )

    @property
    def path(self) -> Path:
        return self.directory / "relay.toml"

    @property
    def files(self) -> set[str]:
        """The sockets there are."""
        return {path.name for path in self.directory.iterdir() if path.is_socket()}

    async def reload(self) -> str:
        answer = await self.admin("POST", "/-/reload")
        found: dict[str, str] = answer.json()
        return found.get("reloaded") or found["error"]

    async def connect(self, name: str) -> Client:
        return Client(await trio.open_unix_socket(f"{self.directory}/{name}"))

    async def ask(self, name: str) -> Answer:
        async with await self.connect(name) as client:
            return await client.ask(request())

    @asynccontextmanager
    async def streams(self, name: str, number: int) -> AsyncIterator[list[Client]]:
        """Clients with two frames of a stream."""
        async with AsyncExitStack() as stack:
            clients = []
            for _ in range(number):
                client = await stack.enter_async_context(await self.connect(name))
                await client.send(request(**SLOW))
                await client.frames(2)
                clients.append(client)
            yield clients


@pytest.fixture
def daemon(tmp_path: Path, engine: Engine) -> Daemon:
    return Daemon(tmp_path, engine)


@contextmanager
def serving(daemon: Daemon) -> Any:
    with child(daemon.directory, "relay", "serve", "--config", str(daemon.path)) as process:
        yield process


def workers_of(process: Child) -> list[int]:
    (forker,) = children_of(process.pid)
    return children_of(forker)


async def assert_whole(clients: list[Client]) -> None:
    for client in clients:
        answer = await client.answer()
        assert (answer.end, len(answer.frames)) == ("whole", 22)


@pytest.mark.parametrize("workers", [1, 2])
async def test_listeners_come_and_go_and_streams_stay(daemon: Daemon, workers: int) -> None:
    daemon.write("a", "b", workers=workers)
    with serving(daemon) as process:
        async with daemon.streams("a", 3) as clients:
            daemon.write("b", "c", workers=workers)
            assert await daemon.reload() == "yes"
            assert daemon.files == {"admin", "b", "c"}
            for name in ("b", "c", "b", "c"):
                assert (await daemon.ask(name)).status == 200
            daemon.write("c", "nowhere/d", workers=workers)
            assert re.fullmatch(
                r"not reloaded: cannot listen on unix:/\S+/nowhere/d: No such file or directory .listen.addresses, .*",
                await daemon.reload(),
            )
            assert (await daemon.ask("b")).status == 200
            await assert_whole(clients)
        rest = process.stop()
        assert "Traceback" not in rest
    assert daemon.files == set()
    told = [line for line in rest.splitlines() if "listening" in line]
    where = f"listening on unix:{daemon.directory}"
    assert told[-2:] == [f"relay: {where}/c", f"relay: no longer {where}/a"]


async def test_there_may_be_more_listeners_than_a_message_has_descriptors(daemon: Daemon) -> None:
    names = [f"s{at}" for at in range(300)]
    daemon.write(*names[:280], workers=2)
    with serving(daemon):
        assert (await daemon.ask("s279")).status == 200
        daemon.write(*names[20:], workers=2)
        assert await daemon.reload() == "yes"
        assert (await daemon.ask("s299")).status == 200
        assert (await daemon.ask("s20")).status == 200
        assert daemon.files == {"admin", *names[20:]}


async def test_workers_let_go_of_limits_that_are_gone(daemon: Daemon) -> None:
    def limit(number: int) -> None:
        daemon.write("a", workers=2)
        engines = [f"{{ url = 'http://127.0.0.{2 + at}:9', max_in_flight = 1 }}" for at in range(number)]
        text = daemon.path.read_text()
        daemon.path.write_text(text.replace("upstreams = [", f"upstreams = [{', '.join(engines)}, "))

    def semaphores(pid: int) -> int:
        return [os.readlink(path) for path in Path(f"/proc/{pid}/fd").iterdir()].count("anon_inode:[eventfd]")

    limit(9)
    with serving(daemon) as process:
        assert [semaphores(pid) for pid in workers_of(process)] == [9, 9]
        limit(2)
        assert await daemon.reload() == "yes"
        await until(lambda: [semaphores(pid) for pid in workers_of(process)] == [2, 2])
        assert "Traceback" not in process.stop()


async def test_there_are_as_many_workers_as_the_file_says(daemon: Daemon) -> None:
    daemon.write("a", workers=2)
    with serving(daemon) as process:
        before = set(workers_of(process))
        async with daemon.streams("a", 8) as clients:
            daemon.write("a", workers=3)
            assert await daemon.reload() == "yes"
            await until(lambda: len(workers_of(process)) == 3, START_S)
            daemon.write("a", workers=1)
            assert await daemon.reload() == "yes"
            await assert_whole(clients)
        await until(lambda: len(workers_of(process)) == 1, START_S)
        assert set(workers_of(process)) <= before  # the first stays
        assert (await daemon.ask("a")).status == 200
        done = b'relay_requests_total{outcome="--",pool="default",route="chat",status="200"} 9.0\n'
        assert done in (await daemon.admin("GET", "/metrics")).payload
        daemon.write("a", workers=1000)
        assert (
            await daemon.reload()
            == "not reloaded: daemon.workers: 1000 are too many; allowed without a restart: 64 at present"
        )
        assert len(workers_of(process)) == 1
        assert "ended with" not in process.stop()


@pytest.mark.parametrize("workers", [1, 2])
async def test_a_daemon_that_drains_takes_on_nothing(daemon: Daemon, workers: int) -> None:
    daemon.write("a", workers=workers)
    with serving(daemon) as process:
        async with await daemon.connect("a") as client:
            await client.send(request(sim_fault="stall-after:2"))
            await client.frames(2)
            os.kill(process.pid, signal.SIGTERM)
            await until(lambda: "a" not in daemon.files, START_S)
            daemon.write("a", "b", workers=workers)
            os.kill(process.pid, signal.SIGHUP)
            said = [await trio.to_thread.run_sync(process.line) for _ in range(2)]  # with workers in either order
            assert sorted(said) == [
                "relay: draining for at most 30 s, 1 in flight; a second signal cuts\n",
                "relay: not reloaded: the daemon is draining\n",
            ]
            assert daemon.files == {"admin"}
            assert process.stop() == ""


async def test_a_worker_without_room_for_a_new_listener_ends_its_streams_well_and_is_replaced(daemon: Daemon) -> None:
    daemon.write("a", workers=2)
    with serving(daemon) as process:
        victim, other = workers_of(process)
        async with daemon.streams("a", 4) as clients:
            taken = {int(fd) for fd in os.listdir(f"/proc/{victim}/fd")}
            limit = min({*range(len(taken) + 1)} - taken)
            resource.prlimit(victim, resource.RLIMIT_NOFILE, (limit, limit))
            daemon.write("a", "b", workers=2)
            assert await daemon.reload() == "yes"
            assert (await daemon.ask("b")).status == 200
            await assert_whole(clients)

        def is_replaced() -> bool:
            now = workers_of(process)  # once: it may end between two looks
            return len(now) == 2 and victim not in now and other in now

        await until(is_replaced, START_S)
        rest = process.stop()
    assert "Traceback" not in rest
    told = {line for line in rest.splitlines() if "listening" not in line}
    told.discard(f"relay: worker {victim} ended with status 0")  # said if it ended before it was replaced
    assert told == {
        "relay: too many open files to take what the control process passes on; draining",
        "relay: reloaded",
    }


@pytest.mark.parametrize("workers", [1, 2])
async def test_systemd_is_told_of_a_reload(daemon: Daemon, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    daemon.write("a", workers=workers)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(f"{daemon.directory}/notify")
        manager.setblocking(False)
        monkeypatch.setenv("NOTIFY_SOCKET", f"{daemon.directory}/notify")
        with serving(daemon) as process:
            os.kill(process.pid, signal.SIGHUP)
            assert await trio.to_thread.run_sync(process.line) == "relay: reloaded\n"
            process.stop()
        told = [manager.recv(1000).partition(b"\n")[0] for _ in range(4)]
    assert told == [b"READY=1", b"RELOADING=1", b"READY=1", b"STOPPING=1"]


@pytest.mark.parametrize("workers", [1, 2])
async def test_a_listener_that_a_reload_opens_in_public_is_told_of(daemon: Daemon, workers: int) -> None:
    daemon.write("a", workers=workers)
    with serving(daemon) as process:
        text = daemon.path.read_text()
        for _ in range(2):  # told of once
            daemon.path.write_text(text.replace("addresses = [", "addresses = ['0.0.0.0:0', "))
            assert await daemon.reload() == "yes"
        rest = process.stop()
    listening, warning, *others = rest.splitlines()
    assert re.fullmatch(r"relay: listening on http://0\.0\.0\.0:\d+", listening)
    reloads = [line for line in others if "listening" not in line]
    assert re.fullmatch(r"relay: warning: 0\.0\.0\.0:\d+ can be reached from outside: anybody may use .*", warning)
    assert reloads == ["relay: reloaded"] * 2


@pytest.mark.parametrize("workers", [1, 2])
async def test_records_take_another_form(daemon: Daemon, workers: int) -> None:
    daemon.write("a", workers=workers)
    with serving(daemon) as process:
        assert (await daemon.ask("a")).status == 200
        daemon.write("a", workers=workers, log="json")
        os.kill(process.pid, signal.SIGHUP)
        assert await trio.to_thread.run_sync(process.line) == "relay: reloaded\n"
        assert (await daemon.ask("a")).status == 200
        process.stop()
        (record,) = process.records()
    assert record["outcome"] == "--", json.dumps(record)
