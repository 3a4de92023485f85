"""An exchange interrupted at each place where it waits: nothing is left behind, and the next one is served.

How often the exchange waits is counted, whether its task steps it or the pump, and it is interrupted at the k-th time;
k goes up from 1 until an exchange ends before its turn comes. So every wait of every kind of exchange is met, also
those nobody thought of.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Final, Literal, TypeAlias, get_args

import pytest
import trio

from relay.config import StreamConfig, TimeoutsConfig
from relay.errors import Phase
from relay.net.exchange import Exchange
from relay.net.fiber import Fiber, current
from relay.net.pump import Pump
from relay_bench.engine import Engine
from tests.conftest import RunningRelay, changes_pump, running_relay
from tests.e2e.fleet import FakeEngine, RunningFleet, close_kept, fakes, pool_of, running_fleet
from tests.e2e.harness import (
    GOOD_ANSWER,
    UNAVAILABLE,
    Answer,
    Client,
    ask,
    error_frames,
    nothing_unreachable,
    request,
    until,
)
from tests.e2e.secure import Authority, behind_tls

#: Draining that has no more time; a client that closes, or resets, its connection.
How: TypeAlias = Literal["cut", "close", "rst"]
#: While the task waits; or once it has been woken and before it runs, so that both reasons meet.
When: TypeAlias = Literal["waiting", "woken"]
#: Request ids of other clients, whose exchanges are not interrupted.
BYSTANDERS: Final = ("first", "next")
#: No connection to an engine is closed for its age.
AGELESS: Final = TimeoutsConfig(upstream_idle_s=0.0)
#: No exchange here waits so often.
MOST_WAITS: Final = 60

really_resume: Final = Fiber.resume

pytestmark = changes_pump


class Interruption(trio.abc.Instrument):
    """Strikes at the `at`-th wait of the exchanges that are under way while it is installed."""

    def __init__(self, at: int, when: When, strike: Callable[[Exchange], None]) -> None:
        self.begun = 0  #: exchanges
        self.waits = 0
        self.has_struck = False
        self._at = at
        self._when = when
        self._strike = strike
        self._running: dict[trio.lowlevel.Task, Exchange] = {}

    @contextmanager
    def around(self, exchange: Exchange) -> Iterator[None]:
        fiber = current.fiber
        task = (fiber and fiber.task) or trio.lowlevel.current_task()
        self.begun += 1
        self._running[task] = exchange
        try:
            yield
        finally:
            del self._running[task]

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        if task in self._running:
            self.waits += 1
            self._reach(task, "waiting")

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        if task in self._running:
            self._reach(task, "woken")

    def resume(self, fiber: Fiber, error: Exception | None) -> None:
        """In the place of the fiber's own."""
        task = None if fiber.pins else fiber.task  # else its task goes on, as seen above
        if task is not None and task in self._running:
            self._reach(task, "woken")
        really_resume(fiber, error)
        if task is not None and task in self._running:
            self.waits += 1
            self._reach(task, "waiting")

    def _reach(self, task: trio.lowlevel.Task, when: When) -> None:
        if when == self._when and self.waits == self._at and not self.has_struck:
            self.has_struck = True
            self._strike(self._running[task])


@asynccontextmanager
async def interrupting(at: int, how: How, when: When, client: Client) -> AsyncIterator[Interruption]:
    """Interrupts the exchanges of `client` that run in the block."""

    def strike(exchange: Exchange) -> None:
        if how == "cut":
            exchange.cut()
        elif client.stream.socket.fileno() >= 0:  # it has not left at its end
            client.leave(how)

    interruption = Interruption(at, when, strike)
    run = Exchange.run

    async def watched(self: Exchange) -> bool:
        if self.id in BYSTANDERS:
            return await run(self)
        with interruption.around(self):
            return await run(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Exchange, "run", watched)
        patch.setattr(Fiber, "resume", lambda fiber, error: interruption.resume(fiber, error))
        trio.lowlevel.add_instrument(interruption)
        try:
            yield interruption
        finally:
            trio.lowlevel.remove_instrument(interruption)


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


