"""Engines of a split pool that die, in each phase of a request: what the client hears, and what becomes of the others.

The built-in engine holds each handle until a decoder has fetched it, and a decoder that cannot fetch one says so as
vLLM does: in the second frame of a stream that began with 200.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Final

import pytest
import trio

from relay.address import parse_upstream
from relay.config import PoolConfig
from relay.core.timeline import Record
from relay.net.fiber import in_task
from relay.net.leg import Leg
from relay.net.opening import Opening
from relay_bench.engine import Engine, EngineConfig, serve_engine
from tests.e2e.fleet import RunningFleet, running_fleet
from tests.e2e.harness import Answer, Client, ask, assert_cut_off, request, states, until

#: A wait that only an engine's death ends.
LONG_MS: Final = 60_000.0
TOKENS: Final = 6


class Mortal:
    """A built-in engine that can be killed."""

    def __init__(self, engine: Engine, scope: trio.CancelScope) -> None:
        self.engine = engine
        self._scope = scope

    def kill(self) -> None:
        self._scope.cancel()

    @property
    def is_busy(self) -> bool:
        return self.engine.stats()["running"] > 0

    @property
    def handles(self) -> tuple[int, int, int]:
        """Given, taken, and still held."""
        handles = self.engine.ledger.handles
        return handles.given, handles.taken, len(handles.held)


async def _run(config: EngineConfig, *, task_status: trio.TaskStatus[Mortal]) -> None:
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            task_status.started(Mortal(await nursery.start(serve_engine, config), scope))


class Stand:
    """Prefillers and decoders, and the relay before them."""

    def __init__(self, prefillers: list[Mortal], decoders: list[Mortal]) -> None:
        self.prefillers = prefillers
        self.decoders = decoders
        self.relay: RunningFleet

    def busy(self, role: str) -> Mortal:
        """The one of a role that has the request."""
        (found,) = (each for each in getattr(self, role) if each.is_busy)
        assert isinstance(found, Mortal)
        return found

    def kept(self, mortal: Mortal) -> int:
        """Connections to one that wait for another exchange."""
        return self.relay.upstreams[mortal.engine.url].idle

    def other(self, mortal: Mortal) -> Mortal:
        role = self.prefillers if mortal in self.prefillers else self.decoders
        return next(each for each in role if each is not mortal)


@asynccontextmanager
async def standing(
    number: int = 2, *, prefill: EngineConfig | None = None, decode: EngineConfig | None = None
) -> AsyncIterator[Stand]:
    async with trio.open_nursery() as nursery:
        prefillers = [await nursery.start(_run, prefill or EngineConfig()) for _ in range(number)]
        decoders = [await nursery.start(_run, decode or EngineConfig()) for _ in range(number)]
        stand = Stand(prefillers, decoders)
        pool = PoolConfig(
            prefill=tuple(parse_upstream(each.engine.url) for each in prefillers),
            decode=tuple(parse_upstream(each.engine.url) for each in decoders),
        )
        async with running_fleet(pool) as stand.relay:
            yield stand
            drains = stand.relay.worker.service.drains
            await until(lambda: not drains.running)
            for mortal in (*prefillers, *decoders):
                await until(lambda mortal=mortal: not mortal.is_busy)  # type: ignore[misc]
        nursery.cancel_scope.cancel()


async def asked(stand: Stand, *deeds: tuple[Callable[[], bool], Callable[[], None]], stream: bool = True) -> Answer:
    """The answer to a request during which each deed is done once its time has come."""
    async with await Client.connect(stand.relay.port) as client:
        await client.send(request(body={"max_tokens": TOKENS, "stream": stream}, x_request_id="own"))
        for is_time, deed in deeds:
            await until(is_time)
            deed()
        return await client.answer()


def assert_good(answer: Answer, record: Record, *, attempts: int) -> None:
    assert (answer.status, answer.end, answer.frames[-1]) == (200, "whole", b"data: [DONE]\n\n")
    assert len(answer.frames) == TOKENS + 2  # a role, an end mark
    assert (record.outcome, record.status, record.attempts, record.error) == ("--", 200, attempts, None)


SLOW_ONCE: Final = EngineConfig(ttft_ms=LONG_MS)


async def test_a_prefiller_during_prefill() -> None:
    async with standing(prefill=EngineConfig(ttft_ms=300.0)) as stand:
        dead: list[Mortal] = []

        def kill() -> None:
            dead.append(stand.busy("prefillers"))
            dead[0].kill()

        answer = await asked(stand, (lambda: any(each.is_busy for each in stand.prefillers), kill))
        record = await stand.relay.record()
        assert_good(answer, record, attempts=2)
        other = stand.other(dead[0])
        assert record.prefill_upstream == other.engine.url
        assert stand.kept(dead[0]) == 0
        assert (dead[0].handles, other.handles) == ((0, 0, 0), (1, 1, 0))
        assert states(dead[0].engine) == ["aborted"]


@pytest.mark.parametrize("stream", [True, False])
async def test_the_last_prefiller_during_prefill(stream: bool) -> None:
    async with standing(1, prefill=SLOW_ONCE) as stand:
        (prefiller,) = stand.prefillers
        answer = await asked(stand, (lambda: prefiller.is_busy, prefiller.kill), stream=stream)
        record = await stand.relay.record()
        assert (answer.status, answer.error["code"]) == (502, "upstream_disconnected")
        assert (record.outcome, record.status, record.attempts) == ("UP", 502, 1)
        assert stand.kept(prefiller) == 0
        assert stand.decoders[0].engine.requests() == []


@pytest.fixture
def between_the_legs(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[Leg], None]]:
    """What is to happen once, when a prefiller has answered and the decoder has not been asked."""
    deeds: list[Callable[[Leg], None]] = []
    really_open = Leg.open

    async def open_later(leg: Leg) -> Opening:
        if deeds:
            deeds.pop()(leg)
            async with in_task():
                await trio.sleep(0.01)  # the engine's task has to end
        return await really_open(leg)

    monkeypatch.setattr(Leg, "open", open_later)
    return deeds


def prefiller_of(stand: Stand, leg: Leg) -> Mortal:
    """The one that has answered."""
    (found,) = (each for each in stand.prefillers if each.handles[0])
    return found


async def test_a_prefiller_between_the_legs(between_the_legs: list[Callable[[Leg], None]]) -> None:
    """The decoder finds nobody to fetch from, and says so in its second frame: a fresh prefill elsewhere."""
    async with standing() as stand:
        between_the_legs.append(lambda leg: prefiller_of(stand, leg).kill())
        answer = await asked(stand)
        record = await stand.relay.record()
        assert answer.headers["x-request-id"] == "own"
        assert record.attempts in (2, 3)  # the dead one may be picked again, and refuses the connection
        assert_good(answer, record, attempts=record.attempts)
        assert sorted(each.handles for each in stand.prefillers) == [(1, 0, 1), (1, 1, 0)]
        told = [each["id"] for each in (*stand.decoders[0].engine.requests(), *stand.decoders[1].engine.requests())]
        assert sorted(told) == sorted({"own", f"own-{record.attempts}"})


@pytest.mark.parametrize("stream", [True, False])
async def test_the_last_prefiller_between_the_legs(between_the_legs: list[Callable[[Leg], None]], stream: bool) -> None:
    async with standing(1) as stand:
        between_the_legs.append(lambda leg: prefiller_of(stand, leg).kill())
        answer = await asked(stand, stream=stream)
        record = await stand.relay.record()
        assert (answer.status, answer.end) == (500, "whole")
        assert answer.headers["content-type"] == "application/json"
        assert answer.error["type"] == "InternalServerError"
        assert (record.status, record.attempts) == (500, 1)
        assert record.outcome == ("UH" if stream else "--")  # without a stream, it is the engine's own answer


async def test_a_prefiller_whose_handle_was_fetched() -> None:
    async with standing(decode=EngineConfig(ttft_ms=100.0)) as stand:

        def kill() -> None:
            next(each for each in stand.prefillers if each.handles[0]).kill()

        answer = await asked(stand, (lambda: any(each.is_busy for each in stand.decoders), kill))
        assert_good(answer, await stand.relay.record(), attempts=1)


async def test_a_decoder_before_it_is_asked(between_the_legs: list[Callable[[Leg], None]]) -> None:
    """Its connection is refused: another pair with a fresh prefill, and the first handle is drained by the other."""
    async with standing() as stand:

        def kill(leg: Leg) -> None:
            next(each for each in stand.decoders if each.engine.url == leg.upstream.config.url).kill()

        between_the_legs.append(kill)
        answer = await asked(stand)
        record = await stand.relay.record()
        assert_good(answer, record, attempts=2)
        drains = stand.relay.worker.service.drains
        await until(lambda: drains.done == 1)
        assert [sum(each.handles[at] for each in stand.prefillers) for at in range(3)] == [2, 2, 0]
        assert sum(each.engine.stats()["completed"] for each in stand.decoders) == 2


async def test_a_decoder_before_its_first_frame() -> None:
    async with standing(decode=EngineConfig(ttft_ms=300.0)) as stand:
        dead: list[Mortal] = []

        def kill() -> None:
            dead.append(stand.busy("decoders"))
            dead[0].kill()

        answer = await asked(stand, (lambda: any(each.is_busy for each in stand.decoders), kill))
        record = await stand.relay.record()
        assert_good(answer, record, attempts=2)
        other = stand.other(dead[0])
        assert record.upstream == other.engine.url
        assert stand.kept(dead[0]) == 0
        assert [each["id"] for each in other.engine.requests()] == ["own-2"]
        assert [sum(each.handles[at] for each in stand.prefillers) for at in range(3)] == [2, 2, 0]
        assert states(dead[0].engine) == ["aborted"]


async def test_the_last_decoder_before_its_first_frame() -> None:
    async with standing(1, decode=SLOW_ONCE) as stand:
        (decoder,) = stand.decoders
        answer = await asked(stand, (lambda: decoder.is_busy, decoder.kill))
        record = await stand.relay.record()
        assert (answer.status, answer.error["code"]) == (502, "upstream_disconnected")
        assert (record.outcome, record.attempts) == ("UH", 1)
        assert stand.kept(decoder) == 0


async def test_a_decoder_in_mid_stream() -> None:
    async with standing(decode=EngineConfig(step_ms=100.0)) as stand:

        def is_streaming() -> bool:
            return any(each["tokens_sent"] >= 2 for mortal in stand.decoders for each in mortal.engine.requests())

        answer = await asked(stand, (is_streaming, lambda: stand.busy("decoders").kill()))
        record = await stand.relay.record()
        assert_cut_off(answer, "upstream_disconnected", frames=len(answer.frames) - 1)
        assert len(answer.frames) >= 3
        assert (record.outcome, record.status, record.attempts, record.usage) == ("UD", 200, 1, "estimated")
        assert sum(stand.kept(each) for each in stand.decoders) == 0
        assert [sum(each.handles[at] for each in stand.prefillers) for at in range(3)] == [1, 1, 0]


async def test_all_goes_on_once_they_are_back() -> None:
    """Nothing of a dead engine is kept that would hinder its successor."""
    async with standing(1) as stand:
        (decoder,) = stand.decoders
        assert (await asked(stand)).status == 200
        decoder.kill()
        await until(lambda: decoder.engine.stats()["connections_open"] == 0)
        assert (await asked(stand)).status == 502
        assert (await stand.relay.record(2)).outcome == "UC"
        host, port = decoder.engine.host, decoder.engine.port
        async with trio.open_nursery() as nursery:
            await nursery.start(_run, EngineConfig(listen=f"{host}:{port}"))
            assert (await ask(stand.relay.port, request())).status == 200
            nursery.cancel_scope.cancel()
