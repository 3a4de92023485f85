"""The abuse drill's own judgement: a relay that says nothing, or next to nothing, keeps no promise."""

from __future__ import annotations

import os
import socket
import threading
import time
from contextlib import ExitStack, suppress
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
import trio
import trio.testing

from relay_bench.drill import abuse
from relay_bench.drill.attackers import Assault, Attack, Payload, Tally, Way
from relay_bench.drill.hangups import RESET
from relay_bench.drill.healthy import Healthy
from relay_bench.drill.report import Report
from relay_bench.drill.siege import Site

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    Handler = Callable[[Any], Awaitable[None]]

PATIENCE_S = 20.0
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n"
TOKEN = b'data: {"choices":[{"index":0,"delta":{"content":"a"}}]}\n\n'


@pytest.fixture
def address_of(nursery: trio.Nursery) -> Callable[..., Awaitable[Any]]:
    """Starts a server of one handler; its address."""

    async def start(handler: Callable[[trio.SocketStream], Awaitable[None]]) -> Any:
        listeners = await nursery.start(partial(trio.serve_tcp, handler, 0, host="127.0.0.1"))
        return listeners[0].socket.getsockname()

    return start


@pytest.fixture
def in_memory(nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch) -> Callable[[Handler], tuple[str, int]]:
    """Has clients reach a handler without the kernel: a clock that jumps does not know what that has under way."""

    def start(handler: Handler) -> tuple[str, int]:
        async def connect(*_: object) -> trio.abc.Stream:
            client, server = trio.testing.memory_stream_pair()
            nursery.start_soon(handler, server)
            await trio.lowlevel.checkpoint()
            return client

        monkeypatch.setattr(trio, "open_tcp_stream", connect)
        return "memory", 0

    return start


class Besiegers:
    """Attackers without a process of their own."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery

    async def begin(self, attack: Attack) -> None:
        self._assault = Assault(attack)
        self._ended = trio.Event()
        self._nursery.start_soon(self._attack)

    async def _attack(self) -> None:
        await self._assault.run()
        self._ended.set()

    async def end(self, patience_s: float) -> Tally:
        self._assault.over.set()
        await self._ended.wait()
        return self._assault.tally


def site_at(address: Any, nursery: trio.Nursery, report: Report, **changes: Any) -> Site:
    """A site whose relay is this very process."""
    relay: Any = SimpleNamespace(address=address, process=SimpleNamespace(pid=os.getpid()), descriptors=lambda: 0)
    plan = msgspec.structs.replace(abuse.QUICK, **changes)
    besiegers: Any = Besiegers(nursery)
    return Site(report, relay, [], Healthy(address, 1), besiegers, plan)


async def test_silence_is_no_answer(address_of: Callable[..., Awaitable[Any]], nursery: trio.Nursery) -> None:
    async def say_nothing(stream: trio.SocketStream) -> None:
        async for _ in stream:
            pass

    report = Report("abuse")
    site = site_at(await address_of(say_nothing), nursery, report, bombs=3, limit_s=0.1, patience_s=0.9, window_s=0.1)
    await abuse._bombs(site, "bombs", (Payload(b"x"),), ("431",), 0, "nothing")
    assert "bombs: told 431" in report.broken
    tally = site.tallies["bombs"]
    assert tally.answers == {"silence": tally.begun}
    assert any(promise.seen == f"told {tally.told}" for promise in report.promises)


async def _live(stream: trio.SocketStream) -> None:
    if b"/-/live" in await stream.receive_some():
        await stream.send_all(b"HTTP/1.1 200 OK\r\n\r\n")


async def _tell_503(stream: trio.SocketStream) -> None:
    await stream.send_all(b"HTTP/1.1 503 Service Unavailable\r\n\r\n")


async def _reset(stream: trio.SocketStream) -> None:
    stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    await trio.lowlevel.checkpoint()


async def _close(stream: trio.SocketStream) -> None:
    pass


@pytest.mark.parametrize(("handler", "told"), [(_live, ""), (_tell_503, "503"), (_close, "closed"), (_reset, "reset")])
async def test_who_comes_and_goes_looks_whether_it_is_let_in(
    address_of: Callable[..., Awaitable[Any]],
    nursery: trio.Nursery,
    handler: Callable[[trio.SocketStream], Awaitable[None]],
    told: str,
) -> None:
    async def serve(stream: trio.SocketStream) -> None:
        with suppress(trio.BrokenResourceError):
            await handler(stream)

    report = Report("abuse")
    await abuse.churn(site_at(await address_of(serve), nursery, report, window_s=0.1))
    (promise,) = (promise for promise in report.promises if promise.text == "connection churn: none is refused")
    assert promise.is_kept is not bool(told)
    assert told in promise.seen


async def test_attackers_come_again(
    address_of: Callable[..., Awaitable[Any]], nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whom the relay has closed is back at once, for as long as the window lasts."""
    present: list[int] = []
    here = 0
    all_here, often_enough = trio.Event(), trio.Event()

    async def refuse(stream: trio.SocketStream) -> None:
        nonlocal here
        here += 1
        present.append(here)
        if here == 3:
            all_here.set()
        if len(present) == 30:
            often_enough.set()
        await stream.receive_some()
        await all_here.wait()
        here -= 1
        with suppress(trio.BrokenResourceError):
            await stream.send_all(b"HTTP/1.1 408 Request Timeout\r\n\r\n")

    async def window(seconds: float) -> float:
        with trio.fail_after(PATIENCE_S):
            await often_enough.wait()
        return 0.0

    report = Report("abuse")
    site = site_at(await address_of(refuse), nursery, report, slowloris=3)
    monkeypatch.setattr(site.healthy, "p99_ms", window)
    await abuse.slow_heads(site)
    assert "slowloris on the head: told 408" not in report.broken
    ((name, came),) = report.figures
    assert (name, came.partition(";")[0]) == ("slowloris on the head", f"{len(present)} came, 3 at a time")
    assert len(present) >= 30
    assert max(present) == 3


