"""What a split pool's clients get otherwise than the decoder sent it: cached tokens, and ends that are none."""

from __future__ import annotations

import errno
import json
import socket
from typing import Any, Final

import pytest
import trio

from relay.address import parse_upstream
from relay.config import PoolConfig, StreamConfig
from relay.core.request import Route
from relay_bench.engine import Engine
from tests.core.captured import frames_of
from tests.e2e.fleet import answer, running_fleet
from tests.e2e.harness import ask, assert_cut_off, error_frames, request
from tests.e2e.pairs import BODIES, CLIENT, STREAMS, WITHOUT_HANDLE, raw, recorded, says, sent, split_pair

HEAD: Final = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
ROLE: Final = b'data: {"choices":[{"index":0,"delta":{"role":"assistant","content":""},"finish_reason":null}]}\n\n'
TOKEN: Final = b'data: {"choices":[{"index":0,"delta":{"content":"a"},"finish_reason":null}]}\n\n'
GIVEN_UP: Final = (
    b'data: {"choices":[{"index":0,"delta":{"content":""},"finish_reason":"stop","stop_reason":"recomputed"}]}\n\n'
)
USAGE: Final = b'data: {"choices":[],"usage":{"prompt_tokens":90,"completion_tokens":1,"total_tokens":91%b}}\n\n'
DONE: Final = b"data: [DONE]\n\n"
RECOMPUTED_BODY: Final = (
    b'{"object":"chat.completion","choices":[{"index":0,"message":{"role":"assistant","content":"a"},'
    b'"finish_reason":"stop","stop_reason":"recomputed"}],"usage":{"prompt_tokens":9,"completion_tokens":1}}'
)
ASCEND: Final = pytest.mark.parametrize("connector", ["ascend_mooncake"])


def chunks(*frames: bytes) -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(frame), frame) for frame in frames)


def streamed(*frames: bytes) -> bytes:
    return HEAD + chunks(*frames) + b"0\r\n\r\n"


def cached(count: int | None) -> bytes:
    """A prefiller's answer that says how much it had cached."""
    details = b"null" if count is None else b'{"cached_tokens":%d}' % count
    return answer(
        200, b'{"kv_transfer_params":{"a":1},"usage":{"prompt_tokens":90,"prompt_tokens_details":%b}}' % details
    )


# -- cached tokens

ALL_CACHED: Final = USAGE % b',"prompt_tokens_details":{"cached_tokens":90}'


async def test_clients_see_what_the_prefiller_had_cached() -> None:
    async with split_pair() as pair:
        pair.prefill.usual = says(cached(32))
        pair.decode.usual = says(streamed(ROLE, TOKEN, ALL_CACHED, DONE))
        got = await ask(pair.relay.port, sent())
        record = await pair.relay.record()
    assert got.frames == [ROLE, TOKEN, ALL_CACHED.replace(b":90}}", b":32}}"), DONE]
    assert (got.end, record.cached_tokens, record.prompt_tokens) == ("whole", 32, 90)


async def test_so_do_those_of_a_whole_answer() -> None:
    body = json.dumps({"usage": {"prompt_tokens": 90, "prompt_tokens_details": {"cached_tokens": 90}}}).encode()
    async with split_pair() as pair:
        pair.prefill.usual = says(cached(32))
        pair.decode.usual = says(answer(200, body))
        got = await ask(pair.relay.port, sent(stream=False))
    assert got.payload == body.replace(b'_tokens": 90}}', b'_tokens": 32}}')
    assert got.headers["content-length"] == str(len(body))


@pytest.mark.parametrize(
    ("connector", "settings", "count"),
    [("nixl", {"cached_tokens_from": "decode"}, 32), ("nixl", {}, None), ("none", {}, 32), ("sglang", {}, 32)],
)
async def test_otherwise_the_decoders_count_stays(connector: str, settings: dict[str, Any], count: int | None) -> None:
    async with split_pair(connector=connector, settings=settings) as pair:
        pair.prefill.usual = says(cached(count))
        pair.decode.usual = says(streamed(ROLE, TOKEN, ALL_CACHED, DONE))
        got = await ask(pair.relay.port, sent())
    assert got.frames == [ROLE, TOKEN, ALL_CACHED, DONE]


async def test_each_attempt_has_its_own_prefillers_count() -> None:
    async with split_pair(2, 2) as pair:
        pair.prefill.script = [says(cached(32))]
        pair.prefill.usual = says(cached(None))
        pair.decode.script = [says(answer(503))]
        pair.decode.usual = says(streamed(ROLE, TOKEN, ALL_CACHED, DONE))
        got = await ask(pair.relay.port, sent())
    assert got.frames == [ROLE, TOKEN, ALL_CACHED, DONE]


async def test_nor_has_it_that_of_an_earlier_one_where_it_gets_no_handle() -> None:
    async with split_pair(2, 2) as pair:
        pair.prefill.script = [says(cached(32))]
        pair.prefill.usual = says(WITHOUT_HANDLE)
        pair.decode.script = [says(answer(503))]
        pair.decode.usual = says(streamed(ROLE, TOKEN, ALL_CACHED, DONE))
        got = await ask(pair.relay.port, sent())
        record = await pair.relay.record()
    assert got.frames == [ROLE, TOKEN, ALL_CACHED, DONE]
    assert (record.attempts, record.cached_tokens) == (2, 90)


