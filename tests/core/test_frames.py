"""The relay of frames, beside an oracle that decodes everything anew at each step."""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Callable, Iterable, Iterator
from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.core.dialect import Meter
from relay.core.frames import COMMENT, LAST_CHUNK, FrameRelay, Pieces
from relay.core.framing import BodyDecoder, ChunkDecoder, CloseDecoder, LengthDecoder
from relay.core.request import Route
from tests.core.captured import Captured, dechunk, frames_of, stream, streams

MAX_FRAME = 1 << 20
SMALL = ["messages_stop_seq.stream", "comp_stop.stream_usage", "comp_eos_at_once.stream_usage", "chat_max1.stream"]
STREAMS = [pytest.param(one, id=one.name) for one in streams()]
#: For what is tried in many ways: each route, several choices, errors, a cut.
CHOICE = [
    *SMALL, "chat_n2_tool.stream_usage", "comp_utf8_choice.stream", "responses_basic.stream", "comp_n2.stream_cont",
    "fail/sigterm_stream", "fail/client_abort_stream",
]  # fmt: skip


def frame_relay(
    decoder: BodyDecoder | None = None,
    *,
    route: Route = Route.CHAT,
    is_chunked: bool = True,
    max_frame_bytes: int = MAX_FRAME,
) -> FrameRelay:
    """A relay of one stream."""
    return FrameRelay(decoder or ChunkDecoder(), Meter(route), is_chunked=is_chunked, max_frame_bytes=max_frame_bytes)


def feed(relay: FrameRelay, piece: bytes) -> bytes:
    """What goes out when `piece` has come in. The receive buffer is wiped afterwards, as the next read would."""
    buffer = bytearray(piece)
    out: Pieces = []
    with memoryview(buffer) as view:
        relay.feed(piece, view, out)
        sent = b"".join(out)
        for part in out:
            if isinstance(part, memoryview):
                part.release()
    buffer[:] = b"\xaa" * len(buffer)
    return sent


def finish(relay: FrameRelay) -> bytes:
    """What goes out at a clean end."""
    out: Pieces = []
    relay.finish(out)
    return b"".join(out)


def payload_of(sent: bytes, is_chunked: bool) -> bytes:
    """What a client has received of the body."""
    return dechunk(sent)[0] if is_chunked else sent


def complete_part(body: bytes) -> bytes:
    """All complete frames of a body with LF line ends, and nothing of the next."""
    end = body.rfind(b"\n\n") + 2 if b"\n\n" in body else 0
    while body[end : end + 1] == b"\n":
        end += 1  # blank lines beyond the first go on as they come
    return body[:end]


def in_pieces(data: bytes, size: int) -> Iterator[bytes]:
    """`data` in pieces of `size`."""
    for begin in range(0, len(data), size):
        yield data[begin : begin + size]


def run(relay: FrameRelay, pieces: Iterable[bytes], received: Callable[[bytes], bytes], *, every: int = 1) -> bytes:
    """Feeds all pieces; after each `every`th, what was sent must be all complete frames, and whole chunks."""
    raw = sent = b""
    for number, piece in enumerate(pieces):
        sent += feed(relay, piece)
        raw += piece
        if number % every == 0:
            assert payload_of(sent, relay.is_chunked) == complete_part(received(raw))
            assert not relay.is_chunked or sent == b"" or sent.endswith(b"\r\n")
    return sent


def payload_so_far(raw: bytes) -> bytes:
    """The payload in a chunked body that was cut off anywhere."""
    return dechunk(raw)[0]


# -- recorded streams


