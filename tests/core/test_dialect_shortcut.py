"""The short cut past parsing: whatever a stream holds, counting ordinary frames finds what inspecting each one finds.

The streams are the recorded ones, and made-up ones of the forms other engines have; what the recordings say is read out
of them a second time by plain `json`.
"""

from __future__ import annotations

import json
import sys
from typing import Any, Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.core import ordinary
from relay.core.dialect import Meter
from relay.core.frames import FrameRelay
from relay.core.framing import ChunkDecoder
from relay.core.request import Route
from relay.core.timeline import Timeline, make_record, record_text, server_timing
from relay.core.usage import Usage
from tests.core.captured import Captured, events_of, frames_of, stream, streams

RESULTS = ("usage", "finish_reason", "error", "saw_end", "content_frames", "opaque_frames", "comments", "saw_id_field")
ROUTES = list(Route)


def results(meter: Meter) -> dict[str, Any]:
    """All that a meter has found."""
    return {name: getattr(meter, name) for name in RESULTS}


def inspected(route: Route, frames: list[bytes]) -> Meter:
    """Every frame inspected."""
    meter = Meter(route)
    for frame in frames:
        meter.inspect(frame)
    return meter


class Watched(Meter):
    """A meter that counts the frames it had to inspect, and those with content."""

    inspections = 0
    inspected = 0

    def inspect_data(self, data: bytes, event: bytes = b"") -> None:
        self.inspections += 1
        before = self.content_frames
        super().inspect_data(data, event)
        self.inspected += self.content_frames - before


def short_cut(route: Route, frames: list[bytes], *, per_read: int = 1) -> tuple[Watched, int]:
    """As the pump does it, `per_read` chunks of a frame to a read; also how many content frames were not inspected."""
    meter = Watched(route)
    relay = FrameRelay(ChunkDecoder(), meter, is_chunked=True, max_frame_bytes=1 << 20)
    for start in range(0, len(frames), per_read):
        read = b"".join(b"%x\r\n%b\r\n" % (len(frame), frame) for frame in frames[start : start + per_read])
        relay.feed(read, memoryview(read), [])
    return meter, meter.content_frames - meter.inspected


def chunk(delta: dict[str, Any], *, spaced: bool = False, finish: str | None = None, **fields: Any) -> bytes:
    """A chat chunk."""
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    return data({"id": "chatcmpl-1", "object": "chat.completion.chunk", "choices": [choice], **fields}, spaced=spaced)


def data(value: Any, *, spaced: bool = False) -> bytes:
    """A frame of one line of JSON, with blanks behind its colons and commas or without."""
    separators = (", ", ": ") if spaced else (",", ":")
    return b"data: " + json.dumps(value, separators=separators, ensure_ascii=False).encode() + b"\n\n"


def event(value: dict[str, Any]) -> bytes:
    """A frame of the Responses and Messages APIs."""
    return f"event: {value['type']}\n".encode() + data(value)


DONE = b"data: [DONE]\n\n"
A, B = {"content": "a"}, {"content": "b"}
TEXT = {"type": "response.output_text.delta", "delta": "a", "sequence_number": 4}
BLOCK = {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "a"}}
COMPLETED = {
    "type": "response.completed",
    "response": {"status": "completed", "usage": {"input_tokens": 1, "output_tokens": 2, "total_tokens": 3}},
}
STOPPED = {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 2}}


@pytest.mark.parametrize("per_read", [1, 2, 7])
@pytest.mark.parametrize("captured", streams(), ids=repr)
def test_recorded_streams(captured: Captured, per_read: int) -> None:
    frames = frames_of(captured.body)
    meter, counted = short_cut(captured.route, frames, per_read=per_read)
    assert results(meter) == results(inspected(captured.route, frames))
    assert counted <= meter.content_frames


@pytest.mark.parametrize("name", ["chat_long_1500.stream_usage", "comp_basic.stream", "responses_basic.stream"])
def test_most_frames_of_a_stream_are_not_parsed(name: str) -> None:
    captured = stream(name)
    frames = frames_of(captured.body)
    meter, counted = short_cut(captured.route, frames)
    assert meter.content_frames >= 10
    assert counted >= meter.content_frames - 1  # the last may come with the finish reason


SPOKEN: Final = {"role": "assistant", "content": ""}


