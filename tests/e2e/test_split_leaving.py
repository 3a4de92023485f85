"""Clients that leave a split request: both engines are freed, and no handle is left behind."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Any, Final, get_args

import msgspec
import pytest
import trio
import trio.testing

from relay.address import parse_upstream
from relay.config import PoolConfig
from relay.core.connectors import CONNECTORS
from relay.core.request import Route
from relay.net import drains as drains_module
from relay.net.drains import Drains
from relay_bench.engine import Engine, EngineConfig, serve_engine
from tests.core.test_connectors_peers import ids_of, one_token, raw_params
from tests.e2e.fleet import RunningFleet, answer, running_fleet
from tests.e2e.harness import Answer, Client, ask, request, until
from tests.e2e.pairs import DECODED, HANDLE, PREFILLED, Asked, Half, Pair, Silence, says, sent, split_pair
from tests.e2e.test_cancellation import AGELESS, EngineView, How, Scenario, When, interrupt_everywhere
from tests.e2e.test_split import call

KEEPS: Final = {"drain_kv": False}


class LateAnswer:
    """A prefiller that has answered just when its client left, and cannot know that yet."""

    def __init__(self, data: bytes = PREFILLED) -> None:
        self.begun = trio.Event()
        self._data = data

    async def __call__(self, asked: Asked, stream: trio.SocketStream) -> None:
        self.begun.set()
        assert not await stream.receive_some()
        await stream.send_all(self._data)
        await stream.aclose()


async def leave(pair: Pair, begun: trio.Event, how: str = "close") -> None:
    """A client that hangs up once an engine is at work on its request; its exchange has then come to its end."""
    written = len(pair.relay.records)
    async with await Client.connect(pair.relay.port) as client:
        await client.send(sent(x_request_id="own"))
        await begun.wait()
        client.leave(how)
        await pair.relay.record(written + 1)
    service = pair.relay.worker.service
    assert all(upstream.outstanding == 0 for upstream in service.fleet.upstreams)
    assert [pool.in_flight for pool in service.fleet.pools] == [0]


def counts(pair: Pair) -> tuple[int, int, int]:
    drains: Drains = pair.relay.worker.service.drains
    return drains.running, drains.done, drains.failed


def kept(pair: Pair) -> list[int]:
    """How many connections each engine has that wait for another exchange."""
    return [upstream.idle for upstream in pair.relay.worker.service.fleet.upstreams]


@pytest.mark.parametrize("how", ["close", "rst", "fin"])
@pytest.mark.parametrize("settings", [{}, KEEPS], ids=["drains", "keeps"])
async def test_during_prefill(how: str, settings: dict[str, Any]) -> None:
    async with split_pair(settings=settings) as pair:
        pair.prefill.usual = silence = Silence()
        await leave(pair, silence.begun, how)
        await silence.left()
        assert kept(pair) == [0, 0]
        record = await pair.relay.record()
        assert (record.outcome, record.status, pair.order, counts(pair)) == ("CP", 499, "p", (0, 0, 0))
        assert pair.metric("relay_upstream_failures_total") == 0


@pytest.mark.parametrize("connector", ["sglang", "ascend_layerwise"])
async def test_during_both_legs(connector: str) -> None:
    async with split_pair(connector=connector) as pair:
        pair.prefill.usual = prefilling = Silence()
        pair.decode.usual = decoding = Silence()
        begun = decoding.begun if connector == "ascend_layerwise" else prefilling.begun
        await leave(pair, begun)
        await decoding.left()
        if connector == "sglang":
            await prefilling.left()
        assert kept(pair) == [0, 0]
        record = await pair.relay.record()
        assert (record.outcome, counts(pair)) == ("CH", (0, 0, 0))


async def test_a_handle_that_was_on_its_way_is_drained() -> None:
    async with split_pair(decoders=2) as pair:
        pair.prefill.usual = late = LateAnswer()
        await leave(pair, late.begun)
        await until(lambda: counts(pair) == (0, 1, 0))
        assert pair.metric("relay_kv_drains_total") == 1
        record = await pair.relay.record()
        assert (record.outcome, pair.order, len(pair.relay.records)) == ("CP", "pd", 1)
        drained = pair.decode.last
        body = one_token(Route.CHAT, drained.leg)
        assert (raw_params(drained.leg), drained.id, body["max_tokens"]) == (HANDLE, "own", 1)


async def test_handles_are_left_where_that_is_configured() -> None:
    async with split_pair(settings=KEEPS) as pair:
        pair.prefill.usual = late = LateAnswer()
        await leave(pair, late.begun)
        assert kept(pair) == [0, 0]
        assert ((await pair.relay.record()).outcome, pair.order, counts(pair)) == ("CP", "p", (0, 0, 0))


@pytest.mark.parametrize("data", [answer(400), answer(200, b'{"kv_transfer_params":null}'), PREFILLED[:-5]])
async def test_nothing_is_drained_where_nothing_is_held(data: bytes) -> None:
    async with split_pair() as pair:
        pair.prefill.usual = late = LateAnswer(data)
        await leave(pair, late.begun)
        assert (pair.order, kept(pair), counts(pair)) == ("p", [0, 0], (0, 0, 0))


async def test_a_drain_is_no_load_and_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drains_module, "DRAIN_S", 0.1)
    async with split_pair(settings={"max_in_flight": 1}) as pair:
        pair.prefill.script = [late := LateAnswer()]
        pair.decode.script = [silence := Silence()]
        await leave(pair, late.begun)
        await silence.begun.wait()
        assert counts(pair) == (1, 0, 0)
        assert (await ask(pair.relay.port, sent())).status == 200  # in the one place that there is
        await silence.left()
        await until(lambda: counts(pair) == (0, 0, 1))


async def test_drains_are_bounded_in_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drains_module, "MOST_DRAINS", 1)
    async with split_pair() as pair:
        pair.decode.script = [silence := Silence()]
        for _ in range(3):
            pair.prefill.script = [late := LateAnswer()]
            await leave(pair, late.begun)
        assert counts(pair) == (1, 0, 2)
        assert pair.order == "pdpp"
        await silence.begun.wait()
    await silence.left()


@pytest.mark.parametrize("status", [400, 503])
async def test_a_drain_may_fail(status: int) -> None:
    async with split_pair() as pair:
        pair.prefill.usual = late = LateAnswer()
        pair.decode.usual = says(answer(status))
        await leave(pair, late.begun)
        await until(lambda: counts(pair) == (0, 0, 1))


async def test_once_the_decoder_was_asked_it_is_closed_as_any_stream() -> None:
    async with split_pair() as pair:
        pair.decode.usual = silence = Silence()
        await leave(pair, silence.begun)
        await silence.left()
        assert kept(pair) == [1, 0]  # the prefiller has answered
        assert ((await pair.relay.record()).outcome, pair.order, counts(pair)) == ("CH", "pd", (0, 0, 0))


async def test_a_decoder_that_cannot_be_reached_leaves_its_handle_to_another() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        nobody = f"http://127.0.0.1:{listener.getsockname()[1]}"
    handles = iter((b'{"first":1}', b'{"second":2}'))

    async def hand_over(asked: Asked, stream: trio.SocketStream) -> None:
        await stream.send_all(answer(200, b'{"kv_transfer_params":%b}' % next(handles)))

    async with trio.open_nursery() as nursery:
        pair = Pair()
        prefill = parse_upstream(await pair.prefill.listen(nursery))
        decode = parse_upstream(await pair.decode.listen(nursery))
        pair.prefill.usual = hand_over
        pool = PoolConfig(prefill=(prefill,), decode=(parse_upstream(nobody), decode), balance="round_robin")
        async with running_fleet(pool) as pair.relay:
            attempts = 1
            while attempts == 1:  # until it is the other one's turn
                handles = iter((b'{"first":1}', b'{"second":2}'))
                pair.decode.asked.clear()
                assert (await ask(pair.relay.port, sent(x_request_id="own"))).status == 200
                attempts = pair.relay.records[-1].attempts
            await until(lambda: counts(pair) == (0, 1, 0))
        used = {asked.id: (raw_params(asked.leg), asked.json().get("max_tokens")) for asked in pair.decode.asked}
        nursery.cancel_scope.cancel()
    assert used == {"own": (b'{"first":1}', 1), "own-2": (b'{"second":2}', None)}


# -- interrupted wherever it waits


class Stand:
    """Two built-in engines as prefiller and decoder, and a relay in front."""

    def __init__(self, prefiller: Engine, decoder: Engine) -> None:
        self.prefiller = prefiller
        self.decoder = decoder
        self.relay: RunningFleet

    def stats(self) -> dict[str, int]:
        """Of both engines."""
        both = [self.prefiller.stats(), self.decoder.stats()]
        return {name: sum(stats[name] for stats in both) for name in both[0]}


@asynccontextmanager
async def standing(connector: str, nursery: trio.Nursery) -> AsyncIterator[Stand]:
    """Engines that hold a handle where the protocol has one; what others wait for of each other, they do not check."""
    own = {"mooncake": "none", "ascend_mooncake": "ascend_mooncake"}.get(connector, "nixl")
    config = EngineConfig(ttft_ms=2.0, connector=own)
    engines: list[Engine] = [await nursery.start(serve_engine, config) for _ in range(2)]
    stand = Stand(*engines)
    prefill, decode = (parse_upstream(engine.url) for engine in engines)
    if connector == "mooncake":
        bootstrap = await Half(says(answer(200, b'{"0":{"engine_id":"e"}}'))).listen(nursery)
        prefill = msgspec.structs.replace(prefill, bootstrap=bootstrap)
    settings: dict[str, Any] = {"prefill": (prefill,), "decode": (decode,), "connector": connector}
    pool = PoolConfig(**settings)
    async with running_fleet(pool, timeouts=AGELESS) as stand.relay:
        yield stand


class Afresh(Scenario):
    """Another one, for which a prefiller is asked first whatever a connector asks only once."""

    def __init__(self, relay: RunningFleet, like: Scenario) -> None:
        super().__init__(*like.requests, outcome=like.outcome, waits=like.waits)
        self._relay = relay

    async def play(self, client: Client, how: How) -> list[Answer]:
        for upstream in self._relay.upstreams.values():
            upstream.endpoint = None
        return await super().play(client, how)


SCENARIOS: Final = {
    "stream": Scenario(request(body={"max_tokens": 3}, sim_step_ms="1"), waits=4),
    "json": Scenario(request(body={"stream": False, "max_tokens": 3}), waits=3),
}


@pytest.mark.parametrize("when", get_args(When))
@pytest.mark.parametrize("how", get_args(How))
@pytest.mark.parametrize("connector", [each for each in CONNECTORS if each != "ascend_layerwise"])  # which is below
@pytest.mark.parametrize("scenario", SCENARIOS.values(), ids=SCENARIOS)
async def test_interrupted_at_each_wait(
    nursery: trio.Nursery, scenario: Scenario, connector: str, how: How, when: When
) -> None:
    async with standing(connector, nursery) as stand:
        view, afresh = EngineView(stand.stats), Afresh(stand.relay, scenario)
        assert await interrupt_everywhere(stand.relay, view, afresh, how, when) >= scenario.waits
        drains = stand.relay.worker.service.drains
        await until(lambda: not drains.running)
        assert drains.failed == 0
        handles = stand.prefiller.ledger.handles
        assert (bool(handles.given), handles.held) == (connector in ("nixl", "ascend_mooncake"), set())


class CallingBack:
    """A decoder that calls back, as vllm-ascend's does, and answers once pushed to; and its prefiller."""

    def __init__(self) -> None:
        self.prefill = Half(self._prefill)
        self.decode = Half(self._decode)
        self._is_pushed = trio.Event()
        self._connections = 0

    def stats(self) -> dict[str, int]:
        return {"connections_open": self._connections, "running": 0, "queued": 0}

    async def _decode(self, asked: Asked, stream: trio.SocketStream) -> None:
        is_pushed = self._is_pushed = trio.Event()
        body = asked.json()
        (inner,) = ids_of(Route.CHAT, asked.leg, body)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._watch, stream, nursery.cancel_scope)
            await call(body["kv_transfer_params"]["metaserver"], b'{"request_id":"%b"}' % inner.encode())
            await is_pushed.wait()
            nursery.cancel_scope.cancel()
        if is_pushed.is_set():
            await stream.send_all(DECODED)

    async def _watch(self, stream: trio.SocketStream, scope: trio.CancelScope) -> None:
        with suppress(trio.BrokenResourceError):
            await stream.receive_some()
        scope.cancel()

    async def _prefill(self, asked: Asked, stream: trio.SocketStream) -> None:
        self._is_pushed.set()
        await stream.send_all(PREFILLED)

    async def serve(self, half: Half, stream: trio.SocketStream) -> None:
        self._connections += 1
        try:
            await half.serve(stream)
        finally:
            self._connections -= 1


@pytest.mark.parametrize("when", get_args(When))
@pytest.mark.parametrize("how", get_args(How))
async def test_a_decoder_that_calls_back_interrupted_at_each_wait(nursery: trio.Nursery, how: How, when: When) -> None:
    both = CallingBack()
    roles: dict[str, Any] = {}
    for role, half in (("prefill", both.prefill), ("decode", both.decode)):
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, partial(both.serve, half), listeners)
        roles[role] = (parse_upstream(f"http://127.0.0.1:{listeners[0].socket.getsockname()[1]}"),)
    async with running_fleet(PoolConfig(connector="ascend_layerwise", **roles), timeouts=AGELESS) as relay:
        assert await interrupt_everywhere(relay, EngineView(both.stats), Scenario(request()), how, when) >= 3
        assert not relay.worker.service.callbacks
    nursery.cancel_scope.cancel()
