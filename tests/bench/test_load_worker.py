"""The load generator on real sockets, against the built-in engine and small servers that misbehave."""

from __future__ import annotations

import itertools
import os
import shutil
import socket
import ssl
import subprocess
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import trio

from relay_bench.engine import Engine, EngineConfig, serve_engine
from relay_bench.load.datasets import ENDPOINTS
from relay_bench.load.timer import Alarm
from relay_bench.load.worker import Progress
from tests.bench.loading import LIMIT_S, job_for, labels, load

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

MS = 1_000_000


@pytest.fixture
async def engine(nursery: trio.Nursery) -> Engine:
    started: Engine = await nursery.start(serve_engine, EngineConfig(stamp=True))
    return started


@pytest.fixture
def serve(nursery: trio.Nursery) -> Callable[..., Awaitable[str]]:
    """Starts a server of one handler; its URL."""

    async def start(handler: Callable[[trio.SocketStream], Awaitable[None]]) -> str:
        listeners = await nursery.start(partial(trio.serve_tcp, handler, 0, host="127.0.0.1"))
        return f"http://127.0.0.1:{listeners[0].socket.getsockname()[1]}"

    return start


async def test_every_route_and_every_mark(engine: Engine) -> None:
    for route in ENDPOINTS:
        job = job_for(engine.url, total=3, route=route, has_stamps=True, request_id_prefix=f"t-{route.value}")
        tally = await load(job)
        assert labels(tally) == ["", "", ""], route
        for one in tally.records:
            marks = [
                one.planned_ns, one.sent_ns, one.connected_ns, one.head_ns, one.first_byte_ns, one.first_content_ns,
                one.last_content_ns, one.done_ns,
            ]  # fmt: skip
            assert None not in marks
            assert marks == sorted(marks, key=lambda mark: mark or 0)
            assert one.written_ns is not None
            assert (one.content_frames, one.completion_tokens, one.prompt_tokens) == (4, 4, 3)
            assert one.itl_source == "frames"
        assert tally.frame_gap.count == tally.itl.count == 9
        assert (tally.frame_delay.count, tally.lost_stamps) == (12, 0)
        assert 0 < tally.frame_delay.min_ns < LIMIT_S * 1e9
    assert {request["id"] for request in engine.requests()} >= {"t-chat-0", "t-messages-2"}


async def test_the_kernel_says_when_bytes_came(engine: Engine) -> None:
    tally = await load(job_for(engine.url, total=20, every_ns=5 * MS))
    # the first ones may be without: the kernel switches stamps on with a delay
    assert 0 < tally.client_delay.count <= tally.reads
    assert tally.client_delay.max_ns < LIMIT_S * 1e9


async def test_continuous_usage_gives_inter_token_latencies(engine: Engine) -> None:
    tally = await load(job_for(engine.url, continuous_usage=True, is_detailed=True))
    (one,) = tally.records
    assert one.itl_source == "continuous"
    assert one.content_ns is not None
    assert one.itls_ns == [later - earlier for earlier, later in pairwise(one.content_ns)]


async def test_without_a_count_there_is_no_inter_token_latency(engine: Engine) -> None:
    tally = await load(job_for(engine.url, headers={"x-sim-usage": "none"}))
    assert labels(tally) == [""]
    assert tally.records[0].itl_source == "none"
    assert (tally.frame_gap.count, tally.itl.count) == (3, 0)


