"""The record of an exchange: which fields, in which order, and the arithmetic of the marks."""

from __future__ import annotations

import json
from typing import Any

import pytest

from relay.core.dialect import Meter
from relay.core.histogram import Histogram
from relay.core.preface import Preface
from relay.core.request import Route
from relay.core.timeline import Record, Timeline, make_record, preface, record_text, server_timing

#: The interface: scripts and dashboards read these names, and people read them in this order.
FIELDS = [
    "ts", "id", "client", "key", "method", "path", "model", "pool", "upstream", "prefill_upstream", "status", "outcome",
    "stream", "streamed_upstream", "attempts", "queue_ms", "connect_ms", "prefill_ms", "handover_ms", "head_ms",
    "ttft_ms", "total_ms", "relay_ms", "frames", "bytes_in", "bytes_out", "gap_p50_ms", "gap_p99_ms", "gap_max_ms",
    "prompt_tokens", "cached_tokens", "completion_tokens", "reasoning_tokens", "total_tokens", "usage", "finish_reason",
    "cost", "error",
]  # fmt: skip

NOW = 1_795_226_774.0625


def record(**fields: Any) -> Record:
    """A record of an exchange of which only `fields` are told."""
    told: dict[str, Any] = {"now": NOW, "client": "127.0.0.1:5", "outcome": "--"}
    return make_record(**told | fields)


def timeline() -> Timeline:
    """One stream: 10 ms of queue, 4 ms of dialling, 200 ms of engine; the rest until the first content is relay."""
    made = Timeline(request_started=100.0, request_read=100.5)
    made.queue_s = 0.010
    made.add_connect(0.003)
    made.add_connect(0.001)
    made.request_sent = 100.516
    made.head = 100.566
    made.answered = 100.716
    made.first_content_read = 100.716
    made.first_content_sent = 100.717
    made.ended = 102.0
    return made


def test_fields_and_their_order() -> None:
    assert list(json.loads(record().encode())) == FIELDS


def test_one_line_of_json() -> None:
    line = record(error='a "quoted"\nline\u2028', model="qw\u00e9n").encode()
    assert b"\n" not in line
    assert json.loads(line)["error"] == 'a "quoted"\nline\u2028'


def test_time_of_day_is_utc_in_milliseconds() -> None:
    assert record().ts == "2026-11-21T02:06:14.062Z"
    assert record(now=1_795_226_774.0).ts == "2026-11-21T02:06:14.000Z"


def test_what_was_never_reached_is_null() -> None:
    fields = json.loads(record(timeline=Timeline(1.0, 1.25)).encode())
    for name in ("queue_ms", "connect_ms", "prefill_ms", "head_ms", "ttft_ms", "total_ms", "relay_ms"):
        assert fields[name] is None
    for name in ("gap_p50_ms", "gap_p99_ms", "gap_max_ms", "prompt_tokens", "completion_tokens", "status", "cost"):
        assert fields[name] is None
    assert fields["usage"] == "none"


def test_without_a_timeline_all_times_are_null() -> None:
    fields = json.loads(record().encode())
    assert all(fields[name] is None for name in FIELDS if name.endswith("_ms"))


def test_arithmetic_of_a_stream() -> None:
    made = record(timeline=timeline())
    assert made.queue_ms == 10.0
    assert made.connect_ms == 4.0
    assert made.head_ms == 50.0
    assert made.ttft_ms == 217.0  # from the request's last byte
    assert made.total_ms == 2000.0  # from its first
    assert made.relay_ms == 3.0  # 217 - 10 queued - 4 dialled - 200 until the engine's first content


def test_relay_ms_of_an_answer_without_content_frames_runs_to_its_head() -> None:
    made = timeline()
    made.first_content_read = made.first_content_sent = None
    assert record(timeline=made).ttft_ms is None
    assert record(timeline=made).relay_ms == 2.0  # 66 - 10 - 4 - 50


