"""Head, wait, first frame: what happens between an engine's head and its first token, which the pump sends."""

from __future__ import annotations

import re
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any, Final

import pytest
import trio

from relay.core.request import RequestFacts, peek
from relay.net import exchange, upstream
from tests.conftest import RunningRelay, running_relay
from tests.e2e.harness import STREAM, Client, ask, assert_cut_off, request, scripted, until

CHUNKED: Final = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
FRAME: Final = STREAM[: STREAM.index(b"\n\n") + 2]
CHUNK: Final = b"%x\r\n%b\r\n" % (len(FRAME), FRAME)
REST: Final = b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"


pytestmark = pytest.mark.usefixtures("pump_form")


class Waiting:
    """A relay between a client and an engine, one exchange under way."""

    def __init__(self, relay: RunningRelay, client: Client, engine: trio.SocketStream) -> None:
        self.relay = relay
        self.client = client
        self.engine = engine


@asynccontextmanager
async def waiting(head: bytes = CHUNKED) -> AsyncIterator[Waiting]:
    """A client whose engine has sent a head, and no frame yet."""
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    url = f"http://127.0.0.1:{listeners[0].socket.getsockname()[1]}"
    async with listeners[0], running_relay(url) as relay, await Client.connect(relay.port) as client:
        await client.send(request())
        async with await listeners[0].accept() as engine:
            asked = b""
            while not re.search(rb"\}$", asked):
                asked += await engine.receive_some()
            await engine.send_all(head)
            await until(lambda: any(each.pair.is_beginning for each in relay.worker.service.active))
            yield Waiting(relay, client, engine)


async def test_the_first_frame_goes_out_with_the_head_and_the_rest_behind_it() -> None:
    async with waiting() as now:
        await now.engine.send_all(CHUNK)
        assert (await now.client.frames(1)).partition(b"\r\n\r\n")[2] == CHUNK
        (exchange,) = now.relay.worker.service.active
        await until(lambda: exchange.reply.is_committed)
        await now.engine.send_all(REST)
        answer = await now.client.answer()
        assert (answer.status, answer.end, answer.payload) == (200, "whole", STREAM)
        record = await now.relay.record()
        assert (record.outcome, record.status, record.frames) == ("--", 200, 2)
        timing = answer.headers["server-timing"]
        assert re.fullmatch(r"engine;dur=\d+\.\d{3}, relay;dur=\d+\.\d{3}", timing)
        assert record.ttft_ms is not None
        assert record.ttft_ms > float(timing.split("engine;dur=")[1].split(",")[0])
        assert (await now.client.ask(request("/-/live", method="GET"))).status == 200  # it is kept


async def test_the_end_comes_with_the_first_frame() -> None:
    async with waiting() as now:
        await now.engine.send_all(CHUNK + REST)
        answer = await now.client.answer()
        assert (answer.status, answer.end, answer.payload) == (200, "whole", STREAM)
        record = await now.relay.record()
        assert (record.outcome, record.frames, record.attempts) == ("--", 2, 1)


async def test_a_stream_without_frames_is_an_answer_all_the_same() -> None:
    async with waiting() as now:
        await now.engine.send_all(b"0\r\n\r\n")
        answer = await now.client.answer()
        assert (answer.status, answer.end, answer.payload) == (200, "whole", b"")
        assert (await now.relay.record()).frames == 0


@pytest.mark.parametrize("rest", [b"", STREAM], ids=["no body", "a body"])
async def test_a_stream_of_a_length(rest: bytes) -> None:
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-length: %d\r\n\r\n" % len(rest)
    async with scripted((head + rest, "keep"), (head + rest, "keep"), addresses=1) as engine:
        async with running_relay(*engine.urls) as relay:
            for number in (1, 2):
                answer = await ask(relay.port, request())
                assert (answer.status, answer.end, answer.payload) == (200, "whole", rest)
                assert (await relay.record(number)).outcome == "--"
        assert engine.connections == 1


async def test_the_engine_closes_where_that_is_the_end_of_the_body() -> None:
    async with waiting(CHUNKED.replace(b"transfer-encoding: chunked\r\n", b"")) as now:
        await now.engine.send_all(STREAM)
        await now.engine.aclose()
        answer = await now.client.answer()
        assert (answer.status, answer.end, answer.payload) == (200, "whole", STREAM)
        assert (await now.relay.record()).outcome == "--"


async def test_a_frame_in_two_parts_is_not_begun_with() -> None:
    async with waiting() as now:
        await now.engine.send_all(CHUNK[:20])
        await trio.testing.wait_all_tasks_blocked(0.02)
        (exchange,) = now.relay.worker.service.active
        assert not exchange.reply.is_committed
        assert exchange.pair.is_beginning
        await now.engine.send_all(CHUNK[20:] + REST)
        answer = await now.client.answer()
        assert (answer.status, answer.payload) == (200, STREAM)


async def test_what_drains_meanwhile_says_so_in_its_head() -> None:
    async with waiting() as now:
        now.relay.worker.stop()
        await until(lambda: now.relay.worker.service.is_draining)
        await now.engine.send_all(CHUNK + REST)
        answer = await now.client.answer()
        assert (answer.status, answer.payload) == (200, STREAM)
        assert answer.headers["connection"] == "close"
        assert await now.client.is_closed()


@pytest.mark.parametrize("broken", [b"", CHUNK[:20], b"zz\r\n"], ids=["nothing", "half a frame", "no chunk"])
async def test_before_the_first_frame_another_engine_may_take_over(broken: bytes) -> None:
    whole = CHUNKED + CHUNK + REST
    async with scripted((CHUNKED + broken, "fin"), (whole, "keep")) as engine:
        async with running_relay(*engine.urls) as relay:
            answer = await ask(relay.port, request())
            assert (answer.status, answer.end, answer.payload) == (200, "whole", STREAM)
            record = await relay.record()
            assert (record.outcome, record.attempts, record.frames) == ("--", 2, 2)


async def test_behind_the_first_frame_none_does() -> None:
    async with waiting() as now:
        await now.engine.send_all(CHUNK)
        await now.client.frames(1)
        await now.engine.aclose()
        answer = await now.client.answer()
        assert_cut_off(answer, "upstream_disconnected", frames=1)
        record = await now.relay.record()
        assert (record.outcome, record.status, record.attempts) == ("UD", 200, 1)


async def test_the_client_leaves_while_the_first_frame_comes() -> None:
    async with waiting() as now:
        now.client.leave("rst")
        await now.engine.send_all(CHUNK)
        record = await now.relay.record()
        assert record.outcome[0] == "C"
        with trio.fail_after(2), suppress(trio.BrokenResourceError):  # what it had sent was not read
            assert await now.engine.receive_some() == b""  # it is free
        assert not now.relay.worker.service.active


async def test_no_engine_waits_for_the_relay_to_read_the_body(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    async def send(*arguments: Any) -> Any:
        done.append("sent")
        return await upstream_send(*arguments)

    def read(body: bytes) -> RequestFacts:
        done.append("read")
        return peek(body)

    upstream_send = upstream._send
    monkeypatch.setattr(upstream, "_send", send)
    monkeypatch.setattr(exchange, "peek", read)
    async with waiting():
        assert done == ["sent", "read"]


async def test_how_an_engines_connection_broke_is_said() -> None:
    async with waiting() as now:
        now.engine.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        now.engine.socket.close()
        answer = await now.client.answer()
        assert (answer.status, answer.error["code"]) == (502, "upstream_disconnected")
        said = "the engine's connection broke before its stream's first frame: Connection reset by peer"
        assert (await now.relay.record()).error == said
