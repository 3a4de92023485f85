"""Engines come and go by hand while the relay runs, and no stream notices."""

from __future__ import annotations

from contextlib import AsyncExitStack
from typing import Any, Literal

import msgspec
import pytest
import trio

from relay import config as settings
from relay.address import parse_upstream
from relay.config import HealthConfig, PoolConfig
from relay_bench.engine import Engine
from tests.e2e.fleet import (
    RunningFleet,
    assert_whole,
    config_of,
    engines_of,
    fakes,
    pool_of,
    running_fleet,
    status_of,
    streams,
    waiting,
)
from tests.e2e.harness import STREAM, Answer, Client, ask, request, until

CHAT = request()


async def test_an_engine_is_added_and_used_at_once() -> None:
    async with fakes("a", "b") as (old, new):
        health = HealthConfig(interval_s=60)
        pools = (pool_of("http://127.0.0.1:9", name="other", models=("m",)), pool_of(old.url, name="rest"))
        async with running_fleet(*pools, health=health) as relay:
            got = await relay.admin("POST", "/-/upstreams", {"pool": "rest", "url": f"{new.url}/"})
            assert (got.status, got.json()) == (200, {"added": new.url, "pool": "rest"})
            for _ in range(4):
                assert (await ask(relay.port, CHAT)).status == 200
            assert (len(old.asked), len(new.asked)) == (2, 2)
            await until(lambda: bool(new.probed))
            ups = (await status_of(relay)).pools[1].upstreams
            assert [up.url for up in ups] == [old.url, new.url]
            assert ups[1].age_s <= ups[0].age_s


async def test_the_first_pool_is_meant_where_none_is_named() -> None:
    async with fakes("a") as (engine,):
        pools = (
            pool_of("http://127.0.0.1:9", name="first"),
            pool_of("http://127.0.0.1:9", name="second", models=("m",)),
        )
        async with running_fleet(*pools) as relay:
            assert (await relay.admin("POST", "/-/upstreams", {"url": engine.url})).json()["pool"] == "first"
            first, second = (await status_of(relay)).pools
            assert (len(first.upstreams), len(second.upstreams)) == (2, 1)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", 'wanted: {"pool": …, "role": …, "url": …, "ca": …, "server_name": …}'),
        (b"{", "wanted: "),
        (b"[]", "wanted: "),
        (b'{"url":1}', "wanted: "),
        (b'{"pool":"default"}', "missing required field `url`"),
        (b'{"url":"http://a:1","weight":2}', "unknown field `weight`"),
        (b'{"url":"\xff"}', ""),
        ({"url": "a:1"}, '"a:1" is not an engine\'s URL; allowed: http(s)://HOST:PORT'),
        ({"url": "http://a:1/v1"}, "has a path"),
        ({"url": "http://a:1", "pool": "x"}, "there is no pool x; there are: default"),
        ({"url": "http://a:1", "role": "prefill"}, "pool default has no role prefill; it has: serve"),
    ],
)
@pytest.mark.parametrize("method", ["POST", "DELETE"])
async def test_wrong_changes_change_nothing(method: str, body: Any, said: str) -> None:
    async with fakes("a") as (engine,), running_fleet(pool_of(engine.url)) as relay:
        got = await relay.admin(method, "/-/upstreams", body)
        assert got.status == 400
        assert said in got.json()["error"]
        assert list(relay.upstreams) == [engine.url]


@pytest.mark.parametrize(
    ("method", "url", "said"),
    [
        ("POST", "{engine}", "{engine} is in pool default already"),
        (
            "POST",
            "dns+http://engines:8000",
            "a name to resolve belongs into the configuration; give http(s)://HOST:PORT",
        ),
        ("DELETE", "http://127.0.0.1:9", "http://127.0.0.1:9 is not in pool default; in it: {engine}"),
        ("DELETE", "dns+http://engines:8000", "dns+http://engines:8000 is not in pool default"),
    ],
)
async def test_changes_that_cannot_be(method: str, url: str, said: str) -> None:
    async with fakes("a") as (engine,), running_fleet(pool_of(engine.url)) as relay:
        got = await relay.admin(method, "/-/upstreams", {"url": url.format(engine=engine.url)})
        assert got.status == 400
        assert said.format(engine=engine.url) in got.json()["error"]
        assert list(relay.upstreams) == [engine.url]