class EngineView:
    """How many connections an engine has, and how many requests it works on."""

    def __init__(self, stats: Callable[[], dict[str, int]]) -> None:
        self._stats = stats

    @property
    def connections(self) -> int:
        return self._stats()["connections_open"]

    @property
    def running(self) -> int:
        stats = self._stats()
        return stats["running"] + stats["queued"]


def number_kept(relay: RunningRelay) -> int:
    """Connections to engines that wait for another exchange."""
    return sum(upstream.idle for upstream in relay.worker.service.fleet.upstreams)


async def at_rest(relay: RunningRelay, engine: EngineView, before: int = 0) -> int:
    """Waits until nothing is open but what was `before`; answers how many descriptors that is.

    What engines have open until then is what is kept for other exchanges: what was cut short has been closed at once.
    """
    service = relay.worker.service
    await until(lambda: not relay.worker.connections and not service.drains.running)
    kept = number_kept(relay)
    await until(lambda: engine.connections == kept)
    await until(lambda: engine.running == 0)  # nor does it go on with what nobody will read
    assert number_kept(relay) == kept
    await close_kept(relay.worker)
    await until(lambda: engine.connections == 0)
    if before:
        await until(lambda: descriptors() <= before)  # the engine may still be accepting, and closing, what is gone
    return descriptors()


class Scenario:
    """Requests on one connection, and what the last comes to if nothing interrupts it."""

    def __init__(self, *requests: bytes, outcome: str = "--", waits: int = 3) -> None:
        self.requests = requests
        self.outcome = outcome
        self.waits = waits  #: at the least

    async def play(self, client: Client, how: How) -> list[Answer]:
        answers: list[Answer] = []
        try:
            for data in self.requests:
                answers.append(await client.ask(data))
                if answers[-1].end != "whole" or answers[-1].headers.get("connection") == "close":
                    break
        except (trio.ClosedResourceError, trio.BrokenResourceError):
            assert how != "cut"
        return answers


async def interrupt_everywhere(
    relay: RunningRelay, engine: EngineView, scenario: Scenario, how: How, when: When
) -> int:
    """Plays it again and again, interrupted one wait later each time; answers how many waits there are."""
    service, pump = relay.worker.service, relay.worker.pump
    assert (await ask(relay.port, request())).end == "whole"
    before = await at_rest(relay, engine)
    for at in range(1, MOST_WAITS):
        written = len(relay.records)
        with nothing_unreachable():
            async with await Client.connect(relay.port, receive_buffer=16_384) as client:
                async with interrupting(at, how, when, client) as interruption:
                    answers = await scenario.play(client, how)
                    await until(lambda: not service.active)
                    client.leave("close")
                    await until(lambda: not relay.worker.connections)  # nor any request of this client still unread
            await at_rest(relay, engine, before)
        assert all(upstream.outstanding == 0 for upstream in service.fleet.upstreams), at
        assert repr(pump).startswith("<Pump pairs=0 streaming=0 "), at
        assert engine.running == 0, at
        assert all((pool.in_flight, pool.queued) == (0, 0) for pool in service.fleet.pools), at
        assert relay.worker.budget.used == 0, at

        records = [record for record in relay.records[written:] if record.id not in BYSTANDERS]
        assert len(records) == interruption.begun, at
        *others, outcome = [record.outcome for record in records]
        assert all(each == "--" for each in others), at
        if interruption.has_struck and outcome != scenario.outcome:
            assert outcome[0] == ("R" if how == "cut" else "C"), (at, outcome)
            if how == "cut":
                assert_told_of_draining(answers[-1])
        elif outcome == "--":  # then its answer had gone out before
            assert records[-1].status == 200, at
            assert how != "cut" or answers[len(records) - 1].end == "whole", at

        following = await ask(relay.port, request())
        assert (following.status, following.end) == (200, "whole"), at
        await at_rest(relay, engine, before)
        if not interruption.has_struck:
            assert outcome == scenario.outcome
            assert {answer.end for answer in answers} == {"whole" if outcome == "--" else "fin"}
            return interruption.waits
    raise AssertionError("the exchange never ended by itself")


