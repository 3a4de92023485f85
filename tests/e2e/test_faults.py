"""What an engine can do wrong, and what client and record see of it."""

from __future__ import annotations

import errno
import gzip
import socket
from typing import Literal

import pytest
import trio

from relay.config import FailoverConfig, LimitsConfig, StreamConfig, TimeoutsConfig
from relay.core.timeline import Record
from relay_bench.engine import Engine
from tests.conftest import RunningRelay, running_relay
from tests.e2e.harness import (
    CHAT_PATH,
    GOOD_ANSWER,
    PATHS,
    STREAM,
    UNAVAILABLE,
    Answer,
    Client,
    ask,
    assert_cut_off,
    request,
    same,
    scripted,
    states,
    until,
)

STREAMING = "text/event-stream; charset=utf-8"
#: Small, where a test waits for it to pass.
SHORT_S = 0.2


def outcome(record: Record) -> tuple[str, int | None, int]:
    return record.outcome, record.status, record.attempts


async def direct_and_through(relay: RunningRelay, engine: Engine, path: str, fault: str, rechunk: str) -> list[Answer]:
    """The engine's answer without and with the relay; x-request-id makes them the same."""
    data = request(path, x_request_id="same", sim_fault=fault, sim_rechunk=rechunk)
    return [await ask(engine.port, data), await ask(relay.port, data)]


# -- before the commit point


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("fault", ["die-before-head", "rst-before-head", "die-after-head", "rst-after-head"])
async def test_an_engine_that_breaks_before_its_first_frame_is_a_502(engine: Engine, path: str, fault: str) -> None:
    async with running_relay(engine.url) as relay, await Client.connect(relay.port) as client:
        answer = await client.ask(request(path, sim_fault=fault))
        assert answer.status == 502
        assert answer.headers["content-type"] == "application/json"
        assert answer.headers["connection"] == "close"
        if path == "/v1/messages":
            assert answer.json()["type"] == "error"
            assert answer.error.keys() >= {"type", "message"}
        else:
            assert answer.error["code"] == "upstream_disconnected"
            assert answer.error["param"] is None
        assert await client.is_closed()
        record = await relay.record()
        assert outcome(record) == ("UH", 502, 1)
        assert record.error
        assert record.upstream == engine.url
        assert len(engine.requests()) == 1


@pytest.mark.parametrize("fault", ["die-before-head", "rst-before-head", "die-after-head", "rst-after-head"])
async def test_both_engines_break(engine: Engine, second_engine: Engine, fault: str) -> None:
    async with running_relay(engine.url, second_engine.url) as relay:
        answer = await ask(relay.port, request(x_request_id="mine", sim_fault=fault))
        assert (answer.status, answer.error["code"]) == (502, "upstream_disconnected")
        assert answer.headers["x-request-id"] == "mine"
        assert outcome(await relay.record()) == ("UH", 502, 2)
        seen = [record["id"] for each in (engine, second_engine) for record in each.requests()]
        assert sorted(seen) == ["mine", "mine-2"]


