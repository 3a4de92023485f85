"""Engines that fail: their probes, or requests. Who is passed over, and who comes back."""

from __future__ import annotations

import time
from typing import Any

import pytest
import trio

from relay.config import HealthConfig
from relay.core.health import CONSECUTIVE_FAILURES
from relay.core.timeline import Record
from relay_bench.engine import Engine, EngineConfig, serve_engine
from tests.e2e.fleet import (
    WATCHED,
    answer,
    eject,
    fakes,
    pool_of,
    running_fleet,
    waiting,
)
from tests.e2e.harness import PATHS, STREAM, Answer, Client, ask, request, until

CHAT = request()
MODELS = request("/v1/models", method="GET")


def outcome(record: Record) -> tuple[str, int | None, int]:
    return record.outcome, record.status, record.attempts


# -- probes


async def test_an_engine_that_fails_its_probes_is_not_picked_and_comes_back(capsys: pytest.CaptureFixture[str]) -> None:
    async with (
        fakes("a", "b") as (one, two),
        running_fleet(pool_of(one.url, two.url, balance="round_robin"), health=WATCHED) as relay,
    ):
        one.health = 503
        await until(lambda: not relay.is_up(one))
        assert relay.upstreams[one.url].last_error == "probe: /health answered 503"
        for _ in range(6):
            assert (await ask(relay.port, CHAT)).status == 200
        assert (len(one.asked), len(two.asked)) == (0, 6)
        one.health = 204
        await until(lambda: relay.is_up(one))
        for _ in range(6):
            assert (await ask(relay.port, CHAT)).status == 200
        assert (len(one.asked), len(two.asked)) == (3, 9)
        said = [line for line in capsys.readouterr().err.splitlines() if one.url in line]
        assert said == [
            f"relay: {one.url} is down: probe: /health answered 503",
            f"relay: {one.url} is up",
        ]
    assert {outcome(record) for record in relay.records} == {("--", 200, 1)}


async def test_how_engines_are_probed() -> None:
    health = HealthConfig(interval_s=0.02, path="/health")
    async with fakes("a") as (engine,), running_fleet(pool_of(engine.url), health=health):
        await until(lambda: len(engine.probed) >= 4)
        heads = [head.lower() for head in engine.probed]
        assert {head.split(b"\r\n")[0] for head in heads} == {b"get /health http/1.1", b"get /v1/models http/1.1"}
        assert heads.count(heads[1]) == 1  # a list is good for a while
        assert all(f"\r\nhost: {engine.authority}\r\n".encode() in head for head in heads)


async def test_the_first_probes_come_before_the_first_client() -> None:
    async with fakes("a", "b") as (bad, good):
        bad.health = 500
        async with running_fleet(pool_of(bad.url, good.url), health=HealthConfig(interval_s=60)) as relay:
            for _ in range(4):
                assert (await ask(relay.port, CHAT)).status == 200
            assert (len(bad.asked), len(good.asked)) == (0, 4)


async def test_one_failed_probe_is_not_enough_once_it_was_well() -> None:
    health = HealthConfig(interval_s=0.02, failures=3, successes=2)
    async with fakes("a") as (engine,), running_fleet(pool_of(engine.url), health=health) as relay:
        up = relay.upstreams[engine.url]
        assert up.health.is_up
        seen: list[tuple[bool, bool]] = []

        def watch(ok: bool, now: float, on_probe: Any = up.health.on_probe) -> None:
            on_probe(ok, now)
            seen.append((ok, up.health.is_up))

        up.health.on_probe = watch  # type: ignore[method-assign]
        engine.health = 500
        await until(lambda: not up.health.is_up)
        engine.health = 200
        await until(lambda: up.health.is_up)
        failed = [is_up for ok, is_up in seen if not ok]
        passed = [is_up for ok, is_up in seen if ok]
        assert failed == [True, True, False]
        assert passed[-2:] == [False, True]


@pytest.mark.parametrize("path", PATHS)
async def test_when_all_are_down_nobody_is_asked(path: str) -> None:
    async with fakes("a", "b") as (one, two):
        one.health = two.health = 503
        health = HealthConfig(interval_s=30, successes=2)
        async with running_fleet(pool_of(one.url, two.url, max_queue=5, max_in_flight=5), health=health) as relay:
            refused = await ask(relay.port, request(path))
            assert refused.status == 503
            assert refused.headers["retry-after"] == "30"  # one probe, as neither has been up yet
            assert "no engine of pool default is up" in refused.error["message"]
            if path != "/v1/messages":
                assert refused.error["code"] == "no_upstream"
            record = await relay.record()
            assert outcome(record) == ("RC", 503, 0)
            assert (record.pool, record.upstream) == ("default", None)
        assert not one.asked
        assert not two.asked


async def test_who_waits_when_all_go_down_is_told() -> None:
    async with (
        fakes("a") as (engine,),
        running_fleet(pool_of(engine.url, max_in_flight=1, max_queue=5), health=WATCHED) as relay,
    ):
        engine.hold()
        async with await Client.connect(relay.port) as first:
            await first.send(CHAT)
            await until(lambda: len(engine.asked) == 1)
            async with waiting(relay, CHAT) as (waiter,):
                engine.health = 503
                refused = await waiter.answer()
                assert (refused.status, refused.error["code"]) == (503, "no_upstream")
            engine.gate.set()
            assert (await first.answer()).payload == STREAM  # what is under way goes on


async def test_a_probe_that_is_not_answered_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("relay.net.roster.PROBE_S", 0.05)
    async with fakes("a") as (engine,), running_fleet(pool_of(engine.url), health=WATCHED) as relay:
        engine.health = 0
        await until(lambda: not relay.is_up(engine))
        assert "no answer within 0.05 s" in str(relay.upstreams[engine.url].last_error)


