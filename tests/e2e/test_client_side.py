"""What clients do, well and badly, and what the relay answers them."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path

import pytest
import trio

from relay.config import DaemonConfig, LimitsConfig, TimeoutsConfig
from relay_bench.engine import Engine, EngineConfig, serve_engine
from tests.conftest import running_relay
from tests.e2e.fleet import fakes
from tests.e2e.harness import (
    ASKS,
    CHAT_PATH,
    PATHS,
    Client,
    ask,
    assert_cut_off,
    request,
    same,
    states,
    until,
)

SHORT_S = 0.2
#: "At once", for what needs only a few turns of the scheduler.
AT_ONCE_S = 0.5


# -- requests and connections


async def test_keep_alive(engine: Engine) -> None:
    async with running_relay(engine.url) as relay, await Client.connect(relay.port) as client:
        for number, path in enumerate(PATHS):
            answer = await client.ask(request(path, x_request_id=f"id-{number}"))
            assert (answer.status, answer.end) == (200, "whole")
            assert answer.headers["x-request-id"] == f"id-{number}"
            assert answer.headers.get("connection") != "close"
        assert [record["id"] for record in engine.requests()] == ["id-0", "id-1", "id-2", "id-3"]


async def test_connection_close(engine: Engine) -> None:
    async with running_relay(engine.url) as relay, await Client.connect(relay.port) as client:
        answer = await client.ask(request(connection="close"))
        assert (answer.status, answer.end) == (200, "whole")
        assert answer.headers["connection"] == "close"
        assert await client.is_closed()


async def test_pipelined_requests_are_answered_in_order(engine: Engine) -> None:
    requests = [
        request(x_request_id="a", sim_ttft_ms="50"),
        request("/version", method="GET", x_request_id="b"),
        request(body={"stream": False}, x_request_id="c"),
        request("/-/live", method="GET", x_request_id="d"),
        request(x_request_id="e", sim_rechunk="length"),
    ]
    async with running_relay(engine.url) as relay, await Client.connect(relay.port) as client:
        await client.send(b"\r\n".join(requests))
        for name in "abcde":
            answer = await client.answer()
            assert (answer.status, answer.end, answer.headers["x-request-id"]) == (200, "whole", name)
        await relay.record(5)
        assert [record.id for record in relay.records] == list("abcde")
        assert {record.outcome for record in relay.records} == {"--"}


async def test_a_request_in_single_bytes(engine: Engine) -> None:
    async with running_relay(engine.url) as relay, await Client.connect(relay.port) as client:
        for byte in request():
            await client.send(bytes([byte]))
        assert (await client.answer()).status == 200


async def test_expect_100_continue(engine: Engine) -> None:
    async with running_relay(engine.url) as relay, await Client.connect(relay.port) as client:
        head, _, body = request(expect="100-continue").partition(b"\r\n\r\n")
        for _ in range(2):
            await client.send(head + b"\r\n\r\n")
            assert await client.interim() == b"HTTP/1.1 100 Continue\r\n\r\n"
            answer = await client.ask(body)
            assert (answer.status, answer.interim) == (200, [])
        assert (await client.ask(head + b"\r\n\r\n" + body)).status == 200
        assert "expect" not in engine.last()["head"].lower()


async def test_expect_with_a_body_too_large_is_refused_before_it_is_sent(engine: Engine) -> None:
    async with (
        running_relay(engine.url, limits=LimitsConfig(max_body_bytes=10)) as relay,
        await Client.connect(relay.port) as client,
    ):
        head = request(expect="100-continue").partition(b"\r\n\r\n")[0]
        answer = await client.ask(head + b"\r\n\r\n")
        assert (answer.status, answer.interim) == (413, [])


async def test_head(engine: Engine) -> None:
    async with running_relay(engine.url) as relay, await Client.connect(relay.port) as client:
        direct = await ask(engine.port, request("/health", method="HEAD"))
        answer = await client.ask(request("/health", method="HEAD"))
        assert answer.status == direct.status
        assert answer.headers["content-length"] == direct.headers["content-length"]
        local = await client.ask(request("/-/live", method="HEAD"))
        assert (local.status, local.payload) == (200, b"")
        assert int(local.headers["content-length"]) > 0
        assert (await client.ask(request())).status == 200  # nothing was left on the connection


async def test_head_of_an_error_has_no_body() -> None:
    async with running_relay("http://127.0.0.1:1") as relay, await Client.connect(relay.port) as client:
        answer = await client.ask(request("/v1/models", method="HEAD"))
        assert answer.status == 502
        assert await client.is_closed()


@pytest.mark.parametrize("extra", [{}, {"connection": "keep-alive"}])
async def test_http10(engine: Engine, extra: dict[str, str]) -> None:
    async with running_relay(engine.url) as relay, await Client.connect(relay.port) as client:
        direct = await ask(engine.port, request(x_request_id="same"))
        answer = await client.ask(request(version="1.0", body=None, method="POST", x_request_id="same", **extra))
        assert "transfer-encoding" not in answer.headers
        assert "content-length" not in answer.headers
        assert answer.end == "fin"  # the body ends with the connection
        assert same(answer.payload) == same(direct.payload)
        assert (await relay.record()).outcome == "--"


async def test_http10_with_a_length(engine: Engine) -> None:
    async with running_relay(engine.url) as relay, await Client.connect(relay.port) as client:
        answer = await client.ask(request(version="1.0", body={"stream": False}))
        assert (answer.status, answer.end) == (200, "whole")
        assert await client.is_closed()


async def test_a_chunked_request(engine: Engine) -> None:
    async with running_relay(engine.url) as relay, await Client.connect(relay.port) as client:
        body = request().partition(b"\r\n\r\n")[2]
        head = request(body=b"", transfer_encoding="chunked", trailer="x-t")
        chunks = b"".join(b"%X;e=1\r\n%b\r\n" % (len(part), part) for part in (body[:5], body[5:6], body[6:]))
        for _ in range(2):
            answer = await client.ask(head + chunks + b"0\r\nx-t: 1\r\n\r\n")
            assert (answer.status, answer.end) == (200, "whole")
            assert engine.last()["body"] == body.decode()
            assert engine.last()["raw_body"] == body.decode()
            assert f"content-length: {len(body)}\r\n" in engine.last()["head"].lower()


async def test_what_the_engine_sees(engine: Engine) -> None:
    async with running_relay(engine.url) as relay:
        await ask(
            relay.port, request(x_request_id="mine", connection="keep-alive, x-secret", x_secret="1", te="trailers")
        )
        head = engine.last()["head"].lower()
        assert head.startswith(f"post {CHAT_PATH} http/1.1\r\n")
        for line in (
            f"host: 127.0.0.1:{engine.port}",
            "x-request-id: mine",
            "via: 1.1 relay",
            "x-forwarded-for: 127.0.0.1",
        ):
            assert f"\r\n{line}\r\n" in head
        assert "x-secret" not in head
        assert "\r\nte:" not in head
        assert "\r\naccept-encoding: identity\r\n" in head


# -- refusals

GET = b"GET /v1/models HTTP/1.1\r\nhost: relay\r\n"
POST = b"POST /v1/chat/completions HTTP/1.1\r\nhost: relay\r\n"
REFUSED = {
    "no http": (b"\x00\x01\x02", 400),
    "tls": (b"\x16\x03\x01\x02\x00\x01\x00", 400),
    "bare lf": (b"GET / HTTP/1.1\nhost: relay\n\n", 400),
    "folded": (GET + b"a: b\r\n c\r\n\r\n", 400),
    "no host": (b"GET / HTTP/1.1\r\n\r\n", 400),
    "two hosts": (GET + b"host: other\r\n\r\n", 400),
    "bad host": (b"GET / HTTP/1.1\r\nhost: a b\r\n\r\n", 400),
    "space before colon": (GET + b"a : b\r\n\r\n", 400),
    "control byte": (GET + b"a: b\x00c\r\n\r\n", 400),
    "two lengths": (POST + b"content-length: 5\r\ncontent-length: 5\r\n\r\nhello", 400),
    "length list": (POST + b"content-length: 5, 5\r\n\r\nhello", 400),
    "length with sign": (POST + b"content-length: +5\r\n\r\nhello", 400),
    "length and chunked": (POST + b"content-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n", 400),
    "underscored length": (POST + b"content_length: 5\r\n\r\nhello", 400),
    "chunked in 1.0": (b"POST / HTTP/1.0\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n", 400),
    "chunked not last": (POST + b"transfer-encoding: chunked, gzip\r\n\r\n", 400),
    "bad chunk": (POST + b"transfer-encoding: chunked\r\n\r\nzz\r\nhello\r\n0\r\n\r\n", 400),
    "bad trailer": (POST + b"transfer-encoding: chunked\r\n\r\n0\r\ncontent-length: 5\r\n\r\n", 400),
    "fragment": (b"GET /#a HTTP/1.1\r\nhost: relay\r\n\r\n", 400),
    "ftp": (b"GET ftp://a/ HTTP/1.1\r\nhost: relay\r\n\r\n", 400),
    "trace": (b"TRACE / HTTP/1.1\r\nhost: relay\r\n\r\n", 405),
    "connect": (b"CONNECT a:443 HTTP/1.1\r\nhost: a:443\r\n\r\n", 405),
    "too large": (POST + b"content-length: 1001\r\n\r\n", 413),
    "chunked too large": (POST + b"transfer-encoding: chunked\r\n\r\n3e9\r\n" + b"x" * 1001, 413),
    "long line": (b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\nhost: relay\r\n\r\n", 414),
    "endless line": (b"GET /" + b"a" * 9000, 414),
    "expectation": (POST + b"expect: miracles\r\ncontent-length: 5\r\n\r\nhello", 417),
    "long head": (GET + b"a: " + b"b" * 70000 + b"\r\n\r\n", 431),
    "endless head": (GET + b"a: " + b"b" * 70000, 431),
    "many fields": (GET + b"a: b\r\n" * 300 + b"\r\n", 431),
    "gzip": (POST + b"transfer-encoding: gzip, chunked\r\n\r\n0\r\n\r\n", 501),
    "http/2.0": (b"GET / HTTP/2.0\r\nhost: relay\r\n\r\n", 505),
    "http/1.2": (b"GET / HTTP/1.2\r\nhost: relay\r\n\r\n", 505),
}
CODES = {400: "bad_request", 413: "body_too_large", 431: "headers_too_large"}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("is_second", [False, True])
async def test_refused_requests(engine: Engine, name: str, is_second: bool) -> None:
    data, status = REFUSED[name]
    async with (
        running_relay(engine.url, limits=LimitsConfig(max_body_bytes=1000)) as relay,
        await Client.connect(relay.port) as client,
    ):
        if is_second:
            assert (await client.ask(request("/-/live", method="GET"))).status == 200
        answer = await client.ask(data)
        assert (answer.status, answer.end) == (status, "whole")
        assert answer.headers["connection"] == "close"
        assert answer.headers["content-type"] == "application/json"
        assert answer.error["code"] == CODES.get(status, "bad_request")
        assert answer.error["message"]
        assert answer.error.keys() == {"message", "type", "param", "code"}
        assert await client.is_closed()
        record = await relay.record(2 if is_second else 1)
        assert (record.outcome, record.status, record.attempts) == ("RR", status, 0)
        assert record.bytes_out == len(answer.head) + len(answer.payload)
        assert record.error
        assert (engine.stats()["served"], engine.stats()["connections_accepted"]) == (0, 0)


async def test_what_stands_behind_a_refused_request_is_not_served(engine: Engine) -> None:
    async with running_relay(engine.url) as relay, await Client.connect(relay.port) as client:
        answer = await client.ask(REFUSED["length and chunked"][0] + request())
        assert answer.status == 400
        assert await client.is_closed()
        assert engine.stats()["served"] == 0
        assert len(relay.records) == 1


@pytest.mark.parametrize("is_second", [False, True])
@pytest.mark.parametrize("data", [b"GET / HT", POST + b"content-length: 5\r\n\r\nhel"])
async def test_slow_requests(engine: Engine, data: bytes, is_second: bool) -> None:
    timeouts = TimeoutsConfig(client_head_s=SHORT_S, client_body_s=SHORT_S)
    async with running_relay(engine.url, timeouts=timeouts) as relay, await Client.connect(relay.port) as client:
        if is_second:
            assert (await client.ask(request("/-/live", method="GET"))).status == 200
        answer = await client.ask(data)
        assert (answer.status, answer.error["code"], answer.headers["connection"]) == (408, "request_timeout", "close")
        assert await client.is_closed()
        record = await relay.record(2 if is_second else 1)
        assert (record.outcome, record.status) == ("cR", 408)
        assert engine.stats()["served"] == 0


@pytest.mark.parametrize("is_second", [False, True])
async def test_idle_connections_are_closed_without_a_word(engine: Engine, is_second: bool) -> None:
    async with (
        running_relay(engine.url, timeouts=TimeoutsConfig(client_idle_s=SHORT_S)) as relay,
        await Client.connect(relay.port) as client,
    ):
        if is_second:
            assert (await client.ask(request("/-/live", method="GET"))).status == 200
        assert await client.is_closed()
        assert len(relay.records) == is_second


@pytest.mark.parametrize(
    "framing", [b"content-length: 8388608\r\n\r\n", b"transfer-encoding: chunked\r\n\r\n800000\r\n"]
)
async def test_a_refusal_reaches_a_client_that_is_still_sending(engine: Engine, framing: bytes) -> None:
    async with (
        running_relay(engine.url, limits=LimitsConfig(max_body_bytes=100_000)) as relay,
        await Client.connect(relay.port) as client,
    ):
        # all of it is sent before the answer is looked for: a reset meanwhile would have thrown the answer away
        await client.send(POST + framing + b"x" * 8388608)
        answer = await client.answer()
        assert (answer.status, answer.end, answer.error["code"]) == (413, "whole", "body_too_large")


async def test_a_client_of_a_unix_socket_has_no_address_to_forward(tmp_path: Path) -> None:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "relay"))
    listener.listen()
    async with fakes("m") as (engine,), running_relay(engine.url, listener=listener) as relay:
        async with Client(await trio.open_unix_socket(str(tmp_path / "relay"))) as client:
            await client.ask(request())
            await client.ask(request(x_forwarded_for="203.0.113.9"))
        assert b"x-forwarded-for" not in engine.asked[0]
        assert b"\r\nx-forwarded-for: 203.0.113.9\r\n" in engine.asked[1]
        assert (await relay.record(2)).client == "unix"


async def test_bodies_beyond_the_budget_wait_and_are_served(engine: Engine) -> None:
    async with (
        running_relay(engine.url, limits=LimitsConfig(max_buffered_bytes=1000)) as relay,
        await Client.connect(relay.port) as first,
        await Client.connect(relay.port) as second,
    ):
        await first.send(request(body={"user": "x" * 600}, sim_fault="stall-after:2"))
        await first.frames(2)
        await second.send(request(body={"user": "x" * 600}))
        assert (await ask(relay.port, request("/-/live", method="GET"))).status == 200
        assert engine.stats()["served"] == 1
        first.leave("close")
        assert (await second.answer()).status == 200


@pytest.mark.parametrize("is_second", [False, True])
async def test_bodies_beyond_the_budget_wait_for_so_long(engine: Engine, is_second: bool) -> None:
    async with (
        running_relay(
            engine.url,
            limits=LimitsConfig(max_buffered_bytes=1000),
            timeouts=TimeoutsConfig(client_body_s=SHORT_S),
        ) as relay,
        await Client.connect(relay.port) as first,
        await Client.connect(relay.port) as second,
    ):
        if is_second:
            assert (await second.ask(request("/-/live", method="GET"))).status == 200
        await first.send(request(body={"user": "x" * 600}, sim_fault="stall-after:2"))
        await first.frames(2)
        answer = await second.ask(request(body={"user": "x" * 600}))
        assert (answer.status, answer.error["code"]) == (503, "no_upstream")
        assert answer.headers["retry-after"] == "1"
        record = await relay.record(2 if is_second else 1)
        assert (record.outcome, record.status) == ("RQ", 503)


async def test_waiting_for_the_budget_is_not_the_clients_time(engine: Engine) -> None:
    """Half of ``client_body_s`` and more goes by twice: once for want of room, once in the client's own pause."""
    body_s = 1.0
    head = POST + b"content-length: 1000\r\n\r\n"
    async with (
        running_relay(
            engine.url, limits=LimitsConfig(max_buffered_bytes=1000), timeouts=TimeoutsConfig(client_body_s=body_s)
        ) as relay,
        await Client.connect(relay.port) as first,
        await Client.connect(relay.port) as second,
    ):
        await first.send(request(body={"user": "x" * 600}, sim_fault="stall-after:2"))
        await first.frames(2)
        await second.send(head + b'{"messages":[' + b" " * 587)
        for _ in range(2):
            began = trio.current_time()
            await until(lambda began=began: trio.current_time() - began > 0.6 * body_s)  # type: ignore[misc]
            first.leave("close")
        await second.send(b" " * 397 + b"]}")
        await second.send(b" ")
        assert (await second.answer()).status != 408


