"""Many engines behind one relay: chosen by model and policy, and nothing left over at the end."""

from __future__ import annotations

import json
import random

import pytest
import trio

from relay.config import PoolConfig, TimeoutsConfig
from relay.core.timeline import Record
from relay_bench.engine import Engine, EngineConfig, serve_engine
from tests.e2e.fleet import (
    WATCHED,
    FakeEngine,
    RunningFleet,
    answer,
    fakes,
    pool_of,
    running_fleet,
)
from tests.e2e.harness import CHAT_PATH, PATHS, STREAM, Answer, Client, ask, request, until

MODELS = request("/v1/models", method="GET")


def outcome(record: Record) -> tuple[str, int | None, int]:
    return record.outcome, record.status, record.attempts


async def ask_for(relay: RunningFleet, model: str, path: str = CHAT_PATH) -> Answer:
    return await ask(relay.port, request(path, body={"model": model}))


# -- pools by model


async def test_the_model_decides_on_the_pool() -> None:
    async with fakes("a", "b", "c") as (named, globbed, rest):
        pools = (
            pool_of(globbed.url, name="globbed", models=("qwen*", "*/r1")),
            pool_of(named.url, name="named", models=("qwen3-32b",)),
            pool_of(rest.url, name="rest"),
        )
        async with running_fleet(*pools) as relay:
            wanted = {
                "qwen3-32b": ("named", named),
                "qwen3-8b": ("globbed", globbed),
                "deepseek/r1": ("globbed", globbed),
                "llama": ("rest", rest),
                "qwén\n": ("rest", rest),
            }
            for number, (model, (pool, engine)) in enumerate(wanted.items(), 1):
                before = len(engine.asked)
                assert (await ask_for(relay, model)).payload == STREAM
                record = await relay.record(number)
                assert (record.model, record.pool, record.upstream) == (model, pool, engine.url)
                assert len(engine.asked) == before + 1
            # what names no model goes to the first
            assert (await ask(relay.port, request("/v1/embeddings", b'{"input":"x"}'))).status == 200
            assert (await relay.record(len(wanted) + 1)).pool == "globbed"


@pytest.mark.parametrize("path", PATHS)
async def test_a_model_that_no_pool_names_is_a_404_that_names_those_known(path: str) -> None:
    async with fakes("a", "b") as (one, two):
        pools = (pool_of(one.url, models=("qwen*",)), pool_of(two.url, name="long", models=("r1", "v3")))
        async with running_fleet(*pools) as relay:
            refused = await ask_for(relay, "gpt-5", path)
            assert refused.status == 404
            assert refused.error["message"] == "no pool serves the model 'gpt-5'; known: qwen*, r1, v3"
            if path == "/v1/messages":
                assert refused.json()["type"] == "error"
            else:
                assert refused.error["code"] == "model_not_found"
            record = await relay.record()
            assert outcome(record) == ("RR", 404, 0)
            assert (record.pool, record.upstream) == (None, None)
            garbage = await ask(relay.port, request(path, b"{"))
            assert garbage.status == 400
            assert not one.asked
            assert not two.asked


@pytest.mark.parametrize("method", ["OPTIONS", "GET", "HEAD"])
async def test_what_is_no_post_names_no_model_and_goes_to_the_first(method: str) -> None:
    async with fakes("a", "b") as (one, two):
        pools = (pool_of(one.url, models=("qwen*",)), pool_of(two.url, name="long", models=("r1",)))
        async with running_fleet(*pools) as relay, await Client.connect(relay.port) as client:
            assert (await client.ask(request(method=method))).status == 200
        assert len(one.asked) == 1
        assert not two.asked


async def test_models_are_the_union_of_what_engines_list() -> None:
    async with fakes("qwen-a", "qwen-a", "llama", "qwen-hidden") as (one, two, rest, hidden):
        two.models.append("qwen-b")
        two.models.append("llama")  # which a request would not reach there
        pools = (
            pool_of(one.url, two.url, name="chat", models=("qwen*",)),
            pool_of(rest.url, hidden.url, name="rest"),
        )
        async with running_fleet(*pools, health=WATCHED) as relay:

            async def listed() -> list[str]:
                found = await ask(relay.port, MODELS)
                assert found.status == 200
                return [model["id"] for model in found.json()["data"]]

            await until(lambda: all(up.models is not None for up in relay.upstreams.values()))
            assert await listed() == ["qwen-a", "qwen-b", "llama"]
            models = await ask(relay.port, MODELS)
            assert models.json()["object"] == "list"
            assert models.json()["data"][0] == {"id": "qwen-a", "object": "model", "of": one.url}
            two.health = 503
            await until(lambda: not relay.is_up(two))
            assert await listed() == ["qwen-a", "llama"]
            assert not any(engine.asked for engine in (one, two, rest, hidden))
        records = relay.records
        assert {(record.outcome, record.status, record.path, record.upstream) for record in records} == {
            ("--", 200, "/v1/models", None)
        }


async def test_without_probes_models_are_the_first_engines_own(engine: Engine) -> None:
    async with running_fleet(pool_of(engine.url)) as relay:
        direct, through = [await ask(port, MODELS) for port in (engine.port, relay.port)]
        assert through.json()["data"][0]["id"] == direct.json()["data"][0]["id"] == "tiny"
        assert (await relay.record()).upstream == engine.url


