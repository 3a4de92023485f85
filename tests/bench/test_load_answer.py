"""Answers: what recordings of a real engine amount to, in pieces of any size, and what damage is called."""

from __future__ import annotations

import gzip
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relay.core.request import Route
from relay_bench.load.answer import LABELS, Answer
from tests.core.captured import CAPTURES, Captured, streams

if TYPE_CHECKING:
    from collections.abc import Iterable

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
CONTENT = b'data: {"id":"a","choices":[{"index":0,"delta":{"content":"x"},"finish_reason":null}]}\n\n'
USAGE = b'data: {"id":"a","choices":[],"usage":{"prompt_tokens":3,"completion_tokens":%d,"total_tokens":9}}\n\n'
FINISH = b'data: {"id":"a","choices":[{"index":0,"delta":{},"finish_reason":"%b"}]}\n\n'
DONE = b"data: [DONE]\n\n"
LAST = b"0\r\n\r\n"


def chunk(*frames: bytes) -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(frame), frame) for frame in frames)


def answer_of(pieces: Iterable[bytes], *, route: Route = Route.CHAT, closed: bool = False, **options: bool) -> Answer:
    """An answer that came in `pieces`, at 1, 2, 3, … ns."""
    answer = Answer(route, **options)
    for at_ns, piece in enumerate(pieces, 1):
        if answer.is_done:
            break
        if piece:
            answer.feed(piece, at_ns)
    if closed and not answer.is_done:
        answer.close()
    return answer


def raw_of(captured: Captured) -> bytes:
    return (CAPTURES / f"{captured.name}.response.raw").read_bytes()


def label_of(*pieces: bytes, expected: int | None = None, is_exact: bool = False, closed: bool = True) -> str:
    return answer_of(pieces, closed=closed).fault(expected, is_exact=is_exact)[0]


def facts(answer: Answer) -> tuple[object, ...]:
    return answer.status, answer.frames, len(answer.content_ns), answer.usage, answer.fault(None, is_exact=False)


@pytest.mark.parametrize("captured", [one for one in streams() if one.is_complete], ids=repr)
def test_recorded_streams_are_without_fault_in_any_pieces(captured: Captured) -> None:
    raw = raw_of(captured)
    whole = answer_of([raw], route=captured.route, closed=True)
    assert whole.is_done
    label, _ = whole.fault(None, is_exact=False)
    assert label in ("", "no_content", "error_frame"), label
    for size in (1, 1000) if len(raw) < 100_000 else (101, 1000):
        pieces = [raw[at : at + size] for at in range(0, len(raw), size)]
        split = answer_of(pieces, route=captured.route, closed=True)
        assert facts(split) == facts(whole)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from([one for one in streams() if one.is_complete]), st.data())
def test_a_frame_is_stamped_when_its_last_byte_came(captured: Captured, data: st.DataObject) -> None:
    raw = raw_of(captured)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(raw)), max_size=8)))
    pieces = [raw[start:end] for start, end in zip([0, *cuts], [*cuts, len(raw)], strict=True) if start < end]
    answer = answer_of(pieces, route=captured.route, closed=True)
    stamps = answer.content_ns.tolist()
    assert stamps == sorted(stamps)
    assert len(stamps) == answer.meter.content_frames
    received = 0
    for at_ns, piece in enumerate(pieces, 1):
        received += len(piece)
        so_far = answer_of([raw[:received]], route=captured.route)
        assert sum(stamp <= at_ns for stamp in stamps) == len(so_far.content_ns)


def test_marks_of_head_body_and_content() -> None:
    pieces = [HEAD[:20], HEAD[20:], chunk(b": hello\n\n"), chunk(CONTENT)[:30], chunk(CONTENT)[30:], chunk(DONE), LAST]
    answer = answer_of(pieces)
    assert (answer.head_ns, answer.first_byte_ns, answer.content_ns.tolist()) == (2, 3, [5])
    assert answer.is_done
    assert answer.may_reuse
    assert answer.bytes_in == sum(map(len, pieces))


def test_frames_of_one_read_share_its_stamp() -> None:
    answer = answer_of([HEAD + chunk(CONTENT, CONTENT), chunk(CONTENT, DONE) + LAST])
    assert answer.content_ns.tolist() == [1, 1, 2]


GOOD = HEAD + chunk(CONTENT, CONTENT)