@pytest.mark.parametrize("framing", [b"content-length: 2000\r\n\r\n", b"transfer-encoding: chunked\r\n\r\n7d0\r\n"])
async def test_bodies_that_are_half_read_keep_out_none_that_comes_whole(engine: Engine, framing: bytes) -> None:
    body = b'{"model":"tiny","messages":[{"role":"user","content":"x"}]' + b" " * 1941
    end = b"}\r\n0\r\n\r\n" if b"chunked" in framing else b"}"
    async with (
        running_relay(engine.url, limits=LimitsConfig(max_buffered_bytes=4000)) as relay,
        await Client.connect(relay.port) as first,
        await Client.connect(relay.port) as second,
    ):
        budget = relay.worker.budget
        await first.send(POST + framing + body)
        await until(lambda: budget.used == 1999)
        await second.send(POST + framing + body[:1400])
        await until(lambda: budget.used == 3399)
        await second.send(body[1400:])
        assert (await ask(relay.port, request())).status == 200
        for client in (first, second):
            await client.send(end)
            assert (await client.answer()).status == 200


async def test_who_leaves_while_it_waits_for_the_budget_gives_its_part_back(engine: Engine) -> None:
    async with (
        running_relay(engine.url, limits=LimitsConfig(max_buffered_bytes=1000)) as relay,
        await Client.connect(relay.port) as first,
        await Client.connect(relay.port) as second,
    ):
        budget = relay.worker.budget
        await first.send(request(body={"user": "x" * 600}, sim_fault="stall-after:2"))
        await first.frames(2)
        held = budget.used
        await second.send(POST + b"content-length: 5000\r\n\r\n{")
        await until(lambda: budget.used == held + 1)
        await second.send(b" " * 999)
        second.leave("close")
        await until(lambda: budget.used == held)
        record = await relay.record()
        assert (record.outcome, record.status) == ("CQ", 499)


