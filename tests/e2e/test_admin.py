"""The admin side tells what there is: status, exchanges, readiness, metrics."""

from __future__ import annotations

import time

import msgspec
import pytest
import trio

import relay as package
from relay.cli import main
from relay.config import TimeoutsConfig
from relay.core.status import Status
from relay_bench.engine import Engine
from tests.e2e.fleet import (
    WATCHED,
    Scrape,
    assert_whole,
    eject,
    fakes,
    pool_of,
    running_fleet,
    status_of,
    streams,
    waiting,
)
from tests.e2e.harness import ASKS, Client, ask, request, until

CHAT = request()


async def test_status_is_what_relay_status_shows(engine: Engine, capsys: pytest.CaptureFixture[str]) -> None:
    pools = (
        pool_of(engine.url, name="chat", models=("tiny", "t*"), max_in_flight=1, max_queue=2, balance="round_robin"),
        pool_of("http://127.0.0.1:9", name="rest"),
    )
    async with running_fleet(*pools) as relay, streams(relay, engine, 1) as clients:
        async with waiting(relay, CHAT) as (waiter,):
            status = await status_of(relay)
            assert (status.version, status.state, status.workers) == (package.__version__, "ready", 1)
            assert (status.in_flight, status.frames) == (2, 2)
            assert 0 < status.uptime_s < 60
            chat, rest = status.pools
            assert (chat.name, chat.models, chat.policy) == ("chat", ("tiny", "t*"), "round_robin")
            assert (chat.in_flight, chat.queued) == (1, 1)
            assert (rest.in_flight, rest.queued, rest.models, rest.policy) == (0, 0, (), "least_outstanding")
            (up,) = chat.upstreams
            assert (up.url, up.role, up.state, up.weight) == (engine.url, "serve", "healthy", 1)
            assert (up.in_flight, up.idle, up.failures, up.last_error, up.probe_ms) == (1, 0, 0, None, None)
            assert (chat.max_in_flight, up.max_in_flight) == (1, 0)

            flags = ["status", "--admin", f"127.0.0.1:{relay.admin_port}"]
            assert await trio.to_thread.run_sync(main, flags) == 0
            shown = capsys.readouterr().out
            assert "2 in flight" in shown
            assert "chat · tiny, t* · round_robin" in shown
            assert engine.url in shown
            assert await trio.to_thread.run_sync(main, [*flags, "--json"]) == 0
            assert msgspec.json.decode(capsys.readouterr().out, type=Status).pools[0].queued == 1

            await assert_whole(*clients)
            assert (await waiter.answer()).status == 200
        await relay.record(2)
        after = await status_of(relay)
        assert (after.in_flight, after.pools[0].in_flight, after.pools[0].queued) == (0, 0, 0)
        assert after.frames == 11 + 8
        assert after.pools[0].upstreams[0].idle == 1
        rates = after.pools[0].rates
        elapsed = after.uptime_s
        assert rates.requests_per_s == pytest.approx(2 / elapsed, rel=0.3)
        assert rates.tokens_per_s == pytest.approx(8 / elapsed, rel=0.3)  # of the other the engine said nothing
        assert rates.ttft_p50_ms is not None
        assert rates.gap_p99_ms is not None
        assert 30 < rates.gap_p99_ms < 500
        assert after.pools[1].rates.requests_per_s == 0


async def test_rates_are_those_of_the_last_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("relay.net.admin._RATE_S", 0.05)
    async with fakes("a") as (engine,), running_fleet(pool_of(engine.url)) as relay:
        for _ in range(5):
            await ask(relay.port, CHAT)
        await relay.record(5)
        assert (await status_of(relay)).pools[0].rates.requests_per_s > 0
        with trio.fail_after(5):
            while (await status_of(relay)).pools[0].rates.requests_per_s:  # noqa: ASYNC110 — it is asked over HTTP
                await trio.sleep(0.01)


