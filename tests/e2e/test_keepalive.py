"""Comments while nothing flows: between frames, and before there are any, when an error can only be a frame."""

from __future__ import annotations

import json
import re
import time
from functools import partial
from typing import Final

import pytest
import trio

from relay.config import FailoverConfig, StreamConfig, TimeoutsConfig
from relay.core.frames import COMMENT
from relay.core.timeline import Record
from relay.net import pump
from relay.net.pair import Pair as PumpPair
from relay.net.pair import Stop
from relay_bench.engine import Engine
from tests.conftest import changes_pump, running_relay
from tests.e2e.fleet import FakeEngine, RunningFleet, answer, fakes, pool_of, running_fleet
from tests.e2e.harness import (
    CHAT_PATH,
    GOOD_ANSWER,
    PATHS,
    STREAM,
    Answer,
    Client,
    ask,
    assert_cut_off,
    request,
    same,
    states,
    until,
)
from tests.e2e.pairs import Asked, Pair, sent, split_pair

INTERVAL_S: Final = 0.02
COMMENTED: Final = StreamConfig(keepalive_comment_s=INTERVAL_S)
#: The first of the two frames of `STREAM`.
FRAME: Final = STREAM[: STREAM.index(b"\n\n") + 2]
#: Small, where a test waits for it to pass; a few comments fit in.
SHORT_S: Final = 0.15

CHUNKED: Final = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
REFUSED: Final = b"HTTP/1.1 400 -\r\ntransfer-encoding: chunked\r\n\r\n"
ENGINES_ERROR: Final = b'{"message":"too long","type":"BadRequestError","param":"messages","code":400}'
BODY: Final = b'{"choices":[{"message":{"content":"a"}}]}'


