"""Clients that do not stream, before engines that are asked to: one JSON body, equal to the engine's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import msgspec
import pytest
import trio

from relay.config import StreamConfig, TimeoutsConfig
from relay.core.request import Route
from relay_bench.engine import Engine, EngineConfig, serve_engine
from tests.conftest import running_relay
from tests.core.captured import CAPTURES, Captured
from tests.core.test_aggregate import ECHOED_LOGPROBS, PAIRS, base_name, pair
from tests.e2e.harness import (
    CHAT_PATH,
    PATHS,
    Client,
    ask,
    request,
    same,
    scripted,
    states,
    until,
)

FORCED: Final = StreamConfig(force_stream=True)
PATH_OF: Final = dict(zip((Route.CHAT, Route.COMPLETIONS, Route.RESPONSES, Route.MESSAGES), PATHS, strict=True))
WHOLE_REQUEST: Final = {"stream": False}
FRAMES: Final = (
    b'data: {"id":"c","choices":[{"index":0,"delta":{"role":"assistant","content":"a"}}]}\n\n',
    b'data: {"id":"c","choices":[{"index":0,"delta":{"content":"b"},"finish_reason":"stop"}]}\n\n',
    b'data: {"id":"c","choices":[],"usage":{"prompt_tokens":3,"completion_tokens":2,"total_tokens":5}}\n\n',
    b"data: [DONE]\n\n",
)
STREAM: Final = b"".join(FRAMES)
UNAVAILABLE_FRAME: Final = b'data: {"error": {"message": "starting", "type": "x", "param": null, "code": 503}}\n\n'
END: Final = b"0\r\n\r\n"


def streamed(payload: bytes, end: bytes = END) -> bytes:
    """An engine's answer of one chunk."""
    return (
        b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\nserver: e\r\n"
        b"transfer-encoding: chunked\r\n\r\n%x\r\n%b\r\n%b" % (len(payload), payload, end)
    )


# -- the built-in engine


@pytest.fixture
async def player(nursery: trio.Nursery, tmp_path: Path) -> Engine:
    """An engine that plays the recordings by name, a dot for the slash."""
    for file in CAPTURES.rglob("*.response.raw"):
        (tmp_path / str(file.relative_to(CAPTURES)).replace("/", ".")).symlink_to(file)
    started: Engine = await nursery.start(serve_engine, EngineConfig(captures=str(tmp_path)))
    return started


@pytest.mark.parametrize("path", PATHS)
async def test_the_body_is_the_engines_own(engine: Engine, path: str) -> None:
    whole = await ask(engine.port, request(path, WHOLE_REQUEST, x_request_id="x"))
    async with running_relay(engine.url, stream=FORCED) as relay:
        answer = await ask(relay.port, request(path, WHOLE_REQUEST, x_request_id="x"))
        record = await relay.record()
    assert (answer.status, answer.end) == (200, "whole")
    assert answer.headers["content-type"] == "application/json"
    assert answer.head.lower().count(b"content-type:") == 1
    assert "x-accel-buffering" not in answer.headers
    assert int(answer.headers["content-length"]) == len(answer.payload)
    expected = json.loads(same(whole.payload))
    if path == "/v1/messages":
        del expected["stop_sequence"]  # null, and vLLM's own body has no nulls here
    assert json.loads(same(answer.payload)) == expected
    assert json.loads(engine.last(path)["body"])["stream"] is True
    assert (record.outcome, record.stream, record.streamed_upstream) == ("--", False, True)
    assert record.frames > 6
    assert (record.usage, record.completion_tokens) == ("engine", 6)
    assert record.finish_reason is not None


@pytest.mark.parametrize("rechunk", ["", "split:3", "size:7", "frames:4", "close"])
async def test_recorded_streams_become_bodies(player: Engine, rechunk: str) -> None:
    """What `tests.core.test_aggregate` compares with the engine's own bodies comes out of the relay."""
    answers = [answer for answer in PAIRS if base_name(answer) not in ECHOED_LOGPROBS]
    async with running_relay(player.url, stream=FORCED) as relay, await Client.connect(relay.port) as client:
        for recorded in answers:
            answer = await client.ask(
                request(
                    PATH_OF[recorded.route],
                    body_without_stream(recorded),
                    sim_play=recorded.name.replace("/", "."),
                    sim_rechunk=rechunk,
                )
            )
            assert (answer.status, answer.end) == (200, "whole"), recorded
            assert answer.json() == pair(recorded)[1], recorded
        assert {record.streamed_upstream for record in relay.records} == {True}
        if rechunk != "close":  # the engine's connection is used again and again
            assert [record.connect_ms is None for record in relay.records] == [False] + [True] * (len(answers) - 1)


def body_without_stream(recorded: Captured) -> bytes:
    body = json.loads((CAPTURES / f"{recorded.name}.request.json").read_bytes())
    del body["stream"]
    body.pop("stream_options", None)
    return json.dumps(body).encode()


