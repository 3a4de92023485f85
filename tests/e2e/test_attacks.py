"""Engines and clients at their worst: one may ruin its own exchange, and nothing else."""

from __future__ import annotations

import gzip
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from itertools import pairwise
from typing import Any, Final

import pytest
import trio
import trio.testing

from relay.config import CostConfig, HealthConfig, LimitsConfig, PriceConfig, StreamConfig, TimeoutsConfig
from relay.core.dialect import Meter
from relay.core.frames import FrameRelay
from relay.core.framing import CloseDecoder
from relay.core.histogram import Histogram
from relay.core.request import Route
from relay.net.pair import Pair, Stop
from relay.net.pump import Pump
from relay.net.sockets import READ_BYTES
from relay.net.upstream import MOST_INTERIM
from relay_bench.engine import Engine
from tests.conftest import running_relay
from tests.e2e.fleet import Scrape, answer, fakes, pool_of, running_fleet
from tests.e2e.harness import GOOD_ANSWER, PATIENCE_S, STREAM, Client, ask, request, scripted, until

#: How long a flood lasts that nobody ends.
FLOOD_S: Final = 3.0
STREAM_HEAD: Final = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
JSON_HEAD: Final = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n"
PRICED: Final[dict[str, Any]] = {
    "prices": {"*": PriceConfig(prompt=1.0, completion=1.0)},
    "cost": CostConfig(in_usage=True),
}


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


class Flood:
    """An engine in a thread of its own, so that it can be quicker than the relay: a head, and a block without end."""

    def __init__(self, head: bytes, block: bytes) -> None:
        self.sent = 0
        self.is_over = False
        self._answer = head, block
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(FLOOD_S)
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def run(self) -> None:
        head, block = self._answer
        deadline = time.monotonic() + FLOOD_S
        try:
            sock, _ = self._listener.accept()
            with sock:
                sock.settimeout(FLOOD_S)
                sock.recv(65536)
                sock.sendall(head)
                while time.monotonic() < deadline:
                    sock.sendall(block)
                    self.sent += len(block)
        except OSError:
            pass  # the relay has had enough
        finally:
            self.is_over = True
            self._listener.close()


@contextmanager
def flooding(head: bytes, block: bytes) -> Iterator[Flood]:
    flood = Flood(head, block)
    thread = threading.Thread(target=flood.run)
    thread.start()
    yield flood
    thread.join()


# -- engines


async def test_interim_answers_have_an_end(engine: Engine) -> None:
    interim = b"HTTP/1.1 103 Early Hints\r\n\r\n"
    async with scripted((MOST_INTERIM * interim + GOOD_ANSWER, "keep"), (interim * 1000, "keep")) as many:
        async with running_relay(many.urls[0]) as relay:
            good = await ask(relay.port, request())
            assert (good.status, len(good.interim)) == (200, MOST_INTERIM)
            bad = await ask(relay.port, request())
            assert (bad.status, bad.error["code"], bad.interim) == (502, "upstream_error", [])
            assert "interim" in ((await relay.record(2)).error or "")


async def test_frames_that_are_all_hidden_end_at_the_first_token_limit() -> None:
    usage = chunk(b'data: {"choices":[],"usage":{"prompt_tokens":1}}\n\n')
    with flooding(STREAM_HEAD, usage * 500) as flood:
        always, limits = StreamConfig(include_usage="always"), TimeoutsConfig(first_token_s=0.2)
        async with running_relay(flood.url, stream=always, timeouts=limits) as relay:
            got = await ask(relay.port, request())
            assert (got.status, got.error["code"]) == (504, "upstream_timeout")


async def test_a_body_as_fast_as_its_client_takes_it_holds_up_nobody(nursery: trio.Nursery) -> None:
    """Other tasks have their turn between two reads, though there is always something to be read and room to send."""
    seen: set[int] = set()

    async def look() -> None:
        while True:
            seen.update(exchange.bytes_out for exchange in relay.worker.service.active)
            await trio.lowlevel.checkpoint()

    async with scripted((answer(200, b" " * 4_000_000), "keep")) as engine, running_relay(engine.urls[0]) as relay:
        nursery.start_soon(look)
        got = await ask(relay.port, request(body={"stream": False}))
        assert len(got.payload) == 4_000_000
    steps = sorted(seen)
    assert max(after - before for before, after in pairwise(steps)) < 3 * READ_BYTES
    nursery.cancel_scope.cancel()


