"""The engine as a server: pacing, queue, hang-ups, keep-alive, what it reports, and its command."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import trio

from relay_bench.engine import Engine, EngineConfig, serve_engine

if TYPE_CHECKING:
    from tests.bench.conftest import Client

#: Long enough that nothing paced by it happens within a test.
NEVER_MS = "3600000"


async def test_ids_and_counts_of_finished_requests(client: Client) -> None:
    await client.stream(x_request_id="a")
    await client.ask(client.ASK, path="/v1/completions", x_request_id="b")
    assert client.engine.requests() == [
        {"id": "a", "path": "/v1/chat/completions", "state": "completed", "tokens_sent": 4},
        {"id": "b", "path": "/v1/completions", "state": "completed", "tokens_sent": 4},
    ]
    report = (await client.ask(method="GET", path="/sim/requests")).json()
    assert report["requests"] == client.engine.requests()
    assert {name: report[name] for name in ("served", "completed", "running", "connections_accepted")} == {
        "served": 2,
        "completed": 2,
        "running": 0,
        "connections_accepted": 3,
    }


async def test_the_last_request_is_kept_byte_for_byte(client: Client) -> None:
    request = client.request(client.ASK, connection="close", X_Odd="  ä ".encode().decode("latin-1"))
    async with await client.connect() as stream:
        await stream.send_all(request)
        await client.read_to_end(stream)
    await client.ask(method="GET", path="/health")
    last = (await client.ask(method="GET", path="/sim/last")).json()
    assert (last["head"] + last["body"]).encode("latin-1") == request
    health = (await client.ask(method="GET", path="/sim/last?path=/health")).json()
    assert health["head"].startswith("GET /health HTTP/1.1\r\n")


async def test_chunked_request(client: Client) -> None:
    body = json.dumps(client.ASK).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nhost: e\r\nconnection: close\r\ntransfer-encoding: chunked\r\n\r\n"
    async with await client.connect() as stream:
        chunks = b"5\r\n%b\r\n%x\r\n%b\r\n0\r\n\r\n" % (body[:5], len(body) - 5, body[5:])
        await stream.send_all(head + chunks)
        assert (await client.read_to_end(stream)).status == 200
    assert client.engine.last()["body"].encode("latin-1") == body
    assert client.engine.last()["raw_body"].startswith("5\r\n")


async def test_a_head_in_single_bytes(client: Client) -> None:
    async with await client.connect() as stream:
        for byte in client.request(client.ASK, connection="close"):
            await stream.send_all(bytes([byte]))
        assert (await client.read_to_end(stream)).status == 200


async def test_expect_continue(client: Client) -> None:
    head, _, body = client.request(client.ASK, connection="close", expect="100-continue").partition(b"\r\n\r\n")
    async with await client.connect() as stream:
        await stream.send_all(head + b"\r\n\r\n")
        assert await client.read_until(stream, b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        await stream.send_all(body)
        assert (await client.read_to_end(stream)).status == 200


async def test_bytes_that_are_no_http(client: Client) -> None:
    async with await client.connect() as stream:
        await stream.send_all(b"\x16\x03\x01 hello\r\n\r\n")
        answer = await client.read_to_end(stream)
    assert (answer.status, answer.body) == (400, b"Invalid HTTP request received.")


async def test_connection_is_kept_and_pipelining_works(client: Client) -> None:
    request = client.request({**client.ASK, "stream": True})
    async with await client.connect() as stream:
        await stream.send_all(request * 3)
        raw = await client.read_until(stream, b"\r\n0\r\n\r\n", 3)
    assert raw.count(b"HTTP/1.1 200 OK") == 3
    assert client.engine.stats()["connections_accepted"] == 1
    await client.until(lambda: client.engine.stats()["connections_open"] == 0)


@pytest.mark.parametrize("stream_asked", [True, False])
async def test_a_client_that_leaves_while_running_aborts(client: Client, stream_asked: bool) -> None:
    body = {**client.ASK, "stream": stream_asked}
    async with await client.connect() as stream:
        await stream.send_all(client.request(body, sim_step_ms=NEVER_MS))
        await client.until(lambda: client.states == ["running"])
    await client.until(lambda: client.states == ["aborted"])
    await client.until(lambda: client.engine.stats()["connections_open"] == 0)


async def test_half_closed_counts_as_left(client: Client) -> None:
    async with await client.connect() as stream:
        assert isinstance(stream, trio.SocketStream)
        await stream.send_all(client.request({**client.ASK, "stream": True}, sim_ttft_ms=NEVER_MS))
        await client.until(lambda: client.states == ["running"])
        await stream.send_eof()
        await client.until(lambda: client.states == ["aborted"])


async def test_steps_are_paced(client: Client, autojump_clock: trio.testing.MockClock) -> None:
    """On trio's test clock: the pauses pass in no time, and add up exactly."""
    start = trio.current_time()
    answer = await _ask_unhurried(client, sim_ttft_ms="500", sim_step_ms="100")
    assert len(answer) == 6
    assert trio.current_time() - start == pytest.approx(0.8)


async def _ask_unhurried(client: Client, **headers: str) -> list[bytes]:
    async with await client.connect() as stream:
        await stream.send_all(client.request({**client.ASK, "stream": True}, connection="close", **headers))
        raw = b""
        while data := await stream.receive_some():
            raw += data
    return raw.split(b"\n\n")[:-1]