async def test_an_engine_that_never_answers_probes_does_not_hold_up_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("relay.net.roster.FIRST_PROBES_S", 0.05)
    async with fakes("a", "b") as (silent, good):
        silent.health = 0
        async with running_fleet(pool_of(silent.url, good.url), health=HealthConfig(interval_s=60)) as relay:
            assert (await ask(relay.port, CHAT)).status == 200


async def test_an_engine_on_a_unix_socket_is_probed(tmp_path: Any, nursery: trio.Nursery) -> None:
    engine: Engine = await nursery.start(serve_engine, EngineConfig(listen=f"unix:{tmp_path}/engine"))
    async with running_fleet(pool_of(engine.url), health=WATCHED) as relay:
        await until(lambda: relay.upstreams[engine.url].models is not None)
        assert (await ask(relay.port, MODELS)).json()["data"][0]["id"] == "tiny"
        assert (await ask(relay.port, CHAT)).status == 200


# -- what requests tell


@pytest.mark.parametrize("how", ["503", "reset"])
async def test_one_that_fails_requests_is_left_alone(how: str) -> None:
    async with fakes("a", "b") as (bad, good), running_fleet(pool_of(bad.url, good.url)) as relay:
        bad.answer, bad.then = (answer(503), "keep") if how == "503" else (b"", "rst")
        for _ in range(4 * CONSECUTIVE_FAILURES):
            assert (await ask(relay.port, CHAT)).payload == STREAM
        assert len(bad.asked) == CONSECUTIVE_FAILURES
        assert relay.upstreams[bad.url].health.is_open
        assert relay.upstreams[bad.url].failures == CONSECUTIVE_FAILURES
        assert relay.upstreams[good.url].failures == 0
    attempts = [record.attempts for record in relay.records]
    assert attempts.count(2) == CONSECUTIVE_FAILURES
    assert attempts[-5:] == [1] * 5


@pytest.mark.parametrize("status", [400, 404, 429, 500])
async def test_answers_that_may_be_the_requests_fault_eject_nobody(status: int) -> None:
    async with fakes("a", "b") as (one, two), running_fleet(pool_of(one.url, two.url)) as relay:
        one.answer = two.answer = answer(status)
        for _ in range(3 * CONSECUTIVE_FAILURES):
            assert (await ask(relay.port, CHAT)).status == status
        assert not any(up.health.is_open or up.failures for up in relay.upstreams.values())
    assert {outcome(record) for record in relay.records} == {("--", status, 1)}


async def test_clients_that_leave_eject_nobody() -> None:
    async with fakes("a") as (engine,), running_fleet(pool_of(engine.url)) as relay:
        engine.hold()
        for number in range(1, 3 * CONSECUTIVE_FAILURES):
            async with await Client.connect(relay.port) as client:
                await client.send(CHAT)
                await until(lambda number=number: len(engine.asked) == number)  # type: ignore[misc]
                client.leave("rst")
            assert (await relay.record(number)).outcome == "CH"
        up = relay.upstreams[engine.url]
        assert (up.health.is_open, up.failures, up.outstanding) == (False, 0, 0)
        engine.gate.set()
        await until(lambda: not engine.connections)


async def test_half_open_means_one_request_at_a_time() -> None:
    async with fakes("a", "b") as (bad, good), running_fleet(pool_of(bad.url, good.url)) as relay:
        await eject(relay, bad, CHAT)
        asked = len(bad.asked)
        up = relay.upstreams[bad.url]
        up.health.ejected_until = time.monotonic()
        bad.hold()
        async with trio.open_nursery() as nursery:
            answers: list[Answer] = []

            async def one() -> None:
                answers.append(await ask(relay.port, CHAT))

            for _ in range(8):
                nursery.start_soon(one)
            await until(lambda: len(answers) == 7 and len(bad.asked) == asked + 1)
            assert up.health.is_open
            bad.gate.set()
        assert {each.payload for each in answers} == {STREAM}
        assert not up.health.is_open
        before = len(bad.asked)
        for _ in range(4):
            await ask(relay.port, CHAT)
        assert len(bad.asked) == before + 2  # it has its share again


async def test_a_trial_that_fails_costs_no_client_anything() -> None:
    async with fakes("a", "b") as (bad, good), running_fleet(pool_of(bad.url, good.url)) as relay:
        await eject(relay, bad, CHAT)
        asked, up = len(bad.asked), relay.upstreams[bad.url]
        bad.answer = answer(503)
        up.health.ejected_until = time.monotonic()
        for _ in range(6):
            assert (await ask(relay.port, CHAT)).payload == STREAM
        assert len(bad.asked) == asked + 1
        assert up.health.ejected_until > time.monotonic()


async def test_a_trial_whose_client_leaves_is_no_verdict() -> None:
    async with fakes("a") as (only,), running_fleet(pool_of(only.url)) as relay:
        await eject(relay, only, CHAT)
        up = relay.upstreams[only.url]
        up.health.ejected_until = time.monotonic()
        only.hold()
        async with await Client.connect(relay.port) as client:
            await client.send(CHAT)
            await until(lambda: not up.seat.is_available)
            client.leave("close")
        await until(lambda: up.seat.is_available)
        assert up.health.is_open


async def test_the_only_engine_is_tried_however_bad_it_was() -> None:
    async with fakes("a") as (only,), running_fleet(pool_of(only.url)) as relay:
        await eject(relay, only, CHAT)
        assert relay.upstreams[only.url].health.is_open
        assert (await ask(relay.port, CHAT)).payload == STREAM
        assert not relay.upstreams[only.url].health.is_open