@pytest.mark.parametrize(
    "opening",
    [
        chunk(SPOKEN, usage=None),
        chunk({"role": "assistant", "content": None, "tool_calls": None}, model="m", created=17),
        b'data: {"choices":[{"finish_reason":null,"index":0,"delta":{"role":"assistant","content":null}}],'
        b'"created":17,"id":"chatcmpl-1","model":"m","system_fingerprint":"b1","object":"chat.completion.chunk"}\n\n',
        b'data: {"id":"chatcmpl-1","object":"chat.completion.chunk","created":17,"model":"m","choices":[{"index":0,'
        b'"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}],"prompt_token_ids":null}\n\n',
    ],
)
def test_a_role_alone_is_not_parsed_where_a_stream_begins(opening: bytes) -> None:
    begun, _ = short_cut(Route.CHAT, [opening])
    assert begun.inspections == 0
    assert results(begun) == results(inspected(Route.CHAT, [opening]))
    later, _ = short_cut(Route.CHAT, [chunk(A), opening])
    assert later.inspections == 1


@pytest.mark.parametrize(
    "opening",
    [
        chunk({"role": "assistant", "content": "a\n"}),
        chunk({"role": "assistant", "content": "", "reasoning": "a"}),
        chunk({"role": "assistant", "tool_calls": [{"index": 0}]}),
        chunk(SPOKEN, usage={"prompt_tokens": 3}),
        chunk(SPOKEN, error={"message": "m"}),
        chunk(SPOKEN, error="m"),
        data({"error": "m", "choices": [{"index": 0, "delta": SPOKEN, "finish_reason": None}]}),
        chunk(SPOKEN, finish="length"),
        chunk(SPOKEN)[:-4] + b"\n\n",
        data({"error": {"message": "m"}}),
        data({"choices": [{"index": 0, "delta": SPOKEN}, {"index": 1, "delta": A}]}),
    ],
)
def test_a_first_frame_that_says_more_is_parsed(opening: bytes) -> None:
    begun, _ = short_cut(Route.CHAT, [opening])
    assert begun.inspections == 1
    assert results(begun) == results(inspected(Route.CHAT, [opening]))


@pytest.mark.parametrize("name", ["chat_long_1500.stream_usage", "chat_200.stream_usage"])
def test_recorded_chats_begin_without_parsing(name: str) -> None:
    first, *_ = frames_of(stream(name).body)
    begun, _ = short_cut(Route.CHAT, [first])
    assert begun.inspections == 0


@pytest.mark.parametrize("captured", streams(), ids=repr)
def test_recorded_streams_say_what_plain_json_says(captured: Captured) -> None:
    if captured.route not in (Route.CHAT, Route.COMPLETIONS) or not captured.is_complete:
        pytest.skip("not choices, or cut in the middle of a frame")
    usage = finish = error = None
    content = 0
    for found in events_of(captured.body):
        usage = found.get("usage") or usage
        error = found.get("error") or error
        choices = found.get("choices", [])
        for choice in choices:
            finish = choice["finish_reason"] or finish
        content += any(
            choice.get("text") or any(value for key, value in choice.get("delta", {}).items() if key != "role")
            for choice in choices
        )
    meter, _ = short_cut(captured.route, frames_of(captured.body))
    assert meter.finish_reason == finish
    assert meter.error == (error["message"] if error else None)
    assert meter.content_frames == content
    assert meter.saw_end == captured.body.endswith(DONE)
    assert (meter.usage is None) == (usage is None)
    if usage is not None:
        assert meter.usage is not None
        for name in ("prompt_tokens", "completion_tokens", "total_tokens"):
            assert getattr(meter.usage, name) == usage[name]


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("fail/sigterm_stream", "EngineCore encountered an issue"),
        ("fail/engine_killed_stream", "EngineCore encountered"),
    ],
)
def test_a_dying_engines_last_words(name: str, error: str) -> None:
    captured = stream(name)
    meter, _ = short_cut(Route.CHAT, frames_of(captured.body))
    assert meter.error is not None
    assert meter.error.startswith(error)
    assert meter.saw_end


def test_a_killed_engines_last_usage_is_kept() -> None:
    frames = [frame for frame in frames_of(stream("fail/sigkill_api_stream").body) if frame.endswith(b"\n\n")]
    meter, counted = short_cut(Route.CHAT, frames)
    assert counted == 0  # usage in every frame
    assert meter.usage is not None
    assert meter.usage.completion_tokens == json.loads(frames[-1][6:])["usage"]["completion_tokens"]
    assert not meter.saw_end


