"""Accepting when descriptors have run out, and clients that leave before they are accepted."""

from __future__ import annotations

import errno
import os
import resource
import select
import signal
import socket
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
import trio

from relay_bench.engine import Engine
from tests.conftest import running_relay
from tests.e2e.children import Child, relay_child
from tests.e2e.harness import Client, ask, request, states, until

#: Descriptors a relay is left with beyond those in use.
SPARE = 8


def descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def leave_descriptors(relay: Child, number: int) -> None:
    """Lowers the limit of a running relay."""
    limit = max(int(name) for name in os.listdir(f"/proc/{relay.pid}/fd")) + 1 + number
    resource.prlimit(relay.pid, resource.RLIMIT_NOFILE, (limit, limit))


def no_descriptors(line: str) -> bool:
    return line.startswith(f"relay: cannot accept: {os.strerror(errno.EMFILE)}")


async def test_without_descriptors_streams_go_on_and_new_clients_wait(engine: Engine, tmp_path: Path) -> None:
    live = request("/-/live", method="GET")
    with relay_child(tmp_path, engine.url, listen="127.0.0.1:0") as relay:
        async with await Client.connect(relay.port) as streaming, AsyncExitStack() as clients:
            await streaming.send(request(body={"max_tokens": 60}, sim_step_ms="20"))
            await streaming.frames(1)
            leave_descriptors(relay, SPARE)
            accepted = [await clients.enter_async_context(await Client.connect(relay.port)) for _ in range(SPARE)]
            waiting = [await clients.enter_async_context(await Client.connect(relay.port)) for _ in range(SPARE)]
            assert no_descriptors(await trio.to_thread.run_sync(relay.line))

            frames = (await streaming.frames(1)).count(b"\n\n")
            await streaming.frames(frames + 5)
            for client in accepted:
                assert (await client.ask(live)).status == 200
            # There is none for a connection to the engine either, which is an answer and not the end.
            refused = await accepted[0].ask(request())
            assert (refused.status, refused.end) == (503, "whole")

            await waiting[0].send(live)
            for client in accepted:
                client.leave("close")
            for client in waiting:
                answer = await (client.answer() if client is waiting[0] else client.ask(live))
                assert answer.status == 200
            answer = await streaming.answer()
            assert (answer.status, answer.end, len(answer.frames)) == (200, "whole", 62)
        assert (await ask(relay.port, request())).status == 200
        assert all(map(no_descriptors, relay.stop().splitlines(keepends=True)))


async def test_a_relay_without_descriptors_ends_in_order(engine: Engine, tmp_path: Path) -> None:
    with relay_child(tmp_path, engine.url, listen="127.0.0.1:0") as relay:
        async with AsyncExitStack() as clients:
            leave_descriptors(relay, SPARE)
            for _ in range(2 * SPARE):
                await clients.enter_async_context(await Client.connect(relay.port))
            assert no_descriptors(await trio.to_thread.run_sync(relay.line))
            assert all(map(no_descriptors, relay.stop().splitlines(keepends=True)))


async def test_clients_that_left_before_they_were_accepted_cost_nothing(engine: Engine, tmp_path: Path) -> None:
    with relay_child(tmp_path, engine.url, listen="127.0.0.1:0") as relay:
        before = descriptors(relay.pid)
        relay.process.send_signal(signal.SIGSTOP)
        for number in range(60):
            async with await Client.connect(relay.port) as client:
                if number % 2:
                    await client.send(request())
                client.leave("rst" if number % 3 else "close")
        relay.process.send_signal(signal.SIGCONT)
        assert (await ask(relay.port, request())).status == 200
        await until(lambda: "running" not in states(engine) and engine.stats()["connections_open"] <= 1)
        await until(lambda: descriptors(relay.pid) <= before + 1)  # an idle connection to the engine
        assert relay.stop() == ""


class Refusing(socket.socket):
    """A listener whose first attempts to accept fail."""

    failures: list[int]

    def accept(self) -> tuple[socket.socket, object]:
        if self.failures:
            number = self.failures.pop()
            raise OSError(number, os.strerror(number))
        return super().accept()


@pytest.mark.parametrize(
    "number",
    [
        errno.ECONNABORTED,
        errno.EMFILE,
        errno.ENFILE,
        errno.ENOBUFS,
        errno.ENOMEM,
        # accept(2): on Linux, errors of the new connection that are to be treated like EAGAIN
        errno.EPROTO,
        errno.ENETDOWN,
        errno.EHOSTUNREACH,
    ],
    ids=errno.errorcode.get,
)
async def test_accepting_survives(engine: Engine, number: int, capsys: pytest.CaptureFixture[str]) -> None:
    listener = Refusing(fileno=socket.create_server(("127.0.0.1", 0)).detach())
    listener.failures = [number] * 2
    async with running_relay(engine.url, listener=listener) as relay:
        assert (await ask(relay.port, request())).status == 200
        assert not listener.failures
    assert ("cannot accept" in capsys.readouterr().err) == (number != errno.ECONNABORTED)


class FullEpoll:
    """Takes sockets as it is told, and then all."""

    def __init__(self, real: select.epoll, number: int, *takes: bool) -> None:
        self._real = real
        self._number = number
        self._takes = [*takes]

    def __getattr__(self, name: str) -> object:
        return getattr(self._real, name)

    def register(self, fd: int, events: int) -> None:
        if self._takes and not self._takes.pop(0):
            raise OSError(self._number, os.strerror(self._number))
        self._real.register(fd, events)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.ENOMEM], ids=errno.errorcode.get)
async def test_an_epoll_that_takes_no_more_costs_connections_and_not_the_worker(
    engine: Engine, number: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """epoll_ctl(2): there is no memory, or /proc/sys/fs/epoll/max_user_watches is reached."""
    async with running_relay(engine.url) as relay:
        pump: Any = relay.worker.pump
        pump.epoll = FullEpoll(pump.epoll, number, False, True, False)
        async with await Client.connect(relay.port) as client:
            assert await client.is_closed()
        assert "cannot accept" in capsys.readouterr().err
        refused = await ask(relay.port, request())  # its engine's connection is the second that is not taken
        assert (refused.status, "short of resources" in refused.error["message"]) == (503, True)
        assert (await ask(relay.port, request())).status == 200
