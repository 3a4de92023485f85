"""``relay-bench micro``: what a frame costs, in the pure parts by themselves and in the running relay.

The pure parts are timed on one frame of 210 bytes, as vLLM sends it, in a chunk of its own: the best of several rounds
in nanoseconds, since a round can only be disturbed upwards. Memory is what tracemalloc sees: bytes still held per frame
after many of them, which must be none, and the most that is held at any moment on the way, which is what one read
costs. The running relay is measured by `relay_bench.micro_process`.
"""

from __future__ import annotations

import argparse
import gc
import platform
import time
import tracemalloc
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Final

import msgspec

import relay
from relay.core.dialect import Meter
from relay.core.frames import FrameRelay, Pieces
from relay.core.framing import ChunkDecoder
from relay.core.request import Route
from relay.core.sse import FrameFinder

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

#: Size of the frames measured, with the blank line.
FRAME_BYTES: Final = 210
#: Size of a large read, as the pump's receive buffer takes it.
READ_BYTES: Final = 65536

_MAX_FRAME_BYTES: Final = 1_048_576


class PureCost(msgspec.Struct, frozen=True):
    """What one frame costs one pure part."""

    part: str
    ns: float
    held_bytes: float  #: still held afterwards, per frame
    peak_bytes: int  #: held at once on the way, at most


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


# -- one function per part: does the part's work for at least so many frames, and answers for how many it was


def _framing(frames: int) -> int:
    chunk = bytearray(chunk_of(frame_of()))
    decoder, stop = ChunkDecoder(), len(chunk)
    for _ in range(frames):
        position = 0
        while position < stop:
            _, _, position = decoder.next(chunk, position, stop)
    assert decoder.error is None
    return frames


def _sse(frames: int) -> int:
    frame = bytearray(frame_of())
    finder, stop = FrameFinder(), len(frame)
    for _ in range(frames):
        finder.feed(frame, 0, stop)
    assert finder.frames == frames
    return frames


def _inspect(frames: int) -> int:
    frame = frame_of()
    meter = Meter(Route.CHAT)
    for _ in range(frames):
        meter.inspect(frame)
    assert meter.content_frames == frames
    return frames


def _ordinary(frames: int) -> int:
    """What `FrameRelay` asks of a frame instead of inspecting it."""
    frame = bytearray(frame_of())
    meter, stop = _meter(), len(frame)
    for _ in range(frames):
        for marker in meter.markers:
            if frame.find(marker, 0, stop) >= 0:
                break
        else:
            if frame.startswith(meter.ordinary_prefix, 0, stop):
                meter.count_ordinary(1)
    assert meter.content_frames == frames + 1
    return frames


def _relay_single(frames: int) -> int:
    return _relay(frames, frames_per_read=1)


def _relay_large(frames: int) -> int:
    return _relay(frames, frames_per_read=READ_BYTES // len(chunk_of(frame_of())))


def _relay(frames: int, frames_per_read: int) -> int:
    buffer = bytearray(chunk_of(frame_of()) * frames_per_read)
    view, stop = memoryview(buffer), len(buffer)
    meter = _meter()
    streamed = FrameRelay(ChunkDecoder(), meter, is_chunked=True, max_frame_bytes=_MAX_FRAME_BYTES)
    out: Pieces = []
    reads = -(-frames // frames_per_read)
    for _ in range(reads):
        streamed.feed(buffer, view, stop, out)
        out.clear()
    assert streamed.finder.frames == reads * frames_per_read == meter.content_frames - 1
    return reads * frames_per_read


def _meter() -> Meter:
    """A meter that knows how the stream's content frames begin."""
    meter = Meter(Route.CHAT)
    meter.inspect(frame_of())
    assert meter.ordinary_prefix
    return meter


PARTS: Final[dict[str, Callable[[int], int]]] = {
    "framing: ChunkDecoder.next": _framing,
    "sse: FrameFinder.feed": _sse,
    "dialect: Meter.inspect": _inspect,
    "dialect: ordinary check": _ordinary,
    "frames: FrameRelay.feed, one frame a read": _relay_single,
    "frames: FrameRelay.feed, 64 KiB a read": _relay_large,
}


def measure_pure(*, rounds: int = 7, frames: int = 50_000) -> list[PureCost]:
    """Costs of all parts; `frames` per round."""
    costs = []
    for name, work in PARTS.items():
        work(frames // 10)  # warm
        held, peak = _memory(work, frames)
        costs.append(PureCost(name, round(_best_ns(work, rounds, frames), 1), round(held, 3), peak))
    return costs


def _best_ns(work: Callable[[int], int], rounds: int, frames: int) -> float:
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        best = float("inf")
        for _ in range(rounds):
            began = time.perf_counter_ns()
            done = work(frames)
            best = min(best, (time.perf_counter_ns() - began) / done)
        return best
    finally:
        if was_enabled:
            gc.enable()


def _memory(work: Callable[[int], int], frames: int) -> tuple[float, int]:
    """Bytes held per frame, and held at most; what a stream costs once, whatever its length, is taken off."""
    few, many = max(frames // 100, 1), max(frames // 5, 2)
    tracemalloc.start()
    try:
        peaks = []
        for count in (few, many):
            before, _ = tracemalloc.get_traced_memory()
            tracemalloc.reset_peak()
            done = work(count)
            _, peak = tracemalloc.get_traced_memory()
            peaks.append((peak - before, done))
        (small, done_small), (large, done_large) = peaks
    finally:
        tracemalloc.stop()
    held = (large - small) / (done_large - done_small) if done_large > done_small else 0.0
    return held, _read_peak(work)


def _read_peak(work: Callable[[int], int]) -> int:
    """The most held at once by the work on one read, beyond what is held between reads."""
    # The parts hold their buffers in locals, so the peak of a run of two frames is measured against that of one object
    # that is as large: the buffer itself. A frame's own objects (views, matches, numbers) are what is left.
    tracemalloc.start()
    try:
        work(1)
        before, _ = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        work(1)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    return peak - before