def assert_told_of_draining(answer: Answer) -> None:
    """What the client of an exchange that was cut gets: an error while one can be said, and no end like a good one."""
    if answer.status == 503:
        assert (answer.end, answer.error["code"]) == ("whole", "draining")
        return
    assert answer.end == "fin"
    if answer.rest:  # half a frame, behind which nothing can be said
        assert b'"error":' not in answer.rest
    elif answer.headers["content-type"].startswith("text/event-stream"):
        assert error_frames(answer) == answer.frames[-1:]


STREAM: Final = request(body={"max_tokens": 3}, sim_step_ms="1")
SCENARIOS: Final = {
    "stream": Scenario(STREAM),
    "json": Scenario(request(body={"stream": False, "max_tokens": 3}, sim_step_ms="1")),
    "two on a connection": Scenario(STREAM, STREAM, waits=5),
    "large request": Scenario(request(body={"messages": [{"role": "user", "content": "x" * 4_000_000}]})),
    "interim answer": Scenario(request(sim_fault="1xx")),
    "engine that dies": Scenario(request(sim_fault="die-after:2"), outcome="UD"),
    "slow client": Scenario(request(sim_fault="huge-frame:100000"), waits=6),
}


@pytest.mark.usefixtures("pump_form")
@pytest.mark.parametrize("when", get_args(When))
@pytest.mark.parametrize("how", get_args(How))
@pytest.mark.parametrize("scenario", SCENARIOS.values(), ids=SCENARIOS)
async def test_an_exchange(engine: Engine, scenario: Scenario, how: How, when: When) -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # a large frame is more than goes out at once
    async with running_relay(engine.url, listener=listener, timeouts=AGELESS) as relay:
        assert await interrupt_everywhere(relay, EngineView(engine.stats), scenario, how, when) >= scenario.waits


#: Answers that change on their way, or are spoken to before they begin.
CHANGED: Final = {
    "forced": (StreamConfig(force_stream=True), request(body={"stream": False, "max_tokens": 3}, sim_step_ms="1")),
    "usage hidden": (StreamConfig(include_usage="always"), STREAM),
    "comments first": (StreamConfig(keepalive_comment_s=0.002), request(body={"max_tokens": 3}, sim_ttft_ms="20")),
}


