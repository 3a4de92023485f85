"""A stream is handed to the pump before its first frame."""

from __future__ import annotations

import socket
import time
from collections.abc import AsyncIterator
from typing import Final

import pytest
import trio
import trio.testing

from relay.core.dialect import Meter
from relay.core.frames import FrameRelay
from relay.core.framing import ChunkDecoder
from relay.core.histogram import Histogram
from relay.core.preface import Preface
from relay.core.request import Route
from relay.net.pair import Pair, Stop
from relay.net.pump import Pump

FRAME: Final = b'data: {"choices":[{"index":0,"delta":{"content":"a"}}]}\n\n'
CHUNK: Final = b"%x\r\n%b\r\n" % (len(FRAME), FRAME)
HEAD: Final = b"HTTP/1.1 200 OK\r\n\r\n"


class Beginning:
    """A pair whose first frame is awaited; the far ends of its sockets, and what `begin` has answered."""

    def __init__(self) -> None:
        self.pump = Pump()
        self.near_client, self.client = socket.socketpair()
        self.near_engine, self.engine = socket.socketpair()
        self.client.setblocking(False)
        self.near_client.setblocking(False)
        self.near_engine.setblocking(False)
        self.pair = self.pump.open(self.pump.add(self.near_client), lambda: None)
        self.pair.attach(self.pump.add(self.near_engine))
        self.relay = FrameRelay(ChunkDecoder(), Meter(Route.CHAT), is_chunked=True, max_frame_bytes=1 << 24)
        self.gaps = Histogram()
        self.answers: list[Stop | None] = []
        self.is_late = False

    async def run(self) -> None:
        try:
            self.answers.append(await self.pair.begin(self.relay, self.gaps, idle_limit_s=0))
        except trio.TooSlowError:
            self.is_late = True

    async def comes(self, data: bytes) -> None:
        """From the engine, its end where it is nothing; the pump has a turn, and then who waits."""
        if data:
            self.engine.sendall(data)
        else:
            self.engine.shutdown(socket.SHUT_WR)
        self.pump.turn(0)
        await trio.testing.wait_all_tasks_blocked()

    def close(self) -> None:
        self.pair.close()
        self.pump.epoll.close()
        for sock in (self.near_client, self.client, self.near_engine, self.engine):
            sock.close()

    def sent(self) -> bytes:
        """What the client has got."""
        got = b""
        while True:
            try:
                got += self.client.recv(1 << 20)
            except BlockingIOError:
                return got


@pytest.fixture
async def beginning(nursery: trio.Nursery) -> AsyncIterator[Beginning]:
    made = Beginning()
    made.pair.preface = Preface(HEAD[:-2], HEAD[-2:], since_ns=0, own_ns=0)
    nursery.start_soon(made.run)
    await trio.testing.wait_all_tasks_blocked()
    yield made
    made.close()


def is_streaming(pair: Pair) -> bool:
    return pair in pair._pump.streaming and pair.relay is not None


async def test_half_a_frame_is_none(beginning: Beginning) -> None:
    await beginning.comes(CHUNK[:20])
    assert beginning.sent() == b""
    assert not beginning.answers
    assert not is_streaming(beginning.pair)
    await beginning.comes(CHUNK[20:])
    assert beginning.sent().endswith(b"\r\n" + CHUNK)
    assert beginning.answers == [None]
    assert is_streaming(beginning.pair)


async def test_frames_go_on_whether_or_not_anyone_waits(beginning: Beginning) -> None:
    await beginning.comes(CHUNK)
    await beginning.comes(CHUNK)
    assert beginning.sent().count(CHUNK) == 2
    assert (beginning.pump.frames, beginning.gaps.count) == (2, 1)
    await beginning.comes(b"0\r\n\r\n")
    assert await beginning.pair.stopped() is Stop.DONE
    assert not is_streaming(beginning.pair)