@pytest.mark.parametrize(
    ("headers", "label"),
    [
        ({"x-sim-fault": "error-frame:2"}, "error_frame"),
        ({"x-sim-fault": "no-done"}, "no_end_mark"),
        ({"x-sim-fault": "die-after:3"}, "truncated"),
        ({"x-sim-fault": "die-mid-frame:3"}, "truncated"),
        ({"x-sim-fault": "rst-after:3"}, "reset"),
        ({"x-sim-fault": "die-before-head"}, "no_answer"),
        ({"x-sim-fault": "bad-chunk:2"}, "bad_framing"),
        ({"x-sim-fault": "status:429"}, "http_429"),
        ({"x-sim-fault": "json-on-stream"}, "not_a_stream"),
        ({"x-sim-fault": "wrong-content-type"}, "not_a_stream"),
        ({"x-sim-tokens": "3"}, "wrong_count"),
        ({"x-sim-fault": "stall-after:3"}, "timeout"),
        ({"x-sim-fault": "comment, crlf, 1xx"}, ""),
        ({"x-sim-fault": "no-final-blank"}, ""),
        ({"x-sim-rechunk": "bytes"}, ""),
        ({"x-sim-rechunk": "close"}, ""),
        ({"x-sim-rechunk": "length"}, ""),
    ],
)
async def test_faults_are_failures_by_label(engine: Engine, headers: dict[str, str], label: str) -> None:
    timeout_s = 0.3 if label == "timeout" else LIMIT_S
    tally = await load(job_for(engine.url, total=2, headers=headers, is_exact=True, timeout_s=timeout_s))
    assert labels(tally) == [label, label]
    assert tally.frame_gap.count == (0 if label else 6)


async def test_connections_are_kept_or_not(engine: Engine) -> None:
    tally = await load(job_for(engine.url, total=5, max_concurrency=1, is_closed_loop=True))
    assert [one.is_reused for one in tally.records] == [False, True, True, True, True]
    assert engine.stats()["connections_accepted"] == 1
    await load(job_for(engine.url, total=3, max_concurrency=1, is_closed_loop=True, keep_alive=False))
    assert engine.stats()["connections_accepted"] == 4


async def test_a_connection_the_server_closed_is_not_used_again(engine: Engine) -> None:
    job = job_for(engine.url, total=4, max_concurrency=1, is_closed_loop=True, headers={"x-sim-fault": "close-idle"})
    tally = await load(job)
    assert labels(tally) == [""] * 4


async def test_a_request_that_met_a_closing_connection_is_sent_again(serve: Callable[..., Awaitable[str]]) -> None:
    """The second request on a connection gets a hang-up instead of an answer; on a fresh one it is served."""
    body = b'data: {"choices":[{"delta":{"content":"x"}}]}\n\ndata: [DONE]\n\n'
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-length: %d\r\n\r\n" % len(body)

    async def handler(stream: trio.SocketStream) -> None:
        await read_request(stream)
        await stream.send_all(head + body)
        await read_request(stream)

    tally = await load(job_for(await serve(handler), total=3, max_concurrency=1, is_closed_loop=True))
    assert labels(tally) == ["", "", ""]
    assert tally.retried == 2
    assert [one.is_reused for one in tally.records] == [False] * 3


async def test_nobody_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    tally = await load(job_for(f"http://127.0.0.1:{port}", total=3, max_concurrency=1, is_closed_loop=True))
    assert labels(tally) == ["connect"] * 3
    assert "refused" in tally.records[0].error


async def test_a_request_larger_than_the_socket_takes(engine: Engine) -> None:
    job = job_for(engine.url, extra={"user": "x" * 6_000_000})
    tally = await load(job)
    assert labels(tally) == [""]


async def test_places_hold_requests_back_and_the_plan_does_not_forget() -> None:
    """An open loop with one place, before a server that takes its time: time from planned shows the wait."""
    async with trio.open_nursery() as nursery:
        engine = await nursery.start(serve_engine, EngineConfig(ttft_ms=20))
        tally = await load(job_for(engine.url, total=4, every_ns=MS, max_concurrency=1))
        nursery.cancel_scope.cancel()
    assert labels(tally) == [""] * 4
    assert [one.planned_ns for one in tally.records] == [0, MS, 2 * MS, 3 * MS]
    for before, one in pairwise(tally.records):
        assert one.sent_ns > before.done_ns
        assert one.due_ns == before.done_ns > one.planned_ns  # till then it was not the client's fault
        ttft, planned = one.metric_s("ttft"), one.metric_s("ttft_planned")
        assert ttft is not None
        assert planned is not None
        assert planned > ttft + 0.015


