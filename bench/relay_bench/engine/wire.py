"""From the frames of an answer to what is written on the connection: edits, chunking, cuts. Pure.

An answer is a generator of lists of operations. The first list is due when the request is accepted (vLLM sends the head
of a stream before the first token exists), each further one with a decode step. Frames are counted as they leave, after
all edits: ``comment`` frames count, too.
"""

from __future__ import annotations

from enum import Enum
from itertools import chain
from typing import TYPE_CHECKING, Final, TypeAlias

from relay_bench.engine.faults import Shape
from relay_bench.engine.plain import response_head

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from relay_bench.engine.faults import Controls
    from relay_bench.engine.script import Script


class Cut(Enum):
    """An operation that is not a write."""

    END = "the answer is complete"
    FIN = "close the connection"
    RST = "reset the connection"
    STALL = "send nothing more, until the peer leaves"
    BREATH = "let the other tasks have a turn"


#: Bytes of one write, or a `Cut`.
Op: TypeAlias = bytes | Cut

_CUT_KINDS: Final = {"die": Cut.FIN, "rst": Cut.RST, "stall": Cut.STALL}
_EVENT_STREAM: Final = b"content-type: text/event-stream; charset=utf-8"
_JSON: Final = b"content-type: application/json"


def stream_answer(script: Script, controls: Controls, now_s: int, *, close: bool) -> Iterator[list[Op]]:
    """A streamed answer. `close`: the connection ends with it, and the head says so."""
    steps = edited(script, script.steps(), controls)
    yield from framed_stream(steps, script.step_count, controls, now_s, _content_type(controls), close=close)


def framed_stream(
    steps: Iterator[list[bytes]], count: int, controls: Controls, now_s: int, content_type: bytes, *, close: bool
) -> Iterator[list[Op]]:
    """The frames of `steps`, of which there are to be `count`, as the body of a 200."""
    shape = controls.shape
    length = None
    if shape.framing == "length":
        whole = list(steps)
        length = sum(len(frame) for step in whole for frame in step)
        steps = iter(whole)
    head: list[Op] = [*early_hints(controls), _stream_head(shape, length, now_s, content_type, close=close)]
    cut = _Cutter.of(controls)
    if cut is not None and cut.after == 0 and cut.is_at_head:
        yield [*head, cut.kind]
        return
    yield head
    yield from _body_steps(steps, count, shape, cut)


def ready_stream(body: Iterable[list[Op]], now_s: int, content_type: bytes, *, close: bool) -> Iterator[list[Op]]:
    """What `uvicorn_steps` has made before, as the body of a 200."""
    return chain([[_stream_head(Shape(), None, now_s, content_type, close=close)]], body)


def _stream_head(shape: Shape, length: int | None, now_s: int, content_type: bytes, *, close: bool) -> bytes:
    fields = [content_type] if content_type else []
    fields.append(b"vary: Origin")
    if close or shape.framing == "close":
        fields.append(b"connection: close")
    if shape.framing == "chunked":
        fields.append(b"transfer-encoding: chunked")
    elif length is not None:
        fields.append(b"content-length: %d" % length)
    return response_head(200, now_s, *fields)