async def test_who_pipelines_holds_up_nobody(nursery: trio.Nursery) -> None:
    """Other tasks have their turn between two requests that the relay answers by itself."""
    turns = 0

    async def look() -> None:
        nonlocal turns
        while True:
            turns += 1
            await trio.lowlevel.checkpoint()

    asked = b"GET /-/live HTTP/1.1\r\nhost: x\r\n\r\n"
    async with fakes("m") as (engine,), running_relay(engine.url) as relay:
        async with await Client.connect(relay.port) as client:
            await client.send(asked * 501)
            nursery.start_soon(look)
            await until(lambda: len(relay.records) == 501)
            assert turns >= 500
    nursery.cancel_scope.cancel()


async def test_an_encoded_stream_passes_as_it_comes() -> None:
    body = gzip.compress(STREAM)
    fields = b"content-type: text/event-stream\r\ncontent-encoding: gzip"
    sent = b"HTTP/1.1 200 OK\r\n%b\r\ncontent-length: %d\r\n\r\n%b" % (fields, len(body), body[:-8])
    async with (
        scripted((sent, "keep")) as engine,
        running_relay(engine.urls[0]) as relay,
        await Client.connect(relay.port) as client,
    ):
        await client.send(request())
        got = b""
        with trio.fail_after(PATIENCE_S):
            while not got.endswith(body[:-8]):
                got += await client.stream.receive_some()
        assert b"content-encoding: gzip\r\n" in got


@pytest.mark.parametrize("number", ["9" * 400, "-7", "99999999999999999999", "1e308", '"many"'])
async def test_absurd_usage_is_none(number: str) -> None:
    frame = f'data: {{"choices":[],"usage":{{"prompt_tokens":{number},"completion_tokens":{number}}}}}\n\n'
    script = STREAM_HEAD + chunk(frame.encode()) + chunk(STREAM) + b"0\r\n\r\n"
    async with scripted((script, "keep")) as engine, running_fleet(pool_of(engine.urls[0]), **PRICED) as relay:
        got = await ask(relay.port, request())
        assert (got.status, got.end) == (200, "whole")
        assert frame.encode() in got.payload
        record = await relay.record()
        assert (record.outcome, record.usage, record.prompt_tokens, record.completion_tokens) == (
            "--", "estimated", None, 1,
        )  # fmt: skip
        scrape = Scrape(await relay.admin("GET", "/metrics"))
        assert scrape("relay_cost_total") == pytest.approx(1e-6)


async def test_a_finish_reason_is_a_word() -> None:
    frame = b'data: {"choices":[{"index":0,"delta":{},"finish_reason":"%b"}]}\n\n' % (b"x" * 100_000)
    script = STREAM_HEAD + chunk(frame) + b"0\r\n\r\n"
    async with scripted((script, "keep")) as engine, running_relay(engine.urls[0]) as relay:
        assert (await ask(relay.port, request())).payload == frame
        assert (await relay.record()).finish_reason == "x" * 100


async def test_chunk_extensions_are_part_of_what_is_kept() -> None:
    body = b'{"usage":{"prompt_tokens":1,"completion_tokens":1}}'
    bloated = b"".join(b"1;%b\r\n%c\r\n" % (b"e" * 4000, byte) for byte in body)
    short, long = (JSON_HEAD + pieces + b"0\r\n\r\n" for pieces in (chunk(body), bloated))
    stream = StreamConfig(max_answer_bytes=5000)
    async with (
        scripted((short, "keep"), (long, "keep")) as engine,
        running_relay(engine.urls[0], stream=stream, **PRICED) as relay,
    ):
        assert b"total_cost" in (await ask(relay.port, request(body={"stream": False}))).payload
        assert (await ask(relay.port, request(body={"stream": False}))).payload == body