@pytest.mark.parametrize("when", get_args(When))
@pytest.mark.parametrize("how", get_args(How))
@pytest.mark.parametrize(("stream", "data"), CHANGED.values(), ids=CHANGED)
async def test_an_exchange_that_changes_its_answer(
    engine: Engine, stream: StreamConfig, data: bytes, how: How, when: When, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("relay.daemon.worker.Pump", partial(Pump, sweep_s=0.002))  # so often are comments looked for
    async with running_relay(engine.url, stream=stream, timeouts=AGELESS) as relay:
        assert await interrupt_everywhere(relay, EngineView(engine.stats), Scenario(data), how, when) >= 3


class Attempts:
    """An engine at two addresses that fails each first attempt, and answers the second."""

    def __init__(self, first: bytes) -> None:
        self._first = first
        self._connections = 0

    def stats(self) -> dict[str, int]:
        return {"connections_open": self._connections, "running": 0, "queued": 0}

    async def serve(self, stream: trio.SocketStream) -> None:
        self._connections += 1
        received = b""
        with suppress(trio.BrokenResourceError):
            async for data in stream:
                received += data
                head, blank, body = received.partition(b"\r\n\r\n")
                match = re.search(rb"(?i)\r\ncontent-length: *(\d+)", head)
                if not blank or match is None or len(body) < int(match[1]):
                    continue
                received = b""
                is_second = re.search(rb"(?im)^x-request-id: .*-2\r?$", head)
                if not is_second and not self._first:
                    break
                await stream.send_all(GOOD_ANSWER if is_second else self._first)
        self._connections -= 1


@pytest.mark.usefixtures("pump_form")
@pytest.mark.parametrize("when", get_args(When))
@pytest.mark.parametrize("how", get_args(How))
@pytest.mark.parametrize("first", [UNAVAILABLE, b""], ids=["refused", "died"])
async def test_failing_over(first: bytes, how: How, when: When) -> None:
    attempts = Attempts(first)
    async with trio.open_nursery() as nursery:
        listeners = [listener for _ in range(2) for listener in await trio.open_tcp_listeners(0, host="127.0.0.1")]
        await nursery.start(trio.serve_listeners, attempts.serve, listeners)
        urls = [f"http://127.0.0.1:{listener.socket.getsockname()[1]}" for listener in listeners]
        async with running_relay(*urls, timeouts=AGELESS) as relay:
            waits = await interrupt_everywhere(relay, EngineView(attempts.stats), Scenario(request()), how, when)
            assert waits >= 5
            assert relay.records[-1].attempts == 2
        nursery.cancel_scope.cancel()


class Queued(Scenario):
    """A request that waits for the one place there is, which it, or who is behind it in the queue, then gets."""

    def __init__(self, relay: RunningFleet, engine: FakeEngine) -> None:
        super().__init__(request(x_request_id="own"))
        self._relay = relay
        self._engine = engine

    async def play(self, client: Client, how: How) -> list[Answer]:
        relay, engine = self._relay, self._engine
        answers: list[Answer] = []
        is_over = False

        async def wait_for_it() -> None:
            nonlocal is_over
            answers.extend(await super(Queued, self).play(client, how))
            is_over = True

        async def join_queue(name: str) -> None:
            await until(lambda: name in self._queue or (name == "own" and is_over))

        async with await Client.connect(relay.port) as first, await Client.connect(relay.port) as behind:
            engine.hold()
            number = len(engine.asked)
            await first.send(request(x_request_id="first"))
            await until(lambda: len(engine.asked) > number)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(wait_for_it)
                await join_queue("own")
                await behind.send(request(x_request_id="next"))
                await join_queue("next")
                engine.gate.set()
                for other in (first, behind):
                    served = await other.answer()
                    assert (served.status, served.end) == (200, "whole")
        return answers

    @property
    def _queue(self) -> set[str]:
        """The ids of those that wait; none while one is just joining them, or leaving."""
        service = self._relay.worker.service
        found = {exchange.id for exchange in service.active if exchange.phase is Phase.QUEUE}
        return found if len(found) == self._relay.queued else set()


@pytest.mark.parametrize("when", get_args(When))
@pytest.mark.parametrize("how", get_args(How))
async def test_waiting_in_the_queue(how: How, when: When) -> None:
    """Its place is given back, or never taken, and who is next in line is served."""
    async with (
        fakes("tiny") as (engine,),
        running_fleet(pool_of(engine.url, max_in_flight=1, max_queue=2), timeouts=AGELESS) as relay,
    ):
        view = EngineView(lambda: {"connections_open": engine.connections, "running": 0, "queued": 0})
        scenario = Queued(relay, engine)
        assert await interrupt_everywhere(relay, view, scenario, how, when) >= scenario.waits
        assert ("RQ" if how == "cut" else "CQ") in {record.outcome for record in relay.records}


@pytest.mark.parametrize("when", get_args(When))
@pytest.mark.parametrize("how", get_args(How))
async def test_an_exchange_with_an_engine_behind_tls(engine: Engine, how: How, when: When, tmp_path: Path) -> None:
    """Its handshake, too, is waited for."""
    authority = Authority(tmp_path)
    async with (
        behind_tls(engine.url, authority.server()) as edge,
        running_relay(edge.as_upstream(authority.path), timeouts=AGELESS) as relay,
    ):
        assert await interrupt_everywhere(relay, EngineView(engine.stats), Scenario(STREAM), how, when) >= 5
