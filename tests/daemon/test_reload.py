"""A reload: what is told of it, and what it does not hold up."""

from __future__ import annotations

import json
import signal
from collections.abc import AsyncIterator

import pytest
import trio
import trio.testing

from relay.address import parse_upstream
from relay.config import Config, PoolConfig
from relay.daemon import alone, crew
from relay.daemon.crew import Crew
from relay.daemon.listeners import Listeners
from relay.daemon.reload import reload_and_tell
from relay.daemon.scoreboard import Scoreboard
from relay.daemon.supervisor import Supervisor
from relay.daemon.worker import Worker
from relay.net.admin import Admin
from relay.net.guard import Guard
from relay.net.pump import Pump
from relay.net.roster import Roster
from relay.net.service import Service
from tests.daemon.test_supervisor import Unforked

CONFIG = Config(pools=(PoolConfig(upstreams=(parse_upstream("http://127.0.0.1:9"),)),))
#: To take it on, the decoder's name is resolved.
NAMED = Config(
    pools=(
        PoolConfig(
            prefill=(parse_upstream("http://127.0.0.1:9"),),
            decode=(parse_upstream("http://decoder:9"),),
            connector="ascend_layerwise",
        ),
    )
)


class Resolver(trio.abc.HostnameResolver):
    """One that never answers."""

    def __init__(self) -> None:
        self.is_asked = trio.Event()

    async def getaddrinfo(self, *_: object, **__: object) -> list[object]:  # type: ignore[override]
        self.is_asked.set()
        await trio.sleep_forever()
        raise AssertionError

    async def getnameinfo(self, *_: object, **__: object) -> tuple[str, str]:
        raise AssertionError


def supervisor_of(config: Config) -> Supervisor:
    guard, scoreboard, forker = Guard.read(config.auth), Scoreboard(64), Unforked()
    return Supervisor(config, guard, Listeners(), Listeners(), lambda: NAMED, scoreboard, forker)  # type: ignore[arg-type]


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
            await alone.obey(worker, signals(), nursery)
            assert not worker.service.is_ready
        else:
            supervisor = supervisor_of(CONFIG)
            await supervisor.obey(signals(), nursery)
            assert not supervisor.service.is_ready
    nursery.cancel_scope.cancel()


async def test_a_worker_that_does_not_answer_is_told_of(
    nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The change was made all the same."""
    monkeypatch.setattr(crew, "ANSWER_S", 0.01)
    service = Service(CONFIG, Pump(), None)
    forker = Unforked()
    workers = Crew(service, Scoreboard(1), forker, Listeners())  # type: ignore[arg-type]
    nursery.start_soon(workers.run, 1, lambda: None)
    await trio.testing.wait_all_tasks_blocked()

    async def reload() -> str:
        await trio.lowlevel.checkpoint()
        return "a restart is needed for: admin.address"

    roster = Roster(service, workers.fleet_changed)
    admin = Admin(service, roster, lambda: reload_and_tell(reload, workers.settle), workers)
    unconfirmed = "not confirmed within 0.01 s by worker 1 (pid None)"
    got = await admin.answer(b"POST", b"/-/reload")
    assert (got.status, json.loads(got.body)) == (400, {"error": f"reloaded, but {unconfirmed}"})
    assert capsys.readouterr().err == f"relay: reloaded, but {unconfirmed}\n"
    for method, done in ((b"POST", "added"), (b"DELETE", "removed")):
        got = await admin.answer(method, b"/-/upstreams", b'{"url": "http://127.0.0.1:8"}')
        assert (got.status, json.loads(got.body)) == (400, {"error": f"{done}, but {unconfirmed}"})
    forker.ends[0].close()
    nursery.cancel_scope.cancel()