async def test_an_index_of_thousands_of_digits() -> None:
    digits = b"1" * 5000
    frame = b'data: {"choices":[{"index":%b,"delta":{"content":"a"},"finish_reason":"stop"}]}\n\n' % digits
    script = STREAM_HEAD + chunk(frame + b"data: [DONE]\n\n") + b"0\r\n\r\n"
    async with (
        scripted((script, "keep")) as engine,
        running_relay(engine.urls[0], stream=StreamConfig(force_stream=True)) as relay,
    ):
        got = await ask(relay.port, request(body={"stream": False}))
        assert got.status == 200
        assert b'"content":"a"' in got.payload  # Python's own parser would not take the index


# -- what engines answer to probes


class Probed:
    """An engine whose ``/health`` is the test's."""

    def __init__(self, answer: bytes, *, is_endless: bool) -> None:
        self.answer = answer
        self.is_endless = is_endless
        self.heads: list[bytes] = []
        self.sent = 0
        self.ended = 0

    async def serve(self, stream: trio.SocketStream) -> None:
        head = await stream.receive_some()
        if not head.startswith(b"GET /health "):
            await stream.send_all(answer(404))
            return
        self.heads.append(bytes(head))
        try:
            await stream.send_all(self.answer)
            while self.is_endless:
                await stream.send_all(b"x" * 65536)
                self.sent += 65536
        except trio.BrokenResourceError:
            self.ended += 1


@asynccontextmanager
async def probed(answer: bytes, *, is_endless: bool = False) -> AsyncIterator[tuple[Probed, str]]:
    engine = Probed(answer, is_endless=is_endless)
    async with trio.open_nursery() as nursery:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        await nursery.start(trio.serve_listeners, engine.serve, listeners)
        yield engine, f"http://127.0.0.1:{listeners[0].socket.getsockname()[1]}"
        nursery.cancel_scope.cancel()


OFTEN: Final = HealthConfig(interval_s=0.02, failures=1, successes=1)


async def test_a_probe_does_not_read_an_endless_answer() -> None:
    head = b"HTTP/1.1 200 OK\r\ncontent-length: 4000000000\r\n\r\n"
    async with probed(head, is_endless=True) as (engine, url), running_fleet(pool_of(url), health=OFTEN) as relay:
        await until(lambda: engine.ended >= 2)
        assert engine.sent < 64 * 1_048_576  # what sockets hold is the kernel's business
        assert relay.upstreams[url].health.is_up


async def test_a_probe_does_not_unpack() -> None:
    head = b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\ncontent-length: 4\r\n\r\nnone"
    async with probed(head) as (engine, url), running_fleet(pool_of(url), health=OFTEN) as relay:
        await until(lambda: len(engine.heads) >= 2)
        assert relay.upstreams[url].health.is_up


async def test_probes_carry_no_cookies() -> None:
    head = b"HTTP/1.1 200 OK\r\nset-cookie: a=b; Path=/\r\ncontent-length: 0\r\n\r\n"
    async with probed(head) as (engine, url), running_fleet(pool_of(url), health=OFTEN):
        await until(lambda: len(engine.heads) >= 3)
    assert not any(b"cookie" in head.lower() for head in engine.heads)


async def test_probes_follow_nobody() -> None:
    async with fakes("other") as (other,):
        head = b"HTTP/1.1 302 Found\r\nlocation: %b/health\r\ncontent-length: 0\r\n\r\n" % other.url.encode()
        async with probed(head) as (engine, url), running_fleet(pool_of(url), health=OFTEN) as relay:
            await until(lambda: len(engine.heads) >= 2)
            assert not relay.upstreams[url].health.is_up
            assert not other.probed


# -- clients


async def test_room_for_bodies_is_not_given_to_announcements(engine: Engine) -> None:
    async with (
        running_relay(engine.url, limits=LimitsConfig(max_buffered_bytes=1000)) as relay,
        await Client.connect(relay.port) as idler,
    ):
        await idler.send(b"POST /v1/chat/completions HTTP/1.1\r\nhost: r\r\ncontent-length: 900\r\n\r\n{")
        await until(lambda: relay.worker.budget.used == 1)
        assert (await ask(relay.port, request(body={"user": "x" * 600}))).status == 200


