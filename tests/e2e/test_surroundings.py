"""What the machine does to a relay: no memory for sockets, names that do not resolve, clocks that jump, full disks, and
processes that are stopped.
"""

from __future__ import annotations

import errno
import io
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import pytest
import trio

from relay.config import HealthConfig, PoolConfig, StreamConfig, TimeoutsConfig
from relay.core.frames import FrameRelay, Pieces
from relay.net import pool as pool_module
from relay_bench.engine import Engine
from tests.conftest import changes_pump, running_relay
from tests.e2e.children import START_S, child, relay_child
from tests.e2e.fleet import engines_of, running_fleet
from tests.e2e.harness import GOOD_ANSWER, STREAM, Client, ask, assert_cut_off, request, states, until
from tests.e2e.test_client_side import MANY_TOKENS

#: Small, where a test waits for it to pass.
SHORT_S: Final = 0.2


# -- sockets without memory


class ShortSocket(socket.socket):
    """A socket for whose n-th call of a name the kernel has no memory."""

    fails: str = ""
    after = 0

    def _call(self, name: str) -> None:
        if name == self.fails:
            self.after -= 1
            if self.after < 0:
                raise OSError(errno.ENOBUFS, os.strerror(errno.ENOBUFS))

    def send(self, *given: Any) -> int:
        self._call("send")
        return super().send(*given)

    def sendmsg(self, *given: Any) -> int:
        self._call("send")
        return super().sendmsg(*given)

    def recv_into(self, *given: Any) -> int:
        self._call("recv_into")
        return super().recv_into(*given)


class ShortListener(socket.socket):
    """A listener whose connections are short of memory from their n-th send on."""

    after = 0

    def accept(self) -> tuple[socket.socket, Any]:
        accepted, peer = super().accept()
        short = ShortSocket(fileno=accepted.detach())
        short.fails, short.after = "send", self.after
        return short, peer


@pytest.mark.parametrize("after", [0, 1, 3])
async def test_no_memory_to_send_to_a_client_is_no_client_that_left(engine: Engine, after: int) -> None:
    listener = ShortListener(fileno=socket.create_server(("127.0.0.1", 0)).detach())
    listener.after = after
    async with running_relay(engine.url, listener=listener) as relay:
        answer = await ask(relay.port, request(sim_step_ms="5"))
        assert answer.end == "fin"
        assert (answer.head == b"") == (after == 0)
        assert b"[DONE]" not in answer.payload
        assert bool(answer.payload) == (after > 0)
        assert answer.payload.endswith(b"\n\n" if after else b"")
        record = await relay.record()
        assert (record.outcome, record.status) == ("RD", 200)
        await until(lambda: states(engine) == ["aborted"])


@pytest.mark.parametrize(
    ("fails", "after", "told"),
    [  # head and first frame take three reads at most
        ("send", 0, ("RH", 503)),
        ("recv_into", 0, ("RH", 503)),
        ("recv_into", 3, ("RD", 200)),
        ("recv_into", 5, ("RD", 200)),
    ],
)
async def test_no_memory_for_an_engines_socket_is_no_engine_that_failed(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, fails: str, after: int, told: tuple[str, int]
) -> None:
    connect_to = pool_module._connect_to

    async def connect_short(family: int, address: object) -> socket.socket:
        short = ShortSocket(fileno=(await connect_to(family, address)).detach())
        short.fails, short.after = fails, after
        return short

    async with running_relay(engine.url) as relay:
        with monkeypatch.context() as patch:
            patch.setattr(pool_module, "_connect_to", connect_short)
            answer = await ask(relay.port, request(sim_step_ms="5"))
        record = await relay.record()
        assert (record.outcome, record.status, record.attempts) == (*told, 1)
        if told[1] == 503:
            assert (answer.status, answer.error["code"], answer.headers["retry-after"]) == (503, "no_upstream", "1")
        else:
            assert (answer.status, answer.end) == (200, "fin")
        (upstream,) = relay.worker.service.fleet.upstreams
        assert (upstream.failures, upstream.last_error) == (0, None)
        assert (await ask(relay.port, request())).end == "whole"