@pytest.mark.parametrize("path", PATHS)
async def test_streaming_clients_are_not_touched(engine: Engine, path: str) -> None:
    direct = await ask(engine.port, request(path, x_request_id="x"))
    async with running_relay(engine.url, stream=FORCED) as relay:
        answer = await ask(relay.port, request(path, x_request_id="x"))
    assert same(answer.payload) == same(direct.payload)
    assert engine.last(path)["body"].encode() == request(path).partition(b"\r\n\r\n")[2]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT_PATH, {"stream": False, "prompt_logprobs": 1}),
        ("/v1/completions", {"stream": False, "echo": True, "logprobs": 1}),
        ("/v1/embeddings", {"input": "hi"}),
    ],
)
async def test_what_only_a_whole_answer_can_say_is_not_streamed(engine: Engine, path: str, body: Any) -> None:
    async with running_relay(engine.url, stream=FORCED) as relay:
        answer = await ask(relay.port, request(path, body))
        record = await relay.record()
    assert answer.headers["content-type"] == "application/json"
    assert engine.last(path)["body"].encode() == request(path, body).partition(b"\r\n\r\n")[2]
    assert not record.streamed_upstream


async def test_a_pool_decides_for_itself(engine: Engine) -> None:
    async with running_relay(engine.url) as relay:
        service = relay.worker.service
        pool = msgspec.structs.replace(service.config.pools[0], force_stream=True)
        relay.worker.roster.reconfigure(msgspec.structs.replace(service.config, pools=(pool,)), service.guard)
        await ask(relay.port, request(body=WHOLE_REQUEST))
        assert (await relay.record()).streamed_upstream


@pytest.mark.parametrize("fault", ["json-on-stream", "json-error", "status:418"])
async def test_json_answers_to_a_forced_stream_go_through(engine: Engine, fault: str) -> None:
    direct = await ask(engine.port, request(sim_fault=fault, x_request_id="x"))
    async with running_relay(engine.url, stream=FORCED) as relay:
        answer = await ask(relay.port, request(body=WHOLE_REQUEST, sim_fault=fault, x_request_id="x"))
        record = await relay.record()
    assert (answer.status, same(answer.payload)) == (direct.status, same(direct.payload))
    assert (record.outcome, record.streamed_upstream) == ("--", False)


async def test_a_stream_under_a_false_type_is_one(engine: Engine) -> None:
    async with running_relay(engine.url, stream=FORCED) as relay:
        answer = await ask(relay.port, request(body=WHOLE_REQUEST, sim_fault="wrong-content-type"))
    assert answer.json()["object"] == "chat.completion"


async def test_a_client_of_http_1_0(engine: Engine) -> None:
    async with running_relay(engine.url, stream=FORCED) as relay:
        answer = await ask(relay.port, request(body=WHOLE_REQUEST, version="1.0"))
    assert int(answer.headers["content-length"]) == len(answer.payload)
    assert answer.json()["object"] == "chat.completion"


# -- failures


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("fault", ["error-frame:2", "error-first"])
async def test_an_error_in_the_stream_has_its_status(engine: Engine, path: str, fault: str) -> None:
    async with running_relay(engine.url, stream=FORCED) as relay:
        answer = await ask(relay.port, request(path, WHOLE_REQUEST, sim_fault=fault))
        record = await relay.record()
    assert answer.status >= 400
    assert answer.headers["content-type"] == "application/json"
    assert answer.error["message"]
    assert (record.status, record.outcome, record.streamed_upstream) == (answer.status, "--", True)
    assert record.error


async def test_an_error_that_another_engine_may_not_have() -> None:
    """Nothing has gone out, so a 503 within the first engine's stream is answered by the second."""
    refusal = streamed(FRAMES[0] + UNAVAILABLE_FRAME)
    async with scripted((refusal, "fin"), (streamed(STREAM), "keep")) as engines:
        async with running_relay(*engines.urls, stream=FORCED) as relay:
            answer = await ask(relay.port, request(body=WHOLE_REQUEST))
            record = await relay.record()
    assert answer.json()["choices"][0]["message"]["content"] == "ab"
    assert (record.attempts, record.status, record.error, record.completion_tokens) == (2, 200, None, 2)


async def test_the_last_engines_error_is_the_answer() -> None:
    refusal = streamed(UNAVAILABLE_FRAME)
    async with scripted((refusal, "fin"), (refusal, "fin")) as engines:
        async with running_relay(*engines.urls, stream=FORCED) as relay:
            answer = await ask(relay.port, request(body=WHOLE_REQUEST))
            record = await relay.record()
    assert (answer.status, answer.error["message"]) == (503, "starting")
    assert (record.attempts, record.outcome) == (2, "--")