async def test_a_server_that_stalls_shows_up_in_every_request_it_held_up(serve: Callable[..., Awaitable[str]]) -> None:
    """The accept queue waits until the last request has been sent: none of them may look fast."""
    body = b'data: {"choices":[{"delta":{"content":"x"}}]}\n\ndata: [DONE]\n\n'
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-length: %d\r\n\r\n" % len(body)
    total, asked, go_on = 5, 0, trio.Event()

    async def handler(stream: trio.SocketStream) -> None:
        nonlocal asked
        await read_request(stream)
        asked += 1
        if asked == total:
            go_on.set()
        await go_on.wait()
        await stream.send_all(head + body)

    tally = await load(job_for(await serve(handler), total=total, every_ns=10 * MS))
    assert labels(tally) == [""] * total
    last_sent = max(one.sent_ns for one in tally.records)
    assert all((one.first_content_ns or 0) > last_sent for one in tally.records)
    for one in tally.records:
        assert (one.metric_s("ttft_planned") or 0.0) > (last_sent - one.planned_ns) / 1e9


async def test_a_closed_loop_keeps_its_places_full_and_ends_in_time(engine: Engine) -> None:
    reports: list[Progress] = []
    job = job_for(engine.url, total=2, max_concurrency=3, is_closed_loop=True, duration_ns=300 * MS)
    tally = await load(job, reports)
    indexes = [one.index for one in tally.records]
    assert len(set(indexes)) == len(indexes) > 2  # the two bodies were used again
    assert all(one.planned_ns == one.due_ns < 300 * MS for one in tally.records)
    assert reports
    assert reports[0].done <= len(tally.records)


async def test_in_a_closed_loop_a_request_is_due_when_its_place_became_free(engine: Engine) -> None:
    """So that a client which takes its time to send is seen to be late."""
    tally = await load(job_for(engine.url, total=4, max_concurrency=1, is_closed_loop=True))
    assert [one.planned_ns for one in tally.records[1:]] == [one.done_ns for one in tally.records[:-1]]
    assert all(one.planned_ns == one.due_ns < one.sent_ns for one in tally.records)


async def test_places_that_were_free_from_the_start_are_not_filled_late(engine: Engine) -> None:
    """A hundred connections take a while to begin, which is nobody's delay."""
    tally = await load(job_for(engine.url, total=100, max_concurrency=100, is_closed_loop=True))
    begun = sorted((one.planned_ns, one.sent_ns) for one in tally.records)
    assert all(sent <= planned for (_, sent), (planned, _) in itertools.pairwise(begun))


async def test_a_place_is_filled_before_the_next_answer_is_looked_at(serve: Callable[..., Awaitable[str]]) -> None:
    """Two answers come at once: the request that follows the first does not wait for the second to be read."""
    body = b'data: {"choices":[{"delta":{"content":"x"}}]}\n\ndata: [DONE]\n\n'
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-length: %d\r\n\r\n" % len(body)
    waiting: list[trio.SocketStream] = []

    async def handler(stream: trio.SocketStream) -> None:
        await read_request(stream)
        waiting.append(stream)
        if len(waiting) == 2:
            for one in waiting:
                os.write(one.socket.fileno(), head + body)  # without a chance for the client in between
        await read_request(stream)
        await stream.send_all(head + body)

    tally = await load(job_for(await serve(handler), total=3, max_concurrency=2, is_closed_loop=True))
    assert labels(tally) == [""] * 3
    first, second = sorted(tally.records, key=lambda one: one.done_ns)[:2]
    assert first.done_ns < max(one.sent_ns for one in tally.records) < second.done_ns


async def test_warm_ups_are_all_of_one_prompt(engine: Engine) -> None:
    """What prefix caches know of the prompts that are measured is the first of them at most."""
    await load(job_for(engine.url, total=3, every_ns=MS, num_warmups=2, request_id_prefix="t"))
    ids = [request["id"] for request in engine.requests()]
    assert ids[:2] == ["t-0", "t-0"]
    assert sorted(ids[2:]) == ["t-0", "t-1", "t-2"]  # a millisecond apart: they overtake each other on a busy machine


