"""The real process: what it prints, and how it ends."""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from relay.config import LimitsConfig
from relay.daemon.process import shortages
from relay_bench.engine import Engine
from tests.e2e.fleet import fakes
from tests.e2e.harness import Client, ask, request, states, until

#: A Python start-up on a loaded machine.
START_S = 15.0
#: Between two of the signals that come to the last moment. Without a pause a daemon in twenty or so still ends by one.
EACH_S = 0.001


class Process:
    """A `relay serve` and what it has printed."""

    def __init__(self, process: trio.Process) -> None:
        self.process = process
        self.stdout = b""
        self.stderr = b""

    @property
    def port(self) -> int:
        match = re.search(rb"^relay: listening on http://127\.0\.0\.1:(\d+)$", self.stderr, re.MULTILINE)
        assert match is not None, self.stderr
        return int(match[1])

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    async def ended(self) -> int:
        """The exit status."""
        with trio.fail_after(START_S):
            return await self.process.wait()

    async def prints(self, condition: Callable[[], bool]) -> None:
        await until(condition, START_S)

    async def read_stdout(self) -> None:
        assert self.process.stdout is not None
        async for data in self.process.stdout:
            self.stdout += data

    async def read_stderr(self) -> None:
        assert self.process.stderr is not None
        async for data in self.process.stderr:
            self.stderr += data


#: Starts a command as systemd does: the descriptors of `sys.argv[1]`, named by `sys.argv[2]`, become 3 and up.
_PASS_SOCKETS = """
import fcntl, os, sys
fds = [fcntl.fcntl(int(fd), fcntl.F_DUPFD, 100) for fd in sys.argv[1].split(",")]
for number, fd in enumerate(fds, 3):
    os.dup2(fd, number)
passed = {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": str(len(fds)), "LISTEN_FDNAMES": sys.argv[2]}
os.execve(sys.argv[3], sys.argv[3:], os.environ | passed)
"""


@asynccontextmanager
async def relay_serve(
    *arguments: str,
    listen: str = "127.0.0.1:0",
    passed: Mapping[str, socket.socket] | None = None,
    start: Sequence[str] = (),
) -> AsyncIterator[Process]:
    """A running relay, with sockets as systemd passes them; its output is read to the end when the block is left.

    `start`: what runs the command that it gets.
    """
    command = [*start, sys.executable, "-m", "relay", "serve", "--listen", listen, "--admin", "off", *arguments]
    fds = [sock.fileno() for sock in (passed or {}).values()]
    if passed:
        command = [sys.executable, "-c", _PASS_SOCKETS, ",".join(map(str, fds)), ":".join(passed), *command]
    async with trio.open_nursery() as nursery:
        process = await trio.lowlevel.open_process(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=os.environ.copy(),
            pass_fds=fds,
        )
        relay = Process(process)
        nursery.start_soon(relay.read_stdout)
        nursery.start_soon(relay.read_stderr)
        try:
            yield relay
        finally:
            if process.returncode is None:
                process.kill()
            with trio.CancelScope(shield=True):
                await process.wait()


async def test_lines_record_and_drain(engine: Engine) -> None:
    async with relay_serve("--upstream", engine.url) as relay:
        await relay.prints(lambda: b"\n" in relay.stderr)
        async with await Client.connect(relay.port) as client:
            await client.send(request(body={"max_tokens": 20}, x_request_id="mine", sim_step_ms="25"))
            await client.frames(3)
            relay.signal(signal.SIGTERM)
            answer = await client.answer()
            assert (answer.status, answer.end, len(answer.frames)) == (200, "whole", 22)
            assert await client.is_closed()
        assert await relay.ended() == 0
    assert relay.stderr.count(b"listening") == 1
    assert b"Traceback" not in relay.stderr
    lines = relay.stdout.splitlines()
    assert len(lines) == 1
    record = json.loads(lines[0])
    assert (record["id"], record["outcome"], record["status"]) == ("mine", "--", 200)
    assert record["completion_tokens"] == 20