@pytest.mark.parametrize("fault", ["no-done", "die-after:3", "rst-after:3", "die-mid-frame:3", "bad-chunk:2"])
async def test_a_broken_stream_is_never_a_good_answer(engine: Engine, fault: str) -> None:
    async with running_relay(engine.url, stream=FORCED) as relay:
        answer = await ask(relay.port, request(body=WHOLE_REQUEST, sim_fault=fault))
        record = await relay.record()
    assert answer.status == 502
    assert answer.error["code"] in ("upstream_disconnected", "upstream_error")
    assert (record.outcome, record.status, record.streamed_upstream) == ("UH", 502, True)
    assert record.completion_tokens  # as far as it came
    assert record.error


async def test_a_broken_stream_is_made_up_for_by_another_engine() -> None:
    async with scripted((streamed(FRAMES[0], end=b""), "rst"), (streamed(STREAM), "keep")) as engines:
        async with running_relay(*engines.urls, stream=FORCED) as relay:
            answer = await ask(relay.port, request(body=WHOLE_REQUEST))
            record = await relay.record()
    assert answer.json()["choices"][0]["message"]["content"] == "ab"
    assert (record.attempts, record.outcome, record.frames) == (2, "--", 4)


async def test_tokens_of_an_attempt_that_was_given_up_are_not_the_next_ones() -> None:
    """The second engine closes before its answer has a head: the record counts its tokens, and not the first one's."""
    async with scripted((streamed(FRAMES[0], end=b""), "rst"), (b"", "fin")) as engines:
        async with running_relay(*engines.urls, stream=FORCED) as relay:
            answer = await ask(relay.port, request(body=WHOLE_REQUEST))
            record = await relay.record()
    assert answer.status == 502
    assert (record.attempts, record.status, record.completion_tokens) == (2, 502, None)
    assert (record.frames, record.streamed_upstream) == (0, False)


async def test_a_silent_engine(engine: Engine) -> None:
    limits = TimeoutsConfig(between_tokens_s=0.05)
    async with running_relay(engine.url, stream=FORCED, timeouts=limits) as relay:
        answer = await ask(relay.port, request(body=WHOLE_REQUEST, sim_fault="stall-after:3"))
        record = await relay.record()
    assert (answer.status, answer.error["code"]) == (504, "upstream_timeout")
    assert "between_tokens_s" in answer.error["message"]
    assert record.outcome == "uH"
    await until(lambda: states(engine) == ["aborted"])


async def test_an_engine_that_says_nothing_at_all(engine: Engine) -> None:
    limits = TimeoutsConfig(first_token_s=0.05)
    async with running_relay(engine.url, stream=FORCED, timeouts=limits) as relay:
        answer = await ask(relay.port, request(body=WHOLE_REQUEST, sim_fault="stall-after-head"))
    assert (answer.status, answer.error["code"]) == (504, "upstream_timeout")
    assert "first_token_s" in answer.error["message"]


async def test_the_body_that_does_not_end_behind_the_end_mark() -> None:
    """The answer is whole; the connection is of no further use."""
    async with scripted((streamed(STREAM, end=b""), "keep"), (streamed(STREAM), "keep"), addresses=1) as engines:
        async with running_relay(*engines.urls, stream=FORCED) as relay:
            for _ in range(2):
                answer = await ask(relay.port, request(body=WHOLE_REQUEST))
                assert answer.json()["choices"][0]["message"]["content"] == "ab"
    assert engines.connections == 2


@pytest.mark.parametrize("frames", [FRAMES, (b"data: " + b"x" * 200,)])
async def test_an_answer_beyond_the_limit(frames: tuple[bytes, ...]) -> None:
    small = StreamConfig(force_stream=True, max_answer_bytes=100)
    async with scripted((streamed(b"".join(frames), end=b""), "keep")) as engines:
        async with running_relay(engines.urls[0], stream=small) as relay:
            answer = await ask(relay.port, request(body=WHOLE_REQUEST))
            record = await relay.record()
            assert [upstream.failures for upstream in relay.worker.service.fleet.upstreams] == [0]  # it did its work
    assert (answer.status, answer.error["code"]) == (502, "upstream_error")
    assert "stream.max_answer_bytes" in answer.error["message"]
    assert record.outcome == "RH"


@pytest.mark.parametrize("how", ["fin", "close", "rst"])
async def test_a_client_that_leaves_ends_the_generation(engine: Engine, how: str) -> None:
    async with running_relay(engine.url, stream=FORCED) as relay:
        async with await Client.connect(relay.port) as client:
            await client.send(request(body=WHOLE_REQUEST, sim_fault="stall-after:3"))
            await until(lambda: any(e.meter.content_frames == 2 for e in relay.worker.service.active))
            client.leave(how)
            record = await relay.record()
        await until(lambda: states(engine) == ["aborted"])
    assert (record.outcome, record.status, record.usage, record.completion_tokens) == ("CH", 499, "estimated", 2)
    assert record.streamed_upstream