@pytest.fixture(autouse=True)
def fine_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests need not wait for the quarter of a second that does for people."""
    monkeypatch.setattr("relay.daemon.worker.Pump", partial(pump.Pump, sweep_s=0.005))


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def outcome(record: Record) -> tuple[str, int | None, int]:
    return record.outcome, record.status, record.attempts


def comments(got: Answer) -> int:
    """Takes the comments out of an answer, and says how many there were; each came as one chunk, or between chunks."""
    number = got.payload.count(COMMENT)
    if len(got.chunks) > 1:
        assert got.chunks.count(COMMENT) == number
    got.chunks = [b"".join(re.sub(b"(?m)^%b" % COMMENT, b"", each) for each in got.chunks)]
    assert COMMENT not in got.payload
    return number


async def early(client: Client, number: int = 2) -> None:
    """Waits until the client has the head of a stream and so many comments, and nothing else."""
    head, _, body = (await client.frames(number)).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 OK\r\n")
    assert body.replace(chunk(COMMENT), b"").replace(COMMENT, b"") == b""


def assert_told(got: Answer, code: str | None, message: str) -> None:
    """After comments, one error frame and the end of the connection."""
    assert comments(got) >= 2
    assert (got.status, got.end, got.rest) == (200, "fin", b"")
    (frame,) = got.frames
    *names, data = frame.decode().removesuffix("\n\n").split("\n")
    error = json.loads(data.removeprefix("data: "))
    if error.get("type") == "error":
        assert names == ["event: error"]
    assert message in error["error"]["message"]
    if code is not None:
        assert error["error"]["code"] == code


# -- between frames


@pytest.mark.usefixtures("pump_form")
async def test_a_silent_stream_gets_comments(engine: Engine) -> None:
    async with running_relay(engine.url, stream=COMMENTED) as relay:
        async with await Client.connect(relay.port) as client:
            await client.send(request(sim_fault="stall-after:2"))
            received = await client.frames(2 + 4)
            assert received.endswith(3 * chunk(COMMENT) + chunk(COMMENT)[: len(received) - received.rfind(b"e\r\n:")])
        record = await relay.record()
        assert (outcome(record), record.frames) == (("CD", 200, 1), 2)
        assert record.bytes_out >= len(received)
        assert record.gap_max_ms is None or record.gap_max_ms < 1000 * INTERVAL_S
        await until(lambda: states(engine) == ["aborted"])


@pytest.mark.parametrize(
    ("path", "rechunk", "version"),
    [
        *((path, "", "1.1") for path in PATHS),
        *((CHAT_PATH, rechunk, "1.1") for rechunk in ("split:3", "size:7", "frames:2", "length")),
        ("/v1/responses", "size:50", "1.0"),
    ],
)
async def test_the_frames_are_the_engines_apart_from_comments(
    engine: Engine, path: str, rechunk: str, version: str
) -> None:
    asked = request(path, version=version, x_request_id="same", sim_step_ms="30", sim_rechunk=rechunk)
    async with running_relay(engine.url, stream=COMMENTED) as relay:
        direct = await ask(int(engine.url.rpartition(":")[2]), asked)
        through = await ask(relay.port, asked)
        assert comments(through) >= 2
        assert through.end == ("whole" if version == "1.1" else "fin")
        assert same(through.payload) == same(direct.payload)
        record = await relay.record()
        assert outcome(record) == ("--", 200, 1)
        assert record.frames == len(direct.frames)
        assert record.completion_tokens == 6


@pytest.mark.parametrize("with_id", [False, True])
async def test_never_behind_an_id_and_never_against_the_engines_limit(with_id: bool) -> None:
    async with fakes("a") as (engine,):
        timeouts = TimeoutsConfig(between_tokens_s=SHORT_S)
        async with running_fleet(pool_of(engine.url), stream=COMMENTED, timeouts=timeouts) as relay:
            frame = b"id: 7\n" * with_id + b'data: {"choices":[]}\n\n'
            engine.answer = CHUNKED + chunk(frame)
            got = await ask(relay.port, request())
            assert comments(got) == 0 if with_id else comments(got) >= 2
            assert got.frames[0] == frame
            assert_cut_off(got, "upstream_timeout", frames=1)
            assert outcome(await relay.record()) == ("uD", 200, 1)


@pytest.mark.parametrize("before", [b"", FRAME], ids=["first", "second"])
async def test_never_within_a_frame_that_outgrew_the_limit(before: bytes) -> None:
    async with fakes("a") as (engine,):
        stream = StreamConfig(keepalive_comment_s=INTERVAL_S, max_frame_bytes=4096)
        timeouts = TimeoutsConfig(between_tokens_s=SHORT_S)
        async with running_fleet(pool_of(engine.url), stream=stream, timeouts=timeouts) as relay:
            begun = b"data: " + b"x" * 5000 + b"\n"
            engine.answer = CHUNKED + (chunk(before) if before else b"") + chunk(begun)
            got = await ask(relay.port, request())
            assert (got.payload, got.end) == (before + begun, "fin")


async def test_half_a_frame_that_the_client_has_not_seen_is_no_hindrance() -> None:
    async with fakes("a") as (engine,):
        timeouts = TimeoutsConfig(between_tokens_s=SHORT_S)
        async with running_fleet(pool_of(engine.url), stream=COMMENTED, timeouts=timeouts) as relay:
            engine.answer = CHUNKED + chunk(FRAME + b"data: [DO")  # the first frame, and the beginning of the second
            got = await ask(relay.port, request())
            assert comments(got) >= 2
            assert_cut_off(got, "upstream_timeout", frames=1)


async def test_nothing_is_said_behind_the_end_mark() -> None:
    async with fakes("a") as (engine,):
        timeouts = TimeoutsConfig(between_tokens_s=SHORT_S)
        async with running_fleet(pool_of(engine.url), stream=COMMENTED, timeouts=timeouts) as relay:
            engine.answer = CHUNKED + chunk(STREAM)  # and no last chunk
            assert comments(await ask(relay.port, request())) == 0


@changes_pump
async def test_a_comment_that_the_client_takes_in_parts_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    flush, is_cut = pump.Pump._flush, False

    def cut(self: pump.Pump, pair: PumpPair, out: list[bytes | memoryview]) -> Stop | None:
        nonlocal is_cut
        if is_cut or out != [chunk(COMMENT)]:
            return flush(self, pair, out)
        is_cut = True
        pair.send(out[0][:5])
        pair.unsent = bytes(out[0][5:])
        return Stop.CLIENT_BLOCKED

    monkeypatch.setattr(pump.Pump, "_flush", cut)
    timeouts = TimeoutsConfig(between_tokens_s=SHORT_S)
    async with fakes("a") as (engine,):
        async with running_fleet(pool_of(engine.url), stream=COMMENTED, timeouts=timeouts) as relay:
            engine.answer = CHUNKED + chunk(FRAME)
            got = await ask(relay.port, request())
            assert is_cut
            assert comments(got) >= 2
            assert_cut_off(got, "upstream_timeout", frames=1)


# -- before there is a stream


@pytest.mark.parametrize(
    ("path", "fault", "version"),
    [
        *((path, "stall-before-head", "1.1") for path in PATHS),
        *((CHAT_PATH, fault, "1.1") for fault in ("stall-after-head", "stall-mid-frame:0")),
        ("/v1/messages", "stall-before-head", "1.0"),
    ],
)
async def test_a_client_that_waits_gets_a_head_and_comments_then_the_error_as_a_frame(
    engine: Engine, path: str, fault: str, version: str
) -> None:
    timeouts = TimeoutsConfig(first_token_s=SHORT_S)
    async with running_relay(engine.url, stream=COMMENTED, timeouts=timeouts) as relay:
        began = time.monotonic()
        async with await Client.connect(relay.port) as client:
            await client.send(request(path, version=version, sim_fault=fault, x_request_id="mine"))
            await early(client)
            assert time.monotonic() - began >= 2 * INTERVAL_S
            got = await client.answer()
        fields = got.headers
        assert fields.pop("date")
        assert fields == {
            "content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache",
            "x-accel-buffering": "no", "x-request-id": "mine",
            **({"transfer-encoding": "chunked"} if version == "1.1" else {"connection": "close"}),
        }  # fmt: skip
        assert_told(got, None if path == "/v1/messages" else "upstream_timeout", "first_token_s")
        record = await relay.record()
        assert (outcome(record), record.stream, record.frames) == (("uH", 200, 1), True, 0)
        await until(lambda: states(engine) == ["aborted"])


@pytest.mark.parametrize("version", ["1.0", "1.1"])
async def test_the_stream_follows_and_the_connection_goes_on(version: str) -> None:
    async with fakes("a") as (engine,), running_fleet(pool_of(engine.url), stream=COMMENTED) as relay:
        engine.hold()
        async with await Client.connect(relay.port) as client:
            await client.send(request(version=version))
            await early(client, 3)
            engine.gate.set()
            got = await client.answer()
            assert comments(got) >= 3
            assert (got.payload, got.end) == (STREAM, "whole" if version == "1.1" else "fin")
            record = await relay.record()
            assert (outcome(record), record.frames) == (("--", 200, 1), 2)
            assert record.ttft_ms is not None
            assert record.ttft_ms >= 3000 * INTERVAL_S
            if version == "1.1":
                assert (await client.ask(request())).payload == STREAM
                assert "server-timing" in (await client.ask(request())).headers


@pytest.mark.parametrize("how", ["502", "fin", "rst", "silent"])
async def test_another_engine_may_still_answer(how: str) -> None:
    timeouts = TimeoutsConfig(first_token_s=SHORT_S)
    async with fakes("a", "b") as (bad, good):
        for each in (bad, good):
            each.hold()
        if how != "silent":
            bad.answer = answer(502) if how == "502" else b""
            bad.then = how if how == "rst" else "fin"
        pool = pool_of(bad.url, good.url, balance="round_robin")
        async with running_fleet(pool, stream=COMMENTED, timeouts=timeouts) as relay:
            for _ in range(2):  # whoever's turn is first
                async with await Client.connect(relay.port) as client:
                    good.gate = trio.Event()
                    await client.send(request())
                    await early(client)
                    if how != "silent":
                        bad.gate.set()
                    good.gate.set()
                    got = await client.answer()
                    assert comments(got) >= 2
                    assert (got.payload, got.end) == (STREAM, "whole")
            assert sorted(outcome(record) for record in relay.records) == [("--", 200, 1), ("--", 200, 2)]


@pytest.mark.parametrize("version", ["1.0", "1.1"])
@pytest.mark.parametrize("is_early", [True, False])
async def test_behind_a_comment_there_is_no_byte_order_mark(version: str, is_early: bool) -> None:
    """Clients know one at the beginning of a stream alone, and would lose the first event."""
    mark, stream = b"\xef\xbb\xbf", COMMENTED if is_early else StreamConfig()
    async with fakes("a") as (engine,), running_fleet(pool_of(engine.url), stream=stream) as relay:
        engine.answer = CHUNKED + chunk(mark + STREAM) + b"0\r\n\r\n"
        async with await Client.connect(relay.port) as client:
            if is_early:
                engine.hold()
            await client.send(request(version=version))
            if is_early:
                await early(client)
                engine.gate.set()
            got = await client.answer()
    assert (comments(got) > 0, got.payload) == (is_early, STREAM if is_early else mark + STREAM)


async def test_after_the_first_byte_of_an_engine_there_is_no_other() -> None:
    timeouts = TimeoutsConfig(between_tokens_s=SHORT_S)
    async with fakes("a", "b") as engines:
        pool = pool_of(*(each.url for each in engines))
        async with running_fleet(pool, stream=COMMENTED, timeouts=timeouts) as relay:
            for each in engines:
                each.hold()
                each.answer = CHUNKED + chunk(FRAME)
            async with await Client.connect(relay.port) as client:
                await client.send(request())
                await early(client)
                for each in engines:
                    each.gate.set()
                got = await client.answer()
            assert comments(got) >= 4
            assert_cut_off(got, "upstream_timeout", frames=1)
            assert outcome(await relay.record()) == ("uD", 200, 1)
            assert sum(len(each.asked) for each in engines) == 1


async def late(relay: RunningFleet, engine: FakeEngine, said: bytes, path: str = CHAT_PATH) -> Answer:
    """What a client gets to whom the engine answers `said` when it has been waiting for some time."""
    engine.hold()
    engine.answer = said
    async with await Client.connect(relay.port) as client:
        await client.send(request(path))
        await early(client)
        engine.gate.set()
        return await client.answer()


@pytest.mark.parametrize(("path", "status"), [*((path, 400) for path in PATHS), (CHAT_PATH, 429), (CHAT_PATH, 503)])
async def test_an_engines_error_becomes_a_frame(path: str, status: int) -> None:
    async with fakes("a") as (engine,), running_fleet(pool_of(engine.url), stream=COMMENTED) as relay:
        got = await late(relay, engine, answer(status, b'{"error": %b\n}' % ENGINES_ERROR), path)
        assert_told(got, None, "too long")
        assert ENGINES_ERROR in got.payload
        record = await relay.record()
        assert outcome(record) == ("UH", 200, 1)
        assert str(status) in str(record.error)
        assert len(engine.asked) == 1


@pytest.mark.parametrize("path", [CHAT_PATH, "/v1/messages"])
@pytest.mark.parametrize(
    ("said", "message"),
    [
        (answer(400, b'{"object":"error","message":"too long","code":400}'), "the engine answered 400: too long"),
        (answer(404, b'{"detail":"Not Found"}'), 'the engine answered 404: {"detail":"Not Found"}'),
        (answer(500, b"<html>\r\noops"), "the engine answered 500: <html>\r\noops"),
        (answer(500, b""), "the engine answered 500"),
        (answer(200, BODY), "the engine's answer is not the stream it was asked for"),
        (b"HTTP/1.1 204 -\r\n\r\n", "the engine's answer is not the stream it was asked for"),
        (CHUNKED.replace(b"200 OK", b"400 -") + chunk(STREAM), "the engine answered 400"),
        (REFUSED + chunk(b'{"message":"a') + chunk(b'b"}') + b"0\r\n\r\n", "the engine answered 400: ab"),
        (REFUSED + b"nonsense\r\n", "the engine answered 400"),
        (answer(400, b"\x1f\x8b", "content-encoding: gzip"), "the engine answered 400"),
    ],
    ids=["flat", "detail", "html", "empty", "body", "nothing", "stream", "chunks", "malformed", "compressed"],
)  # fmt: skip
async def test_any_other_answer_becomes_a_frame(path: str, said: bytes, message: str) -> None:
    async with fakes("a", "b") as engines:
        pool = pool_of(*(each.url for each in engines))
        async with running_fleet(pool, stream=COMMENTED) as relay:
            for each in engines:
                each.hold()
                each.answer = said
            async with await Client.connect(relay.port) as client:
                await client.send(request(path))
                await early(client)
                for each in engines:
                    each.gate.set()
                got = await client.answer()
            assert_told(got, None if path == "/v1/messages" else "upstream_error", message)
            record = await relay.record()
            assert (outcome(record), record.error) == (("UH", 200, 1), message)
            assert sum(len(each.asked) for each in engines) == 1  # what is no failure to others fails over to nobody


async def test_an_error_that_stalls_is_told_of_all_the_same() -> None:
    timeouts = TimeoutsConfig(between_tokens_s=SHORT_S)
    async with fakes("a") as (engine,):
        async with running_fleet(pool_of(engine.url), stream=COMMENTED, timeouts=timeouts) as relay:
            got = await late(relay, engine, b"HTTP/1.1 400 -\r\ncontent-length: 9\r\n\r\n{")
            assert_told(got, "upstream_timeout", "between_tokens_s")
            assert outcome(await relay.record()) == ("uH", 200, 1)


async def test_an_interim_answer_comes_too_late() -> None:
    async with fakes("a") as (engine,), running_fleet(pool_of(engine.url), stream=COMMENTED) as relay:
        got = await late(relay, engine, b"HTTP/1.1 103 Early Hints\r\nlink: <x>\r\n\r\n" + GOOD_ANSWER)
        assert comments(got) >= 2
        assert (got.payload, got.end) == (STREAM, "whole")


async def test_waiting_in_the_queue() -> None:
    timeouts = TimeoutsConfig(queue_s=2 * SHORT_S)
    async with fakes("a") as (engine,):
        pool = pool_of(engine.url, max_in_flight=1, max_queue=2)
        async with running_fleet(pool, stream=COMMENTED, timeouts=timeouts) as relay:
            engine.hold()
            async with (
                await Client.connect(relay.port) as first,
                await Client.connect(relay.port) as second,
                await Client.connect(relay.port) as third,
            ):
                await first.send(request())
                await until(lambda: len(engine.asked) == 1)
                await second.send(request())
                await until(lambda: relay.queued == 1)
                await early(second)
                assert relay.queued == 1
                assert_told(await second.answer(), "queue_full", "queue_s")
                assert outcome(await relay.record()) == ("rQ", 200, 0)
                await third.send(request())
                await early(third)
                engine.gate.set()
                for client in (first, third):
                    got = await client.answer()
                    assert comments(got) >= 2
                    assert got.payload == STREAM


@pytest.mark.parametrize("how", ["not asked for", "forced", "another route"])
async def test_who_waits_for_no_stream_hears_nothing(how: str) -> None:
    stream = StreamConfig(keepalive_comment_s=INTERVAL_S, force_stream=how == "forced")
    timeouts = TimeoutsConfig(first_token_s=SHORT_S)
    asked = request(body={"stream": False})
    if how == "another route":
        asked = request("/v1/embeddings", {"input": "x", "stream": True})
    async with fakes("a") as (engine,):
        async with running_fleet(pool_of(engine.url), stream=stream, timeouts=timeouts) as relay:
            engine.hold()
            got = await ask(relay.port, asked)
            assert (got.status, got.error["code"]) == (504, "upstream_timeout")
            assert outcome(await relay.record()) == ("uH", 504, 1)


async def test_a_forced_stream_is_collected_in_silence(engine: Engine) -> None:
    stream = StreamConfig(keepalive_comment_s=INTERVAL_S, force_stream=True)
    async with running_relay(engine.url, stream=stream) as relay:
        got = await ask(relay.port, request(body={"stream": False}, sim_step_ms="20"))
        assert (got.status, got.json()["usage"]["completion_tokens"]) == (200, 6)
        assert (await relay.record()).streamed_upstream


async def test_what_is_refused_at_once_has_its_true_status() -> None:
    async with fakes("a") as (engine,), running_fleet(pool_of(engine.url), stream=COMMENTED) as relay:
        engine.answer = answer(400, b'{"error":%b}' % ENGINES_ERROR)
        got = await ask(relay.port, request())
        assert (got.status, got.payload) == (400, b'{"error":%b}' % ENGINES_ERROR)


async def test_pools_have_their_own() -> None:
    async with fakes("a", "b") as (one, two):
        for each in (one, two):
            each.hold()
        pools = (
            pool_of(one.url, name="one", models=("a",), keepalive_comment_s=0.0),
            pool_of(two.url, name="two", models=("b",)),
        )
        timeouts = TimeoutsConfig(first_token_s=SHORT_S)
        async with running_fleet(*pools, stream=COMMENTED, timeouts=timeouts) as relay:
            assert (await ask(relay.port, request(body={"model": "a"}))).status == 504
            assert_told(await ask(relay.port, request(body={"model": "b"})), "upstream_timeout", "first_token_s")


@pytest.mark.parametrize("how", ["fin", "close", "rst"])
async def test_a_client_that_leaves_early_frees_the_engine(engine: Engine, how: str) -> None:
    async with running_relay(engine.url, stream=COMMENTED) as relay:
        async with await Client.connect(relay.port) as client:
            await client.send(request(sim_fault="stall-before-head"))
            await early(client)
            client.leave(how)
            assert outcome(await relay.record()) == ("CH", 200, 1)
            await until(lambda: states(engine) == ["aborted"])


async def test_draining_tells_those_who_wait(engine: Engine) -> None:
    async with running_relay(engine.url, stream=COMMENTED) as relay:
        async with await Client.connect(relay.port) as client:
            await client.send(request(sim_fault="stall-before-head"))
            await early(client)
            relay.worker.stop()
            relay.worker.cut()
            assert_told(await client.answer(), "draining", "shutting down")


# -- with two engines


class Gated:
    """An engine that answers when it is let."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.gate = trio.Event()

    async def __call__(self, asked: Asked, stream: trio.SocketStream) -> None:
        await self.gate.wait()
        await stream.send_all(self.data)