async def test_a_pause_of_the_attack_is_told(
    address_of: Callable[..., Awaitable[Any]], nursery: trio.Nursery, mock_clock: trio.testing.MockClock
) -> None:
    """The clock jumps where it is told to, and not before all are connected."""
    has_come = trio.Event()
    mock_clock.rate = 1.0

    async def stay(stream: trio.SocketStream) -> None:
        await stream.receive_some()
        has_come.set()
        await trio.sleep_forever()

    address = await address_of(stay)
    assault = Assault(Attack(way=Way.ASK, address=address, clients=1, payloads=(Payload(b"x"),), patience_s=10_000))
    mock_clock.jump(700)
    nursery.start_soon(assault.run)
    with trio.fail_after(PATIENCE_S):
        await has_come.wait()
    mock_clock.jump(300)
    assault.over.set()
    await trio.testing.wait_all_tasks_blocked()
    assert assault.tally.begun == 1
    assert 700 <= assault.tally.lull_s <= 700 + PATIENCE_S


async def test_one_gap_is_enough_to_know_it(
    in_memory: Callable[[Handler], tuple[str, int]], nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    """A relay that freezes leaves few gaps to judge by."""

    async def freeze(stream: trio.abc.Stream) -> None:
        await stream.receive_some()
        await stream.send_all(HEAD + TOKEN)
        await trio.sleep(1)
        await stream.send_all(TOKEN)
        await trio.sleep_forever()

    healthy = Healthy(in_memory(freeze), 5)
    nursery.start_soon(healthy.run, 1)
    assert await healthy.p99_ms(100) > 0
    assert await healthy.p99_ms(100) == 0


async def test_a_stream_that_stands_still_is_seen_before_it_goes_on(
    in_memory: Callable[[Handler], tuple[str, int]], nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    """One freeze is one gap of a stream's many, and may be under way when the window ends."""

    async def freeze(stream: trio.abc.Stream) -> None:
        await stream.receive_some()
        await stream.send_all(HEAD + TOKEN)
        for pause_s in [0.1] * 100 + [3.0] + [0.1] * 100 + [30.0]:
            await trio.sleep(pause_s)
            await stream.send_all(TOKEN)
        await trio.sleep_forever()

    healthy = Healthy(in_memory(freeze), 300)
    nursery.start_soon(healthy.run, 1)
    await trio.sleep(1)
    assert healthy.largest_ms() == pytest.approx(100)
    assert await healthy.p99_ms(21.5) == pytest.approx(100)
    assert healthy.largest_ms() == pytest.approx(3000)
    assert healthy.largest_ms() < 200  # it is told once
    await trio.sleep(10)
    assert 9_000 < healthy.largest_ms() < 11_000
    await trio.sleep(100)
    assert healthy.largest_ms() > 60_000


async def test_one_freeze_breaks_a_promise(nursery: trio.Nursery) -> None:
    report = Report("abuse")
    site = site_at(("127.0.0.1", 9), nursery, report)
    site.largest_ms = 60.0
    await trio.lowlevel.checkpoint()
    for largest_ms, is_kept in ((999.0, True), (1001.0, False)):
        site.healthy._largest_ms = largest_ms
        site.judge_largest(str(largest_ms))
        assert report.promises[-1].is_kept is is_kept


async def test_an_answer_that_never_begins_is_a_gap(
    in_memory: Callable[[Handler], tuple[str, int]], nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    async def say_nothing(stream: trio.abc.Stream) -> None:
        await trio.sleep_forever()

    healthy = Healthy(in_memory(say_nothing), 200)
    nursery.start_soon(healthy.run, 1)
    await trio.sleep(5)
    assert healthy.largest_ms() == pytest.approx(5000)


@pytest.mark.parametrize(
    ("outcomes", "answers", "is_kept"),
    [
        (["CD"] * 3, {}, True),
        (["CD"] * 4, {}, True),
        (["CD"] * 2, {}, False),  # fewer than were to come
        ([], {}, False),
        (["CD", "CD", "UD"], {}, False),
        (["CD"] * 3, {"503": 1}, False),
        (["CD"] * 3, {"closed": 1}, False),
        (["CD"] * 3, {"not connected": 1}, False),
    ],
)
def test_slow_readers_are_all_let_in_and_stay(outcomes: list[str], answers: dict[str, int], is_kept: bool) -> None:
    records = [{"id": "slow", "outcome": outcome} for outcome in outcomes]
    report = Report("abuse")
    abuse._judge_slow_readers(report, [*records, {"id": "healthy-1", "outcome": "--"}], 3, Tally(answers=answers))
    assert report.promises[0].text == "slow readers: none is cut off"
    assert report.is_kept is is_kept


async def test_a_slow_reader_that_gets_another_answer_is_refused(
    address_of: Callable[..., Awaitable[Any]], nursery: trio.Nursery
) -> None:
    has_left = trio.Event()

    async def refuse(stream: trio.SocketStream) -> None:
        with suppress(trio.BrokenResourceError):  # it has come again, and all is over
            await stream.receive_some()
            await _tell_503(stream)
            assert not await stream.receive_some()
            has_left.set()

    address = await address_of(refuse)
    assault = Assault(Attack(way=Way.SIP, address=address, clients=1, payloads=(Payload(b"x"),)))
    nursery.start_soon(assault.run)
    with trio.fail_after(PATIENCE_S):
        await has_left.wait()
    assault.over.set()
    assert assault.tally.answers.keys() == {"503"}


async def test_who_cannot_connect_gives_up() -> None:
    """Where the backlog is full, the kernel does not say so."""
    with ExitStack() as kept:
        listener = kept.enter_context(socket.create_server(("127.0.0.1", 0), backlog=1))
        for _ in range(4):
            filler = kept.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(listener.getsockname())
        attack = Attack(
            way=Way.ASK, address=listener.getsockname(), clients=2, payloads=(Payload(b"x"),), patience_s=0.1
        )
        assault = Assault(attack)
        with trio.fail_after(PATIENCE_S):
            async with trio.open_nursery() as attackers:
                attackers.start_soon(assault.run)
                await trio.testing.wait_all_tasks_blocked()
                assault.over.set()
        assert assault.tally.answers.keys() == {"not connected"}


async def test_an_answer_is_timed_as_it_comes_not_as_it_is_read() -> None:
    """The attackers' process has the lowest priority."""
    may_answer, has_answered = threading.Event(), threading.Event()

    def answer(listener: socket.socket) -> None:
        sock, _ = listener.accept()
        with sock:
            sock.recv(1000)
            assert may_answer.wait(PATIENCE_S)
            sock.sendall(b"HTTP/1.1 408 Request Timeout\r\n\r\n")
            has_answered.set()
            sock.recv(1000)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(PATIENCE_S)
        attack = Attack(way=Way.DRIP, address=listener.getsockname(), clients=1, payloads=(Payload(b"x"),), every_s=100)
        assault = Assault(attack)
        began = time.monotonic()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.to_thread.run_sync, answer, listener)
            nursery.start_soon(assault.run)
            with trio.fail_after(PATIENCE_S):
                while not assault.tally.begun:
                    await trio.testing.wait_all_tasks_blocked(0.01)
            assault.over.set()
            may_answer.set()
            assert has_answered.wait(PATIENCE_S)
            took_s = time.monotonic() - began
            time.sleep(0.5)  # noqa: ASYNC251 — nobody has a turn
    assert assault.tally.answers == {"408": 1}
    assert assault.tally.longest_s < took_s + 0.1


class _Engine:
    def __init__(self, connections: int) -> None:
        self._connections = connections

    async def counts(self) -> dict[str, int]:
        return {"connections_open": self._connections + 1}  # and who asks


@pytest.mark.parametrize(("clients", "is_kept"), [(500, True), (502, True), (503, False)])
async def test_connections_to_engines_take_no_clients_place(clients: int, is_kept: bool) -> None:
    """Those in use, kept or probing, however many."""
    report = Report("abuse")
    relay: Any = SimpleNamespace(descriptors=lambda: 7 + 100 + 40 + clients)
    engines: Any = [_Engine(100), _Engine(40)]
    nobody: Any = None
    site = Site(report, relay, engines, nobody, nobody, abuse.QUICK, at_rest=7)
    assert await site.clients() == clients
    abuse._judge_open(site, "idle connections", clients)
    assert report.is_kept is is_kept