async def test_a_comment_that_finds_no_memory_goes_out_later(engine: Engine) -> None:
    listener = ShortListener(fileno=socket.create_server(("127.0.0.1", 0)).detach())
    async with (
        running_relay(engine.url, listener=listener, stream=StreamConfig(keepalive_comment_s=0.05)) as relay,
        await Client.connect(relay.port) as client,
    ):
        await client.send(request(sim_fault="stall-before-head"))
        await until(lambda: any(exchange.reply.is_early for exchange in relay.worker.service.active))
        (connection,) = relay.worker.connections
        connection.sock.fails = ""  # type: ignore[attr-defined]
        (exchange,) = relay.worker.service.active
        exchange.cut()
        answer = await client.answer()
        assert answer.payload.startswith(b": keep-alive\n\n")
        assert (await relay.record()).outcome == "RH"


async def test_a_unix_socket_whose_backlog_is_full_is_tried_again(tmp_path: Path, nursery: trio.Nursery) -> None:
    path = f"{tmp_path}/e"
    with socket.socket(socket.AF_UNIX) as full, socket.socket(socket.AF_UNIX) as filler:
        full.bind(path)
        full.listen(0)
        filler.connect(path)
        async with running_relay(f"unix:{path}", timeouts=TimeoutsConfig(connect_s=SHORT_S)) as relay:
            answer = await ask(relay.port, request())
            assert (answer.status, answer.error["code"]) == (504, "upstream_timeout")
            assert (await relay.record()).outcome == "uC"
        async with running_relay(f"unix:{path}") as relay, await Client.connect(relay.port) as client:
            await client.send(request())
            await until(lambda: any(exchange.phase.value == "C" for exchange in relay.worker.service.active))
            filler.close()
            listener = trio.SocketListener(trio.socket.from_stdlib_socket(full))
            nursery.start_soon(trio.serve_listeners, answer_once, [listener])
            assert (await client.answer()).payload == STREAM
            assert (await relay.record()).outcome == "--"
            nursery.cancel_scope.cancel()


async def answer_once(stream: trio.SocketStream) -> None:
    if await stream.receive_some():
        await stream.send_all(GOOD_ANSWER)


# -- names


class Resolver(trio.abc.HostnameResolver):
    """Names that do not resolve, or of which nothing is ever heard."""

    def __init__(self, error: int | None) -> None:
        self._error = error

    async def getaddrinfo(self, *_: Any, **__: Any) -> Any:
        if self._error is None:
            await trio.sleep_forever()
        raise socket.gaierror(self._error, "Name or service not known")

    async def getnameinfo(self, *_: Any) -> Any:
        raise NotImplementedError


@contextmanager
def resolving(error: int | None) -> Iterator[None]:
    before = trio.socket.set_custom_hostname_resolver(Resolver(error))
    try:
        yield
    finally:
        trio.socket.set_custom_hostname_resolver(before)


@pytest.mark.parametrize("error", [socket.EAI_NONAME, socket.EAI_AGAIN, socket.EAI_FAIL, socket.EAI_MEMORY])
async def test_a_name_that_does_not_resolve(engine: Engine, error: int) -> None:
    nowhere = "http://engine.invalid:8000"
    with resolving(error):
        async with running_relay(nowhere) as relay:
            answer = await ask(relay.port, request())
            assert (answer.status, answer.error["code"]) == (502, "upstream_error")
            assert "cannot connect to the engine: " in answer.error["message"]
            assert "engine.invalid" not in answer.error["message"]  # where engines are is not for clients
            record = await relay.record()
            assert (record.outcome, record.upstream) == ("UC", nowhere)
        pool = PoolConfig(upstreams=engines_of([nowhere, engine.url]), balance="round_robin")
        async with running_fleet(pool) as fleet:
            for _ in range(2):
                assert (await ask(fleet.port, request())).status == 200
            await fleet.record(2)
            assert sorted(record.attempts for record in fleet.records) == [1, 2]