# -- clients that leave


@pytest.mark.parametrize("how", ["fin", "close", "rst"])
@pytest.mark.parametrize("fault", ["stall-before-head", "stall-after-head", "stall-mid-frame:0"])
async def test_a_client_leaves_before_the_head(engine: Engine, how: str, fault: str) -> None:
    async with running_relay(engine.url, engine.url) as relay, await Client.connect(relay.port) as client:
        await client.send(request(sim_fault=fault))
        await until(lambda: states(engine) == ["running"])
        client.leave(how)
        await until(lambda: states(engine) == ["aborted"], AT_ONCE_S)
        record = await relay.record()
        assert (record.outcome, record.status, record.attempts) == ("CH", 499, 1)
        assert record.bytes_out == 0
        if how == "fin":
            assert await client.is_closed()


@pytest.mark.parametrize("how", ["fin", "close"])
@pytest.mark.parametrize("more", [b"\r\n", b"P", request()])
@pytest.mark.parametrize("body", [{}, {"stream": False}])
async def test_a_client_leaves_that_has_said_more(engine: Engine, how: str, more: bytes, body: dict[str, bool]) -> None:
    """Its end is not the next thing to be read."""
    async with running_relay(engine.url) as relay, await Client.connect(relay.port) as client:
        await client.send(request(body=body, sim_fault="stall-before-head"))
        await until(lambda: states(engine) == ["running"])
        await client.send(more)
        client.leave(how)
        await until(lambda: states(engine) == ["aborted"], AT_ONCE_S)
        assert (await relay.record()).outcome == "CH"