async def test_a_slow_reader_rests_and_gets_all(client: Client) -> None:
    body = {**client.ASK, "stream": True}
    async with await client.connect() as stream:
        await stream.send_all(
            client.request(body, connection="close", sim_tokens="200", sim_fault="huge-frame:20000000")
        )
        await client.until(lambda: client.states == ["running"])
        other = await client.stream()  # which is not held up
        assert other.is_whole
        assert client.states == ["running", "completed"]
        answer = await client.read_to_end(stream)
    assert answer.is_whole
    assert len(answer.frames) == 203
    assert client.states == ["completed", "completed"]


async def test_a_blocked_reader_that_leaves_aborts(client: Client) -> None:
    async with await client.connect() as stream:
        await stream.send_all(client.request({**client.ASK, "stream": True}, sim_fault="huge-frame:20000000"))
        await client.read_until(stream, b"\n\n\r\n")
    await client.until(lambda: client.states == ["aborted"])


class TestQueue:
    @pytest.fixture
    def config(self) -> EngineConfig:
        return EngineConfig(max_seqs=1)

    async def test_one_runs_and_the_others_wait_in_order(self, client: Client) -> None:
        request = client.request({**client.ASK, "stream": True}, sim_step_ms=NEVER_MS)
        first, second, third = [await client.connect() for _ in range(3)]
        for stream in (first, second, third):
            await stream.send_all(request)
            # in order: the head is there once the request has its place in the queue
            assert b"200 OK" in await client.read_until(stream, b"\r\n\r\n")
        assert client.states == ["running", "queued", "queued"]
        await second.aclose()
        await client.until(lambda: client.states == ["running", "aborted", "queued"])
        await first.aclose()
        await client.until(lambda: client.states == ["aborted", "aborted", "running"])
        await third.aclose()
        await client.until(lambda: client.states == ["aborted"] * 3)

    async def test_an_end_lets_the_next_in(self, client: Client) -> None:
        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(client.stream)
        assert client.states == ["completed"] * 5


class TestKeepAlive:
    @pytest.fixture
    def config(self) -> EngineConfig:
        return EngineConfig(keep_alive_s=0.01)

    async def test_idle_connections_are_closed_after_an_answer(self, client: Client) -> None:
        async with await client.connect() as stream:
            await client.stream()
            await client.stream()
            assert client.engine.stats()["connections_open"] >= 1  # fresh and silent: not idle yet
            await stream.send_all(client.request(client.ASK))
            answer = await client.read_to_end(stream)
        assert answer.json()["object"] == "chat.completion"
        assert answer.end == "fin"


async def test_unix_socket(tmp_path: Path, nursery: trio.Nursery) -> None:
    path = tmp_path / "engine.sock"
    for _ in range(2):  # the second finds the first one's path in its way, were it left behind
        async with trio.open_nursery() as inner:
            engine: Engine = await inner.start(serve_engine, EngineConfig(listen=f"unix:{path}"))
            assert engine.url == f"unix:{path}"
            async with await trio.open_unix_socket(path) as stream:
                await stream.send_all(b"GET /version HTTP/1.1\r\nhost: e\r\n\r\n")
                assert await stream.receive_some()
            inner.cancel_scope.cancel()
        assert not path.exists()


async def test_closing_the_engine_closes_its_connections() -> None:
    async with trio.open_nursery() as nursery:
        engine: Engine = await nursery.start(serve_engine, EngineConfig())
        stream = await trio.open_tcp_stream(engine.host, engine.port)
        await stream.send_all(
            b"POST /v1/completions HTTP/1.1\r\nhost: e\r\nx-sim-fault: stall-after-head\r\n"
            b'content-length: 28\r\n\r\n{"prompt":"x","stream":true}'
        )
        assert await stream.receive_some()
        nursery.cancel_scope.cancel()
    assert engine.stats()["connections_open"] == 0
    assert engine.requests()[0]["state"] == "aborted"
    assert await stream.receive_some() == b""
    await stream.aclose()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_command(number: signal.Signals) -> None:
    command = [sys.executable, "-m", "relay_bench", "engine", "--listen", "127.0.0.1:0", "--model", "m"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            process: trio.Process = await nursery.start(_run, command, environment)
            assert process.stderr is not None
            line = (await process.stderr.receive_some()).decode()
            url = line.removeprefix("relay-bench engine: listening on ").strip()
            host, _, port = url.removeprefix("http://").partition(":")
            async with await trio.open_tcp_stream(host, int(port)) as stream:
                await stream.send_all(b"GET /v1/models HTTP/1.1\r\nhost: e\r\n\r\n")
                assert b'"id":"m"' in await stream.receive_some()
                process.send_signal(number)
                assert await process.wait() == 0


async def _run(command: list[str], environment: dict[str, str], **options: Any) -> None:
    await trio.run_process(command, env=environment, stderr=subprocess.PIPE, capture_stderr=False, **options)


@pytest.mark.parametrize("flags", [["--listen", "nonsense"], ["--jitter", "2"], ["--step-ms", "-1"]])
def test_wrong_flags_are_told(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    from relay_bench.cli import main

    assert main(["engine", *flags]) == 2
    assert capsys.readouterr().err.startswith("relay-bench engine: ")


def test_a_taken_port_is_told_with_its_address() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        command = [sys.executable, "-m", "relay_bench", "engine", "--listen", address]
        result = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    assert result.returncode == 2
    assert result.stderr.startswith(f"relay-bench engine: cannot listen on {address}: Address already in use; ")
    assert result.stderr.count("\n") == 1