@pytest.mark.parametrize(
    ("route", "frames", "expected"),
    [
        pytest.param(
            Route.CHAT,
            [chunk({"content": ":"}, spaced=True), chunk(B, spaced=True), chunk({}, spaced=True, finish="stop"), DONE],
            {"finish_reason": "stop", "content_frames": 2, "saw_end": True},
            id="spaced JSON whose first text looks like a colon between strings",
        ),
        pytest.param(
            Route.CHAT,
            [chunk(A), chunk(B), chunk({}, spaced=True, finish="length", usage={"prompt_tokens": 1})],
            {"finish_reason": "length", "content_frames": 2, "usage": Usage(prompt_tokens=1)},
            id="the last chunk spaced in another way",
        ),
        pytest.param(
            Route.CHAT,
            [data({"object": "chat.completion.chunk", "choices": [{"delta": A}]})] * 2
            + [data({"object": "error", "message": "boom", "code": 500})],
            {"error": "boom", "content_frames": 2},
            id="object first, then SGLang's flat error",
        ),
        pytest.param(
            Route.CHAT,
            [chunk(A), chunk(B), chunk({"content": ""}, error={"code": 502, "message": "boom"})],
            {"error": "boom", "content_frames": 2},
            id="an error in a chunk like the others",
        ),
        pytest.param(
            Route.CHAT,
            [chunk(A), chunk(B, choices=[{"index": 1, "delta": {"role": "assistant", "content": ""}}]), chunk(B)],
            {"content_frames": 2},
            id="another choice's role in the middle",
        ),
        pytest.param(
            Route.CHAT,
            [b"event: message\n" + f for f in (chunk(A), chunk(B), chunk({}, finish="stop"), DONE)],
            {"finish_reason": "stop", "content_frames": 2, "saw_end": True},
            id="an event type that says nothing",
        ),
        pytest.param(
            Route.CHAT,
            [chunk(A), chunk(B), b'error: {"code":500,"message":"boom"}\n\n'],
            {"error": "boom", "content_frames": 2},
            id="llama.cpp's error line",
        ),
        pytest.param(
            Route.CHAT,
            [chunk(A), chunk({"content": '"usage":{"finish_reason":"stop","error":'}), chunk(B)],
            {"content_frames": 3, "finish_reason": None, "error": None, "usage": None},
            id="a text about usage and errors",
        ),
        pytest.param(
            Route.RESPONSES,
            [event(TEXT), event(TEXT), event({"type": "error", "message": "boom"})],
            {"error": "boom", "content_frames": 2},
            id="a flat error among events",
        ),
        pytest.param(
            Route.RESPONSES,
            [
                data({"sequence_number": 1, **TEXT}),
                data({"sequence_number": 2, **TEXT}),
                data({"sequence_number": 3, "type": "error", "message": "boom"}),
                data({"sequence_number": 4, **COMPLETED}),
            ],
            {"error": "boom", "content_frames": 2, "saw_end": True, "finish_reason": "completed"},
            id="Responses without event lines",
        ),
        pytest.param(
            Route.RESPONSES,
            [
                event({"type": "response.reasoning_text.delta", "delta": "a"}),
                event(TEXT),
                event(TEXT),
                event(COMPLETED),
            ],
            {"content_frames": 3, "saw_end": True, "usage": Usage(1, None, 2, None, 3)},
            id="from reasoning to text",
        ),
        pytest.param(
            Route.MESSAGES,
            [data(BLOCK), data(BLOCK), data(STOPPED), data({"type": "message_stop"})],
            {"content_frames": 2, "saw_end": True, "finish_reason": "end_turn"},
            id="Messages without event lines",
        ),
        pytest.param(
            Route.MESSAGES,
            [event(BLOCK), event({"type": "error", "error": {"type": "overloaded_error", "message": "boom"}})],
            {"content_frames": 1, "error": "boom"},
            id="Messages: an error",
        ),
        pytest.param(
            Route.CHAT,
            [chunk(A), chunk(A, finish="stop", status=200, usage={"prompt_tokens": "5", "completion_tokens": 3})],
            {"content_frames": 2, "finish_reason": "stop", "opaque_frames": 1},
            id="a key of an unexpected type does not hide the others",
        ),
        pytest.param(
            Route.CHAT,
            [chunk(A), b"event: error\ndata: out of memory\n\n"],
            {"error": "out of memory", "opaque_frames": 1},
            id="an error that is no JSON",
        ),
    ],
)
def test_other_engines_forms(route: Route, frames: list[bytes], expected: dict[str, Any]) -> None:
    for per_read in (1, 2):
        meter, _ = short_cut(route, frames, per_read=per_read)
        assert results(meter) == results(inspected(route, frames))
        assert {name: getattr(meter, name) for name in expected} == expected


def ordinary_text(frame: bytes, text: str) -> bytes:
    """The same frame with another text."""
    return frame.replace(b'"a"', json.dumps(text, ensure_ascii=False).encode())