@pytest.mark.parametrize("how", ["fin", "close", "rst"])
@pytest.mark.parametrize("fault", ["stall-after:2", "stall-mid-frame:2"])
async def test_a_client_leaves_in_mid_stream(engine: Engine, how: str, fault: str) -> None:
    async with running_relay(engine.url) as relay, await Client.connect(relay.port) as client:
        await client.send(request(sim_fault=fault))
        await client.frames(2)
        client.leave(how)
        await until(lambda: states(engine) == ["aborted"], AT_ONCE_S)
        record = await relay.record()
        assert record.outcome == "CD"
        assert record.status == 200  # what it was told


@pytest.mark.parametrize("how", ["fin", "close", "rst"])
async def test_a_client_leaves_while_tokens_flow(engine: Engine, how: str) -> None:
    async with running_relay(engine.url) as relay, await Client.connect(relay.port) as client:
        await client.send(request(body={"max_tokens": 100_000}, sim_step_ms="1"))
        await client.frames(5)
        client.leave(how)
        await until(lambda: states(engine) == ["aborted"], AT_ONCE_S)
        assert (await relay.record()).outcome == "CD"


@pytest.mark.parametrize("how", ["fin", "close", "rst"])
@pytest.mark.parametrize("body", [{}, {"stream": False}])
async def test_a_client_leaves_the_engines_queue(nursery: trio.Nursery, how: str, body: dict[str, bool]) -> None:
    engine: Engine = await nursery.start(serve_engine, EngineConfig(max_seqs=1))
    async with (
        running_relay(engine.url) as relay,
        await Client.connect(engine.port) as first,
        await Client.connect(relay.port) as client,
    ):
        await first.send(request(sim_fault="stall-after:1"))
        await until(lambda: states(engine) == ["running"])
        await client.send(request(body=body))
        await until(lambda: states(engine) == ["running", "queued"])
        client.leave(how)
        await until(lambda: states(engine) == ["running", "aborted"], AT_ONCE_S)
        record = await relay.record()
        assert (record.outcome, record.status) == ("CH", 499)


