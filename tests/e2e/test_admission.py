"""Requests that wait for a place, and those that are turned away."""

from __future__ import annotations

import time

import pytest

from relay.config import DaemonConfig, TimeoutsConfig
from relay.core.timeline import Record
from tests.e2e.fleet import (
    fakes,
    pool_of,
    running_fleet,
    waiting,
)
from tests.e2e.harness import STREAM, Client, ask, request, until

CHAT = request()


def outcome(record: Record) -> tuple[str, int | None, int]:
    return record.outcome, record.status, record.attempts


@pytest.mark.parametrize("limit", ["pool", "engine"])
async def test_a_full_pool_without_a_queue_is_a_429(limit: str) -> None:
    async with fakes("a") as (engine,):
        pool = pool_of(engine.url, max_in_flight=2) if limit == "pool" else pool_of(engine.url, most=2)
        async with (
            running_fleet(pool) as relay,
            await Client.connect(relay.port) as one,
            await Client.connect(relay.port) as two,
        ):
            engine.hold()
            for number, client in enumerate((one, two), 1):
                await client.send(CHAT)
                await until(lambda number=number: len(engine.asked) == number)  # type: ignore[misc]
            full = await ask(relay.port, request(x_request_id="third"))
            assert (full.status, full.error["code"]) == (429, "queue_full")
            assert 1 <= int(full.headers["retry-after"]) <= 60
            assert "max_queue = 0" in full.error["message"]
            record = await relay.record()
            assert (record.id, record.pool, record.upstream) == ("third", "default", None)
            assert outcome(record) == ("RQ", 429, 0)
            engine.gate.set()
            assert [(await client.answer()).payload for client in (one, two)] == [STREAM] * 2
            assert (await ask(relay.port, CHAT)).status == 200
            assert len(engine.asked) == 3


async def test_who_waits_is_served_in_turn_and_told_how_long_it_was() -> None:
    async with (
        fakes("a") as (engine,),
        running_fleet(pool_of(engine.url, max_in_flight=1, max_queue=2)) as relay,
        await Client.connect(relay.port) as first,
    ):
        engine.hold()
        await first.send(CHAT)
        await until(lambda: len(engine.asked) == 1)
        asked = time.monotonic()
        async with waiting(relay, CHAT, 2) as (second, third):
            queued = time.monotonic()
            full = await ask(relay.port, CHAT)
            assert (full.status, full.error["code"]) == (429, "queue_full")
            assert "max_queue = 2" in full.error["message"]
            held_ms = (time.monotonic() - queued) * 1000
            engine.gate.set()
            answers = [await client.answer() for client in (first, second, third)]
            took_ms = (time.monotonic() - asked) * 1000
        assert [each.payload for each in answers] == [STREAM] * 3
        assert "queue;dur=" not in answers[0].headers["server-timing"]
        assert "queue;dur=" in answers[1].headers["server-timing"]
        await relay.record(4)
        refused, *served = relay.records
        assert outcome(refused) == ("RQ", 429, 0)
        assert {outcome(record) for record in served} == {("--", 200, 1)}
        waits = sorted(record.queue_ms or 0.0 for record in served)
        assert waits[0] == 0
        assert held_ms <= waits[1] <= waits[2] <= took_ms
        for record in served:  # the wait is nobody's part
            assert record.relay_ms is not None
            assert record.total_ms is not None
            assert record.relay_ms <= record.total_ms - (record.queue_ms or 0.0)


async def test_the_wait_has_a_limit() -> None:
    async with fakes("a") as (engine,):
        pool = pool_of(engine.url, most=1, max_queue=2)
        async with (
            running_fleet(pool, timeouts=TimeoutsConfig(queue_s=0.05)) as relay,
            await Client.connect(relay.port) as first,
        ):
            engine.hold()
            await first.send(CHAT)
            await until(lambda: len(engine.asked) == 1)
            late = await ask(relay.port, CHAT)
            assert (late.status, late.error["code"]) == (429, "queue_full")
            assert int(late.headers["retry-after"]) >= 1
            assert "queue_s = 0.05 s" in late.error["message"]
            record = await relay.record()
            assert outcome(record) == ("rQ", 429, 0)
            assert record.queue_ms is not None
            assert record.queue_ms >= 50
            assert relay.queued == 0


@pytest.mark.parametrize("how", ["fin", "close", "rst"])
async def test_a_client_that_leaves_the_queue_costs_nothing(how: str) -> None:
    async with (
        fakes("a") as (engine,),
        running_fleet(pool_of(engine.url, max_in_flight=1, max_queue=2)) as relay,
        await Client.connect(relay.port) as first,
    ):
        engine.hold()
        await first.send(CHAT)
        await until(lambda: len(engine.asked) == 1)
        async with waiting(relay, CHAT, 2) as (second, third):
            second.leave(how)
            record = await relay.record()
            assert outcome(record) == ("CQ", 499, 0)
            assert record.upstream is None
            assert relay.queued == 1
            engine.gate.set()
            assert [(await client.answer()).payload for client in (first, third)] == [STREAM] * 2
        assert len(engine.asked) == 2


async def test_keys_take_turns_in_the_queue() -> None:
    async with (
        fakes("a") as (engine,),
        running_fleet(pool_of(engine.url, max_in_flight=1, max_queue=9)) as relay,
        await Client.connect(relay.port) as first,
    ):
        engine.hold()
        await first.send(CHAT)
        await until(lambda: len(engine.asked) == 1)
        busy = request(authorization="Bearer busy", x_request_id="busy")
        rare = request(authorization="Bearer rare", x_request_id="rare")
        async with waiting(relay, busy, 3) as many, waiting(relay, rare, 1) as one:
            engine.gate.set()
            for client in (*many, *one):
                assert (await client.answer()).status == 200
            await relay.record(5)
        assert [record.id for record in relay.records[1:]] == ["busy", "rare", "busy", "busy"]


async def test_who_waits_at_the_end_of_the_drain_is_told() -> None:
    async with (
        fakes("a") as (engine,),
        running_fleet(pool_of(engine.url, max_in_flight=1, max_queue=2), daemon=DaemonConfig(drain_s=0.05)) as relay,
        await Client.connect(relay.port) as first,
    ):
        engine.hold()
        await first.send(CHAT)
        await until(lambda: len(engine.asked) == 1)
        async with waiting(relay, CHAT) as (waiter,):
            relay.worker.stop()
            told = await waiter.answer()
            assert (told.status, told.error["code"]) == (503, "draining")
            await relay.record(2)
        assert ("RQ", 503, 0) in {outcome(record) for record in relay.records}


async def test_other_routes_count_as_well() -> None:
    async with (
        fakes("a") as (engine,),
        running_fleet(pool_of(engine.url, max_in_flight=1)) as relay,
        await Client.connect(relay.port) as first,
    ):
        engine.hold()
        await first.send(request("/v1/embeddings", b'{"model":"m","input":"x"}'))
        await until(lambda: len(engine.asked) == 1)
        assert (await ask(relay.port, CHAT)).status == 429
        assert (await ask(relay.port, request("/-/live", method="GET"))).status == 200  # but not the relay's own
