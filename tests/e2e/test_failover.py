"""Another engine instead of the one that failed: when, when not, and what is left of its answer."""

from __future__ import annotations

import re
import socket
from typing import Any

import msgspec
import pytest
import trio

from relay.config import FailoverConfig, HealthConfig, TimeoutsConfig
from relay.core.timeline import Record
from relay_bench.engine import Engine
from tests.e2e.fleet import (
    answer,
    fakes,
    pool_of,
    running_fleet,
)
from tests.e2e.harness import STREAM, Client, ask, request, until

CHAT = request()
#: Small, where a test waits for it to pass.
SHORT_S = 0.2


def outcome(record: Record) -> tuple[str, int | None, int]:
    return record.outcome, record.status, record.attempts


@pytest.mark.parametrize("how", ["502", "503", "504", "fin", "rst", "silent", "nobody", "no http"])
async def test_failures_before_the_first_byte_go_to_another_engine(how: str) -> None:
    timeouts = TimeoutsConfig(first_token_s=SHORT_S)
    async with fakes("a", "b") as (bad, good):
        with socket.socket() as held:
            held.bind(("127.0.0.1", 0))
            url = bad.url
            if how == "nobody":
                url = f"http://127.0.0.1:{held.getsockname()[1]}"
            elif how == "silent":
                bad.hold()
            else:
                bad.answer = answer(int(how)) if how.isdecimal() else b"SSH-2.0-x\r\n\r\n" if how == "no http" else b""
                bad.then = how if how == "rst" else "fin"
            async with running_fleet(pool_of(url, good.url, balance="round_robin"), timeouts=timeouts) as relay:
                engine_ms: list[float] = []
                for _ in range(2):  # whoever's turn is first
                    passed = await ask(relay.port, CHAT)
                    assert (passed.status, passed.payload, passed.end) == (200, STREAM, "whole")
                    engine_ms += map(float, re.findall("engine;dur=([0-9.]+)", passed.headers["server-timing"]))
            assert sorted(outcome(record) for record in relay.records) == [("--", 200, 1), ("--", 200, 2)]
            assert {record.upstream for record in relay.records} == {good.url}
            assert max(engine_ms) >= (1000 * SHORT_S if how == "silent" else 0)  # and not the relay's


@pytest.mark.parametrize("how", ["503", "fin"])
async def test_another_engine_may_become_free_meanwhile(how: str) -> None:
    """When the attempt began it was full."""
    failover = FailoverConfig(statuses=(503,))
    async with fakes("a", "b") as (one, two):
        pool = pool_of(one.url, two.url, max_in_flight=9)
        pool = msgspec.structs.replace(
            pool, upstreams=tuple(msgspec.structs.replace(one, max_in_flight=1) for one in pool.upstreams)
        )
        async with running_fleet(pool, failover=failover) as relay, trio.open_nursery() as nursery:
            one.hold()
            two.hold()
            answers: list[int] = []

            async def ask_on() -> None:
                answers.append((await ask(relay.port, CHAT)).status)

            nursery.start_soon(ask_on)
            await until(lambda: bool(one.asked or two.asked))
            good, bad = (one, two) if one.asked else (two, one)
            nursery.start_soon(ask_on)
            await until(lambda: bool(bad.asked))
            good.gate.set()
            await until(lambda: answers == [200])
            bad.answer, bad.then = (answer(503), "keep") if how == "503" else (b"", "fin")
            bad.gate.set()
            await until(lambda: answers == [200, 200])
        assert sorted(outcome(record) for record in relay.records) == [("--", 200, 1), ("--", 200, 2)]


async def test_the_time_of_an_engine_that_says_nothing_is_not_the_relays() -> None:
    async with fakes("a") as (engine,):
        engine.hold()
        async with running_fleet(pool_of(engine.url), timeouts=TimeoutsConfig(first_token_s=SHORT_S)) as relay:
            got = await ask(relay.port, CHAT)
            assert got.status == 504
            (engine_ms,) = re.findall("engine;dur=([0-9.]+)", got.headers["server-timing"])
            assert float(engine_ms) >= 1000 * SHORT_S
            record = await relay.record()
            assert (record.head_ms, record.relay_ms) == (None, None)