@pytest.mark.parametrize("how", ["fin", "close", "rst"])
@pytest.mark.parametrize("data", [b"GET / HT", POST + b"content-length: 5\r\n\r\nhel"])
async def test_a_client_leaves_in_its_request(engine: Engine, how: str, data: bytes) -> None:
    async with running_relay(engine.url) as relay, await Client.connect(relay.port) as client:
        await client.send(data)
        await until(lambda: len(relay.worker.connections) == 1)
        client.leave(how)
        record = await relay.record()
        assert (record.outcome, record.status) == ("CR", 499)
        await until(lambda: not relay.worker.connections)
        assert engine.stats()["served"] == 0


async def test_a_client_that_says_nothing_leaves_no_record(engine: Engine) -> None:
    async with running_relay(engine.url) as relay:
        async with await Client.connect(relay.port):
            await until(lambda: len(relay.worker.connections) == 1)
        await until(lambda: not relay.worker.connections)
        assert not relay.records


async def test_a_client_leaves_with_pipelined_requests_unserved(engine: Engine) -> None:
    async with running_relay(engine.url) as relay, await Client.connect(relay.port) as client:
        await client.send(request(sim_fault="stall-after:2") + request())
        await client.frames(2)
        client.leave("close")
        await until(lambda: states(engine) == ["aborted"], AT_ONCE_S)
        assert (await relay.record()).outcome == "CD"
        await until(lambda: not relay.worker.connections)