@pytest.mark.parametrize(
    ("label", "pieces"),
    [
        ("", [GOOD + chunk(DONE) + LAST]),
        ("http_503", [b"HTTP/1.1 503 No\r\ncontent-length: 2\r\n\r\nno"]),
        ("not_a_stream", [b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ncontent-type: application/json\r\n\r\n{}"]),
        ("no_end_mark", [GOOD + LAST]),
        ("truncated", [GOOD]),
        ("truncated", [GOOD + chunk(CONTENT)[:40]]),
        ("bad_framing", [GOOD + b"zz\r\n"]),
        ("error_frame", [GOOD + chunk(b'data: {"error":{"message":"boom"}}\n\n', DONE) + LAST]),
        ("error_frame", [GOOD + chunk(b'data: {"error":{"message":"boom"}}\n\n')]),
        ("no_content", [HEAD + chunk(DONE) + LAST]),
        ("no_answer", [b"HTTP/1.1 200 OK\r\n"]),
        ("no_answer", []),
        ("bad_head", [b"SSH-2.0-OpenSSH_9.2\r\n\r\n"]),
        ("bad_head", [b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\ntransfer-encoding: chunked\r\n\r\n"]),
        ("bad_head", [b"x" * 70_000]),
    ],
)
def test_what_is_wrong_has_a_name(label: str, pieces: list[bytes]) -> None:
    assert label_of(*pieces) == label
    assert label in LABELS or not label or label.startswith("http_")


@pytest.mark.parametrize(
    ("label", "said", "reason", "asked", "is_exact"),
    [
        ("", 2, b"stop", 2, False),
        ("", 2, b"stop", 5, False),
        ("wrong_count", 2, b"stop", 5, True),
        ("wrong_count", 2, b"length", 5, False),
        ("wrong_count", 9, b"stop", 5, False),
    ],
)
def test_counts_are_held_against_what_was_asked(
    label: str, said: int, reason: bytes, asked: int, is_exact: bool
) -> None:
    raw = GOOD + chunk(FINISH % reason, USAGE % said, DONE) + LAST
    assert label_of(raw, expected=asked, is_exact=is_exact) == label


def test_a_close_delimited_stream_ends_with_its_connection() -> None:
    raw = b"HTTP/1.0 200 OK\r\ncontent-type: text/event-stream\r\n\r\n" + CONTENT + DONE
    answer = answer_of([raw], closed=True)
    assert answer.fault(None, is_exact=False) == ("", "")
    assert not answer.may_reuse


def test_interim_answers_are_passed_over() -> None:
    answer = answer_of([b"HTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n", GOOD + chunk(DONE) + LAST])
    assert (answer.status, answer.head_ns) == (200, 2)


def test_a_connection_with_more_behind_the_answer_is_not_kept() -> None:
    assert not answer_of([GOOD + chunk(DONE) + LAST + b"HTTP/1.1 400"]).may_reuse


def test_compressed_bodies_are_no_frames() -> None:
    body = gzip.compress(CONTENT + DONE)
    head = HEAD[:-2] + b"content-encoding: gzip\r\n\r\n"
    assert label_of(head + chunk(body) + LAST) in ("no_end_mark", "no_content")


def test_token_counts_come_from_every_frame_or_not_at_all() -> None:
    counted = CONTENT[:-3] + b',"usage":{"prompt_tokens":3,"completion_tokens":%d,"total_tokens":9}}\n\n'
    answer = answer_of([HEAD + chunk(counted % 2, counted % 5, DONE) + LAST], continuous_usage=True)
    assert answer.token_counts == [2, 5]
    partly = [counted % 2, CONTENT.replace(b'"a"', b'"b"'), counted % 5]
    assert answer_of([HEAD + chunk(*partly, DONE) + LAST], continuous_usage=True).token_counts is None
    assert answer_of([GOOD + chunk(USAGE % 2, DONE) + LAST], continuous_usage=True).token_counts is None


def test_stamps_are_read_and_missing_ones_counted() -> None:
    stamped = CONTENT.replace(b'"x"', b'" 00001:000000000000042"')
    answer = answer_of([HEAD + chunk(stamped), chunk(stamped, DONE) + LAST], has_stamps=True)
    assert answer.stamps_us is not None
    assert (answer.stamps_us.tolist(), answer.lost_stamps) == ([42, 42], 0)
    assert answer_of([GOOD + chunk(DONE) + LAST], has_stamps=True).lost_stamps == 2