async def late_split(pair: Pair, prefill: Gated | None, decode: Gated | None) -> Answer:
    """What a client gets that waits until both are let."""
    for half, turn in ((pair.prefill, prefill), (pair.decode, decode)):
        if turn is not None:
            half.usual = turn
    async with await Client.connect(pair.relay.port) as client:
        await client.send(sent())
        await early(client)
        for turn in (prefill, decode):
            if turn is not None:
                turn.gate.set()
        return await client.answer()


@pytest.mark.parametrize("connector", ["nixl", "sglang"])
async def test_waiting_for_the_prefill(connector: str) -> None:
    async with split_pair(connector=connector, stream=COMMENTED) as pair:
        quick = await ask(pair.relay.port, sent())
        assert quick.status == 200
        got = await late_split(pair, Gated(answer(200, b'{"kv_transfer_params":{"a":1}}')), None)
        assert comments(got) >= 2
        assert (got.end, got.payload) == ("whole", quick.payload)
        assert outcome(await pair.relay.record(2)) == ("--", 200, 1)


@pytest.mark.parametrize("connector", ["nixl", "sglang"])
@pytest.mark.parametrize("status", [400, 500])
async def test_a_prefiller_that_refuses_late(connector: str, status: int) -> None:
    failover = FailoverConfig(attempts=1)
    async with split_pair(connector=connector, stream=COMMENTED, failover=failover) as pair:
        refusing = Gated(answer(status, b'{"error":%b}' % ENGINES_ERROR))
        got = await late_split(pair, refusing, Gated(b"") if connector == "sglang" else None)
        assert_told(got, None, "too long")
        assert ENGINES_ERROR in got.payload
        assert outcome(await pair.relay.record()) == ("UP", 200, 1)


async def test_a_decoder_that_loses_the_handle_late() -> None:
    async with split_pair(decoders=2, stream=COMMENTED) as pair:
        quick = await ask(pair.relay.port, sent())
        failing, good = Gated(answer(500)), pair.decode.usual
        pair.decode.script = [failing]
        async with await Client.connect(pair.relay.port) as client:
            await client.send(sent())
            await early(client)
            failing.gate.set()
            got = await client.answer()
        assert comments(got) >= 2
        assert pair.decode.usual is good
        assert (got.end, got.payload) == ("whole", quick.payload)
        assert outcome(await pair.relay.record(2)) == ("--", 200, 2)