# -- clients that do not read

#: More than all socket buffers on the way hold.
MANY_TOKENS = 200_000


async def blocked(engine: Engine) -> int:
    """How many tokens had left when the engine could send no more."""
    seen = -1
    await until(lambda: bool(engine.requests()))
    with trio.fail_after(15):
        while seen != (seen := engine.requests()[0]["tokens_sent"]) or not seen:  # noqa: ASYNC110
            await trio.sleep(0.25)
    assert engine.requests()[0]["state"] == "running"
    return int(seen)


async def test_a_client_that_does_not_read_costs_bounded_memory_and_delays_nobody(engine: Engine) -> None:
    async with (
        running_relay(engine.url) as relay,
        await Client.connect(relay.port, receive_buffer=4096) as client,
    ):
        await client.send(request(body={"max_tokens": MANY_TOKENS}))
        sent = await blocked(engine)
        assert sent < MANY_TOKENS
        (exchange,) = relay.worker.service.active
        assert len(exchange.pair.unsent) <= 2 * 65536
        assert 0 < exchange.frames_so_far <= sent + 1
        began = trio.current_time()
        other = await ask(relay.port, request())
        assert (other.status, other.end) == (200, "whole")
        assert trio.current_time() - began < AT_ONCE_S
        assert engine.requests()[0]["tokens_sent"] == sent
        client.leave("rst")
        await until(lambda: states(engine)[0] == "aborted", AT_ONCE_S)
        assert (await relay.record(2)).outcome == "CD"