async def test_windows_and_warm_ups_are_left_out(engine: Engine) -> None:
    job = job_for(
        engine.url, total=5, every_ns=MS, measured_from_ns=MS, measured_to_ns=3 * MS, num_warmups=2, has_stamps=True
    )
    tally = await load(job)
    assert [one.is_measured for one in sorted(tally.records, key=lambda one: one.index)] == [
        False,
        True,
        True,
        False,
        False,
    ]
    assert (tally.frame_gap.count, tally.frame_delay.count) == (2 * 3, 2 * 4)
    assert engine.stats()["served"] == 7


async def test_many_streams_at_once(engine: Engine) -> None:
    job = job_for(engine.url, total=300, tokens=5, headers={"x-sim-step-ms": "1"})
    tally = await load(job)
    assert labels(tally) == [""] * 300
    assert sum(one.content_frames for one in tally.records) == 1500


async def test_unix_sockets(nursery: trio.Nursery, tmp_path: Path) -> None:
    engine = await nursery.start(serve_engine, EngineConfig(listen=f"unix:{tmp_path}/engine"))
    tally = await load(job_for(engine.url, total=2))
    assert labels(tally) == ["", ""]


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl to make a certificate")
async def test_tls(engine: Engine, nursery: trio.Nursery, tmp_path: Path) -> None:
    """Through a TLS edge of a few lines; an unknown certificate is refused."""
    key, certificate = tmp_path / "key", tmp_path / "certificate"
    words = ["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    words += ["-subj", "/CN=localhost", "-keyout", str(key), "-out", str(certificate)]
    await trio.run_process(["openssl", *words], stderr=subprocess.DEVNULL)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate, key)

    async def edge(stream: trio.SSLStream[trio.SocketStream]) -> None:
        try:
            async with await trio.open_tcp_stream(engine.host, engine.port) as behind, trio.open_nursery() as pumps:
                pumps.start_soon(pump, stream, behind)
                await pump(behind, stream)
                pumps.cancel_scope.cancel()
        except* (trio.BrokenResourceError, ssl.SSLError):
            pass

    listeners = await nursery.start(partial(trio.serve_ssl_over_tcp, edge, 0, context, host="127.0.0.1"))
    url = f"https://localhost:{listeners[0].transport_listener.socket.getsockname()[1]}"
    tally = await load(job_for(url, total=4, max_concurrency=2, is_closed_loop=True, verify_tls=False))
    assert labels(tally) == [""] * 4
    assert [one.is_reused for one in tally.records].count(True) == 2
    assert tally.client_delay.count == 0
    refused = await load(job_for(url))
    assert labels(refused) == ["tls"]
    assert "certificate" in refused.records[0].error.lower()


async def pump(source: trio.abc.ReceiveStream, sink: trio.abc.SendStream) -> None:
    async for data in source:
        await sink.send_all(data)


async def read_request(stream: trio.SocketStream) -> bytes:
    """A request with its body, or what there was of one."""
    data = b""
    while (end := data.find(b"\r\n\r\n")) < 0:
        more = await stream.receive_some()
        if not more:
            return data
        data += more
    head = data[:end].lower()
    length = int(head.partition(b"content-length: ")[2].partition(b"\r\n")[0])
    while len(data) < end + 4 + length and (more := await stream.receive_some()):
        data += more
    return data


async def test_the_alarm_rings_once_it_is_set() -> None:
    alarm = Alarm()
    try:
        with trio.fail_after(LIMIT_S):
            alarm.set(1)  # long past
            await trio.lowlevel.wait_readable(alarm.fileno())
            alarm.take()
            alarm.set(1)
            await trio.lowlevel.wait_readable(alarm.fileno())
        alarm.set(0)
        with pytest.raises(BlockingIOError):
            os.read(alarm.fileno(), 8)
    finally:
        trio.lowlevel.notify_closing(alarm.fileno())
        alarm.close()