async def test_states_of_engines() -> None:
    async with fakes("a", "b", "c", "d") as (well, down, ejected, due):
        urls = [each.url for each in (well, down, ejected, due)]
        async with running_fleet(pool_of(*urls)) as relay:
            for each in (ejected, due):
                await eject(relay, each, CHAT)
            relay.upstreams[due.url].health.ejected_until = time.monotonic()
            relay.upstreams[down.url].health.on_probe(False, 0.0)
            (pool,) = (await status_of(relay)).pools
            assert [up.state for up in pool.upstreams] == ["healthy", "unhealthy", "ejected", "half-open"]
            assert [up.failures for up in pool.upstreams] == [0, 0, 5, 5]
            assert pool.upstreams[2].last_error == "the engine answered 503"
            assert pool.upstreams[0].last_error_age_s is None
            assert pool.upstreams[2].last_error_age_s == pytest.approx(0.0, abs=5.0)


async def test_probes_are_timed() -> None:
    async with fakes("a") as (engine,), running_fleet(pool_of(engine.url), health=WATCHED) as relay:
        (pool,) = (await status_of(relay)).pools
        assert pool.upstreams[0].probe_ms is not None
        assert 0 < pool.upstreams[0].probe_ms < 5000


async def test_exchanges_in_flight_oldest_first(engine: Engine) -> None:
    async with running_fleet(pool_of(engine.url, name="chat", max_in_flight=2, max_queue=1)) as relay:
        assert (await relay.admin("GET", "/-/exchanges")).json() == []
        async with await Client.connect(relay.port) as one, await Client.connect(relay.port) as two:
            await one.send(request(sim_fault="stall-after:2", x_request_id="one"))
            await one.frames(2)
            body = ASKS["/v1/completions"]
            await two.send(request("/v1/completions?x=1", body, sim_fault="stall-before-head", x_request_id="two"))
            await until(lambda: engine.stats()["served"] == 2)
            async with waiting(relay, request(x_request_id="three")):
                first, second, third = (await relay.admin("GET", "/-/exchanges")).json()
            ages = [each.pop("age_ms") for each in (first, second, third)]
            assert ages == sorted(ages, reverse=True)
            assert min(ages) > 0
            common = {"client": "127.0.0.1", "model": "tiny", "pool": "chat"}
            there = {"upstream": engine.url, "attempts": 1}
            chat = {"path": "/v1/chat/completions"}
            assert first == {"id": "one", **chat, "phase": "data", "frames": 2, **common, **there}
            assert second == {"id": "two", "path": "/v1/completions", "phase": "head", "frames": 0, **common, **there}
            waits = {"upstream": None, "attempts": 0, "frames": 0, "phase": "queue"}
            assert third == {"id": "three", **chat, **waits, **common}
        await relay.record(3)
        assert (await relay.admin("GET", "/-/exchanges")).json() == []


async def test_readiness_and_life() -> None:
    async with fakes("a") as (engine,), running_fleet(pool_of(engine.url)) as relay:
        assert (await relay.admin("GET", "/-/live")).json() == {"status": "live"}
        assert (await relay.admin("GET", "/-/ready")).json() == {"status": "ready"}
        head = await relay.admin("HEAD", "/-/ready")
        assert (head.status, head.payload) == (200, b"")
        relay.worker.service.is_ready = False
        assert (await relay.admin("GET", "/-/ready")).status == 503
        assert (await status_of(relay)).state == "draining"
        assert (await relay.admin("GET", "/-/live")).status == 200


@pytest.mark.parametrize(
    ("method", "path", "status", "said"),
    [
        ("GET", "/", 404, "unknown path; try /-/live, /-/ready, /metrics, /-/status"),
        ("GET", "/v1/models", 404, "unknown path"),
        ("POST", "/v1/chat/completions", 404, "unknown path"),
        ("POST", "/-/status", 405, "only GET here"),
        ("GET", "/-/upstreams", 405, "only POST, DELETE here"),
        ("GET", "/-/reload", 405, "only POST here"),
        ("GET", "/instances/add", 405, "only POST here"),
    ],
)
async def test_what_is_not_there(method: str, path: str, status: int, said: str) -> None:
    async with fakes("a") as (engine,), running_fleet(pool_of(engine.url)) as relay:
        got = await relay.admin(method, path)
        assert (got.status, got.headers["content-type"]) == (status, "application/json")
        assert said in got.json()["error"]
        assert not engine.asked


@pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
@pytest.mark.parametrize("path", ["/-/status", "/-/upstreams", "/-/reload", "/-/nonsense", "/-/", "/-/status?a=1"])
async def test_of_the_admin_sides_paths_engines_hear_nothing(method: str, path: str) -> None:
    async with fakes("a") as (engine,), running_fleet(pool_of(engine.url)) as relay:
        refused = await ask(relay.port, request(path, b"", method=method))
        assert (refused.status, refused.error["code"]) == (404, "not_found")
        assert "on its admin side" in refused.error["message"]
        assert not engine.asked
        assert (await relay.record()).upstream is None
        assert (await ask(relay.port, request("/-", b"", method="GET"))).status == 200  # an engine's own
        assert len(engine.asked) == 1


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"nonsense\r\n\r\n", 400),
        (b"GET /-/status HTTP/1.1\r\n\r\n", 400),  # without Host
        (b"GET / HTTP/1.1\r\nhost: x\r\nx: " + b"a" * 200_000 + b"\r\n\r\n", 431),
        (b"POST /-/upstreams HTTP/1.1\r\nhost: x\r\ncontent-length: 70000\r\n\r\n" + b"a" * 70_000, 413),
        (b"POST /-/upstreams HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n", 400),
    ],
)
async def test_what_is_no_request(data: bytes, status: int) -> None:
    async with fakes("a") as (engine,), running_fleet(pool_of(engine.url)) as relay:
        got = await ask(relay.admin_port, data)
        assert got.status == status
        assert got.json()["error"]
        assert (await relay.admin("GET", "/-/live")).status == 200


async def test_admin_clients_that_leave_or_dawdle_harm_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("relay.net.admin.ADMIN_S", 0.05)
    async with fakes("a") as (engine,), running_fleet(pool_of(engine.url)) as relay:
        for how in ("close", "rst", "fin"):
            async with await Client.connect(relay.admin_port) as client:
                await client.send(b"POST /-/upstreams HTTP/1.1\r\nhost: x\r\ncontent-length: 10\r\n\r\n{")
                client.leave(how)
        async with await Client.connect(relay.admin_port) as client:
            await client.send(b"GET /-/stat")
            assert await client.is_closed()
        assert (await relay.admin("GET", "/-/live")).status == 200


