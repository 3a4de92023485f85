"""Frame boundaries: every line end, every split, beside a slow and obvious oracle."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.core.sse import FrameFinder, fields, looks_like_event_stream, missing_blank_line, split_frames


def oracle(data: bytes) -> tuple[list[int], int]:
    """All boundaries in `data` (byte by byte, CR LF as one line end) and the number of frames that end at them."""
    boundaries, frames, line, has_content = [], 0, 0, False
    position = 0
    while position < len(data):
        if data[position] not in b"\r\n":
            position += 1
            line += 1
            continue
        position += 2 if data[position : position + 2] == b"\r\n" else 1
        if line == 0:
            boundaries.append(position)
            frames += has_content
            has_content = False
        else:
            has_content = True
        line = 0
    return boundaries, frames


def feed(pieces: list[bytes]) -> tuple[int, FrameFinder]:
    """The last boundary the finder reports, as an offset from the start of all pieces."""
    finder = FrameFinder()
    last, offset = 0, 0
    for piece in pieces:
        boundary = finder.feed(piece, 0, len(piece))
        if boundary >= 0:
            last = offset + boundary
        offset += len(piece)
    return last, finder


PARTS = [b"data: x", b"\n", b"\r", b"\r\n", b":", b"\n\n", b"\r\n\r\n", b"\r\r"]
PIECES = st.lists(st.sampled_from(PARTS), max_size=14)


@given(PIECES, st.lists(st.integers(1, 4), max_size=40))
def test_any_mix_of_line_ends_in_any_pieces(parts: list[bytes], sizes: list[int]) -> None:
    data = b"".join(parts) + b"data: tail"  # a byte behind settles what an open CR means
    pieces, rest = [], data
    for size in sizes:
        pieces.append(rest[:size])
        rest = rest[size:]
    pieces.append(rest)
    last, finder = feed([piece for piece in pieces if piece])
    boundaries, frames = oracle(data)
    assert last == (boundaries[-1] if boundaries else 0)
    assert finder.frames == frames
    assert not finder.at_boundary


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
def test_a_frame_is_reported_with_its_last_byte_and_not_before(end: bytes) -> None:
    frame = b"event: x" + end + b"data: y" + end + end
    stream = frame * 3
    finder = FrameFinder()
    for position in range(len(stream)):
        boundary = finder.feed(stream, position, position + 1)
        assert (boundary >= 0) == ((position + 1) % len(frame) == 0), position
    assert finder.frames == 3


def test_the_line_feed_of_an_open_carriage_return_goes_on_at_once() -> None:
    finder = FrameFinder()
    assert finder.feed(b"data: x\r\r", 0, 9) == 9
    assert finder.feed(b"\n", 0, 1) == 1
    assert finder.frames == 1
    assert finder.at_boundary


def test_ranges_inside_a_larger_buffer() -> None:
    buffer = b"??data: a\n\ndata: b\n\nda??"
    finder = FrameFinder()
    assert finder.feed(buffer, 2, 22) == 20
    assert finder.frames == 2
    assert finder.feed(buffer, 22, 22) == -1


def test_separators_inside_json_are_no_line_ends() -> None:
    text = 'data: "\u2028\u2029\u0085\x0b\x0c"'.encode()
    assert FrameFinder().feed(text * 2, 0, 2 * len(text)) == -1


def test_split_frames_covers_everything() -> None:
    for ends in itertools.product([b"\n", b"\r\n", b"\r"], repeat=2):
        data = b"data: a" + ends[0] * 2 + b": c" + ends[1] * 2 + b"rest"
        ranges = list(split_frames(data, 0, len(data)))
        assert b"".join(data[a:b] for a, b in ranges) == data
        assert len(ranges) == 3


@pytest.mark.parametrize(
    ("start", "verdict"),
    [
        (b"", None),
        (b"\r\n", None),
        (b"da", None),
        (b"\xef\xbb\xbf", None),
        (b"data:", True),
        (b"data: {", True),
        (b"\n\nevent: x", True),
        (b": ping", True),
        (b"id: 1", True),
        (b"retry:", True),
        (b"\xef\xbb\xbfdata: x", True),
        (b'{"id"', False),
        (b"[", False),
        (b"<html>", False),
        (b"database", False),
        (b"Internal Server Error", False),
    ],
)
def test_first_byte_detection(start: bytes, verdict: bool | None) -> None:
    assert looks_like_event_stream(start) is verdict


@pytest.mark.parametrize(
    ("rest", "completion"),
    [
        (b"data: [DONE]", b"\n\n"),
        (b"data: [DONE]\n", b"\n"),
        (b"data: x\r\n", b"\r\n"),
        (b"data: x\r", b"\r"),
        (b"data: x\r\n\r", b"\n"),
        (b"event: e\ndata: x", b"\n\n"),
        (b'{"error": 1}', b""),
        (b"\n", b""),
        (b"", b""),
    ],
)
def test_missing_blank_line(rest: bytes, completion: bytes) -> None:
    assert missing_blank_line(rest) == completion


@pytest.mark.parametrize(
    ("frame", "event", "data", "others"),
    [
        (b"data: x\n\n", b"", b"x", []),
        (b"data:x\r\ndata:  y\r\n\r\n", b"", b"x\n y", []),
        (b"\xef\xbb\xbfevent: e\rid: 7\rdata\r\r", b"e", b"", [b"id"]),
        (b": a comment\nretry: 1\nno field\n\n", b"", None, [b"", b"retry", b"no field"]),
        (b'error: {"code":1}\n\n', b"error", b'{"code":1}', []),
        (b"\n\n", b"", None, []),
        (b"", b"", None, []),
    ],
)
def test_fields(frame: bytes, event: bytes, data: bytes | None, others: list[bytes]) -> None:
    found_event, found_data, found_others = fields(frame)
    assert (found_event, found_data, [*found_others]) == (event, data, others)
