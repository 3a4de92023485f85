"""Streams through a whole relay: what the client gets is what the engine sent, when it sent it."""

from __future__ import annotations

import httpx
import trio

from relay_bench.engine import Engine, EngineConfig, serve_engine
from tests.conftest import running_relay

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 6, "stream": True}


async def test_a_streamed_completion_arrives_as_the_engine_sent_it() -> None:
    async with trio.open_nursery() as nursery:
        engine: Engine = await nursery.start(serve_engine, EngineConfig(listen="127.0.0.1:0"))
        async with running_relay(engine.url) as relay, httpx.AsyncClient() as client:
            headers = {"x-request-id": "same"}
            direct = await client.post(f"{engine.url}/v1/chat/completions", json=CHAT, headers=headers)
            through = await client.post(
                f"http://127.0.0.1:{relay.port}/v1/chat/completions", json=CHAT, headers=headers
            )
            assert through.content == direct.content
            assert through.headers["content-type"] == "text/event-stream; charset=utf-8"
            assert through.headers["x-accel-buffering"] == "no"
            record = await relay.record()
            assert record.outcome == "--"
            assert record.status == 200
            assert record.finish_reason == "length"
            assert record.frames == direct.content.count(b"\n\n")
            assert record.completion_tokens == 6
            assert record.error is None
            assert record.ttft_ms is not None
        nursery.cancel_scope.cancel()


async def test_a_model_that_the_pool_does_not_name_is_refused() -> None:
    async with trio.open_nursery() as nursery:
        engine: Engine = await nursery.start(serve_engine, EngineConfig(listen="127.0.0.1:0"))
        async with running_relay(engine.url, models=("tin*",)) as relay, httpx.AsyncClient() as client:
            url = f"http://127.0.0.1:{relay.port}/v1/chat/completions"
            assert (await client.post(url, json=CHAT)).status_code == 200
            unknown = await client.post(url, json=CHAT | {"model": "other"})
            assert unknown.status_code == 404
            assert unknown.json()["error"]["code"] == "model_not_found"
            assert "tin*" in unknown.json()["error"]["message"]
            garbage = await client.post(url, content=b"{")
            assert garbage.status_code == 400
            assert garbage.json()["error"]["code"] == "invalid_json"
            assert engine.stats()["served"] == 1
            assert (await relay.record(2)).outcome == "RR"
        nursery.cancel_scope.cancel()