def json_answer_steps(tokens: int, head: bytes, body: bytes, controls: Controls) -> Iterator[list[Op]]:
    """A non-streaming answer: nothing, while the tokens are made; head and body with the last."""
    for _ in range(max(tokens, 1)):
        yield []
    cut = _Cutter.of(controls)
    if "truncate-length" in controls.faults or (cut is not None and cut.is_mid_frame):
        yield [head, body[: len(body) // 2], cut.kind if cut else Cut.FIN]
    elif cut is not None and cut.after == 0:
        yield [head, cut.kind]
    else:
        yield [*early_hints(controls), head, body, Cut.END]


def early_hints(controls: Controls) -> list[Op]:
    """The interim answer of fault ``1xx``."""
    return [b"HTTP/1.1 103 Early Hints\r\nlink: </hint>; rel=preload\r\n\r\n"] if "1xx" in controls.faults else []


def _content_type(controls: Controls) -> bytes:
    if "no-content-type" in controls.faults:
        return b""
    return _JSON if "wrong-content-type" in controls.faults else _EVENT_STREAM


# --- edits: frames in, frames out ---------------------------------------------------------------------------------


def edited(script: Script, steps: Iterator[list[bytes]], controls: Controls) -> Iterator[list[bytes]]:
    """`steps` with the frames added, changed or left out that the faults name."""
    faults = controls.faults
    if "error-first" in faults:
        steps = iter([script.error_frames()])
    if "error-frame" in faults:
        steps = _replace_from(steps, controls.number("error-frame", 1), script.error_frames)
    if "huge-frame" in faults:
        size = controls.number("huge-frame", 1 << 20)
        padding = max(size - len(script.content_frame(b"")), 0)
        steps = _insert(steps, 1, lambda: script.content_frame(b"x" * padding))
    if "non-json-frame" in faults:
        steps = _insert(steps, controls.number("non-json-frame", 1), lambda: b"data: not json\n\n")
    if "no-done" in faults:
        steps = ([f for f in step if not f.startswith(script.end_mark)] for step in steps)
    if "no-final-blank" in faults:
        steps = ([f[:-1] if f.startswith(script.end_mark) else f for f in step] for step in steps)
    if "comment" in faults:
        steps = _comment(steps, max(controls.number("comment", 1), 1))
    if "crlf" in faults or "cr" in faults:
        line_end = b"\r\n" if "crlf" in faults else b"\r"
        steps = ([f.replace(b"\n", line_end) for f in step] for step in steps)
    if "bom" in faults:
        steps = _prefix(steps, b"\xef\xbb\xbf")
    return steps


def _insert(steps: Iterator[list[bytes]], after: int, make: Callable[[], bytes]) -> Iterator[list[bytes]]:
    """One more frame once `after` have passed."""
    passed = 0
    for step in steps:
        at = after - passed
        passed += len(step)
        yield [*step[:at], make(), *step[at:]] if 0 <= at < len(step) else step


def _replace_from(steps: Iterator[list[bytes]], after: int, make: Callable[[], list[bytes]]) -> Iterator[list[bytes]]:
    """The frames of `make` instead of all that follow the first `after`."""
    left = after
    for step in steps:
        if left < len(step):
            yield step[:left] + make()
            return
        left -= len(step)
        yield step


def _comment(steps: Iterator[list[bytes]], every: int) -> Iterator[list[bytes]]:
    """A comment event after each `every` frames."""
    passed = 0
    for step in steps:
        frames = []
        for frame in step:
            frames.append(frame)
            passed += 1
            if passed % every == 0:
                frames.append(b": ping\n\n")
        yield frames


def _prefix(steps: Iterator[list[bytes]], mark: bytes) -> Iterator[list[bytes]]:
    for step in steps:
        yield [mark + step[0], *step[1:]] if step and mark else step
        mark = b"" if step else mark


# --- framing: frames in, operations out ---------------------------------------------------------------------------


class _Cutter:
    """Where and how an answer is cut off: after `after` whole frames, perhaps with half of the next."""

    def __init__(self, kind: Cut, after: int, *, at_head: bool, mid_frame: bool, garbage: bytes = b"") -> None:
        self.kind = kind
        self.after = after
        self.is_at_head = at_head
        self.is_mid_frame = mid_frame
        self.garbage = garbage

    @classmethod
    def of(cls, controls: Controls) -> _Cutter | None:
        for name in controls.faults:
            if name == "bad-chunk":
                garbage = b"zz\r\nnot a chunk\r\n"
                return cls(Cut.STALL, controls.number(name, 1), at_head=False, mid_frame=False, garbage=garbage)
            how, _, place = name.partition("-")
            if how in _CUT_KINDS and place in {"after-head", "after", "mid-frame"}:
                at_head = place == "after-head"
                after = 0 if at_head else controls.number(name, 1)
                return cls(_CUT_KINDS[how], after, at_head=at_head, mid_frame=place == "mid-frame")
        return None

    def ending(self, pieces: list[bytes]) -> list[Op]:
        """The last operations; `pieces` is the framed form of the frame that is not sent whole.

        Half of a frame in one chunk is half a chunk, as when a process dies in a write; of one split over several
        chunks it is the first half of these.
        """
        if not self.is_mid_frame:
            return [self.garbage, self.kind] if self.garbage else [self.kind]
        if len(pieces) == 1:
            return [pieces[0][: len(pieces[0]) // 2], self.kind]
        return [*pieces[: len(pieces) // 2], self.kind]


def _body_steps(steps: Iterator[list[bytes]], count: int, shape: Shape, cut: _Cutter | None) -> Iterator[list[Op]]:
    """All of the body; `count` steps are expected, so that what ends it leaves with the last and not a step later."""
    if shape == Shape() and cut is None:
        yield from uvicorn_steps(steps, count)
        return
    framer = _Framer(shape)
    passed = 0
    for index, step in enumerate(steps, 1):
        ops: list[Op] = []
        for frame in step:
            if cut is not None and passed == cut.after:
                ops += _in_writes(framer.flush(), shape.write_size)
                yield ops + cut.ending(framer.feed(frame) or framer.flush())
                return
            ops += _in_writes(framer.feed(frame), shape.write_size)
            passed += 1
            if cut is not None and passed == cut.after and not cut.is_mid_frame:
                yield [*ops, *_in_writes(framer.flush(), shape.write_size), *cut.ending([])]
                return
        if index == count:
            yield [*ops, *_in_writes([*framer.flush(), *framer.end()], shape.write_size), Cut.END]
            return
        yield ops
    yield [*_in_writes([*framer.flush(), *framer.end()], shape.write_size), Cut.END]


def uvicorn_steps(steps: Iterator[list[bytes]], count: int) -> Iterator[list[Op]]:
    """The ordinary shape, which benchmarks run on: a chunk and a write per frame, and one more for the last chunk."""
    left = count
    for step in steps:
        left -= 1
        if not left:
            yield [*(b"%x\r\n%b\r\n" % (len(frame), frame) for frame in step), b"0\r\n\r\n", Cut.END]
            return
        yield [b"%x\r\n%b\r\n" % (len(frame), frame) for frame in step]
    yield [b"0\r\n\r\n", Cut.END]


def _in_writes(pieces: list[bytes], size: int) -> list[Op]:
    """`pieces` as they are, or in writes of `size` bytes with other tasks' turns in between."""
    if not size:
        return list(pieces)
    raw = b"".join(pieces)
    ops: list[Op] = []
    for start in range(0, len(raw), size):
        ops += [raw[start : start + size], Cut.BREATH]
    return ops


class _Framer:
    """Frames to framed pieces, each meant for a write of its own."""

    def __init__(self, shape: Shape) -> None:
        self._shape = shape
        self._waiting = bytearray()  # bytes whose chunk is not full yet
        self._frames_waiting = 0

    def feed(self, frame: bytes) -> list[bytes]:
        """What leaves now that `frame` is there."""
        shape = self._shape
        if shape.cut == "split":
            size = max(-(-len(frame) // shape.number), 1)
            return [self._piece(frame[start : start + size]) for start in range(0, len(frame), size)]
        self._waiting += self._piece(frame) if shape.cut == "burst" else frame
        self._frames_waiting += 1
        if shape.cut == "size":
            whole = len(self._waiting) // shape.number * shape.number
            pieces = [bytes(self._waiting[start : start + shape.number]) for start in range(0, whole, shape.number)]
            del self._waiting[:whole]
            return [self._piece(piece) for piece in pieces]
        return self.flush() if self._frames_waiting >= shape.number else []

    def flush(self) -> list[bytes]:
        """What waits, in a piece that may be short."""
        waiting = bytes(self._waiting)
        self._waiting.clear()
        self._frames_waiting = 0
        if self._shape.cut == "burst":
            return [waiting] if waiting else []
        return [self._piece(waiting)] if waiting else []

    def end(self) -> list[bytes]:
        """What ends the body."""
        if self._shape.framing != "chunked":
            return []
        return [b"0;last=1\r\nx-trailer: 1\r\n\r\n" if self._shape.has_extensions else b"0\r\n\r\n"]

    def _piece(self, payload: bytes) -> bytes:
        if self._shape.framing != "chunked":
            return payload
        return b"%x%b\r\n%b\r\n" % (len(payload), b';name="a b"' if self._shape.has_extensions else b"", payload)