async def test_a_fault_of_the_admin_side_is_its_own(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("relay.net.admin.metrics_text", fail)
    async with running_fleet(pool_of(engine.url)) as relay, streams(relay, engine, 1) as clients:
        async with await Client.connect(relay.admin_port) as client:
            await client.send(b"GET /metrics HTTP/1.1\r\nhost: x\r\n\r\n")
            assert await client.is_closed()
        assert "a bug" in capsys.readouterr().err
        assert (await relay.admin("GET", "/-/live")).status == 200
        await assert_whole(*clients)


# -- metrics


async def test_metrics_after_known_traffic(engine: Engine) -> None:
    body = {"max_tokens": 6, "stream_options": {"include_usage": True}}
    async with running_fleet(
        pool_of(engine.url, name="chat", max_in_flight=1, max_queue=1), timeouts=TimeoutsConfig(queue_s=0.05)
    ) as relay:
        for _ in range(3):
            assert (await ask(relay.port, request(body=body, x_sim_usage="cached:2", sim_step_ms="2"))).status == 200
        assert (await ask(relay.port, request("/v1/messages", {"stream": False}))).status == 200
        assert (await ask(relay.port, request(sim_fault="status:400"))).status == 400
        assert (await ask(relay.port, request(sim_fault="die-before-head"))).status == 502
        assert (await ask(relay.port, request(sim_fault="die-after:2"))).end == "fin"
        async with await Client.connect(relay.port) as client:
            await client.send(request(sim_fault="stall-after:2"))
            await client.frames(2)
            assert (await ask(relay.port, CHAT)).status == 429  # after its time in the queue
            held = Scrape(await relay.admin("GET", "/metrics"))
            client.leave("close")
        records = [await relay.record(number + 1) for number in range(9)]
        scrape = Scrape(await relay.admin("GET", "/metrics"))

    assert (held("relay_in_flight", pool="chat"), held("relay_queue_depth", pool="chat")) == (1, 0)
    up = {"pool": "chat", "role": "serve", "upstream": engine.url}
    assert (held("relay_upstream_healthy", **up), held("relay_upstream_in_flight", **up)) == (1, 1)
    assert (scrape("relay_in_flight", pool="chat"), scrape("relay_upstream_in_flight", **up)) == (0, 0)

    chat = {"pool": "chat", "route": "chat"}
    assert scrape("relay_requests_total", **chat, status="200", outcome="--") == 3
    assert scrape("relay_requests_total", pool="chat", route="messages", status="200", outcome="--") == 1
    assert scrape("relay_requests_total", **chat, status="400", outcome="--") == 1
    assert scrape("relay_requests_total", **chat, status="502", outcome="UH") == 1
    assert scrape("relay_requests_total", **chat, status="200", outcome="UD") == 1
    assert scrape("relay_requests_total", **chat, status="200", outcome="CD") == 1
    assert scrape("relay_requests_total", **chat, status="429", outcome="rQ") == 1
    assert scrape.sum("relay_requests_total") == len(records)

    own = {"pool": "chat", "model": "tiny"}
    for kind, name in (("prompt", "prompt_tokens"), ("cached", "cached_tokens"), ("completion", "completion_tokens")):
        said = sum(getattr(record, name) or 0 for record in records if record.usage == "engine")
        assert (scrape("relay_tokens_total", **own, kind=kind) or 0) == said, kind
    assert scrape("relay_time_to_first_token_seconds_count", **own) == sum(r.ttft_ms is not None for r in records)
    ttft = sum(record.ttft_ms or 0 for record in records) / 1000
    assert scrape("relay_time_to_first_token_seconds_sum", **own) == pytest.approx(ttft, rel=0.01)
    streams = [record.frames for record in records if record.frames]
    gaps = scrape("relay_inter_frame_seconds_count", **own)
    assert gaps is not None  # what comes together with the first frame has none
    assert sum(streams) - 2 * len(streams) <= gaps <= sum(streams) - len(streams)
    assert scrape("relay_request_duration_seconds_count") == len(records)
    total = sum(record.total_ms or 0 for record in records) / 1000
    assert scrape("relay_request_duration_seconds_sum") == pytest.approx(total, rel=0.05)
    assert scrape("relay_frames_total") == sum(record.frames for record in records)
    assert scrape("relay_bytes_total", direction="in") == sum(record.bytes_in for record in records)
    assert scrape("relay_bytes_total", direction="out") == sum(record.bytes_out for record in records)
    assert scrape("relay_client_disconnects_total", phase="data") == 1
    assert scrape("relay_upstream_failures_total", phase="head") == 1
    assert (scrape("relay_failovers_total") or 0) == 0
    assert scrape("relay_added_seconds_count", stage="queue") == 1
    assert scrape("process_resident_memory_bytes") is not None


async def test_gaps_of_a_stream_that_runs_on_are_all_counted(engine: Engine) -> None:
    async with running_fleet(pool_of(engine.url)) as relay, await Client.connect(relay.port) as client:
        service = relay.worker.service
        await client.send(request(body={"max_tokens": 8}, sim_step_ms="5"))
        for number in range(1, 10):  # as if a beat came between any two frames
            await client.frames(number)
            service.tally.take_in(service)
        record = await relay.record()
        scrape = Scrape(await relay.admin("GET", "/metrics"))
    gaps = scrape.sum("relay_inter_frame_seconds_count")
    assert record.frames - 2 <= gaps <= record.frames - 1  # one that comes together with the first has none


async def test_failovers_and_probes_in_the_metrics() -> None:
    async with fakes("a", "b") as (bad, good), running_fleet(pool_of(bad.url, good.url)) as relay:
        await eject(relay, bad, CHAT)
        scrape = Scrape(await relay.admin("GET", "/metrics"))
        assert scrape("relay_failovers_total") == 5
        assert scrape("relay_upstream_failures_total", phase="head") == 5
        healthy = {url: scrape("relay_upstream_healthy", pool="default", role="serve", upstream=url)
                   for url in (bad.url, good.url)}  # fmt: skip
        assert healthy == {bad.url: 0, good.url: 1}
        assert scrape("relay_upstreams_up", pool="default", role="serve") == 1
        answers = {
            (url, class_): scrape(
                "relay_upstream_responses_total",
                **{"pool": "default", "role": "serve", "upstream": url, "class": class_},
            )
            for url in (bad.url, good.url)
            for class_ in ("2xx", "5xx", "failed")
        }
        assert answers == {
            (bad.url, "2xx"): None, (bad.url, "5xx"): None, (bad.url, "failed"): 5,
            (good.url, "2xx"): len(good.asked), (good.url, "5xx"): None, (good.url, "failed"): None,
        }  # fmt: skip