def test_relay_ms_is_never_negative() -> None:
    made = timeline()
    made.queue_s = 5.0
    assert record(timeline=made).relay_ms == 0.0


def test_a_prefill_leg_before_the_decode_leg_is_not_the_relays_time() -> None:
    made = timeline()
    made.add_prefill(0.002)
    made.prefilled = 100.515
    assert (record(timeline=made).prefill_ms, record(timeline=made).relay_ms) == (2.0, 1.0)
    assert record(timeline=made).handover_ms == 201.0  # until the decoder's first content


def test_a_prefill_leg_beside_the_decode_leg_is_told_and_not_counted_twice() -> None:
    made = timeline()
    made.add_prefill(0.150, is_beside=True)
    made.prefilled = 100.7
    assert (record(timeline=made).prefill_ms, record(timeline=made).relay_ms) == (150.0, 3.0)
    assert record(timeline=made).handover_ms == 16.0


@pytest.mark.parametrize("content_read", [None, 100.5])
def test_a_hand_over_takes_no_negative_time(content_read: float | None) -> None:
    made = timeline()
    made.prefilled = 100.7
    made.first_content_read = content_read
    assert made.handover_s == (None if content_read is None else 0.0)


def test_content_that_was_read_but_never_sent() -> None:
    made = timeline()
    made.first_content_sent = None
    assert record(timeline=made).ttft_ms is None
    assert record(timeline=made).total_ms == 2000.0


def test_engines_that_failed_are_not_the_relays_time() -> None:
    """The first is given up 1.5 s after it was asked, the second answers."""
    made = timeline()  # of an attempt that began at 100.517: head after 50 ms, answered after 200
    first = Timeline(request_started=100.0, request_read=100.5)
    first.queue_s, first.connect_s = made.queue_s, made.connect_s
    first.request_sent, first.head = 100.515, 100.516
    first.give_up(102.015)
    assert first.lost_s == 1.5
    fields = record(timeline=first)
    assert (fields.head_ms, fields.relay_ms) == (None, None)
    assert server_timing(first, 102.017) == b"queue;dur=10.000, engine;dur=1500.000, relay;dur=3.000"
    first.request_sent, first.head, first.answered = 102.017, 102.067, 102.217
    first.first_content_read, first.first_content_sent = 102.217, 102.218
    fields = record(timeline=first)
    assert (fields.head_ms, fields.relay_ms, fields.ttft_ms) == (50.0, 4.0, 1718.0)
    assert server_timing(first, 102.218) == b"queue;dur=10.000, engine;dur=1700.000, relay;dur=4.000"


def test_an_engine_that_was_never_asked_has_lost_nothing() -> None:
    made = Timeline(1.0, 1.0)
    made.give_up(2.0)
    assert made.lost_s == 0


@pytest.mark.parametrize(("seconds", "ms"), [(0.0123456, 12.346), (0.0000004, 0.0), (1.0000006, 1000.001)])
def test_times_are_rounded_to_microseconds(seconds: float, ms: float) -> None:
    made = Timeline(0.0, 0.0)
    made.queue_s = seconds
    assert record(timeline=made).queue_ms == ms


def test_usage_of_the_engine() -> None:
    meter = Meter(Route.CHAT)
    meter.inspect(
        b'data: {"choices":[{"index":0,"delta":{"content":"x"},"finish_reason":"stop"}],"usage":{"prompt_tokens":7,'
        b'"completion_tokens":3,"total_tokens":10,"prompt_tokens_details":{"cached_tokens":5},'
        b'"completion_tokens_details":{"reasoning_tokens":2}}}\n\n'
    )
    made = record(meter=meter)
    assert made.usage == "engine"
    assert (made.prompt_tokens, made.cached_tokens, made.completion_tokens) == (7, 5, 3)
    assert (made.reasoning_tokens, made.total_tokens, made.finish_reason) == (2, 10, "stop")