async def test_a_name_server_that_does_not_answer() -> None:
    with resolving(None):
        async with running_relay("http://engine.invalid", timeouts=TimeoutsConfig(connect_s=SHORT_S)) as relay:
            answer = await ask(relay.port, request())
            assert (answer.status, answer.error["code"]) == (504, "upstream_timeout")
            assert (await relay.record()).outcome == "uC"


# -- clocks


@pytest.mark.parametrize("now", [1.0, 4e9], ids=["back to 1970", "forward by decades"])
async def test_a_clock_that_jumps_changes_dates_and_nothing_else(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, now: float
) -> None:
    year = b" 1970 " if now == 1.0 else b" 2096 "
    async with running_relay(engine.url, stream=StreamConfig(keepalive_comment_s=5.0)) as relay:
        async with await Client.connect(relay.port) as client:
            assert (await client.ask(request())).end == "whole"
            await client.send(request(sim_step_ms="20"))
            await client.frames(2)
            with monkeypatch.context() as patch:
                patch.setattr(time, "time", lambda: now)
                answer = await client.answer()
                assert (answer.end, len(answer.frames)) == ("whole", 8)
                after = await client.ask(request())
                await relay.record(3)
        assert year not in answer.head  # it left before
        assert year in after.head
        assert [record.outcome for record in relay.records] == ["--"] * 3
        assert [record.ts[:4].encode() in year for record in relay.records] == [False, True, True]
        for record in relay.records:
            times = (record.total_ms, record.ttft_ms, record.relay_ms, record.head_ms)
            assert all(each is not None and 0 <= each < 10_000 for each in times), times
        (upstream,) = relay.worker.service.fleet.upstreams
        assert engine.stats()["connections_accepted"] == 1  # the idle one was not taken for expired
        assert (upstream.idle, upstream.failures) == (1, 0)


# -- full disks


async def test_records_for_a_full_disk_are_dropped_and_counted(engine: Engine, tmp_path: Path) -> None:
    (tmp_path / "relay.out").symlink_to("/dev/full")
    with relay_child(tmp_path, engine.url, listen="127.0.0.1:0") as relay:
        for _ in range(3):
            assert (await ask(relay.port, request())).end == "whole"
        async with Client(await trio.open_unix_socket(f"{tmp_path}/admin")) as admin:
            scrape = await admin.ask(request("/metrics", method="GET"))
        assert b"\nrelay_records_dropped_total 3.0\n" in scrape.payload
        told = "relay: cannot write records to standard output: No space left on device; dropping them\n"
        assert relay.stop() == told


def test_a_daemon_that_can_write_nowhere_serves_and_ends_in_order(tmp_path: Path) -> None:
    where = ("--listen", f"unix:{tmp_path}/r", "--admin", "off", "--upstream", f"unix:{tmp_path}/e", "--workers", "1")
    with Path("/dev/full").open("wb") as full:
        process = subprocess.Popen([sys.executable, "-m", "relay", "serve", *where], stdout=full, stderr=full)
    with process:
        try:
            with socket.socket(socket.AF_UNIX) as client:
                give_up = time.monotonic() + START_S
                while client.connect_ex(f"{tmp_path}/r") and time.monotonic() < give_up:
                    time.sleep(0.02)
                client.settimeout(START_S)
                client.sendall(request("/-/live", method="GET"))
                assert client.recv(65536).startswith(b"HTTP/1.1 200 ")
            process.send_signal(signal.SIGTERM)
            assert process.wait(START_S) == 0
        finally:
            process.kill()