@pytest.mark.parametrize(
    "body",
    [b"", b"[]", b'{"data":1}', b'{"data":[{"id":1}]}', b'{"data":[{"id":"\xff"}]}', b'{"data":' + b"[" * 50_000],
)
async def test_a_list_of_models_that_is_none_does_no_harm(body: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    probes = 0

    async def serve(engine: FakeEngine, stream: trio.SocketStream, head: bytes) -> None:
        nonlocal probes
        if head.startswith(b"GET /v1/models"):
            probes += 1
            await stream.send_all(answer(200, body))
        else:
            await stream.send_all(answer(200))

    monkeypatch.setattr(FakeEngine, "_answer", serve)
    async with fakes("x") as (engine,), running_fleet(pool_of(engine.url), health=WATCHED) as relay:
        await until(lambda: probes >= 2)
        assert relay.is_up(engine)
        assert relay.upstreams[engine.url].models is None


# -- policies


@pytest.mark.parametrize("by", ["header", "id", "trace", "user", "key"])
async def test_a_session_stays_with_its_engine(by: str) -> None:
    async with fakes("a", "b", "c") as engines:
        header = {"id": "X-Request-Id", "trace": "X-Correlation-Id"}.get(by, "X-Chat")
        pool = pool_of(*[each.url for each in engines], balance="session_affinity", session_header=header)
        async with running_fleet(pool) as relay:
            for number in range(24):
                name = f"session-{number % 8}"
                if by == "header":
                    data = request(x_chat=name)
                elif by == "id":
                    data = request(x_request_id=name)
                elif by == "trace":
                    data = request(x_correlation_id=name)
                elif by == "user":
                    data = request(body={"user": name})
                else:
                    data = request(authorization=f"Bearer {name}")
                assert (await ask(relay.port, data)).status == 200
            chosen = [record.upstream for record in relay.records]
    assert chosen[:8] == chosen[8:16] == chosen[16:]
    assert len(set(chosen)) > 1


async def test_a_conversation_stays_with_its_engine() -> None:
    async with fakes("a", "b", "c") as engines:
        pool = pool_of(*[each.url for each in engines], balance="prefix_affinity")
        async with running_fleet(pool) as relay:
            for turn in range(3):
                for number in range(8):
                    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": f"{number}?"}]
                    messages += [{"role": "user", "content": "go on"}] * turn
                    assert (await ask(relay.port, request(body={"messages": messages}))).status == 200
            chosen = [record.upstream for record in relay.records]
    assert chosen[:8] == chosen[8:16] == chosen[16:]
    assert len(set(chosen)) > 1


# -- all of it at once


async def test_whatever_happens_all_counts_return_to_zero() -> None:
    rng = random.Random(11)
    faults = [
        "",
        "",
        "",
        "status:503",
        "status:429",
        "die-before-head",
        "rst-after:2",
        "die-mid-frame:2",
        "stall-after:2",
    ]
    left = 0

    async def one(relay: RunningFleet) -> None:
        nonlocal left
        data = request(
            rng.choice(PATHS),
            {"stream": rng.random() < 0.8, "max_tokens": 5},
            sim_fault=rng.choice(faults),
            sim_step_ms="2",
            authorization=f"Bearer {rng.randrange(3)}",
        )
        leaves_after = rng.uniform(0, 0.03) if rng.random() < 0.4 else 2.0
        async with await Client.connect(relay.port) as client:
            with trio.move_on_after(leaves_after) as scope:
                await client.ask(data)
            left += scope.cancelled_caught
            client.leave(rng.choice(["close", "rst"]))

    timeouts = TimeoutsConfig(between_tokens_s=0.2, queue_s=0.5)
    async with trio.open_nursery() as nursery:
        engines: list[Engine] = [await nursery.start(serve_engine, EngineConfig()) for _ in range(3)]
        pool = pool_of(*[each.url for each in engines], most=8, max_in_flight=20, max_queue=30)
        async with running_fleet(pool, health=WATCHED, timeouts=timeouts) as relay:
            async with trio.open_nursery() as asking:
                for _ in range(300):
                    asking.start_soon(one, relay)
                    await trio.sleep(rng.uniform(0, 0.004))
            await relay.record(300)
            service = relay.worker.service
            assert not service.active
            assert [(each.in_flight, each.queued) for each in service.fleet.pools] == [(0, 0)]
            assert all(up.outstanding == up.seat.prompt_bytes == 0 for up in service.fleet.upstreams)
            assert repr(service.pump).startswith("<Pump pairs=0 streaming=0 ")
            await until(lambda: all(each.stats()["running"] == each.stats()["queued"] == 0 for each in engines))
        nursery.cancel_scope.cancel()
    letters = {record.outcome for record in relay.records}
    assert len(relay.records) == 300
    assert left > 20
    assert letters >= {"--", "CD", "UD"}, letters


def test_pool_config_is_what_these_tests_take_it_for() -> None:
    """Engines without a limit and no queue, unless a test says so."""
    pool = pool_of("http://a:1")
    assert pool == PoolConfig(upstreams=pool.upstreams)
    assert json.loads(answer(200).partition(b"\r\n\r\n")[2]) == {}