def check(one: Captured, pieces: list[bytes], *, is_chunked: bool, every: int = 1) -> None:
    """Relays a recorded stream in `pieces`; the client must get the same payload, and the meter the same facts."""
    relay = frame_relay(route=one.route, is_chunked=is_chunked)
    sent = run(relay, pieces, payload_so_far, every=every)
    assert payload_of(sent, is_chunked) == complete_part(one.body) == one.body
    assert relay.decoder.is_done == one.is_complete
    assert relay.decoder.error is None
    assert not relay.has_excess
    assert LAST_CHUNK not in sent
    frames = frames_of(one.body)
    assert relay.finder.frames == len(frames)
    expected = Meter(one.route)
    for frame in frames:
        expected.inspect(frame)
    for name in "usage", "finish_reason", "content_frames", "error", "saw_end", "opaque_frames":
        assert getattr(relay.meter, name) == getattr(expected, name)
    if one.is_complete:
        assert finish(relay) == (LAST_CHUNK if is_chunked else b"")


@pytest.mark.parametrize("is_chunked", [True, False])
@pytest.mark.parametrize("name", SMALL)
def test_every_split_in_two(name: str, is_chunked: bool) -> None:
    one = stream(name)
    for cut in range(len(one.raw_body) + 1):
        check(one, [one.raw_body[:cut], one.raw_body[cut:]], is_chunked=is_chunked)


@pytest.mark.parametrize("name", SMALL)
def test_byte_by_byte_checked_at_every_byte(name: str) -> None:
    one = stream(name)
    for is_chunked in True, False:
        check(one, list(in_pieces(one.raw_body, 1)), is_chunked=is_chunked)


@pytest.mark.parametrize("one", STREAMS)
def test_byte_by_byte(one: Captured) -> None:
    if len(one.raw_body) < 50_000:
        check(one, list(in_pieces(one.raw_body, 1)), is_chunked=True, every=997)