async def test_names_of_models_cost_no_more_than_their_length() -> None:
    async with fakes("m") as (engine,), running_fleet(pool_of(engine.url, models=("*-vl-*-awq", "m"))) as relay:
        got = await ask(relay.port, request(body={"model": "-vl-" * 250}))
        assert (got.status, got.error["code"]) == (404, "model_not_found")
        # One that is no name counts as none: the first pool's engine is to refuse it.
        assert (await ask(relay.port, request(body={"model": "-vl-" * 250_000}))).status == 200
        records = [await relay.record(number) for number in (1, 2)]
        assert [len(record.model or "") for record in records] == [1000, 0]


# -- the admin side


async def test_an_engine_whose_name_cannot_be_resolved_is_not_let_in() -> None:
    async with fakes("m") as (engine,), running_fleet(pool_of(engine.url), health=OFTEN) as relay:
        for host in ("a..b", "a" * 64, ".a", "-a", "a-", ".".join(["a"] * 200)):
            got = await relay.admin("POST", "/-/upstreams", {"url": f"http://{host}:80"})
            assert (got.status, list(relay.upstreams)) == (400, [engine.url])
        assert (await relay.admin("POST", "/-/upstreams", {"url": f"http://{'a' * 63}.invalid:80"})).status == 200


async def test_admin_bodies_nested_too_deeply() -> None:
    async with fakes("m") as (engine,), running_fleet(pool_of(engine.url)) as relay:
        for path in ("/-/upstreams", "/instances/add", "/instances/remove"):
            assert (await relay.admin("POST", path, b'{"x":' + b"[" * 60_000)).status in (400, 405)


# -- the pump


async def test_a_stream_that_outlasts_the_first_token_limit_ends_as_it_does(nursery: trio.Nursery) -> None:
    """Its end, and the sweep that finds the old limit passed, in one turn of the pump."""
    pump = Pump()
    (client, _client_end), (upstream, _engine_end) = socket.socketpair(), socket.socketpair()
    pair = pump.open(pump.add(client), lambda: None)
    pair.attach(pump.add(upstream))
    pair.limit(1.0)
    stops: list[Stop] = []

    async def stream(pair: Pair) -> None:
        relay = FrameRelay(CloseDecoder(), Meter(Route.CHAT), is_chunked=True, max_frame_bytes=64)
        stops.append(await pair.stream(relay, Histogram(), idle_limit_s=0))

    nursery.start_soon(stream, pair)
    await trio.testing.wait_all_tasks_blocked()
    pump._give_back(pair, Stop.DONE)
    pump.sweep(time.monotonic_ns() + int(2e9))
    await trio.testing.wait_all_tasks_blocked()
    assert stops == [Stop.DONE]
    pair.close()
    pump.epoll.close()
    for sock in (client, _client_end, upstream, _engine_end):
        sock.close()


def test_a_fault_while_one_client_is_told_to_wait_on_is_its_own_alone(capfd: pytest.CaptureFixture[str]) -> None:
    pump = Pump()
    ends = [socket.socketpair() for _ in range(2)]
    gone: list[int] = []
    asked: list[int] = []

    def fail() -> bool:
        raise ValueError("a fault of ours")

    def ask_on() -> bool:
        asked.append(1)
        return True

    pairs = [pump.open(pump.add(client), partial(gone.append, number)) for number, (client, _) in enumerate(ends)]
    for pair, on_quiet in zip(pairs, (fail, ask_on), strict=True):
        pair.comment_every(1.0, 0.0, on_quiet)
    for seconds in (2, 4):
        pump.sweep(int(seconds * 1e9))
    assert (gone, asked) == ([], [1, 1])
    assert pump.commented == {pairs[1]}
    assert "a fault of ours" in capfd.readouterr().err
    for pair in pairs:
        pair.close()
    pump.epoll.close()
    for sock in (*ends[0], *ends[1]):
        sock.close()