async def test_removal_drains(engine: Engine, second_engine: Engine) -> None:
    async with running_fleet(pool_of(engine.url)) as relay, streams(relay, engine, 3) as clients:
        leaving = relay.upstreams[engine.url]
        assert (await relay.admin("POST", "/-/upstreams", {"url": second_engine.url})).status == 200
        got = await relay.admin("DELETE", "/-/upstreams", {"url": engine.url})
        assert (got.status, got.json()) == (200, {"removed": engine.url, "pool": "default"})
        assert list(relay.upstreams) == [second_engine.url]
        for _ in range(4):
            assert (await ask(relay.port, CHAT)).status == 200
        assert (engine.stats()["served"], second_engine.stats()["served"]) == (3, 4)
        assert leaving.outstanding == 3
        rows = [(up.url, up.state, up.in_flight) for up in (await status_of(relay)).pools[0].upstreams]
        assert rows == [(second_engine.url, "healthy", 0), (engine.url, "draining", 3)]
        await assert_whole(*clients)
        await until(lambda: leaving.outstanding == 0)
        await until(lambda: engine.stats()["connections_open"] == 0)  # nothing is kept for later
        assert [up.url for up in (await status_of(relay)).pools[0].upstreams] == [second_engine.url]
        assert {record.outcome for record in relay.records} == {"--"}


async def test_standard_error_tells_who_comes_and_goes(capsys: pytest.CaptureFixture[str]) -> None:
    urls = [f"http://127.0.0.1:{port}" for port in range(9, 30)]
    loaded = config_of(pool_of(*urls))
    async with running_fleet(pool_of(urls[0]), load_config=lambda: loaded) as relay:
        assert (await relay.admin("DELETE", "/-/upstreams", {"url": urls[0]})).status == 200
        assert (await relay.admin("POST", "/-/upstreams", {"url": "http://127.0.0.1:1"})).status == 200
        capsys_said = capsys.readouterr().err
        assert f"relay: pool default: {urls[0]} taken out; none left\n" in capsys_said
        assert "relay: pool default: http://127.0.0.1:1 put in\n" in capsys_said
        assert (await relay.admin("POST", "/-/reload")).status == 200
        said = capsys.readouterr().err
    assert f"relay: pool default: in: {', '.join(sorted(urls)[:16])} and 5 more\n" in said
    assert "relay: pool default: out: http://127.0.0.1:1\n" in said


async def test_the_last_one_can_be_removed_and_come_back(engine: Engine) -> None:
    async with running_fleet(pool_of(engine.url, max_in_flight=9, max_queue=9)) as relay:
        assert (await ask(relay.port, CHAT)).status == 200
        await until(lambda: engine.stats()["connections_open"] == 1)
        assert (await relay.admin("DELETE", "/-/upstreams", {"url": engine.url})).status == 200
        await until(lambda: engine.stats()["connections_open"] == 0)
        refused = await ask(relay.port, CHAT)
        assert (refused.status, refused.error["code"]) == (503, "no_upstream")
        assert refused.headers["retry-after"] == "1"
        assert (await relay.admin("POST", "/-/upstreams", {"url": engine.url})).status == 200
        assert (await ask(relay.port, CHAT)).status == 200


async def test_one_that_comes_back_is_what_the_file_says(engine: Engine) -> None:
    configured = msgspec.structs.replace(parse_upstream(engine.url), weight=3, max_in_flight=7)
    async with running_fleet(PoolConfig(upstreams=(configured,))) as relay:
        for _ in range(2):
            assert relay.upstreams[engine.url].config == configured
            assert (await relay.admin("DELETE", "/-/upstreams", {"url": engine.url})).status == 200
            assert not relay.upstreams
            assert (await relay.admin("POST", "/-/upstreams", {"url": engine.url})).status == 200
        assert relay.upstreams[engine.url].config == configured
        assert (await ask(relay.port, CHAT)).status == 200