@pytest.mark.parametrize("status", [400, 401, 404, 422, 429, 500, 501, 529])
async def test_other_answers_are_the_clients(status: int) -> None:
    async with fakes("a", "b") as (one, two), running_fleet(pool_of(one.url, two.url)) as relay:
        body = b'{"error":{"message":"no","code":%d}}' % status
        one.answer = two.answer = answer(status, body, "retry-after: 13")
        got = await ask(relay.port, CHAT)
        assert (got.status, got.payload, got.headers["retry-after"]) == (status, body, "13")
        assert outcome(await relay.record()) == ("--", status, 1)
        assert len(one.asked) + len(two.asked) == 1


async def test_the_statuses_that_fail_over_are_a_setting() -> None:
    failover = FailoverConfig(statuses=(500,))
    async with fakes("a", "b") as (one, two), running_fleet(pool_of(one.url, two.url), failover=failover) as relay:
        one.answer = answer(500)
        for _ in range(2):
            assert (await ask(relay.port, CHAT)).status == 200
        one.answer = two.answer = answer(503)
        assert (await ask(relay.port, CHAT)).status == 503
        assert outcome(await relay.record(3)) == ("--", 503, 1)


@pytest.mark.parametrize("why", ["only one", "both the same", "attempts", "budget", "other down", "other full"])
@pytest.mark.parametrize("status", [502, 503, 504])
async def test_with_no_other_left_the_engines_answer_goes_through_untouched(why: str, status: int) -> None:
    body = b'{"error":"busy"}'
    async with fakes("a", "b") as (one, two):
        one.answer = two.answer = answer(status, body, "retry-after: 7", "x-engine: mine")
        urls = [one.url] if why == "only one" else [one.url, two.url]
        tables: dict[str, Any] = {"failover": FailoverConfig(attempts=1)} if why == "attempts" else {}
        if why == "budget":
            tables["failover"] = FailoverConfig(budget_s=1e-9)  # it is over before any answer
        if why == "other down":
            two.health = 500
            tables["health"] = HealthConfig(interval_s=60)
        async with (
            running_fleet(pool_of(*urls, most=1), **tables) as relay,
            await Client.connect(relay.port) as blocker,
        ):
            if why == "other full":
                one.hold()
                two.hold()
                await blocker.send(CHAT)
                await until(lambda: len(one.asked) + len(two.asked) == 1)
                (two if one.asked else one).gate.set()
            got = await ask(relay.port, CHAT)
            assert (got.status, got.payload) == (status, body)
            assert (got.headers["retry-after"], got.headers["x-engine"]) == ("7", "mine")
            assert outcome(await relay.record()) == ("--", status, 2 if why == "both the same" else 1)


@pytest.mark.parametrize("how", ["fin", "rst"])
async def test_what_has_begun_to_be_answered_is_not_asked_again(how: str) -> None:
    """Over a used connection: without a byte of an answer, the engine could have closed it just then."""
    async with fakes("a") as (engine,), running_fleet(pool_of(engine.url)) as relay:
        assert (await ask(relay.port, CHAT)).status == 200
        engine.answer, engine.then = b"HTTP/1", how
        got = await ask(relay.port, CHAT)
        assert (got.status, got.error["code"]) == (502, "upstream_disconnected")
        assert len(engine.asked) == 2


async def test_the_budget_bounds_attempts() -> None:
    failover, timeouts = FailoverConfig(budget_s=SHORT_S / 2), TimeoutsConfig(first_token_s=SHORT_S)
    tables: dict[str, Any] = {"failover": failover, "timeouts": timeouts}
    async with fakes("a", "b") as (one, two), running_fleet(pool_of(one.url, two.url), **tables) as relay:
        one.hold()
        two.hold()
        assert (await ask(relay.port, CHAT)).status == 504
        assert outcome(await relay.record()) == ("uH", 504, 1)


async def test_after_the_first_frame_there_is_no_other(engine: Engine, second_engine: Engine) -> None:
    async with running_fleet(pool_of(engine.url, second_engine.url)) as relay:
        broken = await ask(relay.port, request(sim_fault="die-after:1"))
        assert (broken.status, broken.end) == (200, "fin")
        assert len(broken.frames) == 2
        assert outcome(await relay.record()) == ("UD", 200, 1)
        assert engine.stats()["served"] + second_engine.stats()["served"] == 1
