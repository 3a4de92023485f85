"""Streams through a whole relay: what the client gets is what the engine sent, when it sent it."""

from __future__ import annotations

import re

import httpx
import pytest
import trio

from relay.config import TimeoutsConfig
from relay.core.frames import FrameRelay, Pieces
from relay.core.health import Attempt
from relay.net.delivery import Delivery
from relay.net.opening import Opening
from relay.net.reply import Reply
from relay_bench.engine import Engine, EngineConfig, serve_engine
from tests.conftest import changes_pump, running_relay
from tests.e2e.harness import ask, assert_cut_off, request, until

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 6, "stream": True}
_CREATED = re.compile(rb'"created":\d+')  # two answers may be of two seconds


@pytest.mark.usefixtures("pump_form")
async def test_many_streams_at_once_lose_nothing() -> None:
    answers: list[bytes] = []

    async def ask(client: httpx.AsyncClient, url: str, number: int) -> None:
        body = CHAT | {"max_tokens": 40 + number % 7}
        answers.append((await client.post(url, json=body, headers={"x-request-id": str(number)})).content)

    limits = httpx.Limits(max_connections=100)
    async with trio.open_nursery() as nursery:
        engine: Engine = await nursery.start(serve_engine, EngineConfig(listen="127.0.0.1:0", step_ms=2))
        async with running_relay(engine.url) as relay, httpx.AsyncClient(limits=limits, timeout=20) as client:
            url = f"http://127.0.0.1:{relay.port}/v1/chat/completions"
            async with trio.open_nursery() as asking:
                for number in range(100):
                    asking.start_soon(ask, client, url, number)
            # role, one frame a token, [DONE]
            assert sorted(answer.count(b"\n\n") for answer in answers) == sorted(42 + n % 7 for n in range(100))
            assert all(answer.endswith(b"data: [DONE]\n\n") for answer in answers)
            assert {(await relay.record(n + 1)).outcome for n in range(100)} == {"--"}
        nursery.cancel_scope.cancel()


@pytest.mark.usefixtures("pump_form")
async def test_a_silent_engine_is_noticed_and_a_leaving_client_frees_it() -> None:
    async with trio.open_nursery() as nursery:
        engine: Engine = await nursery.start(serve_engine, EngineConfig(listen="127.0.0.1:0"))
        timeouts = TimeoutsConfig(between_tokens_s=0.3)
        async with running_relay(engine.url, timeouts=timeouts) as relay, httpx.AsyncClient() as client:
            url = f"http://127.0.0.1:{relay.port}/v1/chat/completions"
            with pytest.raises(httpx.RemoteProtocolError):
                await client.post(url, json=CHAT, headers={"x-sim-fault": "stall-after:2"})
            assert (await relay.record()).outcome == "uD"
            with trio.move_on_after(0.3):
                await client.post(url, json=CHAT, headers={"x-sim-fault": "stall-before-head"})
            assert (await relay.record(2)).outcome == "CH"
            await until(lambda: engine.stats()["running"] == 0, 0.5)
        nursery.cancel_scope.cancel()


@changes_pump
async def test_a_fault_of_the_relays_own_ends_one_stream_and_no_other(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    feed = FrameRelay.feed

    def fail_on_the_marked(self: FrameRelay, data: bytes, view: memoryview, out: Pieces) -> None:
        if self.finder.frames and b"broken" in data:
            raise RuntimeError("a bug")
        feed(self, data, view, out)

    monkeypatch.setattr(FrameRelay, "feed", fail_on_the_marked)
    async with trio.open_nursery() as nursery:
        engine: Engine = await nursery.start(serve_engine, EngineConfig(listen="127.0.0.1:0", step_ms=5))
        async with running_relay(engine.url) as relay, httpx.AsyncClient() as client:
            url = f"http://127.0.0.1:{relay.port}/v1/chat/completions"
            with pytest.raises(httpx.RemoteProtocolError):
                await client.post(url, json=CHAT, headers={"x-request-id": "broken"})
            assert (await relay.record()).outcome == "RD"
            good = await client.post(url, json=CHAT, headers={"x-request-id": "good"})
            assert good.content.endswith(b"data: [DONE]\n\n")
            assert "a bug" in capsys.readouterr().err
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    ("where", "fails", "outcome"),
    [(Opening, "begin_stream", "RH"), (Reply, "preface", "RH"), (Attempt, "answered", "RD"), (Delivery, "_pump", "RD")],
)
async def test_a_client_is_told_of_a_fault_of_the_relays_own(
    where: type,
    fails: str,
    outcome: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    engine: Engine,
) -> None:
    async def fail(*_: object, **__: object) -> None:
        await trio.lowlevel.checkpoint()
        raise RuntimeError("a bug")

    def fail_at_once(*_: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(where, fails, fail_at_once if fails in ("preface", "answered") else fail)
    async with running_relay(engine.url) as relay:
        answer = await ask(relay.port, request(sim_step_ms="1000"))
        if outcome == "RH":
            assert (answer.status, answer.end, answer.error["code"]) == (500, "whole", "internal_error")
        else:
            assert answer.end != "whole"
            if where is not Attempt:  # there it is not known whether a frame is cut in two
                assert_cut_off(answer, "internal_error", frames=len(answer.frames) - 1)
        record = await relay.record()
        assert (record.outcome, record.error) == (outcome, "the relay failed; its standard error says how")
        assert "a bug" in capsys.readouterr().err
        await until(lambda: engine.stats()["running"] == 0)
        assert "streaming=0" in repr(relay.worker.service.pump)


@pytest.mark.usefixtures("pump_form")
async def test_a_streamed_completion_arrives_as_the_engine_sent_it() -> None:
    async with trio.open_nursery() as nursery:
        engine: Engine = await nursery.start(serve_engine, EngineConfig(listen="127.0.0.1:0"))
        async with running_relay(engine.url) as relay, httpx.AsyncClient() as client:
            headers = {"x-request-id": "same"}
            direct = await client.post(f"{engine.url}/v1/chat/completions", json=CHAT, headers=headers)
            through = await client.post(
                f"http://127.0.0.1:{relay.port}/v1/chat/completions", json=CHAT, headers=headers
            )
            assert _CREATED.sub(b"", through.content) == _CREATED.sub(b"", direct.content)
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