@pytest.mark.parametrize("change", ["by hand", "another weight", "another policy"])
async def test_what_goes_on_at_one_that_comes_back_counts(change: str) -> None:
    def config(weight: int, balance: Literal["least_outstanding", "random"]) -> settings.Config:
        engines = tuple(msgspec.structs.replace(each, weight=weight) for each in engines_of([engine.url], most=2))
        return config_of(PoolConfig(upstreams=engines, max_queue=9, balance=balance))

    async with fakes("a") as (engine,):
        first = config(1, "least_outstanding")
        loaded = config(3, "random" if change == "another policy" else "least_outstanding")
        async with running_fleet(*first.pools, load_config=lambda: loaded) as relay, AsyncExitStack() as stack:
            engine.hold()
            clients = [await stack.enter_async_context(await Client.connect(relay.port)) for _ in range(5)]
            for client in clients[:2]:
                await client.send(CHAT)
            await until(lambda: len(engine.asked) == 2)
            for _ in range(2):
                if change == "by hand":
                    assert (await relay.admin("DELETE", "/-/upstreams", {"url": engine.url})).status == 200
                    assert (await relay.admin("POST", "/-/upstreams", {"url": engine.url})).status == 200
                else:
                    assert (await relay.admin("POST", "/-/reload")).status == 200
            for client in clients[2:]:
                await client.send(CHAT)
            await until(lambda: relay.queued == 3)
            assert len(engine.asked) == 2
            engine.gate.set()
            assert [(await client.answer()).status for client in clients] == [200] * 5


async def test_who_waits_when_the_last_is_removed_is_told() -> None:
    async with fakes("a") as (engine,), running_fleet(pool_of(engine.url, most=1, max_queue=1)) as relay:
        engine.hold()
        async with await Client.connect(relay.port) as first:
            await first.send(CHAT)
            await until(lambda: len(engine.asked) == 1)
            async with waiting(relay, CHAT) as (waiter,):
                await relay.admin("DELETE", "/-/upstreams", {"url": engine.url})
                assert relay.queued == 0
                refused = await waiter.answer()
                assert (refused.status, refused.error["code"]) == (503, "no_upstream")
            engine.gate.set()
            assert (await first.answer()).payload == STREAM


async def test_an_added_engine_serves_who_waits() -> None:
    async with fakes("a", "b") as (full, new), running_fleet(pool_of(full.url, most=1, max_queue=1)) as relay:
        full.hold()
        async with await Client.connect(relay.port) as first:
            await first.send(CHAT)
            await until(lambda: len(full.asked) == 1)
            async with waiting(relay, CHAT) as (waiter,):
                await relay.admin("POST", "/-/upstreams", {"url": new.url})
                assert (await waiter.answer()).payload == STREAM
            full.gate.set()
            assert (await first.answer()).payload == STREAM


async def test_all_engines_are_replaced_under_load(engine: Engine, second_engine: Engine) -> None:
    """One engine after the other, back and forth, while clients go on asking: nobody notices."""
    stop = trio.Event()
    answers: list[Answer] = []

    async def client(relay: RunningFleet) -> None:
        async with await Client.connect(relay.port) as connection:
            while not stop.is_set():
                answers.append(await connection.ask(request(sim_step_ms="1")))

    async with running_fleet(pool_of(engine.url)) as relay, trio.open_nursery() as nursery:
        for _ in range(10):
            nursery.start_soon(client, relay)
        for new, old in [(second_engine, engine), (engine, second_engine)] * 3:
            served = new.stats()["served"]
            assert (await relay.admin("POST", "/-/upstreams", {"url": new.url})).status == 200
            assert (await relay.admin("DELETE", "/-/upstreams", {"url": old.url})).status == 200
            await until(lambda new=new, served=served: new.stats()["served"] > served + 20)  # type: ignore[misc]
        stop.set()
    assert {(each.status, each.end, len(each.frames)) for each in answers} == {(200, "whole", 8)}
    assert {(record.outcome, record.attempts) for record in relay.records} == {("--", 1)}


# -- the paths of the vLLM-Ascend proxy