def test_usage_estimated_from_frames() -> None:
    meter = Meter(Route.CHAT)
    meter.inspect(b'data: {"choices":[{"index":0,"delta":{"content":"x"}}]}\n\n')
    meter.ordinary.frames += 4
    made = record(meter=meter)
    assert (made.usage, made.completion_tokens) == ("estimated", 5)
    assert (made.prompt_tokens, made.total_tokens) == (None, None)


def test_usage_unknown() -> None:
    assert record(meter=Meter(Route.CHAT)).usage == "none"
    assert record().usage == "none"


def test_gaps() -> None:
    gaps = Histogram()
    for _ in range(99):
        gaps.add(20_000_000)
    gaps.add(500_000_000)
    made = record(gaps=gaps)
    assert made.gap_p50_ms == pytest.approx(20, rel=0.0625)
    assert made.gap_p99_ms == pytest.approx(20, rel=0.0625)
    assert made.gap_max_ms == 500.0


def test_the_relays_own_error_comes_before_the_engines() -> None:
    meter = Meter(Route.CHAT)
    meter.inspect(b'data: {"error":{"message":"engine died"}}\n\n')
    assert record(meter=meter).error == "engine died"
    assert record(meter=meter, error="client went away").error == "client went away"


def test_server_timing_of_a_stream() -> None:
    assert server_timing(timeline(), 100.717) == b"queue;dur=10.000, engine;dur=200.000, relay;dur=3.000"


@pytest.mark.parametrize("lost_s", [0.0, 0.5])
def test_a_preface_says_what_the_head_would_have_said(lost_s: float) -> None:
    marks = timeline()
    marks.lost_s = lost_s
    answered, marks.answered = marks.answered, None
    assert answered is not None
    # half a microsecond more: what is binary here falls a little short of the milliseconds it means
    made = preface(marks, b"<", b">").at(int(answered * 1e9) + 500, int(100.717e9) + 500)
    marks.answered = answered
    assert made == b"<" + server_timing(marks, 100.717) + b">"
    assert made.startswith(b"<queue;dur=10.000, engine;dur=%d.000, relay;dur=" % (200 + 1000 * lost_s))


def test_a_preface_of_clocks_that_differ_counts_nothing_below_zero() -> None:
    made = Preface(b"", b"", since_ns=5_000_000, own_ns=-2_000_000)
    assert made.at(4_000_000, 4_000_000) == b"engine;dur=0.000, relay;dur=0.000"
    assert made.at(1_234_567_890_123, 1_234_567_890_123) == b"engine;dur=1234562.890, relay;dur=0.000"


def test_server_timing_of_another_answer() -> None:
    made = timeline()
    made.queue_s = 0.0
    made.answered = made.first_content_read = made.first_content_sent = None
    assert server_timing(made, 100.571) == b"engine;dur=50.000, relay;dur=17.000"


def test_server_timing_of_a_refusal() -> None:
    made = Timeline(1.0, 1.0)
    assert server_timing(made, 1.0) == b"relay;dur=0.000"
    made.queue_s = 0.25
    assert server_timing(made, 1.5) == b"queue;dur=250.000, relay;dur=250.000"


def test_text_for_people() -> None:
    made = record(
        id="r-1", method="POST", path="/v1/completions", model="m", upstream="http://a:1", status=200, attempts=1,
        frames=9, timeline=timeline(),
    )  # fmt: skip
    assert record_text(made) == (
        "2026-11-21T02:06:14.062Z 127.0.0.1:5 POST /v1/completions 200 -- model=m upstream=http://a:1 attempts=1 "
        "ttft=217.0ms total=2000.0ms frames=9 tokens=-+- id=r-1"
    )


def test_text_of_a_record_that_knows_nothing() -> None:
    assert record_text(record(error="bad\nhead")) == (
        "2026-11-21T02:06:14.062Z 127.0.0.1:5 - - - -- model=- upstream=- attempts=0 ttft=- total=- frames=0 "
        "tokens=-+- id=- error='bad\\nhead'"
    )