@pytest.mark.parametrize("route", [Route.COMPLETIONS, Route.RESPONSES, Route.MESSAGES], ids=lambda route: route.value)
@pytest.mark.parametrize("stream", [True, False], ids=["stream", "json"])
async def test_nothing_but_that_count_changes(route: Route, stream: bool) -> None:
    name = STREAMS[route] if stream else BODIES[route]
    async with split_pair() as pair:
        pair.prefill.usual = says(cached(32))
        pair.decode.usual = says(raw(name))
        got = await ask(pair.relay.port, sent(route, stream=stream))
    wanted = frames_of(recorded(name).body)
    changed = [new for new, old in zip(got.frames, wanted, strict=True) if new != old]
    assert len(changed) == (route is not Route.MESSAGES)  # whose other counts depend on that one
    assert all(b'"cached_tokens":32' in frame for frame in changed)


# -- decoders that give a request up


@ASCEND
@pytest.mark.parametrize("is_at_once", [True, False], ids=["in one read", "frame by frame"])
@pytest.mark.parametrize("with_usage", [True, False])
async def test_a_request_given_up_has_no_good_end(connector: str, is_at_once: bool, with_usage: bool) -> None:
    rest = (GIVEN_UP, *([USAGE % b""] if with_usage else []), DONE)
    async with split_pair(2, 2, connector=connector) as pair:
        if is_at_once:
            pair.decode.usual = says(HEAD + chunks(ROLE, TOKEN, TOKEN), chunks(*rest) + b"0\r\n\r\n")
        else:
            pair.decode.usual = says(HEAD + chunks(ROLE, TOKEN, TOKEN), *(chunks(one) for one in rest), b"0\r\n\r\n")
        got = await ask(pair.relay.port, sent())
        record = await pair.relay.record()
        assert pair.metric("relay_recomputed_total") == 1
    assert_cut_off(got, "upstream_recomputed", frames=3)
    assert got.frames[:3] == [ROLE, TOKEN, TOKEN]
    assert (record.outcome, record.status, record.attempts, pair.order) == ("UD", 200, 1, "pd")
    assert record.usage == ("engine" if with_usage else "estimated")


@ASCEND
async def test_a_request_given_up_before_anything_was_sent_has_a_true_status(connector: str) -> None:
    async with split_pair(connector=connector) as pair:
        pair.decode.usual = says(streamed(ROLE, GIVEN_UP, DONE))
        got = await ask(pair.relay.port, sent())
        record = await pair.relay.record()
        assert pair.metric("relay_recomputed_total") == 1
    assert (got.status, got.error["code"], record.outcome) == (502, "upstream_recomputed", "UH")


@ASCEND
@pytest.mark.parametrize("is_forced", [False, True], ids=["plain", "forced"])
async def test_a_whole_answer_given_up_is_an_error(connector: str, is_forced: bool) -> None:
    async with split_pair(connector=connector, stream=StreamConfig(force_stream=is_forced)) as pair:
        whole = streamed(ROLE, TOKEN, GIVEN_UP, DONE) if is_forced else answer(200, RECOMPUTED_BODY)
        pair.decode.usual = says(whole)
        got = await ask(pair.relay.port, sent(stream=False))
        record = await pair.relay.record()
        assert pair.metric("relay_recomputed_total") == 1
    assert (got.status, got.error["code"], record.outcome) == (502, "upstream_recomputed", "UH")


@pytest.mark.parametrize(
    ("connector", "body"),
    [("nixl", CLIENT[Route.CHAT]), ("ascend_mooncake", CLIENT[Route.CHAT][:-1] + b',"stop":["recomputed"]}')],
    ids=["another engine", "the client's own stop"],
)
async def test_what_only_looks_like_it(connector: str, body: bytes) -> None:
    frames = [ROLE, TOKEN, GIVEN_UP, DONE]
    async with split_pair(connector=connector) as pair:
        pair.decode.usual = says(streamed(*frames))
        got = await ask(pair.relay.port, sent(Route.CHAT, body))
    assert (got.frames, got.end, error_frames(got)) == (frames, "whole", [])


@ASCEND
async def test_text_about_it_passes(connector: str) -> None:
    frames = [ROLE, TOKEN.replace(b'"a"', b'"\\"stop_reason\\":\\"recomputed\\""'), DONE]
    async with split_pair(connector=connector) as pair:
        pair.decode.usual = says(streamed(*frames))
        got = await ask(pair.relay.port, sent())
    assert (got.frames, got.end) == (frames, "whole")


async def test_a_relay_out_of_descriptors_blames_no_prefiller(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(*_: object) -> socket.socket:
        await trio.lowlevel.checkpoint()
        raise OSError(errno.EMFILE, "Too many open files")

    one = parse_upstream(engine.url)
    async with running_fleet(PoolConfig(prefill=(one,), decode=(one,), connector="none")) as relay:
        with monkeypatch.context() as patch:
            patch.setattr("relay.net.pool._connect_to", fail)
            for _ in range(6):
                assert (await ask(relay.port, request())).status == 503
        assert all(up.failures == 0 for up in relay.worker.service.fleet.upstreams)
        assert (await ask(relay.port, request())).status == 200