async def test_a_client_that_reads_on_gets_everything(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, an_hour_ns, now_ns = 60_000, 3600 * 10**9, time.monotonic_ns
    async with (
        running_relay(engine.url) as relay,
        await Client.connect(relay.port, receive_buffer=4096) as client,
    ):
        await client.send(request(body={"max_tokens": tokens}))
        await blocked(engine)
        monkeypatch.setattr(time, "monotonic_ns", lambda: now_ns() + an_hour_ns)  # it takes its time
        count, tail = 0, b""
        with trio.fail_after(15):
            while not tail.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n"):
                data = await client.stream.receive_some(1 << 20)
                assert data
                count += (tail[-1:] + data).count(b"\n\n")
                tail = (tail + data)[-64:]
        assert count == tokens + 2
        record = await relay.record()
        assert (record.outcome, record.status, record.frames) == ("--", 200, tokens + 2)
        assert record.gap_max_ms is not None
        assert record.gap_max_ms < an_hour_ns / 1e6  # and that is none of the engine's


async def test_a_client_that_stops_reading_is_dropped(engine: Engine) -> None:
    async with (
        running_relay(engine.url, timeouts=TimeoutsConfig(client_stall_s=0.5)) as relay,
        await Client.connect(relay.port, receive_buffer=4096) as client,
    ):
        await client.send(request(body={"max_tokens": MANY_TOKENS}))
        record = await relay.record()
        assert (record.outcome, record.status) == ("cD", 200)
        assert "client_stall_s" in str(record.error)
        await until(lambda: states(engine) == ["aborted"], AT_ONCE_S)


async def test_nothing_is_said_behind_half_a_frame_of_a_blocked_client(engine: Engine) -> None:
    async with (
        running_relay(engine.url, timeouts=TimeoutsConfig(total_s=1.0)) as relay,
        await Client.connect(relay.port, receive_buffer=4096) as client,
    ):
        await client.send(request(body={"max_tokens": MANY_TOKENS}))
        record = await relay.record()
        assert (record.outcome, record.status) == ("uD", 200)
        answer = await client.answer()
        assert answer.end in {"fin", "rst"}
        assert b'"error":{' not in answer.payload + answer.rest
        await until(lambda: states(engine) == ["aborted"], AT_ONCE_S)


# -- unix sockets


async def test_unix_sockets(nursery: trio.Nursery, tmp_path: Path) -> None:
    engine: Engine = await nursery.start(serve_engine, EngineConfig(listen=f"unix:{tmp_path}/e"))
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{tmp_path}/r")
        listener.listen()
        async with running_relay(engine.url, listener=listener) as relay:
            stream = await trio.open_unix_socket(f"{tmp_path}/r")
            async with stream:
                client = Client(stream)
                for _ in range(2):
                    answer = await client.ask(request())
                    assert (answer.status, answer.end) == (200, "whole")
                record = await relay.record()
                assert (record.outcome, record.client, record.upstream) == ("--", "unix", engine.url)
                await client.send(request(sim_fault="stall-after:2"))
                await client.frames(2)
                client.leave("close")
                await until(lambda: states(engine)[-1] == "aborted", AT_ONCE_S)


# -- the worker


async def test_live_and_ready(engine: Engine) -> None:
    async with running_relay(engine.url) as relay, await Client.connect(relay.port) as client:
        for path in ("/-/live", "/-/ready", "/-/ready?x=1"):
            answer = await client.ask(request(path, method="GET"))
            assert (answer.status, answer.headers["content-type"]) == (200, "application/json")
            assert answer.json()["status"] in {"live", "ready"}
        assert engine.stats()["connections_accepted"] == 0


async def test_not_ready_before_accepting_stops(engine: Engine) -> None:
    async with running_relay(engine.url, daemon=DaemonConfig(ready_delay_s=1.0)) as relay:
        relay.worker.stop()
        ready = await ask(relay.port, request("/-/ready", method="GET"))
        assert ready.status == 503
        assert (await ask(relay.port, request("/-/live", method="GET"))).status == 200
        answer = await ask(relay.port, request())  # the balancer in front has not noticed yet
        assert (answer.status, answer.end) == (200, "whole")


async def refuses_connections(port: int) -> None:
    with trio.fail_after(5):
        while True:
            try:
                (await Client.connect(port)).leave("rst")
            except OSError:
                return
            await trio.sleep(0.01)


async def test_draining_lets_streams_finish(engine: Engine) -> None:
    async with (
        running_relay(engine.url) as relay,
        await Client.connect(relay.port) as client,
        await Client.connect(relay.port) as idle,
    ):
        assert (await idle.ask(request("/-/live", method="GET"))).status == 200
        await client.send(request(body={"max_tokens": 20}, sim_step_ms="25"))
        await client.frames(3)
        relay.worker.stop()
        assert await idle.is_closed()
        await refuses_connections(relay.port)
        answer = await client.answer()
        assert (answer.status, answer.end) == (200, "whole")
        assert len(answer.frames) == 22
        assert await client.is_closed()
        assert (await relay.record(2)).outcome == "--"
        with trio.fail_after(1):
            await relay.worker.stopped.wait()


@pytest.mark.parametrize("path", PATHS)
async def test_draining_cuts_what_takes_longer(engine: Engine, path: str) -> None:
    async with (
        running_relay(engine.url, daemon=DaemonConfig(drain_s=SHORT_S)) as relay,
        await Client.connect(relay.port) as client,
    ):
        await client.send(request(path, sim_fault="stall-after:2"))
        await client.frames(2)
        relay.worker.stop()
        assert_cut_off(await client.answer(), "draining", frames=2)
        record = await relay.record()
        assert (record.outcome, record.status) == ("RD", 200)
        await until(lambda: states(engine) == ["aborted"], AT_ONCE_S)
        with trio.fail_after(1):
            await relay.worker.stopped.wait()


async def test_draining_before_the_head(engine: Engine) -> None:
    async with (
        running_relay(engine.url, daemon=DaemonConfig(drain_s=SHORT_S)) as relay,
        await Client.connect(relay.port) as client,
    ):
        await client.send(request(sim_fault="stall-before-head"))
        await until(lambda: states(engine) == ["running"])
        relay.worker.stop()
        answer = await client.answer()
        assert (answer.status, answer.error["code"]) == (503, "draining")
        assert answer.headers["retry-after"].isdecimal()
        assert answer.headers["connection"] == "close"
        record = await relay.record()
        assert (record.outcome, record.status) == ("RH", 503)
        await until(lambda: states(engine) == ["aborted"], AT_ONCE_S)


async def test_a_cut_ends_everything_at_once(engine: Engine) -> None:
    async with running_relay(engine.url) as relay, await Client.connect(relay.port) as client:
        await client.send(request(sim_fault="stall-after:2"))
        await client.frames(2)
        relay.worker.stop()
        relay.worker.cut()
        answer = await client.answer()
        assert answer.end in {"fin", "rst"}
        assert (await relay.record()).outcome == "RD"
        await until(lambda: states(engine) == ["aborted"], AT_ONCE_S)


async def test_connections_are_limited(engine: Engine) -> None:
    async with (
        running_relay(engine.url, limits=LimitsConfig(max_connections=2)) as relay,
        await Client.connect(relay.port) as first,
        await Client.connect(relay.port) as second,
    ):
        for client in (first, second):
            await client.send(request(body={"max_tokens": 10_000}, sim_step_ms="10"))
            await client.frames(1)
        async with await Client.connect(relay.port) as third:
            await third.send(request())  # waits in the backlog, as nobody idles
            await first.frames(5)
            assert len(relay.worker.connections) == 2
            assert engine.stats()["served"] == 2
            second.leave("close")
            assert (await third.answer()).status == 200


@pytest.mark.parametrize("client_idle_s", [75.0, 0.0])
async def test_who_idles_longest_makes_room_for_who_comes(engine: Engine, client_idle_s: float) -> None:
    limits, timeouts = LimitsConfig(max_connections=3), TimeoutsConfig(client_idle_s=client_idle_s)
    async with (
        running_relay(engine.url, limits=limits, timeouts=timeouts) as relay,
        await Client.connect(relay.port) as busy,
        await Client.connect(relay.port) as idle,
        await Client.connect(relay.port) as newer,
    ):
        await busy.send(request(body={"max_tokens": 10_000}, sim_step_ms="10"))
        await busy.frames(1)
        assert (await idle.ask(request())).status == 200
        assert (await newer.ask(request())).status == 200
        assert (await ask(relay.port, request())).status == 200
        assert await idle.is_closed()
        assert (await newer.ask(request())).status == 200
        await busy.frames(20)


async def test_who_was_busy_when_somebody_came_makes_room_once_idle(engine: Engine) -> None:
    async with (
        running_relay(engine.url, limits=LimitsConfig(max_connections=1)) as relay,
        await Client.connect(relay.port) as first,
        await Client.connect(relay.port) as second,
    ):
        await first.send(request(body={"max_tokens": 50}, sim_step_ms="10"))
        await first.frames(1)
        await second.send(request())
        assert (await first.answer()).end == "whole"
        assert (await second.answer()).status == 200
        assert await first.is_closed()


async def test_a_request_that_came_just_before_a_drain_is_served(engine: Engine) -> None:
    async with running_relay(engine.url) as relay, await Client.connect(relay.port) as client:
        assert (await client.ask(request())).status == 200
        (connection,) = relay.worker.connections
        await until(lambda: connection.is_waiting)
        sock = socket.socket(fileno=os.dup(client.stream.socket.fileno()))
        with sock:
            sock.send(request())  # without a turn of the relay's
        assert not connection.stop_waiting()
        relay.worker.stop()
        assert (await client.answer()).status == 200
        assert await client.is_closed()


@pytest.mark.parametrize("said", [b"\r", b"\r\n"])
async def test_an_empty_line_does_not_keep_a_place(engine: Engine, said: bytes) -> None:
    async with (
        running_relay(engine.url, limits=LimitsConfig(max_connections=1)) as relay,
        await Client.connect(relay.port) as first,
    ):
        await first.send(said)
        await until(lambda: [bytes(client._buffer) for client in relay.worker.connections] == [said])
        assert (await ask(relay.port, request())).status == 200


async def test_many_streams_at_once(engine: Engine) -> None:
    good = await ask(engine.port, request(x_request_id="same"))
    payloads: list[bytes] = []

    async def one(path: str) -> None:
        answer = await ask(relay.port, request(path, x_request_id="same", sim_step_ms="5"))
        assert (answer.status, answer.end) == (200, "whole")
        if path == CHAT_PATH:
            payloads.append(same(answer.payload))

    async with running_relay(engine.url) as relay:
        async with trio.open_nursery() as nursery:
            for number in range(200):
                nursery.start_soon(one, PATHS[number % len(ASKS)])
        assert set(payloads) == {same(good.payload)}
        await relay.record(200)
        assert {record.outcome for record in relay.records} == {"--"}