@pytest.mark.parametrize("workers", [1, 2])
async def test_a_free_port_is_told_and_signals_of_other_servers_mean_nothing(engine: Engine, workers: int) -> None:
    arguments = ("--upstream", engine.url, "--admin", "127.0.0.1:0", "--workers", str(workers))
    async with relay_serve(*arguments) as relay:
        await relay.prints(lambda: relay.stderr.count(b"\n") == 2)
        admin = re.search(rb"^relay: admin side on http://127\.0\.0\.1:(\d+)$", relay.stderr, re.MULTILINE)
        assert admin is not None, relay.stderr
        for number in (signal.SIGUSR1, signal.SIGUSR2):
            relay.signal(number)
        assert (await ask(int(admin[1]), request("/-/status", method="GET"))).status == 200
        assert (await ask(relay.port, request())).status == 200
        relay.signal(signal.SIGTERM)
        assert await relay.ended() == 0


async def test_a_second_signal_cuts(engine: Engine) -> None:
    async with relay_serve("--upstream", engine.url) as relay:
        await relay.prints(lambda: b"\n" in relay.stderr)
        async with await Client.connect(relay.port) as client, await Client.connect(relay.port) as idle:
            assert (await idle.ask(request("/-/live", method="GET"))).status == 200
            await client.send(request(sim_fault="stall-after:2"))
            await client.frames(2)
            relay.signal(signal.SIGINT)
            assert await idle.is_closed()  # it drains
            relay.signal(signal.SIGTERM)
            assert (await client.answer()).end in {"fin", "rst"}
        assert await relay.ended() == 0
        await until(lambda: states(engine) == ["aborted"])
    assert b"Traceback" not in relay.stderr
    assert json.loads(relay.stdout.splitlines()[-1])["outcome"] == "RD"


async def test_who_is_stopped_while_it_starts_says_nothing_of_being_ready(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its engine's first probe holds up the start; a second signal cuts that, too."""
    path = tmp_path / "notify"
    with trio.socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        await manager.bind(str(path))
        monkeypatch.setenv("NOTIFY_SOCKET", str(path))
        async with fakes("a") as (engine,):
            engine.health = 0  # it does not answer
            async with relay_serve("--upstream", engine.url, "--workers", "1") as relay:
                await until(lambda: bool(engine.probed), START_S)
                told = b""
                for _ in range(2):
                    relay.signal(signal.SIGTERM)
                    with trio.fail_after(START_S):
                        while b"STOPPING=1" not in told:
                            told += await manager.recv(1000)
                assert await relay.ended() == 0
        assert b"READY=1" not in told
    assert relay.stderr == b""


@pytest.mark.parametrize("workers", [1, 2])
async def test_a_reload_asked_for_before_anybody_listens_is_made(tmp_path: Path, workers: int, engine: Engine) -> None:
    """The file is a pipe at first, so that it is known when it is read."""
    path, other = tmp_path / "relay.toml", tmp_path / "other.toml"
    os.mkfifo(path)
    other.write_text(f"[daemon]\nworkers = {workers}\n[[pool]]\nupstreams = ['{engine.url}']\n")
    fds: list[int] = []

    def is_read() -> bool:
        try:
            fds.append(os.open(path, os.O_WRONLY | os.O_NONBLOCK))
        except OSError as exc:
            if exc.errno != errno.ENXIO:
                raise
            return False
        return True

    async with relay_serve("--config", str(path)) as relay:
        await until(is_read, START_S)
        relay.signal(signal.SIGHUP)
        os.write(fds[0], other.read_bytes())
        other.replace(path)
        os.close(fds[0])
        await relay.prints(lambda: b"relay: reloaded\n" in relay.stderr)
        relay.signal(signal.SIGTERM)
        assert await relay.ended() == 0


def test_next_to_no_descriptors() -> None:
    command = [sys.executable, "-m", "relay", "serve", "--listen", "127.0.0.1:0", "--upstream", "http://127.0.0.1:1"]
    shell = ["sh", "-c", 'ulimit -n 40; exec "$0" "$@"']
    ended = subprocess.run([*shell, *command], capture_output=True, check=False, text=True, timeout=START_S)
    said = "relay: open files are limited to 40; raise that (ulimit -Hn, LimitNOFILE=): 2 for each stream\n"
    assert (ended.returncode, ended.stderr) == (1, said)


#: Starts a command that may have so few descriptors.
_LIMITED = ("sh", "-c", 'ulimit -n 256; exec "$0" "$@"')


@pytest.mark.parametrize("workers", [1, 2])
async def test_fewer_descriptors_than_connections_may_need_are_told_of(tmp_path: Path, workers: int) -> None:
    """Once for each setting that they are too few for, be it the default."""
    config = tmp_path / "relay.toml"

    def write(limits: str) -> None:
        pool = "[[pool]]\nupstreams = ['http://127.0.0.1:1']\n"
        config.write_text(f"[daemon]\nworkers = {workers}\n[health]\ninterval_s = 0\n{limits}{pool}")

    write("")
    async with relay_serve("--config", str(config), start=_LIMITED) as relay:
        await relay.prints(lambda: b"listening" in relay.stderr)
        for number, limits in enumerate(("", "[limits]\nmax_connections = 113\n", "[limits]\nmax_connections = 112\n")):
            write(limits)
            relay.signal(signal.SIGHUP)
            await relay.prints(lambda: relay.stderr.count(b"relay: reloaded\n") == number + 1)  # noqa: B023
        relay.signal(signal.SIGTERM)
        assert await relay.ended() == 0

    def said(allowed: int) -> str:
        cure = "raise that (ulimit -Hn, LimitNOFILE=): 2 for each stream; or lower limits.max_connections"
        limited = "relay: warning: open files are limited to 256, enough for 112"
        return f"{limited} of {allowed} connections; {cure}"

    first, _, *rest = relay.stderr.decode().splitlines()
    reloaded = "relay: reloaded"
    assert (first, rest) == (said(20_000), [reloaded, said(113), reloaded, reloaded])


@pytest.mark.parametrize(("most", "told"), [(2079, 1), (2080, 0), (resource.RLIM_INFINITY, 0)])
def test_the_default_is_told_of_where_next_to_nothing_is_left_of_it(
    most: int, told: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (most, most))
    assert len(shortages(LimitsConfig())) == told
    assert len(shortages(LimitsConfig(max_connections=2000))) == (most >= 0)


@pytest.mark.parametrize("workers", ["1", "2"])
@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM])
async def test_signals_to_the_last_moment_leave_the_exit_status(number: signal.Signals, workers: str) -> None:
    async with relay_serve("--upstream", "http://127.0.0.1:1", "--workers", workers) as relay:
        await relay.prints(lambda: b"\n" in relay.stderr)
        relay.signal(signal.SIGTERM)
        with trio.fail_after(START_S):
            while relay.process.poll() is None:
                relay.signal(number)
                await trio.sleep(EACH_S)
        assert relay.process.returncode == 0


