"""Event streams through a whole relay: parsers of others read the same events behind it as directly."""

from __future__ import annotations

import json
from collections import Counter

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conformance.peers import Tap, send_in, url_of
from tests.conftest import TEST_LIMIT_S, running_relay
from tests.core.test_frames import cut_up
from tests.core.test_sse_conformance import (
    BODIES,
    PARSERS,
    WAYS,
    Way,
    compared,
    completed,
    encoded,
    in_reads,
    on_the_wire,
)


async def relayed(body: bytes, way: Way) -> tuple[bytes, int]:
    """What a client gets of a stream, and how many frames its record tells of."""

    async def serve(stream: trio.SocketStream) -> None:
        await stream.receive_some()
        framing = b"" if way.chunks is None else b"transfer-encoding: chunked\r\n"
        await stream.send_all(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n%b\r\n" % framing)
        await send_in(in_reads(on_the_wire(body, way.chunks), way.reads), stream)

    async with trio.open_nursery() as nursery:
        async with running_relay(await url_of(serve, nursery)) as relay, await Tap.connect(relay.port) as client:
            with trio.fail_after(TEST_LIMIT_S):
                version = b"1.1" if way.takes_chunks else b"1.0"
                head = b"POST /v1/chat/completions HTTP/%b\r\nHost: a\r\nContent-Length: 15\r\n\r\n" % version
                answer = await client.ask(head + b'{"stream":true}')
                assert answer.status == 200
                assert answer.end == ("whole" if way.takes_chunks else "fin")
                record = await relay.record()
                assert record.outcome == "--"
        nursery.cancel_scope.cancel()
    return answer.payload, record.frames


@pytest.fixture(scope="module")
def behind() -> list[tuple[bytes, bytes, list[int]]]:
    """Bodies as engines sent them, as clients got them, and where to cut them for a parser."""
    counts: Counter[str] = Counter()
    found = []

    @settings(max_examples=100)
    @given(body=BODIES, way=WAYS, cuts=st.lists(st.integers(1, 200), max_size=5))
    def ask(body: bytes, way: Way, cuts: list[int]) -> None:
        got, frames = trio.run(relayed, body, way)
        found.append((body, got, cuts))
        counts["of several frames"] += frames > 2

    ask()
    assert counts["of several frames"] >= 0.2 * len(found) > 0, counts
    return found


def test_the_same_events_behind_a_relay(behind: list[tuple[bytes, bytes, list[int]]]) -> None:
    for body, got, _ in behind:
        assert got.startswith(body)
        for parse in PARSERS:
            assert parse(got) in (parse(body), parse(completed(body)))


def test_a_parser_of_others_sees_the_same_behind_a_relay(
    behind: list[tuple[bytes, bytes, list[int]]], node_environment: dict[str, str]
) -> None:
    bodies = [((body, got, completed(body)), cuts) for body, got, cuts in behind]
    lines = [json.dumps([encoded(cut_up(each, cuts)) for each in three]) for three, cuts in bodies]
    assert compared(lines, node_environment) > 50
