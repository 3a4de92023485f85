"""A reload: what is told of it, and what it does not hold up."""

from __future__ import annotations

import gc
import json
import os
import signal
import socket
import weakref
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from pathlib import Path

import msgspec
import pytest
import trio
import trio.testing

from relay.address import parse_address, parse_upstream
from relay.config import AuthConfig, Config, HealthConfig, KeyLimitsConfig, LimitsConfig, ListenConfig, PoolConfig
from relay.core.auth import keys_line
from relay.daemon import alone, crew, systemd
from relay.daemon.crew import Crew
from relay.daemon.listeners import Listeners
from relay.daemon.reload import ReloadBySignal, reload_and_tell
from relay.daemon.scoreboard import Scoreboard
from relay.daemon.supervisor import Supervisor
from relay.daemon.worker import Worker
from relay.errors import RateLimited
from relay.net.admin import Admin
from relay.net.guard import Guard
from relay.net.pump import Pump
from relay.net.roster import Roster
from relay.net.service import Service
from tests.daemon.shortage import descriptors_left
from tests.daemon.test_supervisor import Unforked
from tests.e2e.harness import until

CALM = HealthConfig(interval_s=0.0)
CONFIG = Config(pools=(PoolConfig(upstreams=(parse_upstream("http://127.0.0.1:9"),)),), health=CALM)
#: To take it on, the decoder's name is resolved.
NAMED = Config(
    pools=(
        PoolConfig(
            prefill=(parse_upstream("http://127.0.0.1:9"),),
            decode=(parse_upstream("http://decoder:9"),),
            connector="ascend_layerwise",
        ),
    ),
    health=CALM,
)


class Resolver(trio.abc.HostnameResolver):
    """One that answers when it may."""

    def __init__(self) -> None:
        self.is_asked = trio.Event()
        self.may_answer = trio.Event()

    async def getaddrinfo(self, *_: object, **__: object) -> list[object]:  # type: ignore[override]
        self.is_asked.set()
        await self.may_answer.wait()
        return [(socket.AF_INET, socket.SOCK_STREAM, 0, "", ("127.0.0.1", 9))]

    async def getnameinfo(self, *_: object, **__: object) -> tuple[str, str]:
        raise AssertionError


def supervisor_of(config: Config, load_config: Callable[[], Config] | None) -> Supervisor:
    guard, scoreboard, forker = Guard.read(config.auth), Scoreboard(64), Unforked()
    return Supervisor(config, guard, Listeners(), Listeners(), load_config, scoreboard, forker)  # type: ignore[arg-type]


@pytest.mark.parametrize("workers", [1, 2])
async def test_a_reload_that_takes_long_does_not_hold_up_a_stop(nursery: trio.Nursery, workers: int) -> None:
    resolver = Resolver()
    trio.socket.set_custom_hostname_resolver(resolver)

    async def signals() -> AsyncIterator[int]:
        yield signal.SIGHUP
        await resolver.is_asked.wait()
        yield signal.SIGTERM

    with trio.fail_after(2):
        if workers == 1:
            worker = Worker(CONFIG, Listeners(), lambda _: None, load_config=lambda: NAMED)
            await nursery.start(worker.run)
            await alone.obey(worker, signals(), nursery)
            assert not worker.service.is_ready
        else:
            supervisor = supervisor_of(CONFIG, lambda: NAMED)
            await supervisor.obey(signals(), nursery)
            assert not supervisor.service.is_ready
    nursery.cancel_scope.cancel()