@pytest.mark.parametrize("size", [7, 261, 4096, 65536])
@pytest.mark.parametrize("one", STREAMS)
def test_pieces_of_one_size(one: Captured, size: int) -> None:
    if size > 100 or len(one.raw_body) < 50_000:
        pieces = list(in_pieces(one.raw_body, size))
        for is_chunked in True, False:
            check(one, pieces, is_chunked=is_chunked, every=1 + len(pieces) // 20)


@pytest.mark.parametrize("one", STREAMS)
def test_whole_chunks_go_on_as_they_are(one: Captured) -> None:
    """As engines send: one frame a chunk. What leaves is byte for byte what came, up to the last chunk."""
    relay = frame_relay(route=one.route)
    data = one.raw_body.removesuffix(LAST_CHUNK)
    assert feed(relay, data) == data
    assert relay.finder.frames == len(frames_of(one.body))


# -- the same payload, framed in hostile ways

Framing = tuple[BodyDecoder, bytes, Callable[[bytes], bytes]]


def chunked(parts: Iterable[bytes], *, extension: bytes = b"", end: bytes = b"0\r\n\r\n") -> bytes:
    """A chunked body of `parts`."""
    return b"".join(b"%x%b\r\n%b\r\n" % (len(part), extension, part) for part in parts if part) + end


def groups(parts: list[bytes], size: int) -> list[bytes]:
    """`parts` joined `size` at a time."""
    return [b"".join(parts[begin : begin + size]) for begin in range(0, len(parts), size)]


def framings(body: bytes) -> dict[str, Framing]:
    """One payload in many framings: decoder, the bytes on the wire, and what of the payload a part of them holds."""
    frames = frames_of(body)
    bodies = {
        "a byte a chunk": chunked(in_pieces(body, 1)),
        "three frames a chunk": chunked(groups(frames, 3)),
        "one chunk": chunked([body]),
        "a frame over many chunks": chunked(in_pieces(body, 10)),
        "chunk ends in the blank line": chunked(part for frame in frames for part in (frame[:-1], frame[-1:])),
        "blank line leads the next chunk": chunked([frames[0][:-1], *groups_shifted(frames)]),
        "a frame and a half a chunk": chunked(in_pieces(body, max(1, 3 * len(frames[0]) // 2))),
        "extensions and trailers": chunked(
            frames, extension=b';a=b;c="d e"', end=b"000;last\r\nX-Sum: 1\r\nOther:\r\n\r\n"
        ),
    }
    made: dict[str, Framing] = {name: (ChunkDecoder(), raw, payload_so_far) for name, raw in bodies.items()}
    made["until close"] = (CloseDecoder(), body, lambda raw: raw)
    made["length"] = (LengthDecoder(len(body)), body, lambda raw: raw)
    return made


def groups_shifted(frames: list[bytes]) -> list[bytes]:
    """Chunks that each begin with the last LF of the frame before."""
    whole = b"".join(frames)
    chunks, begin = [], len(frames[0]) - 1
    for frame in frames[1:]:
        chunks.append(whole[begin : begin + len(frame)])
        begin += len(frame)
    return [*chunks, whole[begin:]]


FRAMINGS = list(framings(b"data: x\n\n"))


@pytest.mark.parametrize("is_chunked", [True, False])
@pytest.mark.parametrize("framing", FRAMINGS)
@pytest.mark.parametrize("name", CHOICE)
def test_any_framing(name: str, framing: str, is_chunked: bool) -> None:
    one = stream(name)
    for size in 1, 64, 1000, 1 << 20:
        decoder, raw, received = framings(one.body)[framing]
        relay = frame_relay(decoder, route=one.route, is_chunked=is_chunked)
        sent = run(relay, in_pieces(raw, size), received, every=1 + len(raw) // size // 7)
        assert payload_of(sent, is_chunked) == one.body
        assert relay.finder.frames == len(frames_of(one.body))
        whole = frame_relay(route=one.route)
        feed(whole, one.raw_body)
        assert relay.meter.usage == whole.meter.usage
        assert relay.meter.content_frames == whole.meter.content_frames
        assert relay.meter.error == whole.meter.error
        assert relay.meter.finish_reason == whole.meter.finish_reason
        decoder.at_close()
        assert decoder.is_done
        assert finish(relay) == (LAST_CHUNK if is_chunked else b"")


LINES = st.sampled_from([b"data: x\n\n", b"data: y", b"\n", b"\n\n", b": c\n\n", b"event: e\n", b"data: " + b"z" * 30])


@given(
    parts=st.lists(LINES, max_size=12),
    cuts=st.lists(st.integers(1, 20), max_size=30),
    reads=st.lists(st.integers(1, 40), max_size=60),
    is_chunked=st.booleans(),
)
def test_any_payload_in_any_chunks_in_any_reads(
    parts: list[bytes], cuts: list[int], reads: list[int], is_chunked: bool
) -> None:
    body = b"".join(parts)
    chunks = list(cut_up(body, cuts))
    relay = frame_relay(is_chunked=is_chunked)
    sent = run(relay, cut_up(chunked(chunks), reads), payload_so_far)
    sent += finish(relay)
    complete = complete_part(body)
    rest = body[len(complete) :]
    assert payload_of(sent, is_chunked) == body + (b"" if not rest else b"\n" if rest.endswith(b"\n") else b"\n\n")
    assert relay.finder.frames == naive_count(payload_of(sent, is_chunked))
    assert not is_chunked or sent.endswith(LAST_CHUNK)


def cut_up(data: bytes, sizes: list[int]) -> Iterator[bytes]:
    """`data` in pieces of `sizes`, then the rest."""
    for size in sizes:
        if data:
            yield data[:size]
            data = data[size:]
    if data:
        yield data


def naive_count(body: bytes) -> int:
    """Events with anything in them, in a body of LF line ends whose last frame is complete."""
    count, has_line = 0, False
    for line in body.split(b"\n"):
        count += has_line and not line
        has_line = bool(line)
    return count


@pytest.mark.parametrize("line_end", [b"\r\n", b"\r"])
@pytest.mark.parametrize("name", SMALL)
def test_other_line_ends(name: str, line_end: bytes) -> None:
    one = stream(name)
    frames = [frame.replace(b"\n", line_end) for frame in frames_of(one.body)]
    body = b"".join(frames)
    for raw in chunked(frames), chunked([body]), chunked(in_pieces(body, 9)):
        for size in 1, 13, 1 << 20:
            relay = frame_relay(route=one.route)
            sent = b"".join(feed(relay, piece) for piece in in_pieces(raw, size))
            assert dechunk(sent)[0] == body
            assert relay.finder.frames == len(frames)


def test_fields_of_a_frame_with_crlf_stay_together() -> None:
    failed = b'event: error\r\ndata: {"detail":"no"}\r\n\r\n'
    relay = frame_relay()
    feed(relay, chunked([failed * 2]))
    assert relay.meter.error == '{"detail":"no"}'


def test_saturated_reads_come_back_into_step() -> None:
    """Under load a read ends anywhere; the rest of one chunk must not put all that follow on the slow way."""
    chunk = chunked([FRAME], end=b"")
    raw = chunk * 100
    relay = frame_relay()
    for cut in range(1, len(chunk)):
        for part in raw[:cut], raw[cut:]:
            out: Pieces = []
            relay.feed(part, memoryview(part), out)
        assert b"".join(out).endswith(chunk * 99)
        assert isinstance(out[-1], memoryview)
        assert len(out[-1]) >= 98 * len(chunk)


# -- no copies

FRAME = b'data: {"id":"c-1","choices":[{"index":0,"delta":{"content":"token"},"finish_reason":null}]}\n\n'


@pytest.mark.parametrize("frame", [b"a\n\n", b":\n\n", b": c\n\n", b"data\n\n", b"data:\n\n", b"data: \n\n"])
def test_the_shortest_frames(frame: bytes) -> None:
    relay = frame_relay()
    for _ in range(2):
        raw = chunked([frame], end=b"")
        assert feed(relay, raw) == raw
    assert relay.finder.frames == 2


@pytest.mark.parametrize("number", [1, 2, 50])
def test_a_run_of_whole_chunks_is_passed_on_as_the_view_it_is(number: int) -> None:
    relay = frame_relay()
    raw = chunked([FRAME] * number, end=b"")
    view = memoryview(bytearray(raw))
    for _ in range(3):
        out: Pieces = []
        relay.feed(raw, view, out)
        (piece,) = out
        assert piece is view
        assert relay.pending == b""
    assert relay.finder.frames == 3 * number
    assert relay.meter.content_frames == 3 * number


def test_whole_chunks_before_a_broken_off_one_are_one_view() -> None:
    relay = frame_relay()
    chunk = chunked([FRAME], end=b"")
    read = chunk * 3 + chunk[:40]
    buffer = bytearray(read)
    out: Pieces = []
    relay.feed(read, memoryview(buffer), out)
    (piece,) = out
    assert isinstance(piece, memoryview)
    assert piece.obj is buffer
    assert piece == chunk * 3
    out = []
    relay.feed(chunk[40:] + chunk, memoryview(chunk[40:] + chunk), out)
    assert dechunk(b"".join(out))[0] == FRAME * 2
    assert b"".join(out) == chunk * 2
    assert isinstance(out[-1], memoryview)  # in step again
    assert out[-1] == chunk


def test_frames_that_end_with_carriage_returns_are_counted_one_by_one() -> None:
    relay = frame_relay()
    raw = chunked([b"data: {}\r\rdata: [DONE]\n\n"], end=b"")
    assert payload_of(feed(relay, raw), True) == payload_of(raw, True)
    assert relay.finder.frames == 2
    assert relay.meter.saw_end


def test_what_looks_like_a_chunk_within_a_chunk_is_payload() -> None:
    payload = b"data: a\n\n9\r\ndata: b\n\n\r\ndata: c\n\n"
    raw = chunked([payload], end=b"")
    at = raw.index(b"9\r\n", 4)
    relay = frame_relay()
    assert payload_of(feed(relay, raw[:at]) + feed(relay, raw[at:]), True) == payload


def test_no_bytes_are_no_frames() -> None:
    out: Pieces = []
    frame_relay().feed(b"", memoryview(b""), out)
    assert out == []


@pytest.mark.parametrize("is_chunked", [True, False])
def test_a_chunk_of_many_frames_is_a_view_between_new_headers(is_chunked: bool) -> None:
    relay = frame_relay(is_chunked=is_chunked)
    read = chunked([FRAME * 4], end=b"")
    buffer = bytearray(read)
    out: Pieces = []
    relay.feed(read, memoryview(buffer), out)
    (payload,) = [piece for piece in out if isinstance(piece, memoryview)]
    assert payload.obj is buffer
    assert payload == FRAME * 4
    assert len(out) == (3 if is_chunked else 1)
    assert dechunk(b"".join(out))[0] == FRAME * 4 if is_chunked else b"".join(out) == FRAME * 4


def test_only_the_unfinished_frame_is_copied() -> None:
    relay = frame_relay(CloseDecoder())
    read = FRAME * 3 + FRAME[:20]
    buffer = bytearray(read)
    out: Pieces = []
    relay.feed(read, memoryview(buffer), out)
    (payload,) = [piece for piece in out if isinstance(piece, memoryview)]
    assert payload.obj is buffer
    assert payload == FRAME * 3
    assert relay.pending == FRAME[:20]


# -- frames beyond the limit


@pytest.mark.parametrize("size", [1, 100, 1000])
@pytest.mark.parametrize("is_chunked", [True, False])
def test_an_oversized_frame_goes_on_unaligned(is_chunked: bool, size: int) -> None:
    limit = 500
    huge = b'data: {"choices":[{"index":0,"delta":{"content":"' + b"x" * 5000 + b'"}}]}\n\n'
    body = FRAME + huge + FRAME + b"data: [DONE]\n\n"
    for raw in chunked([body]), chunked(in_pieces(body, 50)), chunked(in_pieces(body, 1)):
        relay = frame_relay(is_chunked=is_chunked, max_frame_bytes=limit)
        sent = b""
        was_unaligned = False
        for piece in in_pieces(raw, size):
            sent += feed(relay, piece)
            assert len(relay.pending) <= limit + size
            was_unaligned |= relay.is_unaligned
        assert was_unaligned
        assert not relay.is_unaligned  # the frames behind it are aligned again
        assert payload_of(sent, is_chunked) == body
        assert relay.finder.frames == 4
        assert relay.meter.saw_end
        assert finish(relay) == (LAST_CHUNK if is_chunked else b"")


def test_the_tail_of_an_oversized_frame_is_not_taken_for_a_frame() -> None:
    relay = frame_relay(CloseDecoder(), is_chunked=False, max_frame_bytes=50)
    sent = feed(relay, b"data: " + b"x" * 100 + b"\n")
    assert sent  # beyond the limit
    sent += feed(relay, b'data: {"error":{"message":"said the model"}}\n\n' + FRAME)
    assert sent.endswith(FRAME)
    assert relay.meter.error is None
    assert relay.meter.content_frames == 1


@pytest.mark.parametrize("line_end", [b"\n", b"\r\n", b"\r"])
@pytest.mark.parametrize("back", range(6))
def test_wherever_the_end_of_an_oversized_frame_is_cut_the_next_is_metered(line_end: bytes, back: int) -> None:
    huge = b"data: " + b"x" * 100 + 2 * line_end
    following = b'data: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":4}}' + 2 * line_end
    for further in (0, 1):  # in two pieces, and in three
        relay = frame_relay(CloseDecoder(), is_chunked=False, max_frame_bytes=50)
        body, at = huge + following, len(huge) - back
        sent = b"".join(feed(relay, piece) for piece in (body[:at], body[at : at + further], body[at + further :]))
        sent += finish(relay)
        assert sent == body
        assert relay.meter.usage is not None, further
        assert relay.meter.usage.completion_tokens == 4
        assert relay.finder.frames == 2


def test_an_oversized_frame_whose_end_shows_late_makes_no_empty_chunk() -> None:
    relay = frame_relay(CloseDecoder(), max_frame_bytes=50)
    body = b"data: " + b"x" * 100 + b"\r\n\r"  # its LF may follow
    sent = feed(relay, body)
    assert feed(relay, b"data") == b""
    assert LAST_CHUNK not in sent
    assert dechunk(sent)[0] == body


@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n"])
def test_an_oversized_last_frame_gets_its_blank_line(end: bytes) -> None:
    relay = frame_relay(CloseDecoder(), is_chunked=False, max_frame_bytes=50)
    sent = feed(relay, b"data: " + b"x" * 100 + end) + finish(relay)
    assert sent.startswith(b"data: " + b"x" * 100 + end)
    assert sent.replace(b"\r\n", b"\n").endswith(b"x\n\n")
    assert relay.finder.frames == 1


# -- ends


@pytest.mark.parametrize(
    ("rest", "missing"),
    [
        (b"data: [DONE]", b"\n\n"),
        (b"data: [DONE]\n", b"\n"),
        (b"data: [DONE]\r\n", b"\r\n"),
        (b"data: [DONE]\r\n\r", b"\n"),
    ],
)
@pytest.mark.parametrize("is_chunked", [True, False])
def test_the_last_frame_without_its_blank_line(rest: bytes, missing: bytes, is_chunked: bool) -> None:
    for raw in chunked([FRAME, rest]), chunked([FRAME + rest]):
        for size in 1, 1000:
            relay = frame_relay(is_chunked=is_chunked)
            sent = b"".join(feed(relay, piece) for piece in in_pieces(raw, size))
            assert payload_of(sent, is_chunked) == FRAME  # held back until the end is known to be clean
            assert not relay.meter.saw_end
            assert relay.decoder.is_done
            sent += finish(relay)
            assert payload_of(sent, is_chunked) == FRAME + rest + missing
            assert relay.finder.frames == 2
            assert relay.meter.saw_end


def test_a_rest_that_is_no_frame_goes_on_as_it_is() -> None:
    relay = frame_relay(CloseDecoder(), is_chunked=False)
    assert feed(relay, FRAME + b'{"error":"not an event"}') == FRAME
    assert finish(relay) == b'{"error":"not an event"}'


@pytest.mark.parametrize("name", ["fail/client_abort_stream", "chat_max1.stream"])
def test_a_cut_body_has_no_clean_end(name: str) -> None:
    one = stream(name)
    raw = one.raw_body.removesuffix(LAST_CHUNK)
    for cut in range(max(0, len(raw) - 600), len(raw)):
        relay = frame_relay(route=one.route)
        sent = feed(relay, raw[:cut])
        relay.decoder.at_close()
        assert relay.decoder.error is not None
        assert not relay.decoder.is_done
        assert LAST_CHUNK not in sent
        assert dechunk(sent)[0] == complete_part(payload_so_far(raw[:cut]))


def test_a_broken_body_gives_all_that_came_before_the_break() -> None:
    good = chunked([FRAME, FRAME], end=b"")
    for broken in b"zz\r\n", b"-5\r\n", b"\r\n", b"\x00\r\n":
        relay = frame_relay()
        assert feed(relay, good + broken) == good
        assert relay.decoder.error is not None
        assert relay.decoder.error.position == len(good)
        assert feed(relay, good) == b""  # nothing is read behind it
    relay = frame_relay()
    assert dechunk(feed(relay, b"%x\r\n" % len(FRAME) + FRAME + b"more\r\n"))[0] == FRAME
    assert relay.decoder.error is not None


def test_bytes_behind_the_end_are_told() -> None:
    relay = frame_relay()
    assert dechunk(feed(relay, chunked([FRAME]) + b"HTTP/1.1 200"))[0] == FRAME
    assert relay.decoder.is_done
    assert relay.has_excess
    relay = frame_relay()
    feed(relay, chunked([FRAME]))
    assert not relay.has_excess


def test_an_empty_stream() -> None:
    for is_chunked in True, False:
        relay = frame_relay(is_chunked=is_chunked)
        assert feed(relay, b"0\r\n\r\n") == b""
        assert relay.decoder.is_done
        assert finish(relay) == (LAST_CHUNK if is_chunked else b"")


def test_blank_lines_alone_are_no_frames() -> None:
    for size in 1, 1000:
        relay = frame_relay()
        body = [FRAME, b"\n\n", b"\n", FRAME, b"\n\n"]
        sent = b"".join(feed(relay, piece) for piece in in_pieces(chunked(body), size))
        assert dechunk(sent)[0] == b"".join(body)
        assert relay.finder.frames == 2


# -- cost


def seconds_byte_by_byte(size: int) -> float:
    """CPU time for one frame of `size` bytes, one byte a read."""
    body = b"data: " + b"x" * size + b"\n\n"
    relay = frame_relay(LengthDecoder(len(body)))
    out: Pieces = []
    begun = time.process_time()
    for at in range(len(body)):
        byte = body[at : at + 1]
        relay.feed(byte, memoryview(byte), out)
    took = time.process_time() - begun
    assert dechunk(b"".join(out))[0] == body
    return took


def test_a_long_frame_in_single_bytes_takes_linear_time() -> None:
    small, large = (min(seconds_byte_by_byte(size) for _ in range(2)) for size in (75_000, 300_000))
    assert large <= 8 * small


def test_steady_state_allocates_nothing() -> None:
    relay = frame_relay()
    read = chunked([FRAME] * 50, end=b"")
    view = memoryview(read)
    out: Pieces = []

    def feed_frames(number: int) -> None:
        for _ in range(number // 50):
            relay.feed(read, view, out)
            out.clear()

    feed_frames(5000)
    tracemalloc.start()
    try:
        feed_frames(1000)
        growth: list[int] = []
        while len(growth) < 3 and (not growth or growth[-1] >= 2048):  # as a thread of the test runner may take some
            before = tracemalloc.get_traced_memory()[0]
            feed_frames(100_000)
            growth.append(tracemalloc.get_traced_memory()[0] - before)
    finally:
        tracemalloc.stop()
    assert relay.finder.frames == relay.meter.content_frames == 6_000 + 100_000 * len(growth)
    assert growth[-1] < 2048


# -- comments


@given(st.data())
def test_a_comment_fits_wherever_one_is_given(data: st.DataObject) -> None:
    one = stream(data.draw(st.sampled_from(CHOICE)))
    relay = frame_relay(route=one.route, is_chunked=data.draw(st.booleans()))
    cuts = sorted(data.draw(st.sets(st.integers(1, len(one.raw_body) - 1), max_size=12)))
    passed = whole = b""
    for begin, end in zip([0, *cuts], [*cuts, len(one.raw_body)], strict=True):
        sent = feed(relay, one.raw_body[begin:end])
        passed += sent
        whole += sent + relay.comment
        if relay.comment:
            assert complete_part(payload_of(passed, relay.is_chunked)) == payload_of(passed, relay.is_chunked)
        assert bool(relay.comment) is not relay.meter.saw_end
    payload = payload_of(whole, relay.is_chunked)
    assert payload.replace(COMMENT, b"") == payload_of(passed, relay.is_chunked) == one.body
    meter = Meter(one.route)
    for frame in frames_of(payload):
        meter.inspect(frame)
    assert meter.comments == payload.count(COMMENT)
    assert meter.content_frames == relay.meter.content_frames


@pytest.mark.parametrize("is_chunked", [True, False])
def test_no_comment_behind_an_id(is_chunked: bool) -> None:
    relay = frame_relay(CloseDecoder(), is_chunked=is_chunked)
    assert relay.comment
    feed(relay, b"id: 1\n")
    assert relay.comment  # the client has not seen it
    feed(relay, b"data: {}\n\n")
    assert not relay.comment
    feed(relay, b"data: {}\n\n")
    assert not relay.comment


def test_no_comment_within_a_frame_that_outgrew_the_limit() -> None:
    relay = frame_relay(CloseDecoder(), max_frame_bytes=20)
    feed(relay, b"data: " + b"x" * 10)
    assert relay.comment
    feed(relay, b"x" * 10)
    assert not relay.comment
    feed(relay, b"\n")
    assert not relay.comment
    feed(relay, b"\n")
    assert relay.comment


# -- what goes out before it is read

ONE: Final = b'data: {"choices":[{"index":0,"delta":{"content":"a"}}]}\n\n'
LONGER: Final = ONE.replace(b'"a"', b'"abcd"')  # a size with a letter in it: 3c


@pytest.mark.parametrize(
    ("data", "passes"),
    [
        (chunked([ONE], end=b""), True),
        (chunked([ONE, ONE], end=b""), True),
        (chunked([ONE + ONE], end=b""), True),
        (chunked([ONE], end=b"").upper(), False),  # DATA is no field
        (b"%X\r\n%b\r\n" % (len(LONGER), LONGER), True),
        (chunked([ONE]), False),
        (chunked([ONE], extension=b";a=b", end=b""), False),
        (b"0" + chunked([ONE], end=b""), True),
        (b"0" * 7 + chunked([ONE], end=b""), False),
        (b"0x" + chunked([ONE], end=b""), False),
        (b"+" + chunked([ONE], end=b""), False),
        (chunked([ONE], end=b"-6\r\n"), False),  # back to where the chunk before it ends
        (b" " + chunked([ONE], end=b""), False),
        (b"\xd9\xa3" + chunked([ONE], end=b""), False),
        (chunked([ONE], end=b"").replace(b"\r\n", b"\n"), False),
        (chunked([ONE], end=b"")[:-1], False),
        (chunked([ONE], end=b"1"), False),
        (chunked([ONE[:-1]], end=b""), False),
        (chunked([ONE[:-1], b"\n"], end=b""), False),
        (chunked([ONE.replace(b"\n", b"\r\n")], end=b""), False),
        (chunked([ONE.replace(b'"a"', b'"\r"')], end=b""), False),
        (chunked([b"\n\n"], end=b""), False),
        (chunked([b": comment\n\n"], end=b""), False),
        (chunked([b"\xef\xbb\xbf" + ONE], end=b""), False),
        (b"", True),
    ],
)
def test_what_goes_out_before_it_is_read(data: bytes, passes: bool) -> None:
    assert frame_relay(route=Route.CHAT, is_chunked=True).passes_unread(data) is passes
    assert not frame_relay(route=Route.CHAT, is_chunked=False).passes_unread(data)


CHUNKS: Final = st.lists(
    st.sampled_from(
        [
            ONE,
            ONE[:9],
            ONE[9:],
            b"data: a\n\n",
            b"data: [DONE]\n\n",
            b"\n",
            b"data: \r\r",
            b"data: a\n\n\n\n",
            b": c\n\n",
            ONE + ONE,
        ]
    ).map(lambda payload: chunked([payload], end=b""))
    | st.sampled_from([b"0\r\n\r\n", b"5\r\n", b"zz\r\n", b"\r\n", b"b\r\ndata: a\n\nXX"]),
    max_size=5,
)


@given(CHUNKS, CHUNKS)
def test_what_goes_out_before_it_is_read_is_what_would_go_out(before: list[bytes], chunks: list[bytes]) -> None:
    relay, data = frame_relay(route=Route.CHAT, is_chunked=True), b"".join(chunks)
    feed(relay, b"".join(before))
    if not relay.passes_unread(data) or relay.decoder.is_done or relay.decoder.error is not None:
        return
    raw = feed(relay, data)
    assert payload_of(raw, True) == payload_of(data, True)
    assert (bytes(relay.pending), relay.decoder.error, relay.has_excess) == (b"", None, False)
    assert relay.finder.at_boundary
    assert relay.finder.frames >= data.count(b"\r\ndata: ")