BROKEN: list[tuple[bytes, Literal["keep", "fin", "rst"]]] = [
    (b"", "fin"),
    (b"", "rst"),
    (b"HTTP/1.1 20", "fin"),
    (b"not http at all\r\n\r\n", "fin"),
    (b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n", "fin"),
    (b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n", "rst"),
    (b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n5\r\ndata:\r\n", "fin"),
    (b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n", "keep"),
    (UNAVAILABLE, "keep"),
    (UNAVAILABLE.replace(b"503", b"502"), "keep"),
    (UNAVAILABLE.replace(b"503", b"504"), "fin"),
]


@pytest.mark.parametrize("first", BROKEN)
async def test_the_second_engine_answers(first: tuple[bytes, Literal["keep", "fin", "rst"]]) -> None:
    async with scripted(first, (GOOD_ANSWER, "keep")) as engines, running_relay(*engines.urls) as relay:
        answer = await ask(relay.port, request(x_request_id="mine"))
        assert (answer.status, answer.payload, answer.end) == (200, STREAM, "whole")
        assert answer.headers["x-request-id"] == "mine"
        record = await relay.record()
        assert outcome(record) == ("--", 200, 2)
        assert record.id == "mine"
        assert record.error is None
        ids = [line for head in engines.heads for line in head.lower().split(b"\r\n") if line.startswith(b"x-request-")]
        assert ids == [b"x-request-id: mine", b"x-request-id: mine-2"]


async def test_a_silent_engine_is_replaced() -> None:
    timeouts = TimeoutsConfig(first_token_s=SHORT_S)
    async with (
        scripted((b"", "keep"), (GOOD_ANSWER, "keep")) as engines,
        running_relay(*engines.urls, timeouts=timeouts) as relay,
    ):
        answer = await ask(relay.port, request())
        assert (answer.status, answer.payload) == (200, STREAM)
        assert outcome(await relay.record()) == ("--", 200, 2)


async def test_attempts_are_limited() -> None:
    failover = FailoverConfig(attempts=2)
    script: list[tuple[bytes, Literal["fin"]]] = [(b"", "fin")] * 4
    async with (
        scripted(*script, addresses=4) as engines,
        running_relay(*engines.urls, failover=failover) as relay,
    ):
        assert (await ask(relay.port, request())).status == 502
        assert outcome(await relay.record()) == ("UH", 502, 2)
        assert len(engines.heads) == 2


def unused_url(held: socket.socket) -> str:
    """An address that refuses connections, for as long as `held` is bound to it."""
    held.bind(("127.0.0.1", 0))
    return f"http://127.0.0.1:{held.getsockname()[1]}"


async def test_nobody_listens() -> None:
    with socket.socket() as held:
        async with running_relay(unused_url(held)) as relay:
            answer = await ask(relay.port, request())
            assert (answer.status, answer.error["code"]) == (502, "upstream_error")
            record = await relay.record()
            assert outcome(record) == ("UC", 502, 1)
            assert record.error is not None
            assert "refused" in record.error


async def test_where_nobody_listens_the_other_engine_answers(engine: Engine) -> None:
    with socket.socket() as held:
        async with running_relay(unused_url(held), engine.url) as relay:
            for _ in range(3):
                assert (await ask(relay.port, request())).status == 200
            await relay.record(3)
            assert {outcome(record) for record in relay.records} == {("--", 200, 1), ("--", 200, 2)}
            assert {record.upstream for record in relay.records} == {engine.url}


async def test_an_engine_that_does_not_accept_is_a_504() -> None:
    with socket.socket() as full, socket.socket() as one, socket.socket() as two, socket.socket() as three:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        for filler in (one, two, three):
            filler.setblocking(False)
            filler.connect_ex(full.getsockname())
        url = f"http://127.0.0.1:{full.getsockname()[1]}"
        async with running_relay(url, timeouts=TimeoutsConfig(connect_s=SHORT_S)) as relay:
            answer = await ask(relay.port, request())
            assert (answer.status, answer.error["code"]) == (504, "upstream_timeout")
            assert outcome(await relay.record()) == ("uC", 504, 1)


@pytest.mark.parametrize("fault", ["stall-before-head", "stall-after-head", "stall-mid-frame:0"])
async def test_no_first_token(engine: Engine, fault: str) -> None:
    async with running_relay(engine.url, timeouts=TimeoutsConfig(first_token_s=SHORT_S)) as relay:
        answer = await ask(relay.port, request(sim_fault=fault))
        assert (answer.status, answer.error["code"]) == (504, "upstream_timeout")
        record = await relay.record()
        assert outcome(record) == ("uH", 504, 1)
        assert "first_token_s" in str(record.error)
        await until(lambda: states(engine) == ["aborted"])


async def test_first_token_limit_of_an_answer_that_is_no_stream(engine: Engine) -> None:
    async with running_relay(engine.url, timeouts=TimeoutsConfig(first_token_s=SHORT_S)) as relay:
        answer = await ask(relay.port, request(body={"stream": False}, sim_ttft_ms="60000"))
        assert (answer.status, answer.error["code"]) == (504, "upstream_timeout")
        assert outcome(await relay.record()) == ("uH", 504, 1)
        await until(lambda: states(engine) == ["aborted"])


async def test_total_limit_before_the_head(engine: Engine) -> None:
    async with running_relay(engine.url, timeouts=TimeoutsConfig(total_s=SHORT_S)) as relay:
        answer = await ask(relay.port, request(sim_fault="stall-before-head"))
        assert (answer.status, answer.error["code"]) == (504, "upstream_timeout")
        record = await relay.record()
        assert outcome(record) == ("uH", 504, 1)
        assert "total_s" in str(record.error)
        await until(lambda: states(engine) == ["aborted"])


# -- after it


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("fault", "frames", "rechunk"),
    [
        *[("die-after:2", 2, ""), ("die-after:2", 2, "size:7"), ("die-after:2", 2, "length"), ("die-after:1", 1, "")],
        *[("die-mid-frame:2", 2, ""), ("die-mid-frame:2", 2, "split:3"), ("die-mid-frame:2", 2, "length")],
        # not in small pieces: what a reset finds unsent is lost
        *[("rst-after:2", 2, ""), ("rst-mid-frame:2", 2, ""), ("rst-after:2", 2, "length")],
    ],
)
async def test_an_engine_that_breaks_in_mid_stream(
    engine: Engine, second_engine: Engine, path: str, fault: str, frames: int, rechunk: str
) -> None:
    async with running_relay(engine.url, second_engine.url) as relay:
        answer = await ask(relay.port, request(path, sim_fault=fault, sim_rechunk=rechunk))
        assert_cut_off(answer, "upstream_disconnected", frames=frames)
        record = await relay.record()
        assert outcome(record) == ("UD", 200, 1)
        assert record.error
        assert record.stream


@pytest.mark.parametrize("frames", [1, 2, 4])
async def test_a_broken_chunk_in_mid_stream(engine: Engine, frames: int) -> None:
    async with running_relay(engine.url) as relay:
        answer = await ask(relay.port, request(sim_fault=f"bad-chunk:{frames}", sim_step_ms="20"))
        assert_cut_off(answer, "upstream_error", frames=frames)
        assert outcome(await relay.record()) == ("UD", 200, 1)
        await until(lambda: states(engine) == ["aborted"])


async def test_a_broken_chunk_before_the_first_frame(engine: Engine) -> None:
    async with running_relay(engine.url) as relay:
        answer = await ask(relay.port, request(sim_fault="bad-chunk:0"))
        assert (answer.status, answer.error["code"]) == (502, "upstream_error")
        assert outcome(await relay.record()) == ("UH", 502, 1)
        await until(lambda: states(engine) == ["aborted"])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("fault", ["stall-after:2", "stall-mid-frame:2"])
async def test_an_engine_that_falls_silent(engine: Engine, path: str, fault: str) -> None:
    async with running_relay(engine.url, timeouts=TimeoutsConfig(between_tokens_s=SHORT_S)) as relay:
        answer = await ask(relay.port, request(path, sim_fault=fault))
        assert_cut_off(answer, "upstream_timeout", frames=2)
        record = await relay.record()
        assert outcome(record) == ("uD", 200, 1)
        assert "between_tokens_s" in str(record.error)
        await until(lambda: states(engine) == ["aborted"])


async def test_total_limit_in_mid_stream(engine: Engine) -> None:
    async with running_relay(engine.url, timeouts=TimeoutsConfig(total_s=SHORT_S)) as relay:
        answer = await ask(relay.port, request(sim_fault="stall-after:2"))
        assert_cut_off(answer, "upstream_timeout", frames=2)
        record = await relay.record()
        assert outcome(record) == ("uD", 200, 1)
        assert "total_s" in str(record.error)


@pytest.mark.parametrize("fault", ["truncate-length", "die-mid-frame:0", "rst-mid-frame:0"])
async def test_a_json_answer_that_is_cut_stays_short(engine: Engine, fault: str) -> None:
    async with running_relay(engine.url) as relay:
        answer = await ask(relay.port, request(body={"stream": False}, sim_fault=fault))
        assert answer.status == 200
        assert answer.end == "fin"
        assert 0 < len(answer.payload) < int(answer.headers["content-length"])
        assert b'"error"' not in answer.payload
        record = await relay.record()
        assert outcome(record) == ("UD", 200, 1)
        assert record.error


async def test_a_json_answer_that_stalls(engine: Engine) -> None:
    async with running_relay(engine.url, timeouts=TimeoutsConfig(between_tokens_s=SHORT_S)) as relay:
        answer = await ask(relay.port, request(body={"stream": False}, sim_fault="stall-mid-frame:0"))
        assert (answer.status, answer.end) == (200, "fin")
        assert outcome(await relay.record()) == ("uD", 200, 1)
        await until(lambda: states(engine) == ["aborted"])


async def test_http10_clients_get_the_error_frame_without_chunks(engine: Engine) -> None:
    async with running_relay(engine.url) as relay:
        answer = await ask(relay.port, request(version="1.0", sim_fault="die-after:2"))
        assert "transfer-encoding" not in answer.headers
        assert_cut_off(answer, "upstream_disconnected", frames=2)
        assert outcome(await relay.record()) == ("UD", 200, 1)


# -- answers that are errors, and pass


@pytest.mark.parametrize("status", [400, 404, 422, 429, 500, 529])
@pytest.mark.parametrize("fault", ["status", "json-error"])
async def test_statuses_that_never_fail_over(engine: Engine, second_engine: Engine, status: int, fault: str) -> None:
    async with running_relay(engine.url, second_engine.url) as relay:
        data = request(sim_fault=f"{fault}:{status}")
        direct, answer = await ask(engine.port, data), await ask(relay.port, data)
        assert answer.status == status
        assert answer.payload == direct.payload
        assert answer.headers["content-type"] == "application/json"
        assert answer.headers.get("retry-after") == direct.headers.get("retry-after")
        record = await relay.record()
        assert outcome(record) == ("--", status, 1)
        assert record.error
        assert record.error in answer.payload.decode()
        assert len(engine.requests()) + len(second_engine.requests()) == 2


@pytest.mark.parametrize(
    ("path", "body", "field", "said"),
    [
        ("/v1/embeddings", b'{"error":{"message":"too long"}}', b"x-a: b", "too long"),
        ("/v1/models/none", b"<h1>gone</h1>", b"x-a: b", "<h1>gone</h1>"),
        (CHAT_PATH, gzip.compress(b'{"error":{"message":"too long"}}', mtime=0), b"content-encoding: gzip", None),
    ],
    ids=["JSON", "HTML", "gzip"],
)
async def test_the_record_says_why_an_engine_refused(path: str, body: bytes, field: bytes, said: str | None) -> None:
    head = b"HTTP/1.1 404 -\r\n%b\r\ncontent-length: %d\r\n\r\n" % (field, len(body))
    async with scripted((head + body, "keep")) as engine, running_relay(engine.urls[0]) as relay:
        answer = await ask(relay.port, request(path))
        assert (answer.status, answer.payload) == (404, body)
        record = await relay.record()
        assert (outcome(record), record.error) == (("--", 404, 1), said)


@pytest.mark.parametrize("status", [502, 503, 504])
@pytest.mark.parametrize("count", [1, 2])
async def test_the_last_engines_refusal_passes_untouched(
    engine: Engine, second_engine: Engine, status: int, count: int
) -> None:
    data = request(x_request_id="mine", sim_fault=f"status:{status}")
    direct = await ask(engine.port, data)
    async with running_relay(*[engine.url, second_engine.url][:count]) as relay:
        answer = await ask(relay.port, data)
        assert answer.status == status
        assert answer.payload == direct.payload
        assert answer.headers.get("retry-after") == ("7" if status == 503 else None)
        assert outcome(await relay.record()) == ("--", status, count)


async def test_a_json_answer_to_a_stream_request_stays_json(engine: Engine) -> None:
    async with running_relay(engine.url) as relay:
        direct, answer = await direct_and_through(relay, engine, CHAT_PATH, "json-on-stream", "")
        assert (answer.status, answer.headers["content-type"]) == (200, "application/json")
        assert same(answer.payload) == same(direct.payload)
        record = await relay.record()
        assert outcome(record) == ("--", 200, 1)
        assert record.completion_tokens == 6


# -- bodies that pass


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("fault", ["wrong-content-type", "no-content-type"])
@pytest.mark.parametrize("rechunk", ["", "bytes", "frames:3"])
async def test_a_stream_under_another_type_is_a_stream(engine: Engine, path: str, fault: str, rechunk: str) -> None:
    async with running_relay(engine.url) as relay:
        direct, answer = await direct_and_through(relay, engine, path, fault, rechunk)
        assert same(answer.payload) == same(direct.payload)
        assert answer.headers["content-type"] == STREAMING
        assert answer.headers["x-accel-buffering"] == "no"
        record = await relay.record()
        assert outcome(record) == ("--", 200, 1)
        assert record.error is None


@pytest.mark.parametrize(
    "fault", ["", "crlf", "cr", "bom", "comment:2", "non-json-frame:2", "bom,crlf", "crlf,comment:1,non-json-frame"]
)
@pytest.mark.parametrize(
    "rechunk",
    [
        *["", "ext", "length", "close", "bytes", "frames:2", "frames:99", "split:2", "split:9", "size:3", "size:1000"],
        *["writes:1", "writes:7,ext", "bytes,ext", "bytes,length", "bytes,close", "writes:5,length"],
    ],
)
async def test_bodies_come_out_as_they_went_in(engine: Engine, fault: str, rechunk: str) -> None:
    async with running_relay(engine.url) as relay:
        direct, answer = await direct_and_through(relay, engine, CHAT_PATH, fault, rechunk)
        assert same(answer.payload) == same(direct.payload)
        assert answer.end == "whole"
        assert "content-length" not in answer.headers
        record = await relay.record()
        assert outcome(record) == ("--", 200, 1)
        assert record.error is None
        assert record.finish_reason == "length"


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("rechunk", ["", "bytes", "frames:99", "split:3", "close", "length,size:11"])
async def test_all_routes_come_out_as_they_went_in(engine: Engine, path: str, rechunk: str) -> None:
    async with running_relay(engine.url) as relay:
        direct, answer = await direct_and_through(relay, engine, path, "", rechunk)
        assert same(answer.payload) == same(direct.payload)
        record = await relay.record()
        assert outcome(record) == ("--", 200, 1)
        assert record.error is None
        assert record.frames == len(direct.frames)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("rechunk", ["", "bytes", "close", "length"])
async def test_a_missing_end_mark_is_left_missing(engine: Engine, path: str, rechunk: str) -> None:
    async with running_relay(engine.url) as relay:
        direct, answer = await direct_and_through(relay, engine, path, "no-done", rechunk)
        assert same(answer.payload) == same(direct.payload)
        assert answer.end == "whole"
        record = await relay.record()
        assert outcome(record) == ("--", 200, 1)
        assert "end mark" in str(record.error)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("rechunk", ["", "bytes", "close", "length"])
async def test_a_missing_last_blank_line_is_added(engine: Engine, path: str, rechunk: str) -> None:
    async with running_relay(engine.url) as relay:
        direct, answer = await direct_and_through(relay, engine, path, "no-final-blank", rechunk)
        assert not direct.payload.endswith(b"\n\n")
        assert same(answer.payload) == same(direct.payload) + b"\n"
        assert answer.end == "whole"
        record = await relay.record()
        assert outcome(record) == ("--", 200, 1)
        assert record.error is None


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("fault", ["error-frame:2", "error-first"])
async def test_an_engines_own_error_frame_passes(engine: Engine, path: str, fault: str) -> None:
    async with running_relay(engine.url) as relay:
        direct, answer = await direct_and_through(relay, engine, path, fault, "")
        assert same(answer.payload) == same(direct.payload)
        assert answer.end == "whole"
        record = await relay.record()
        assert outcome(record) == ("--", 200, 1)
        assert "EngineCore" in str(record.error)


@pytest.mark.parametrize("size", [1000, 1_200_000, 5_000_000])
@pytest.mark.parametrize("rechunk", ["", "length", "size:4000"])
async def test_a_huge_frame_is_not_lost(engine: Engine, size: int, rechunk: str) -> None:
    stream = StreamConfig(max_frame_bytes=65536)
    async with running_relay(engine.url, stream=stream) as relay:
        direct, answer = await direct_and_through(relay, engine, CHAT_PATH, f"huge-frame:{size}", rechunk)
        assert len(answer.payload) > size
        assert same(answer.payload) == same(direct.payload)
        assert answer.end == "whole"
        record = await relay.record()
        assert outcome(record) == ("--", 200, 1)
        assert record.frames == 9


async def test_nothing_is_said_behind_half_a_huge_frame(engine: Engine) -> None:
    stream = StreamConfig(max_frame_bytes=65536)
    async with running_relay(engine.url, stream=stream) as relay:
        answer = await ask(relay.port, request(sim_fault="huge-frame:400000,die-mid-frame:1"))
        assert answer.end == "fin"
        assert b'"error":{' not in answer.payload
        assert outcome(await relay.record()) == ("UD", 200, 1)


# -- around the answer


@pytest.mark.parametrize("size", [10, 4_000_000])
async def test_an_answer_before_the_body_was_read(engine: Engine, size: int) -> None:
    async with running_relay(engine.url) as relay:
        for number in (1, 2):
            answer = await ask(relay.port, request(body=b"x" * size, sim_fault="early-answer"))
            assert answer.status == 400
            assert "seen enough" in answer.error["message"]
            assert outcome(await relay.record(number)) == ("--", 400, 1)


async def test_an_early_answer_before_a_reset_can_still_be_read(engine: Engine) -> None:
    """Within a machine nothing overtakes anything, and what had come before a reset stays there to be read."""
    async with running_relay(engine.url) as relay:
        answer = await ask(relay.port, request(body=b"x" * 4_000_000, sim_fault="early-answer:rst"))
        assert (answer.status, answer.end) == (400, "whole")
        assert "seen enough" in answer.error["message"]
        assert outcome(await relay.record()) == ("--", 400, 1)


async def test_interim_answers_pass(engine: Engine) -> None:
    async with running_relay(engine.url) as relay:
        answer = await ask(relay.port, request(sim_fault="1xx"))
        assert len(answer.interim) == 1
        assert answer.interim[0].startswith(b"HTTP/1.1 103 ")
        assert b"\r\nlink: </hint>; rel=preload\r\n" in answer.interim[0].lower()
        assert (answer.status, answer.end) == (200, "whole")
        old = await ask(relay.port, request(version="1.0", sim_fault="1xx"))
        assert (old.interim, old.status) == ([], 200)
        await relay.record(2)
        assert {outcome(record) for record in relay.records} == {("--", 200, 1)}


@pytest.mark.parametrize("is_cut", [False, True])
async def test_an_interim_answer_does_not_end_the_request(is_cut: bool, nursery: trio.Nursery) -> None:
    """It comes, in one piece or two, when little of a large body has been read."""
    interim = b"HTTP/1.1 102 Processing\r\n\r\nHTTP/1.1 103 Early Hints\r\nlink: </a>\r\n\r\n"
    size = 12_000_000
    got = bytearray()

    async def serve(stream: trio.SocketStream) -> None:
        got.extend(await stream.receive_some(1000))
        cut = 30 if is_cut else len(interim)
        await stream.send_all(interim[:cut])
        while len(got) < got.find(b"\r\n\r\n") + 4 + size:
            got.extend(await stream.receive_some(1_000_000))
        await stream.send_all(interim[cut:] + GOOD_ANSWER)

    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    listener.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
    nursery.start_soon(trio.serve_listeners, serve, [listener])
    limits = LimitsConfig(max_body_bytes=2 * size)
    async with running_relay(f"http://127.0.0.1:{listener.socket.getsockname()[1]}", limits=limits) as relay:
        head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % size
        answer = await ask(relay.port, head + b"{" + b" " * (size - 2) + b"}")
        assert (answer.status, answer.payload, answer.end) == (200, STREAM, "whole")
        assert [each[:12] for each in answer.interim] == [b"HTTP/1.1 102", b"HTTP/1.1 103"]
    nursery.cancel_scope.cancel()


# -- connections to the engine


async def test_connections_are_used_again(engine: Engine) -> None:
    async with running_relay(engine.url) as relay:
        for data in (request(), request(body={"stream": False}), request(sim_fault="status:500"), request(PATHS[3])):
            await ask(relay.port, data)
        assert engine.stats()["connections_accepted"] == 1


@pytest.mark.parametrize("fault", ["close-idle", "die-after:2", "die-before-head"])
async def test_a_closed_idle_connection_costs_nothing(engine: Engine, fault: str) -> None:
    async with running_relay(engine.url) as relay:
        for number in (1, 3):
            await ask(relay.port, request(sim_fault=fault))
            assert (await ask(relay.port, request())).status == 200
            assert outcome(await relay.record(number + 1)) == ("--", 200, 1)


@pytest.mark.parametrize("how", ["fin", "rst"])
async def test_a_reused_connection_that_dies_is_replaced_silently(how: Literal["fin", "rst"]) -> None:
    script = ((GOOD_ANSWER, "keep"), (b"", how), (GOOD_ANSWER, "keep"))
    async with scripted(*script, addresses=1) as engine, running_relay(*engine.urls) as relay:  # type: ignore[arg-type]
        for number in (1, 2):
            answer = await ask(relay.port, request(x_request_id="mine"))
            assert (answer.status, answer.payload) == (200, STREAM)
            assert outcome(await relay.record(number)) == ("--", 200, 1)
        assert engine.connections == 2
        assert len(engine.heads) == 3
        assert all(b"x-request-id: mine\r\n" in head.lower() for head in engine.heads)


async def test_it_is_replaced_once() -> None:
    script = ((GOOD_ANSWER, "keep"), (b"", "fin"), (b"", "fin"))
    async with scripted(*script, addresses=1) as engine, running_relay(*engine.urls) as relay:  # type: ignore[arg-type]
        assert (await ask(relay.port, request())).status == 200
        assert (await ask(relay.port, request())).status == 502
        assert outcome(await relay.record(2)) == ("UH", 502, 1)


async def test_a_reused_connection_that_dies_after_a_byte_is_a_failure() -> None:
    script = ((GOOD_ANSWER, "keep"), (b"HTTP/1.1", "fin"))
    async with scripted(*script, addresses=1) as engine, running_relay(*engine.urls) as relay:  # type: ignore[arg-type]
        assert (await ask(relay.port, request())).status == 200
        assert (await ask(relay.port, request())).status == 502
        assert outcome(await relay.record(2)) == ("UH", 502, 1)


async def test_idle_connections_expire(engine: Engine) -> None:
    async with running_relay(engine.url, timeouts=TimeoutsConfig(upstream_idle_s=0.05)) as relay:
        await ask(relay.port, request())
        began = trio.current_time()
        await until(lambda: trio.current_time() - began > 0.1)
        await ask(relay.port, request())
        assert engine.stats()["connections_accepted"] == 2


async def test_idle_connections_are_closed_where_no_request_follows(engine: Engine) -> None:
    async with running_relay(engine.url, timeouts=TimeoutsConfig(upstream_idle_s=0.3)) as relay:
        await ask(relay.port, request())
        (upstream,) = relay.worker.service.fleet.upstreams
        await until(lambda: upstream.idle == 1)  # the client may have its answer before the exchange has ended
        await until(lambda: upstream.idle == 0)
        await until(lambda: engine.stats()["connections_open"] == 0)


async def test_bytes_behind_an_answer_end_the_connection() -> None:
    script = ((GOOD_ANSWER + b"HTTP/1.1 200 OK\r\n", "keep"), (GOOD_ANSWER, "keep"))
    async with scripted(*script, addresses=1) as engine, running_relay(*engine.urls) as relay:  # type: ignore[arg-type]
        for number in (1, 2):
            assert (await ask(relay.port, request())).payload == STREAM
            assert outcome(await relay.record(number)) == ("--", 200, 1)
        assert engine.connections == 2


async def test_out_of_descriptors_is_not_the_engines_fault(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(*_: object) -> socket.socket:
        await trio.lowlevel.checkpoint()
        raise OSError(errno.EMFILE, "Too many open files")

    async with running_relay(engine.url) as relay:
        with monkeypatch.context() as patch:
            patch.setattr("relay.net.pool._connect_to", fail)
            for _ in range(6):
                answer = await ask(relay.port, request())
                assert (answer.status, answer.error["code"]) == (503, "no_upstream")
                assert answer.headers["retry-after"] == "1"
        assert outcome(await relay.record(6)) == ("RC", 503, 1)
        assert (await ask(relay.port, request())).status == 200


@pytest.mark.parametrize("status", [299, 599, 600, 777, 999])
async def test_odd_statuses_pass(status: int) -> None:
    answer = b"HTTP/1.1 %d -\r\ncontent-length: 2\r\n\r\nok" % status
    async with scripted((answer, "keep")) as engine, running_relay(engine.urls[0]) as relay:
        got = await ask(relay.port, request())
        assert (got.status, got.payload) == (status, b"ok")
        assert outcome(await relay.record()) == ("--", status, 1)