@changes_pump
async def test_what_cannot_be_said_ends_nothing(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault of the relay's own, and an accept that fails, while standard error is on a full disk."""
    feed = FrameRelay.feed

    def fail_on_the_marked(self: FrameRelay, data: bytes, view: memoryview, out: Pieces) -> None:
        if self.finder.frames and b"broken" in data:
            raise RuntimeError("a bug")
        feed(self, data, view, out)

    accept, failures = socket.socket.accept, [OSError(errno.EMFILE, "Too many open files")]

    def fail_once(self: socket.socket) -> Any:
        if failures and self is relay.worker.listeners.sockets[0]:
            raise failures.pop()
        return accept(self)

    monkeypatch.setattr(FrameRelay, "feed", fail_on_the_marked)
    monkeypatch.setattr(socket.socket, "accept", fail_once)
    with io.FileIO("/dev/full", "w") as full:
        stderr = io.TextIOWrapper(full, write_through=True)
        monkeypatch.setattr(sys, "stderr", stderr)
        async with running_relay(engine.url) as relay:
            broken = await ask(relay.port, request(x_request_id="broken", sim_step_ms="5"))
            assert broken.end == "fin"
            assert not failures
            assert (await ask(relay.port, request())).end == "whole"
            await relay.record(2)
            assert [record.outcome for record in relay.records] == ["RD", "--"]
        monkeypatch.undo()
        stderr.detach()


# -- stopped processes


async def test_an_engine_that_is_stopped(engine: Engine, tmp_path: Path) -> None:
    """In mid stream its silence ends the stream; before its answer, another engine gives one."""
    timeouts = TimeoutsConfig(first_token_s=SHORT_S, between_tokens_s=SHORT_S)
    with child(tmp_path, "relay_bench", "engine", "--listen", "127.0.0.1:0", "--step-ms", "10") as stopped:
        try:
            async with running_relay(stopped.address, timeouts=timeouts) as relay:
                async with await Client.connect(relay.port) as client:
                    await client.send(request(body={"max_tokens": 10_000}))
                    await client.frames(3)
                    os.kill(stopped.pid, signal.SIGSTOP)
                    answer = await client.answer()
                record = await relay.record()
                assert_cut_off(answer, "upstream_timeout", frames=record.frames)
                assert (record.outcome, record.status) == ("uD", 200)

            pool = PoolConfig(upstreams=engines_of([stopped.address, engine.url]), balance="round_robin")
            async with running_fleet(pool, timeouts=timeouts) as fleet:
                for _ in range(2):  # whoever's turn is first
                    assert (await ask(fleet.port, request())).end == "whole"
                await fleet.record(2)
                assert sorted(record.attempts for record in fleet.records) == [1, 2]
                assert {record.upstream for record in fleet.records} == {engine.url}

            health = HealthConfig(interval_s=0.05, failures=1)
            async with running_fleet(pool, timeouts=timeouts, health=health) as fleet:
                upstream = fleet.upstreams[stopped.address]
                await until(lambda: not upstream.health.is_up)
                os.kill(stopped.pid, signal.SIGCONT)
                await until(lambda: upstream.health.is_up)
        finally:
            os.kill(stopped.pid, signal.SIGCONT)


#: Reads an answer in small pieces, and says when it has begun.
READER: Final = """
import socket, sys
sock = socket.socket()
sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
sock.connect(("127.0.0.1", int(sys.argv[1])))
sock.sendall(sys.stdin.buffer.read())
sock.recv(1000)
print(flush=True)
while sock.recv(1000): pass
"""


async def test_a_client_that_is_stopped(engine: Engine) -> None:
    async with running_relay(engine.url, timeouts=TimeoutsConfig(client_stall_s=SHORT_S)) as relay:
        command = [sys.executable, "-S", "-c", READER, str(relay.port)]
        process = subprocess.Popen(  # noqa: ASYNC220 - which takes no time
            command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL
        )
        with process:
            assert process.stdin is not None
            process.stdin.write(request(body={"max_tokens": MANY_TOKENS}))
            process.stdin.close()
            await until(lambda: relay.worker.pump.frames > 0)
            process.send_signal(signal.SIGSTOP)
            record = await relay.record()
            assert (record.outcome, record.status) == ("cD", 200)
            await until(lambda: states(engine) == ["aborted"])
            process.kill()
