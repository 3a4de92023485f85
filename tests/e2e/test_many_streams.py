"""Two thousand streams at once through one worker."""

from __future__ import annotations

import json
import resource
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from tests.core.captured import dechunk
from tests.e2e.children import Child, child, relay_child
from tests.e2e.harness import Client, ask, request, same

STREAMS = 2_000
TOKENS = 12
ASKED = {"max_tokens": TOKENS}
#: The engine's pace: every step is a burst of a frame in each stream, and a turn of all the streams takes less.
STEP_MS = 250
LIMIT_S = 20.0
#: Of the test's process; relay and engine have as many of their own.
DESCRIPTORS = STREAMS + 500


@pytest.fixture
def many_descriptors() -> Iterator[None]:
    """As many as two connections for each stream take, where the hard limit allows it; children inherit it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 2 * DESCRIPTORS:
        pytest.skip(f"needs {2 * DESCRIPTORS} descriptors, the hard limit is {hard}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2 * DESCRIPTORS), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@asynccontextmanager
async def stopped(process: Child) -> AsyncIterator[None]:
    """While the block lasts, the process does not run; its sockets go on taking connections and bytes."""
    process.process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        process.process.send_signal(signal.SIGCONT)


async def in_flight(relay: Child, directory: Path) -> int:
    """Exchanges the relay has open, as its admin side says."""
    async with Client(await trio.open_unix_socket(f"{directory}/admin")) as client:
        status = json.loads((await client.ask(request("/-/status", method="GET"))).payload)
    return int(status["in_flight"])


async def read_stream(port: int, name: str, answers: dict[str, bytes]) -> None:
    """Asks for a stream, and reads it to its end."""
    async with Client(await trio.open_tcp_stream("127.0.0.1", port)) as client:
        await client.send(request(body=ASKED, x_request_id=name))
        received = bytearray()
        while not received.endswith(b"\r\n0\r\n\r\n"):
            data = await client.stream.receive_some()
            assert data, f"{name} ended after {bytes(received)!r}"
            received += data
        answers[name] = bytes(received)


@pytest.mark.usefixtures("many_descriptors")
async def test_two_thousand_streams_without_a_frame_lost_or_torn(tmp_path: Path) -> None:
    engine_flags = ("--port", "0", "--max-seqs", str(STREAMS), "--step-ms", str(STEP_MS), "--ttft-ms", "1000")
    names = [f"stream-{number:04}" for number in range(STREAMS)]
    answers: dict[str, bytes] = {}
    with (
        child(tmp_path, "relay_bench", "engine", *engine_flags) as engine,
        relay_child(tmp_path, engine.address, listen="127.0.0.1:0") as relay,
        trio.fail_after(LIMIT_S),
    ):
        async with trio.open_nursery() as nursery:
            async with stopped(engine):
                for name in names:
                    nursery.start_soon(read_stream, relay.port, name, answers)
                while await in_flight(relay, tmp_path) < STREAMS:  # noqa: ASYNC110 — a process of its own has no events
                    await trio.sleep(0.05)
            assert not answers
        at_once = request(body=ASKED, x_request_id=names[0], sim_ttft_ms="0", sim_step_ms="0")
        sample = await ask(engine.port, at_once)
        assert relay.stop() == ""

    assert len(sample.frames) == TOKENS + 2
    assert sorted(answers) == names
    for name, received in answers.items():
        _, _, body = received.partition(b"\r\n\r\n")
        expected = same(sample.payload).replace(names[0].encode(), name.encode())
        payload, is_whole = dechunk(body)
        assert is_whole
        assert same(payload) == expected, name
    records = relay.records()
    assert len(records) == STREAMS
    assert {record["outcome"] for record in records} == {"--"}
    assert {record["frames"] for record in records} == {TOKENS + 2}
    assert sorted(record["id"] for record in records) == names