async def test_drain_s_is_a_limit(engine: Engine) -> None:
    async with relay_serve("--upstream", engine.url, "--drain-s", "0.2") as relay:
        await relay.prints(lambda: b"\n" in relay.stderr)
        async with await Client.connect(relay.port) as client:
            await client.send(request(sim_fault="stall-after:2"))
            await client.frames(2)
            relay.signal(signal.SIGTERM)
            answer = await client.answer()
            assert answer.end == "fin"
            assert b'"draining"' in answer.frames[-1]
        assert await relay.ended() == 0


async def test_a_port_in_use() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        async with relay_serve("--upstream", "http://127.0.0.1:1", listen=f"127.0.0.1:{port}") as relay:
            assert await relay.ended() == 1
    said = f"relay: cannot listen on 127.0.0.1:{port}: Address already in use (listen.addresses, --listen)\n"
    assert relay.stderr == said.encode()
    assert relay.stdout == b""


@pytest.mark.parametrize("workers", [1, 2])
async def test_a_port_for_decoders_in_use(tmp_path: Path, workers: int) -> None:
    config = tmp_path / "relay.toml"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        config.write_text(
            f"[daemon]\nworkers = {workers}\n[[pool]]\nconnector = 'ascend_layerwise'\ncallback_address = '{address}'\n"
            "prefill = ['http://127.0.0.1:1']\ndecode = ['http://127.0.0.1:1']\n"
        )
        async with relay_serve("--config", str(config), listen=f"unix:{tmp_path}/listener") as relay:
            assert await relay.ended() == 1
    assert relay.stderr == f"relay: cannot listen on {address} for decoders: Address already in use\n".encode()
    assert relay.stdout == b""
    assert not (tmp_path / "listener").exists()


async def test_text_records_and_no_reader_of_them(engine: Engine) -> None:
    async with relay_serve("--upstream", engine.url, "--log-format", "text") as relay:
        await relay.prints(lambda: b"\n" in relay.stderr)
        assert (await ask(relay.port, request(x_request_id="mine"))).status == 200
        relay.signal(signal.SIGINT)
        assert await relay.ended() == 0
    assert relay.stdout.count(b"\n") == 1
    assert b"mine" in relay.stdout