LLAMA = (
    b'data: {"choices":[{"finish_reason":null,"index":0,"delta":{"content":"a"}}],"created":1,"id":"c","model":"m"}\n\n'
)
SGLANG = {"role": None, "content": "a", "reasoning_content": None, "tool_calls": None}
TOOL = {"content": None, "tool_calls": [{"index": 0, "function": {"arguments": "a"}}]}
COMPLETION = {"id": "cmpl-1", "choices": [{"index": 0, "text": "a", "logprobs": None, "finish_reason": None}]}
ORDINARY = [
    (Route.CHAT, chunk(A)),
    (Route.CHAT, chunk({"reasoning_content": "a"})),
    (Route.CHAT, chunk(SGLANG, usage=None)),
    (Route.CHAT, chunk(TOOL)),
    (Route.CHAT, LLAMA),
    (Route.COMPLETIONS, data(COMPLETION)),
    (Route.RESPONSES, event(TEXT)),
    (Route.RESPONSES, data({**TEXT, "sequence_number": 5})),
    (Route.MESSAGES, event(BLOCK)),
    (Route.MESSAGES, data(BLOCK)),
    (Route.OTHER, chunk(A)),
]


@pytest.mark.parametrize(("route", "frame"), ORDINARY)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), min_size=1))
def test_whatever_the_text_an_ordinary_frame_is_known(route: Route, frame: bytes, text: str) -> None:
    assert ordinary.FRAMES[route].fullmatch(ordinary_text(frame, text))


@pytest.mark.parametrize(
    ("route", "frame"),
    [
        (Route.CHAT, chunk({"content": ""})),
        (Route.CHAT, chunk({"role": "assistant"})),
        (Route.CHAT, chunk({"role": "assistant", "content": ""})),
        (Route.CHAT, chunk({})),
        (Route.CHAT, chunk(A, finish="stop")),
        (Route.CHAT, chunk(A, usage={"prompt_tokens": 1})),
        (Route.CHAT, chunk(A, error={"message": "boom"})),
        (Route.CHAT, chunk(A, error="boom")),
        (Route.CHAT, chunk(A, object="error", message="boom", choices=[])),
        (Route.CHAT, data({"error": {"message": "boom"}, "choices": [{"index": 0, "delta": A}]})),
        (Route.CHAT, data({"choices": [{"index": 0, "delta": A}, {"index": 1, "delta": A, "finish_reason": "stop"}]})),
        (Route.CHAT, data({"choices": [{"index": 0, "delta": A, "finish_reason": "stop"}, {"index": 1, "delta": A}]})),
        (Route.CHAT, chunk(A)[:-1] + b"data: [DONE]\n\n"),
        (Route.CHAT, chunk(A) * 2),
        (Route.CHAT, b"event: error\n" + chunk(A)),
        (Route.COMPLETIONS, data({"id": "c", "choices": [{"index": 0, "text": ""}]})),
        (Route.COMPLETIONS, data({"id": "c", "choices": [{"index": 0, "text": "a", "finish_reason": "length"}]})),
        (Route.RESPONSES, event(COMPLETED)),
        (Route.RESPONSES, event({"type": "response.output_text.delta.done"})),
        (Route.RESPONSES, event(TEXT)[:-2] + b"\r\revent: error\ndata: {}\n\n"),
        (Route.MESSAGES, event(STOPPED)),
        (Route.MESSAGES, event({"type": "error", "error": {}})),
        *((route, DONE) for route in ROUTES),
    ],
)
def test_what_says_more_is_not_ordinary(route: Route, frame: bytes) -> None:
    assert not ordinary.FRAMES[route].fullmatch(frame)


@pytest.mark.parametrize(("route", "frame"), ORDINARY)
def test_a_chunk_whose_size_lies_is_not_ordinary(route: Route, frame: bytes) -> None:
    for size in (len(frame) - 1, len(frame) + 1):
        read = b"%x\r\n%b\r\n" % (size, frame)
        relay = FrameRelay(ChunkDecoder(), Meter(route), is_chunked=True, max_frame_bytes=1 << 20)
        relay.feed(read, memoryview(read), [])
        assert relay.decoder.error is not None


def test_tokens_of_several_choices_are_all_ordinary() -> None:
    frames = [chunk(A, choices=[{"index": index, "delta": A, "finish_reason": None}]) for index in (0, 1, 2) * 5]
    assert short_cut(Route.CHAT, frames)[1] == 15


