"""What a frame costs, in the pure parts by themselves.

They are timed on one frame of 210 bytes, as vLLM sends it, in a chunk of its own: the best of several rounds
in nanoseconds, since a round can only be disturbed upwards. Memory is what tracemalloc sees: bytes still held per frame
after many of them, which must be none but for an answer that is being collected, and the most that is held at any
moment on the way, which is what one read costs. The running relay is measured by `relay_bench.micro.process`.
"""

from __future__ import annotations

import gc
import time
import tracemalloc
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final, NamedTuple

import msgspec

from relay.core.aggregate import Collector, aggregator_for
from relay.core.dialect import Meter
from relay.core.editor import UsageEditor
from relay.core.frames import FrameRelay, Pieces
from relay.core.framing import ChunkDecoder
from relay.core.request import Route
from relay.core.sse import FrameFinder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

#: Size of the frames measured, with the blank line.
FRAME_BYTES: Final = 210
#: Size of a large read, as the pump's receive buffer takes it.
READ_BYTES: Final = 65536

_MAX_FRAME_BYTES: Final = 1_048_576
_MAX_ANSWER_BYTES: Final = 1 << 40


class PureCost(msgspec.Struct, frozen=True):
    """What one frame costs one pure part."""

    part: str
    ns: float
    held_bytes: float  #: still held afterwards, per frame
    peak_bytes: int  #: held at once on the way, at most


class Part(NamedTuple):
    """A pure part made ready."""

    work: Callable[[int], None]  #: on so many reads
    frames_per_read: int = 1


def frame_of(size: int = FRAME_BYTES) -> bytes:
    """A content frame of a chat stream, `size` bytes long."""
    begin = b'data: {"id":"chatcmpl-'
    rest = (
        b'","object":"chat.completion.chunk","created":1790000000,"model":"tiny","choices":[{"index":0,"delta":'
        b'{"content":" relay"},"logprobs":null,"finish_reason":null}]}\n\n'
    )
    return begin + b"0" * (size - len(begin) - len(rest)) + rest


def chunk_of(frame: bytes) -> bytes:
    """The frame in a chunk of its own."""
    return b"%x\r\n%b\r\n" % (len(frame), frame)


# -- the parts: each makes what it works on, and answers the work and how many frames one read brings it


def _framing() -> Part:
    chunk = bytearray(chunk_of(frame_of()))
    decoder, stop = ChunkDecoder(), len(chunk)

    def work(reads: int) -> None:
        for _ in range(reads):
            position = 0
            while position < stop:
                _, _, position = decoder.next(chunk, position, stop)
        assert decoder.error is None

    return Part(work)


def _sse() -> Part:
    frame = bytearray(frame_of())
    finder, stop = FrameFinder(), len(frame)

    def work(reads: int) -> None:
        before = finder.frames
        for _ in range(reads):
            finder.feed(frame, 0, stop)
        assert finder.frames - before == reads

    return Part(work)


def _inspect() -> Part:
    frame, meter = frame_of(), Meter(Route.CHAT)

    def work(reads: int) -> None:
        before = meter.content_frames
        for _ in range(reads):
            meter.inspect(frame)
        assert meter.content_frames - before == reads

    return Part(work)


def _ordinary() -> Part:
    """What an ordinary frame costs instead, where it is not taken with its chunk."""
    frame, meter = frame_of(), Meter(Route.CHAT)

    def work(reads: int) -> None:
        before = meter.content_frames
        for _ in range(reads):
            meter.take(frame)
        assert meter.content_frames - before == reads

    return Part(work)


def _relay(frames_per_read: int, *, hides_usage: bool = False) -> Part:
    read = chunk_of(frame_of()) * frames_per_read
    view = memoryview(read)
    meter = Meter(Route.CHAT)
    editor = UsageEditor(hides_usage=True) if hides_usage else None
    streamed = FrameRelay(ChunkDecoder(), meter, is_chunked=True, max_frame_bytes=_MAX_FRAME_BYTES, editor=editor)
    out: Pieces = []

    def work(reads: int) -> None:
        before = meter.content_frames
        for _ in range(reads):
            streamed.feed(read, view, out)
            out.clear()
        assert meter.content_frames - before == reads * frames_per_read

    return Part(work, frames_per_read)


def _unmetered() -> Part:
    """What a relay has to do with a frame that wants to know nothing of it: where its chunk and where it itself end."""
    chunk = bytearray(chunk_of(frame_of()))
    decoder, finder, stop = ChunkDecoder(), FrameFinder(), len(chunk)

    def work(reads: int) -> None:
        before = finder.frames
        for _ in range(reads):
            position = 0
            while position < stop:
                begin, end, position = decoder.next(chunk, position, stop)
                if begin < end:
                    finder.feed(chunk, begin, end)
        assert finder.frames - before == reads

    return Part(work)


def _collect() -> Part:
    """One JSON body made of a stream; what is held is the answer."""
    frames_per_read = READ_BYTES // len(chunk_of(frame_of()))
    data = chunk_of(frame_of()) * frames_per_read
    aggregator = aggregator_for(Route.CHAT, max_bytes=_MAX_ANSWER_BYTES)
    collector = Collector(ChunkDecoder(), Meter(Route.CHAT), aggregator)

    def work(reads: int) -> None:
        before = collector.finder.frames
        for _ in range(reads):
            collector.feed(data)
        assert collector.finder.frames - before == reads * frames_per_read

    return Part(work, frames_per_read)


PARTS: Final[dict[str, Callable[[], Part]]] = {
    "framing: ChunkDecoder.next": _framing,
    "sse: FrameFinder.feed": _sse,
    "dialect: Meter.inspect": _inspect,
    "dialect: Meter.take": _ordinary,
    "framing and sse, metering nothing": _unmetered,
    "frames: FrameRelay.feed, one frame a read": lambda: _relay(1),
    "frames: the same, hiding usage": lambda: _relay(1, hides_usage=True),
    "frames: FrameRelay.feed, 64 KiB a read": lambda: _relay(READ_BYTES // len(chunk_of(frame_of()))),
    "aggregate: Collector.feed, 64 KiB a read": _collect,
}


def measure(*, rounds: int = 7, frames: int = 50_000) -> list[PureCost]:
    """Costs of all parts; `frames` per round."""
    costs = []
    for name, make in PARTS.items():
        part = make()
        reads = max(frames // part.frames_per_read, 1)
        part.work(reads)
        ns = best_ns(part.work, reads, rounds) / part.frames_per_read
        held, peak = _memory(make, frames)
        costs.append(PureCost(name, round(ns, 1), round(held, 3), peak))
    return costs


def best_ns(work: Callable[[int], None], times: int, rounds: int) -> float:
    """The time of one of `times` repetitions in the best round, with the garbage collector off."""
    best = float("inf")
    with no_garbage_collection():
        for _ in range(rounds):
            began = time.perf_counter_ns()
            work(times)
            best = min(best, (time.perf_counter_ns() - began) / times)
    return best


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Keeps the garbage collector off."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _memory(make: Callable[[], Part], frames: int) -> tuple[float, int]:
    """Bytes per frame still held after `frames` of them, and the most held at any moment on the way."""
    tracemalloc.start()
    try:
        part = make()
        reads = max(frames // part.frames_per_read, 1)
        part.work(2)
        before, _ = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        part.work(reads)
        after, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    return (after - before) / (reads * part.frames_per_read), peak - before