async def test_instances_and_healthcheck() -> None:
    split = settings.PoolConfig(
        name="long",
        models=("r1",),
        prefill=engines_of(["http://127.0.0.1:9"]),
        decode=engines_of(["http://127.0.0.1:9"]),
    )
    async with fakes("a") as (engine,), running_fleet(pool_of(engine.url), split) as relay:

        async def counts() -> Any:
            return (await relay.admin("GET", "/healthcheck")).json()

        assert await counts() == {
            "status": "ok", "serve_instances": 1, "prefill_instances": 1, "decode_instances": 1,
        }  # fmt: skip
        added = await relay.admin("POST", "/instances/add", {"type": "prefill", "instances": ["10.0.0.1:8000", "b:1"]})
        assert (added.status, added.json()) == (200, {"added": ["10.0.0.1:8000", "b:1"], "type": "prefill"})
        assert (
            await relay.admin("POST", "/instances/add", {"type": "decode", "instances": "[::1]:8000"})
        ).status == 200
        assert (await counts())["prefill_instances"] == 3
        assert (await counts())["decode_instances"] == 2
        ups = (await status_of(relay)).pools[1].upstreams
        assert [(up.role, up.url) for up in ups] == [
            ("prefill", "http://127.0.0.1:9"),
            ("prefill", "http://10.0.0.1:8000"),
            ("prefill", "http://b:1"),
            ("decode", "http://127.0.0.1:9"),
            ("decode", "http://[::1]:8000"),
        ]
        removed = await relay.admin("POST", "/instances/remove", {"type": "prefill", "instances": ["http://b:1"]})
        assert (removed.status, removed.json()) == (200, {"removed": ["http://b:1"], "type": "prefill"})
        assert (await counts())["prefill_instances"] == 2


async def test_an_instance_that_comes_back_is_what_the_file_says() -> None:
    configured = msgspec.structs.replace(parse_upstream("http://127.0.0.1:9"), weight=3, max_in_flight=7)
    split = PoolConfig(prefill=(configured,), decode=engines_of(["http://127.0.0.1:9"]))
    change = {"type": "prefill", "instances": "127.0.0.1:9"}
    async with running_fleet(split) as relay:
        assert (await relay.admin("POST", "/instances/remove", change)).status == 200
        assert (await relay.admin("POST", "/instances/add", change)).status == 200
        (up, _) = (await status_of(relay)).pools[0].upstreams
        assert (up.role, up.weight, up.max_in_flight) == ("prefill", 3, 7)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "wanted: "),
        (b'{"type":"prefill"}', "missing required field `instances`"),
        ({"type": "prefill", "instances": 3}, "wanted: "),
        ({"type": "prefill", "instances": ["a:1"]}, "no pool has instances of type prefill"),
        ({"type": "serve", "instances": ["a:1", "b:x"]}, '"http://b:x" has no valid port'),
        ({"type": "serve", "instances": ["{some}", "{wrong}"]}, "stays as it was: {wrong} is "),
    ],
)
@pytest.mark.parametrize("path", ["/instances/add", "/instances/remove"])
async def test_wrong_instances_change_nothing(path: str, body: Any, said: str) -> None:
    async with fakes("a") as (engine,), running_fleet(pool_of(engine.url, "http://a:1")) as relay:
        before = list(relay.upstreams)
        if path == "/instances/add":
            await relay.admin("DELETE", "/-/upstreams", {"url": "http://a:1"})
            before.remove("http://a:1")
            some, wrong = "http://a:1", engine.url
        else:
            some, wrong = engine.url, "http://b:1"
        if isinstance(body, dict) and isinstance(body["instances"], list):
            body = {**body, "instances": [each.format(some=some, wrong=wrong) for each in body["instances"]]}
        got = await relay.admin("POST", path, body)
        assert got.status == 400
        assert said.format(wrong=wrong) in got.json()["error"]
        assert list(relay.upstreams) == before


async def test_web_pages_cannot_change_the_fleet(engine: Engine) -> None:
    body = b'{"url": "http://127.0.0.1:9"}'
    message = (
        b"POST /-/upstreams HTTP/1.1\r\nHost: 127.0.0.1\r\nOrigin: http://evil.example\r\nContent-Type: text/plain\r\n"
        b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
    )
    async with running_fleet(pool_of(engine.url)) as relay:
        answer = await ask(relay.admin_port, message)
        assert answer.status == 403
        assert [up.url for up in (await status_of(relay)).pools[0].upstreams] == [engine.url]