def test_line_ends_and_a_byte_order_mark() -> None:
    for end in (b"\n", b"\r\n", b"\r"):
        frames = [frame.replace(b"\n", end) for frame in (chunk(A), event(TEXT), chunk({}, finish="stop"), DONE)]
        meter = inspected(Route.CHAT, [b"\xef\xbb\xbf" + frames[0], *frames[1:]])
        assert (meter.content_frames, meter.finish_reason, meter.saw_end) == (2, "stop", True)
    text = chunk({"content": "\u2028\u0085"})
    assert inspected(Route.CHAT, [text, text.replace(b"data: ", b"data:")]).content_frames == 2


def test_data_over_several_lines_comments_and_ids() -> None:
    meter = inspected(
        Route.CHAT,
        [b'data: {"choices":\ndata: [{"delta":{"content":"a"}}]}\n\n', b": ping\n\n", b"id: 7\nretry: 1\n\n"],
    )
    assert (meter.content_frames, meter.comments, meter.saw_id_field, meter.opaque_frames) == (1, 1, True, 0)


def test_prompt_tokens_include_cached_ones_on_messages_too() -> None:
    usage = {"input_tokens": 6, "cache_read_input_tokens": 16, "cache_creation_input_tokens": 0, "output_tokens": 3}
    meter = inspected(Route.MESSAGES, [event({**STOPPED, "usage": usage})])
    assert meter.usage == Usage(22, 16, 3, None, 25)
    details = {"input_tokens": 22, "input_tokens_details": {"cached_tokens": 16}, "output_tokens": 3}
    meter = inspected(Route.RESPONSES, [event({**COMPLETED, "response": {"usage": details}})])
    assert meter.usage == Usage(22, 16, 3, None, 25)


def test_a_cut_messages_stream_is_estimated() -> None:
    start = {"type": "message_start", "message": {"usage": {"input_tokens": 22, "output_tokens": 0}}}
    meter, _ = short_cut(Route.MESSAGES, [event(start)] + [event(BLOCK)] * 5)
    record = make_record(now=0.0, client="", outcome="UD", meter=meter)
    assert (record.usage, record.prompt_tokens, record.completion_tokens) == ("estimated", 22, 5)


@given(st.sampled_from(ROUTES), st.lists(st.binary(max_size=80), max_size=5))
def test_arbitrary_bytes_never_raise(route: Route, frames: list[bytes]) -> None:
    meter = inspected(route, [b"data: " + frame + b"\n\n" for frame in frames] + frames)
    for frame in frames:
        meter.take_body(frame)
    assert meter.content_frames <= 2 * len(frames)


KEYS = (
    "choices", "delta", "content", "role", "usage", "error", "type", "object", "message", "response", "status", "text",
    "finish_reason", "prompt_tokens", "prompt_tokens_details", "incomplete_details", "stop_reason",
)  # fmt: skip
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
    max_leaves=12,
)


@given(st.sampled_from(ROUTES), JSON, st.booleans())
def test_arbitrary_json_never_raises(route: Route, value: Any, spaced: bool) -> None:
    frame = data(value, spaced=spaced) if _is_utf8(value) else b"data: {}\n\n"
    meter = inspected(route, [frame, chunk(A), frame])
    meter.take_body(frame[6:])
    assert meter.content_frames >= 1
    if not isinstance(value, dict):
        assert meter.opaque_frames == 2


def _is_utf8(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_any_buffer(kind: Any) -> None:
    meter = Meter(Route.CHAT)
    meter.inspect(kind(chunk(A)))
    assert meter.content_frames == 1


def test_a_meter_is_small() -> None:
    meter, _ = short_cut(Route.CHAT, frames_of(stream("chat_long_1500.stream_usage").body))
    own = [meter, meter.usage, meter.finish_reason]
    assert sum(map(sys.getsizeof, own)) < 1024


def test_a_clients_model_name_stays_on_its_line_of_the_text_log() -> None:
    assert "\n" not in record_text(make_record(now=0.0, client="", outcome="--", model="m\nforged \x1b[2J"))


def test_prefill_is_not_the_relays_time() -> None:
    marks = Timeline(request_started=0.0, request_read=0.0)
    marks.prefill_s = 0.5
    marks.request_sent, marks.head, marks.first_content_read, marks.first_content_sent = 0.502, 0.6, 0.7, 0.701
    marks.answered = 0.7
    record = make_record(now=0.0, client="", outcome="--", prefill_upstream="http://p:1", timeline=marks)
    assert (record.prefill_ms, record.ttft_ms, record.relay_ms) == (500.0, 701.0, 3.0)
    assert server_timing(marks, 0.701) == b"prefill;dur=500.000, engine;dur=198.000, relay;dur=3.000"