async def test_without_a_preface_the_first_frames_are_held(beginning: Beginning) -> None:
    beginning.pair.preface = None
    await beginning.comes(CHUNK)
    assert beginning.answers == [Stop.HELD]
    assert (beginning.pair.unsent, beginning.sent()) == (CHUNK, b"")
    assert (beginning.pair.begun_ns, beginning.pump.frames, beginning.near_engine.fileno() > 0) == (0, 0, True)
    await beginning.comes(CHUNK)  # nobody reads it
    assert beginning.sent() == b""


async def test_a_client_that_is_full_from_the_start(beginning: Beginning) -> None:
    beginning.near_client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    data = CHUNK * 1000
    await beginning.comes(data)
    assert beginning.answers == [None]
    assert await beginning.pair.stopped() is Stop.CLIENT_BLOCKED
    got = beginning.sent() + beginning.pair.unsent
    assert got.endswith(b"\r\n" + data)
    assert got.count(b"HTTP/1.1") == 1


async def test_a_client_that_has_left(beginning: Beginning) -> None:
    beginning.client.close()
    await beginning.comes(CHUNK)
    assert beginning.answers == [None]
    assert await beginning.pair.stopped() is Stop.CLIENT_GONE


@pytest.mark.parametrize(
    ("data", "stop"), [(b"zz\r\n", Stop.UPSTREAM_MALFORMED), (b"", Stop.UPSTREAM_CLOSED)], ids=["no chunk", "the end"]
)
async def test_what_ends_before_its_first_frame(data: bytes, stop: Stop, beginning: Beginning) -> None:
    await beginning.comes(data)
    assert (beginning.answers, beginning.sent()) == ([stop], b"")
    assert beginning.pair.preface is None


async def test_bytes_that_trickle_do_not_put_off_the_limit() -> None:
    late = Beginning()
    late.pair.limit(5.0)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(late.run)
        await trio.testing.wait_all_tasks_blocked()
        for byte in CHUNK[:10]:
            await late.comes(bytes([byte]))
        assert not late.is_late
        late.pump.sweep(time.monotonic_ns() + int(6e9))
    assert late.is_late
    late.close()


async def test_what_begins_with_less_than_a_frame_has_gaps_from_there(beginning: Beginning) -> None:
    await beginning.comes(b"1\r\n\n\r\n")
    assert beginning.answers == [None]
    await beginning.comes(CHUNK)
    assert beginning.gaps.count == 1
    assert 0 < beginning.gaps.max_ns < 60e9


async def test_once_the_limit_has_passed_nothing_goes_out() -> None:
    """Though the pump may have a turn before who waits."""
    late = Beginning()
    late.pair.preface = Preface(HEAD[:-2], HEAD[-2:], since_ns=0, own_ns=0)
    late.pair.limit(5.0)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(late.run)
        await trio.testing.wait_all_tasks_blocked()
        late.pump.sweep(time.monotonic_ns() + int(6e9))
        late.engine.sendall(CHUNK)
        late.pump.turn(0)
    assert (late.is_late, late.sent(), late.pair.begun_ns) == (True, b"", 0)
    late.close()


async def test_a_pair_that_is_closed_streams_no_more(beginning: Beginning) -> None:
    await beginning.comes(CHUNK)
    upstream = beginning.pair.upstream
    beginning.pair.close()
    assert upstream is not None
    assert upstream.streams is None
    assert not is_streaming(beginning.pair)


async def test_what_has_begun_is_not_asked_for_a_head_though_its_exchange_may_not_know(beginning: Beginning) -> None:
    asked: list[bool] = []

    def on_quiet() -> bool:
        asked.append(True)
        return True

    beginning.pair.comment_every(1e-9, 0.0, on_quiet)
    beginning.pump.sweep(time.monotonic_ns())
    assert asked == [True]
    beginning.engine.sendall(b"0\r\n\r\n")  # no frame, and so no time of one
    beginning.pump.turn(0)
    assert (beginning.pair.relay, beginning.answers) == (None, [])
    beginning.pump.sweep(time.monotonic_ns() + int(1e9))
    assert asked == [True]
    await trio.testing.wait_all_tasks_blocked()
    assert beginning.answers == [None]
