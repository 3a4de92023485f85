"""What the pump sends is what it received: views of its one buffer, and no memory beyond them."""

from __future__ import annotations

import gc
import socket
import tracemalloc
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Any, Final, Generic, TypeVar

import pytest
import trio
import trio.testing

from relay.core.dialect import Meter
from relay.core.frames import LAST_CHUNK, FrameRelay
from relay.core.framing import BodyDecoder, ChunkDecoder, CloseDecoder
from relay.core.histogram import Histogram
from relay.core.request import Route
from relay.net.pair import Stop
from relay.net.pump import Pump
from tests.core.captured import frames_of, stream

S = TypeVar("S", bound=socket.socket)

FRAMES: Final = frames_of(stream("chat_long_1500.stream").body)
ORDINARY: Final = FRAMES[1]


class Witness(socket.socket):
    """A socket that remembers the objects it was given to fill and to send."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(fileno=sock.detach())
        self.filled: list[object] = []
        self.sent: list[bytes | memoryview] = []
        self.is_full = False  #: it has not taken all that it was given

    def recv_into(self, buffer: Any, nbytes: int = 0, flags: int = 0) -> int:
        self.filled.append(buffer)
        return super().recv_into(buffer, nbytes, flags)

    def send(self, data: Any, flags: int = 0) -> int:
        self.sent.append(data)
        self.is_full = True
        sent = super().send(data, flags)
        self.is_full = sent < len(data)
        return sent

    def sendmsg(self, buffers: Iterable[Any], *arguments: Any) -> int:
        pieces = list(buffers)
        self.sent += pieces
        return super().sendmsg(pieces, *arguments)


class Streaming(Generic[S]):
    """A pair that the pump is streaming, and the far ends of its sockets."""

    def __init__(self, near: Callable[[socket.socket], S]) -> None:
        self.pump = Pump()
        upstream, self.engine = socket.socketpair()
        client, self.client = socket.socketpair()
        self.near_upstream, self.near_client = near(upstream), near(client)
        self.stop: Stop | None = None
        self.unsent = b""
        self._inbox = bytearray(1 << 18)
        for sock in (self.near_upstream, self.engine, self.near_client, self.client):
            sock.setblocking(False)

    async def run(self, relay: FrameRelay, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        pair = self.pump.open(self.pump.add(self.near_client), lambda: None)
        pair.attach(self.pump.add(self.near_upstream))
        task_status.started()
        self.stop = await pair.stream(relay, Histogram(), idle_limit_s=0)
        self.unsent = pair.unsent
        pair.close()

    def step(self, data: bytes) -> int:
        """The engine sends, the pump takes a turn, the client reads; answers how much it got."""
        self.engine.sendall(data)
        self.pump.turn(0)
        try:
            return self.client.recv_into(self._inbox)
        except BlockingIOError:
            return 0

    def received(self, size: int) -> bytes:
        """The last `size` bytes that the client got."""
        return bytes(self._inbox[:size])


@asynccontextmanager
async def streaming(
    decoder: BodyDecoder, near: Callable[[socket.socket], S], *, is_chunked: bool = True
) -> AsyncIterator[Streaming[S]]:
    relay = FrameRelay(decoder, Meter(Route.CHAT), is_chunked=is_chunked, max_frame_bytes=1 << 20)
    running = Streaming(near)
    with running.pump.epoll, running.near_upstream, running.engine, running.near_client, running.client:
        async with trio.open_nursery() as nursery:
            await nursery.start(running.run, relay)
            await trio.testing.wait_all_tasks_blocked()
            yield running
            nursery.cancel_scope.cancel()


def chunked(payload: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(payload), payload)


def views(pieces: Iterable[bytes | memoryview]) -> list[memoryview]:
    return [piece for piece in pieces if isinstance(piece, memoryview)]


def only(objects: list[object]) -> object:
    """The one object that all of them are."""
    assert all(other is objects[0] for other in objects)
    return objects[0]


async def test_whole_chunks_leave_as_one_view_of_the_buffer_they_came_in() -> None:
    reads = [b"".join(map(chunked, FRAMES[begin : begin + 1 + begin % 4])) for begin in range(0, 60, 3)]
    async with streaming(ChunkDecoder(), Witness) as running:
        for data in reads:
            assert running.received(running.step(data)) == data
        buffer = only(running.near_upstream.filled)
        sent = views(running.near_client.sent)
        assert len(sent) == len(running.near_client.sent) == len(reads)
        assert all(view.obj is buffer for view in sent)
        # Looked at now, each begins with the bytes of the last read: nothing was copied for it.
        assert {bytes(view[:50]) for view in sent} == {reads[-1][:50]}


@pytest.mark.parametrize(
    ("decoder", "is_chunked", "data"),
    [
        (ChunkDecoder, True, chunked(b"".join(FRAMES[:5]))),
        (ChunkDecoder, True, chunked(FRAMES[0][:100]) + chunked(FRAMES[0][100:] + FRAMES[1])),
        (ChunkDecoder, False, chunked(FRAMES[0]) + chunked(FRAMES[1])),
        (CloseDecoder, True, b"".join(FRAMES[:5])),
        (CloseDecoder, False, b"".join(FRAMES[:5])),
    ],
    ids=["frames in a chunk", "a frame in chunks", "a client without chunks", "chunks for the client", "no chunks"],
)
async def test_what_is_framed_anew_is_made_of_views(decoder: type[BodyDecoder], is_chunked: bool, data: bytes) -> None:
    """All of it but chunk sizes, line ends, and a frame over several chunks."""
    async with streaming(decoder(), Witness, is_chunked=is_chunked) as running:
        for _ in range(3):
            assert running.step(data)
        buffer = only(running.near_upstream.filled)
        sent = running.near_client.sent
        assert views(sent)
        assert all(view.obj is buffer for view in views(sent))
        copies = [piece for piece in sent if not isinstance(piece, memoryview)]
        assert all(len(piece) < 8 or piece == FRAMES[0] for piece in copies)


@pytest.mark.parametrize("at", [1, 100, len(FRAMES[3]) - 1])
async def test_of_a_torn_frame_only_that_frame_is_copied(at: int) -> None:
    async with streaming(CloseDecoder(), Witness, is_chunked=False) as running:
        running.step(b"".join(FRAMES[:3]) + FRAMES[3][:at])
        running.step(FRAMES[3][at:] + b"".join(FRAMES[4:9]))
        buffer = only(running.near_upstream.filled)
        sent = running.near_client.sent
        assert [piece for piece in sent if not isinstance(piece, memoryview)] == [FRAMES[3]]
        assert all(view.obj is buffer for view in views(sent))
        assert sum(map(len, sent)) == sum(map(len, FRAMES[:9]))


@pytest.mark.parametrize("frames", [1, 200], ids=["nothing goes out", "a part goes out"])
async def test_what_a_full_client_did_not_take_is_kept(frames: int) -> None:
    async with streaming(CloseDecoder(), Witness, is_chunked=False) as running:
        read = ORDINARY * frames
        reads = 0
        while not running.near_client.is_full:
            running.engine.sendall(read)
            running.pump.turn(0)
            reads += 1
        await trio.testing.wait_all_tasks_blocked()
        assert running.stop is Stop.CLIENT_BLOCKED
        assert isinstance(running.unsent, bytes)  # the next read goes into the buffer
        assert (len(running.unsent) == len(read)) == (frames == 1)
        received = b""
        while len(received) + len(running.unsent) < reads * len(read):
            received += running.client.recv(1 << 20)
        assert received + running.unsent == read * reads


#: A few Python objects; a byte lost with each frame would be six times as much.
FLAT_BYTES: Final = 16_384
#: And tuples that the interpreter keeps for the next (2,000 of a size); 32 bytes lost with each frame would be more.
WITH_FREE_LISTS_BYTES: Final = 131_072
#: A thread of the test runner may take some meanwhile; that does not happen each time.
TRIES: Final = 3
#: What the engine sends in a round, read by read; how many frames that is, how many rounds, and the memory at most.
ROUNDS: Final = {
    "a frame in a chunk in a read": ([chunked(ORDINARY)], 1, 100_000, FLAT_BYTES),
    "many in a read": ([chunked(ORDINARY) * 50], 50, 2_000, FLAT_BYTES),
    "many in a chunk": ([chunked(ORDINARY * 50)], 50, 500, WITH_FREE_LISTS_BYTES),
    "each over two chunks": ([(chunked(ORDINARY[:90]) + chunked(ORDINARY[90:])) * 20], 20, 500, WITH_FREE_LISTS_BYTES),
    "each over two reads": ([chunked(ORDINARY)[:90], chunked(ORDINARY)[90:]], 1, 10_000, WITH_FREE_LISTS_BYTES),
}


def plain(sock: socket.socket) -> socket.socket:
    return sock


@pytest.mark.parametrize(("reads", "frames", "rounds", "most"), ROUNDS.values(), ids=ROUNDS)
async def test_frames_take_no_memory_however_many(reads: list[bytes], frames: int, rounds: int, most: int) -> None:
    async with streaming(ChunkDecoder(), plain) as running:
        step = running.step

        def play(times: int) -> None:
            for _ in range(times):
                for data in reads:
                    step(data)

        taken: list[int] = []
        tracemalloc.start()
        try:
            play(100)  # whatever is made once is made here
            while len(taken) < TRIES and (not taken or taken[-1] >= most):
                gc.collect()
                before, _ = tracemalloc.get_traced_memory()
                tracemalloc.reset_peak()
                play(rounds)
                taken.append(tracemalloc.get_traced_memory()[1] - before)
        finally:
            tracemalloc.stop()
        assert running.pump.frames == (100 + len(taken) * rounds) * frames
        assert taken[-1] < most
        step(LAST_CHUNK)
        await trio.testing.wait_all_tasks_blocked()
        assert running.stop is Stop.DONE