async def test_a_reload_waits_for_the_start(
    nursery: trio.Nursery, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    resolver = Resolver()
    trio.socket.set_custom_hostname_resolver(resolver)
    changed = msgspec.structs.replace(CONFIG, listen=ListenConfig(addresses=(parse_address(f"unix:{tmp_path}/a"),)))
    worker = Worker(NAMED, Listeners(), lambda _: None, load_config=lambda: changed)

    async def signals() -> AsyncIterator[int]:
        await resolver.is_asked.wait()
        yield signal.SIGHUP
        await trio.testing.wait_all_tasks_blocked()
        assert capsys.readouterr().err == ""
        resolver.may_answer.set()

    nursery.start_soon(worker.run)
    with trio.fail_after(5):
        await alone.obey(worker, signals(), nursery)
        await until(lambda: (tmp_path / "a").is_socket())
    await trio.testing.wait_all_tasks_blocked()
    gone, *said = capsys.readouterr().err.splitlines()
    assert gone == "relay: pool default: out: http://decoder:9"
    assert said == [f"relay: listening on unix:{tmp_path}/a", "relay: reloaded"]
    nursery.cancel_scope.cancel()


async def test_a_reload_that_descriptors_are_short_for_changes_nothing(
    nursery: trio.Nursery, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "keys").write_text(keys_line("alice", b"alice-key") + "\n")
    auth = AuthConfig(keys_file=str(tmp_path / "keys"), limits={"alice": KeyLimitsConfig(max_in_flight=1)})
    listen = ListenConfig(addresses=(parse_address(f"unix:{tmp_path}/a"),))
    changed = msgspec.structs.replace(CONFIG, listen=listen, auth=auth)
    worker = Worker(CONFIG, Listeners(), lambda _: None, load_config=lambda: changed)
    await nursery.start(worker.run)
    told = "not reloaded: Too many open files"
    with descriptors_left(1), pytest.raises(ValueError, match=told):  # the limit of a key takes two
        await worker.reload()
    assert capsys.readouterr().err == f"relay: {told}\n"
    assert (worker.listeners.urls, worker.service.guard.limits, worker.service.config) == ([], {}, CONFIG)
    assert os.listdir(tmp_path) == ["keys"]
    assert await worker.reload() == ""
    alice = worker.service.keys.of("alice")
    visit = alice.enter(KeyLimitsConfig())
    with pytest.raises(RateLimited):
        alice.enter(KeyLimitsConfig())
    visit.end()
    nursery.cancel_scope.cancel()


@pytest.mark.parametrize("workers", [1, 2])
async def test_systemd_is_told_of_no_reload_before_the_service_is_ready_nor_while_it_drains(
    nursery: trio.Nursery, workers: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind("")  # autobind: the kernel picks an abstract name
        manager.setblocking(False)
        monkeypatch.setenv("NOTIFY_SOCKET", "@" + manager.getsockname()[1:].decode())

        async def signals() -> AsyncIterator[int]:
            for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGHUP):
                yield number
                await trio.testing.wait_all_tasks_blocked()

        if workers == 1:
            worker = Worker(CONFIG, Listeners(), lambda _: None)
            await nursery.start(worker.run)
            await alone.obey(worker, signals(), nursery)
        else:
            await supervisor_of(CONFIG, None).obey(signals(), nursery)
        nursery.cancel_scope.cancel()
        assert capsys.readouterr().err.count("not reloaded: ") == 2
        told = []
        with suppress(BlockingIOError):
            while True:
                told.append(manager.recv(1000).partition(b"\n")[0])
        assert [each for each in told if not each.startswith(b"EXTEND")] == [b"STOPPING=1"]


@pytest.mark.parametrize("ends_serving", [False, True])
async def test_a_reload_during_which_a_drain_begins_does_not_end_in_ready(
    ends_serving: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[str] = []
    monkeypatch.setattr(systemd, "notify", lambda *lines: sent.append(lines[0]))
    is_serving = True

    async def reload() -> str:
        nonlocal is_serving
        await trio.lowlevel.checkpoint()
        is_serving = ends_serving
        return ""

    await ReloadBySignal(reload, lambda: is_serving).run()
    assert sent == ["RELOADING=1", "READY=1"][: 1 + ends_serving]


async def test_systemd_is_told_of_two_reloads_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[str] = []
    monkeypatch.setattr(systemd, "notify", lambda *lines: sent.append(lines[0]))

    async def reload() -> str:
        sent.append("reload")
        await trio.testing.wait_all_tasks_blocked()
        if len(sent) < 3:
            raise ValueError("a reason")
        return ""

    by_signal = ReloadBySignal(reload, lambda: True)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(by_signal.run)
        nursery.start_soon(by_signal.run)
    assert sent == ["RELOADING=1", "reload", "READY=1"] * 2


async def test_a_reload_that_makes_room_for_bodies_lets_them_in(nursery: trio.Nursery) -> None:
    worker = Worker(CONFIG, Listeners(), lambda _: None)
    limit = worker.budget.limit
    assert worker.budget.take_now(limit)
    nursery.start_soon(worker.budget.take, 1000)
    await trio.testing.wait_all_tasks_blocked()
    assert worker.budget.used == limit
    limits = LimitsConfig(max_buffered_bytes=limit + 1000)
    worker.take_on(msgspec.structs.replace(CONFIG, limits=limits))
    await trio.testing.wait_all_tasks_blocked()
    assert worker.budget.used == limit + 1000
    nursery.cancel_scope.cancel()


async def test_a_worker_that_does_not_answer_is_told_of(
    nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The change was made all the same."""
    monkeypatch.setattr(crew, "ANSWER_S", 0.01)
    service = Service(CONFIG, Pump(), None)
    forker = Unforked()
    workers = Crew(service, Scoreboard(1), forker, Listeners())  # type: ignore[arg-type]
    nursery.start_soon(workers.run, lambda: 1, lambda: None)
    await trio.testing.wait_all_tasks_blocked()

    async def reload() -> str:
        await trio.lowlevel.checkpoint()
        return "a restart is needed for: admin.address"

    roster = Roster(service, workers.fleet_changed)
    admin = Admin(service, roster, lambda: reload_and_tell(reload, workers.settle), workers)
    unconfirmed = "not confirmed within 0.01 s by worker 1 (to begin)"
    got = await admin.answer(b"POST", b"/-/reload")
    assert (got.status, json.loads(got.body)) == (400, {"error": f"reloaded, but {unconfirmed}"})
    assert capsys.readouterr().err == f"relay: reloaded, but {unconfirmed}\n"
    for method, done in ((b"POST", "added"), (b"DELETE", "removed")):
        got = await admin.answer(method, b"/-/upstreams", b'{"url": "http://127.0.0.1:8"}')
        assert (got.status, json.loads(got.body)) == (400, {"error": f"{done}, but {unconfirmed}"})
    forker.ends[0].close()
    nursery.cancel_scope.cancel()


async def test_a_failed_reload_keeps_nothing() -> None:
    """Its error goes with the last reference, and with it the frames that hold the configuration."""

    class WrongError(ValueError):
        pass

    kept: list[weakref.ref[WrongError]] = []

    async def fail() -> str:
        await trio.lowlevel.checkpoint()
        try:
            raise WrongError("the file is wrong")
        except WrongError as error:
            kept.append(weakref.ref(error))
            raise

    gc.disable()
    try:
        for _ in range(3):
            with suppress(ValueError):
                await reload_and_tell(fail)
        assert [ref() for ref in kept] == [None] * 3
    finally:
        gc.enable()
