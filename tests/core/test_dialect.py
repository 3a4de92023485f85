"""What frames mean: beside a plain walk over every recorded stream, and on what other engines send."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.core.dialect import Meter, Usage, error_body, error_frame, refusal_frame
from relay.core.request import Route
from tests.core.captured import Captured, captured, events_of, frames_of, streams

ROUTES = list(Route)
STREAMS = [pytest.param(stream, id=stream.name) for stream in streams()]
BODIES = [
    pytest.param(answer, id=answer.name)
    for answer in captured()
    if not answer.is_stream
    and answer.status == 200
    and answer.body.startswith(b"{")
    and answer.route is not Route.OTHER
]

DONE = b"data: [DONE]\n\n"


def inspected(route: Route, *frames: bytes) -> Meter:
    """A meter that has inspected every one of `frames`."""
    meter = Meter(route)
    for frame in frames:
        meter.inspect(frame)
    return meter


def skimmed(route: Route, frames: list[bytes]) -> Meter:
    """A meter that has been used as the hot path uses it: what looks ordinary is only counted."""
    meter = Meter(route)
    for frame in frames:
        meter.take(frame)
    return meter


def findings(meter: Meter) -> dict[str, Any]:
    """All that a meter has found out."""
    names = (
        "usage",
        "finish_reason",
        "content_frames",
        "error",
        "saw_end",
        "saw_id_field",
        "opaque_frames",
        "comments",
    )
    return {name: getattr(meter, name) for name in names}


# -- the plain walk


def usages_in(event: dict[str, Any]) -> list[dict[str, Any]]:
    """The usage objects of an event, whichever the dialect."""
    holders = [event, event.get("response"), event.get("message")]
    return [holder["usage"] for holder in holders if isinstance(holder, dict) and holder.get("usage")]


def walked_usage(events: list[dict[str, Any]]) -> Usage | None:
    """The last figure of each kind."""
    found: dict[str, int | None] = {}
    for event in events:
        for usage in usages_in(event):
            details = (usage.get("prompt_tokens_details") or usage.get("input_tokens_details") or {}) | (
                usage.get("completion_tokens_details") or usage.get("output_tokens_details") or {}
            )
            figures = {
                "prompt_tokens": usage.get("prompt_tokens", usage.get("input_tokens")),
                "completion_tokens": usage.get("completion_tokens", usage.get("output_tokens")),
                "cached_tokens": details.get("cached_tokens", usage.get("cache_read_input_tokens")),
                "reasoning_tokens": details.get("reasoning_tokens"),
                "total_tokens": usage.get("total_tokens"),
            }
            found |= {name: figure for name, figure in figures.items() if figure is not None}
            found["total_tokens"] = (found["prompt_tokens"] or 0) + (found["completion_tokens"] or 0)
            assert usage.get("total_tokens", found["total_tokens"]) == found["total_tokens"]
    return Usage(**found) if found else None


def holds_content(event: dict[str, Any]) -> bool:
    """Whether the model says something in this event."""
    if "choices" in event:
        said = []
        for choice in event["choices"]:
            delta = choice.get("delta") or {}
            said += [choice.get("text"), *(delta.get(name) for name in ("content", "reasoning", "tool_calls"))]
            assert delta.keys() <= {"role", "content", "reasoning", "tool_calls"}
        return any(said)
    return event.get("type") == "content_block_delta" or event.get("type", "").endswith(".delta")


def walked_finish(events: list[dict[str, Any]]) -> str | None:
    """The last finish reason of any choice, or what the other two dialects have in its place."""
    found: str | None = None
    for event in events:
        for choice in event.get("choices") or ():
            found = choice.get("finish_reason") or found
        if event.get("type") == "message_delta":
            found = event["delta"]["stop_reason"]
        if event.get("type") in ("response.completed", "response.incomplete"):
            response = event["response"]
            found = (response["incomplete_details"] or {}).get("reason") or response["status"]
    return found


@pytest.mark.parametrize("stream", STREAMS)
def test_captured_stream(stream: Captured) -> None:
    events = events_of(stream.body)
    errors = [event["error"]["message"] for event in events if "error" in event]
    meter = inspected(stream.route, *frames_of(stream.body))
    assert meter.usage == walked_usage(events)
    assert meter.content_frames == sum(map(holds_content, events))
    assert meter.saw_content == (meter.content_frames > 0)
    assert meter.finish_reason == walked_finish(events)
    assert meter.error == (errors[-1] if errors else None)
    end = (b"data: [DONE]\n", b"event: message_stop\n", b"event: response.completed\n", b"event: response.incomplete\n")
    assert meter.saw_end == any(mark in stream.body for mark in end)
    assert meter.saw_end == stream.is_complete
    assert (meter.opaque_frames, meter.comments, meter.saw_id_field) == (0, 0, False)


@pytest.mark.parametrize("stream", STREAMS)
def test_captured_stream_skimmed_is_as_inspected(stream: Captured) -> None:
    frames = frames_of(stream.body)
    assert findings(skimmed(stream.route, frames)) == findings(inspected(stream.route, *frames))


def test_most_frames_of_a_plain_stream_are_only_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The point of the patterns: a JSON decoder at each token would be the greatest part of its cost."""
    calls = 0
    inspect = Meter.inspect

    def count(meter: Meter, frame: bytes) -> None:
        nonlocal calls
        calls += 1
        inspect(meter, frame)

    monkeypatch.setattr(Meter, "inspect", count)
    for name in ("chat_200.stream_usage", "comp_n2.stream", "responses_basic.stream", "messages_stop_seq.stream"):
        stream = next(stream for stream in streams() if stream.name == name)
        frames = frames_of(stream.body)
        calls = 0
        meter = skimmed(stream.route, frames)
        assert calls <= len(frames) - meter.content_frames + 2  # a choice's last may come with the finish reason


@pytest.mark.parametrize(
    ("name", "error", "saw_end"),
    [
        ("fail/engine_killed_stream", "EngineCore encountered an issue.", True),
        ("fail/sigterm_stream", "EngineCore encountered an issue.", True),
        ("fail/pd_prefill_then_killed.2decode", "Internal server error", True),
        ("fail/sigkill_api_stream", None, False),
        ("fail/client_abort_stream", None, False),
        ("err_bad_schema.stream", "", True),
    ],
)
def test_captured_failures(name: str, error: str | None, saw_end: bool) -> None:
    stream = next(stream for stream in streams() if stream.name == name)
    meter = skimmed(stream.route, frames_of(stream.body))
    assert (meter.error is None) == (error is None)
    assert (meter.error or "").startswith(error or "")
    assert meter.saw_end == saw_end


@pytest.mark.parametrize("answer", BODIES)
def test_captured_body(answer: Captured) -> None:
    body = json.loads(answer.body)
    meter = Meter(answer.route)
    meter.take_body(answer.body)
    assert meter.usage == walked_usage([body])
    reasons = [choice["finish_reason"] for choice in body.get("choices") or ()]
    if "choices" in body:
        assert meter.finish_reason == (reasons[-1] if reasons else None)
    else:
        incomplete = body.get("incomplete_details") or {}
        assert meter.finish_reason == body.get("stop_reason", incomplete.get("reason", body.get("status")))
    assert meter.content_frames == 0


# -- other engines, and things no engine should send


def test_role_only_frames_are_not_content() -> None:
    role = b'data: {"choices":[{"index":0,"delta":{"role":"assistant","content":""},"finish_reason":null}]}\n\n'
    meter = inspected(Route.CHAT, role)
    assert not meter.saw_content


@pytest.mark.parametrize(
    "delta",
    [
        {"content": "x"}, {"reasoning": "x"}, {"reasoning_content": "x"}, {"tool_calls": [{"index": 0}]},
        {"refusal": "x"}, {"function_call": {"arguments": ""}}, {"audio": {"id": "a"}}, {"role": "a", "content": "x"},
    ],
)  # fmt: skip
def test_whatever_says_something_is_content(delta: dict[str, Any]) -> None:
    meter = inspected(
        Route.CHAT, b"data: " + json.dumps({"choices": [{"index": 0, "delta": delta}]}).encode() + b"\n\n"
    )
    assert meter.content_frames == 1


def test_usage_null_is_ignored() -> None:
    first = b'data: {"choices":[],"usage":{"prompt_tokens":1,"completion_tokens":2,"total_tokens":3}}\n\n'
    meter = inspected(Route.CHAT, b'data: {"choices":[],"usage":null}\n\n')
    assert meter.usage is None
    meter = inspected(Route.CHAT, first, b'data: {"choices":[],"usage":null}\n\n')
    assert meter.usage == Usage(1, None, 2, None, 3)


def test_usage_on_the_last_choice_chunk() -> None:
    frames = [
        b'data: {"id":"1","choices":[{"index":0,"delta":{"content":"a"},"finish_reason":null}]}\n\n',
        b'data: {"id":"1","choices":[{"index":0,"delta":{"content":"b"},"finish_reason":null}]}\n\n',
        b'data: {"id":"1","choices":[{"index":0,"delta":{"content":"c"},"finish_reason":"length"}],'
        b'"usage":{"prompt_tokens":4,"completion_tokens":3,"total_tokens":7}}\n\n',
        DONE,
    ]
    for meter in (inspected(Route.CHAT, *frames), skimmed(Route.CHAT, frames)):
        assert meter.usage == Usage(4, None, 3, None, 7)
        assert (meter.finish_reason, meter.content_frames, meter.saw_end) == ("length", 3, True)


def test_details_on_the_final_usage_only() -> None:
    frame = b'data: {"choices":[],"usage":{"prompt_tokens":4,"completion_tokens":%d,"total_tokens":%d%s}}\n\n'
    meter = inspected(Route.CHAT, frame % (1, 5, b""), frame % (2, 6, b',"prompt_tokens_details":{"cached_tokens":3}'))
    assert meter.usage == Usage(4, 3, 2, None, 6)


def spaced(frame: bytes) -> bytes:
    """A frame as Python's own `json.dumps` writes it."""
    data = frame.removeprefix(b"data: ").strip()
    return frame if data == b"[DONE]" else b"data: " + json.dumps(json.loads(data)).encode() + b"\n\n"


@pytest.mark.parametrize("name", ["chat_200.stream_usage", "chat_n2_tool.stream_usage", "comp_basic.stream_usage"])
def test_json_with_spaces(name: str) -> None:
    stream = next(stream for stream in streams() if stream.name == name)
    frames = frames_of(stream.body)
    expected = findings(inspected(stream.route, *frames))
    loose = list(map(spaced, frames))
    assert loose != frames
    assert findings(skimmed(stream.route, loose)) == expected


@pytest.mark.parametrize("line_end", [b"\r\n", b"\r"])
@pytest.mark.parametrize("name", ["chat_200.stream_usage", "messages_stop_seq.stream", "responses_basic.stream"])
def test_other_line_ends(name: str, line_end: bytes) -> None:
    stream = next(stream for stream in streams() if stream.name == name)
    frames = frames_of(stream.body)
    other = [frame.replace(b"\n", line_end) for frame in frames]
    assert findings(inspected(stream.route, *other)) == findings(inspected(stream.route, *frames))
    assert findings(skimmed(stream.route, other)) == findings(inspected(stream.route, *frames))


def test_byte_order_mark() -> None:
    frame = b'data: {"id":"1","choices":[{"index":0,"delta":{"content":"a"}}]}\n\n'
    assert skimmed(Route.CHAT, [b"\xef\xbb\xbf" + frame, frame, frame]).content_frames == 3


def test_id_field_is_seen_in_ordinary_frames_too() -> None:
    frames = [b'id: %d\ndata: {"id":"1","choices":[{"index":0,"delta":{"content":"a"}}]}\n\n' % n for n in range(3)]
    for meter in inspected(Route.CHAT, *frames), skimmed(Route.CHAT, frames):
        assert (meter.saw_id_field, meter.content_frames) == (True, 3)


def test_event_types_without_event_lines() -> None:
    stream = next(stream for stream in streams() if stream.name == "messages_stop_seq.stream")
    bare = [frame[frame.index(b"data:") :] for frame in frames_of(stream.body)]
    delta = bare[2]
    frames = [*bare[:3], delta, delta, *bare[3:]]
    assert findings(skimmed(Route.MESSAGES, frames)) == findings(inspected(Route.MESSAGES, *frames))
    assert skimmed(Route.MESSAGES, frames).saw_end


@pytest.mark.parametrize(
    ("frame", "text"),
    [
        (b'data: {"error":{"message":"no","type":"x","code":500}}\n\n', "no"),
        (b'data: {"error": {"message": "no", "type": "x", "param": null, "code": 500}}\n\n', "no"),
        (b'data: {"object":"error","message":"no","type":"BadRequestError","param":null,"code":400}\n\n', "no"),
        (b'error: {"code":500,"message":"no","type":"server_error"}\n\n', "no"),
        (b'event: error\ndata: {"type":"error","error":{"type":"overloaded_error","message":"no"}}\n\n', "no"),
        (b'event: error\ndata: {"detail":"no"}\n\n', '{"detail":"no"}'),
        (b'data: {"type":"error","code":"x","message":"no","param":null}\n\n', "no"),
        (b'data: {"error":"no"}\n\n', '"no"'),
        (
            b'event: response.failed\ndata: {"type":"response.failed","response":{"status":"failed",'
            b'"error":{"code":"server_error","message":"no"}}}\n\n',
            "no",
        ),
    ],
)
def test_errors_of_all_engines(frame: bytes, text: str) -> None:
    for end in b"\n", b"\r\n":
        meter = inspected(Route.CHAT, frame.replace(b"\n", end))
        assert meter.error == text
        assert meter.opaque_frames == 0
        assert not meter.saw_content


def test_error_null_is_none() -> None:
    assert inspected(Route.CHAT, b'data: {"choices":[],"error":null}\n\n').error is None


def test_a_long_error_is_kept_short() -> None:
    error = inspected(Route.CHAT, b'data: {"error":{"message":"%s"}}\n\n' % (b"x" * 100_000)).error
    assert error is not None
    assert len(error) <= 300


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"x",
        b"{",
        b"[1]",
        b'"text"',
        b"1e999",
        b"nul",
        b"\xff\xfe",
        b'{"choices":5}',
        b'{"a":"\\ud800"}',
        b"[" * 5000,
    ],
)
def test_data_that_is_not_what_is_expected_is_opaque(data: bytes) -> None:
    meter = inspected(Route.CHAT, b"data: " + data + b"\n\n")
    assert meter.opaque_frames == 1
    assert (meter.error, meter.usage, meter.saw_content, meter.saw_end) == (None, None, False, False)


def test_data_over_several_lines() -> None:
    frame = b'data: {"choices":[{"index":0,\ndata: "delta":{"content":"x"}}]}\n\n'
    assert inspected(Route.CHAT, frame).content_frames == 1


def test_frames_without_data_say_nothing() -> None:
    meter = inspected(Route.CHAT, b": ping\n\n", b"event: ping\n\n", b"retry: 3000\n\n", b"\n", b"", b"no field\n\n")
    assert findings(meter) == findings(Meter(Route.CHAT)) | {"comments": 1}


def test_an_absurd_figure_does_not_break_the_record() -> None:
    meter = inspected(Route.CHAT, b'data: {"usage":{"prompt_tokens":%d,"completion_tokens":1}}\n\n' % 10**30)
    msgspec.json.encode(meter.usage)


@pytest.mark.parametrize("route", ROUTES)
def test_nesting_at_the_limit_of_recursion(route: Route) -> None:
    for depth in range(900, 1001):
        nested = b"[" * depth + b"]" * depth
        inspected(route, b'data: {"error":{"x":' + nested + b"}}\n\n")
        inspected(route, b'data: {"type":"message_start","message":{"x":' + nested + b"}}\n\n")
        Meter(route).take_body(b'{"x":' + nested + b"}")


PARTS = st.sampled_from(
    [
        b"data:", b"event:", b"id:", b"error:", b":", b" ", b"\n", b"\r\n", b"\r", b"\n\n", b"{", b"}", b"[", b"]",
        b'"choices":[', b'{"delta":{"content":"x"}}', b'"usage":', b'"type":"message_start"', b'"error":', b"null",
        b",", b"[DONE]", b'"message":', b'{"message":5}', b"\xff", b'"delta":', b'"response":',
        b'"type":"response.completed"',
        b"5",
    ]
)  # fmt: skip


@pytest.mark.parametrize("route", ROUTES)
@given(parts=st.lists(PARTS | st.binary(max_size=12), max_size=16))
def test_nothing_raises(route: Route, parts: list[bytes]) -> None:
    meter = Meter(route)
    frame = b"".join(parts)
    meter.inspect(frame)
    meter.inspect(b"data: {" + frame + b"}\n\n")
    meter.take_body(frame)
    meter.take_body(b"{" + frame + b"}")
    repr(meter)


@pytest.mark.parametrize(
    ("body", "error"),
    [
        (b'{"error":{"message":"Field required","type":"BadRequestError","param":null,"code":400}}', "Field required"),
        (b'{"object":"error","message":"too long","type":"BadRequestError","code":400}', "too long"),  # SGLang
        (b'{"type":"error","error":{"type":"invalid_request_error","message":"no"}}', "no"),
        (b'{"error":"said plainly"}', '"said plainly"'),
        (b'{"id":"resp_1","object":"response","status":"completed","error":null}', None),
    ],
)
def test_the_error_of_a_whole_answer(body: bytes, error: str | None) -> None:
    meter = Meter(Route.CHAT)
    meter.take_body(body)
    assert meter.error == error


@pytest.mark.parametrize(
    ("body", "error"),
    [
        (b'{"error":{"message":"Field required"}}', "Field required"),
        (b'{"detail":"Not Found"}', '{"detail":"Not Found"}'),  # FastAPI
        (b"<html>busy</html>", "<html>busy</html>"),
        (b"", None),
    ],
)
def test_what_is_refused_has_an_error_in_whatever_form(body: bytes, error: str | None) -> None:
    meter = Meter(Route.CHAT)
    meter.take_body(body, status=404)
    assert meter.error == error


def test_body_that_is_no_answer() -> None:
    for body in b"", b"[]", b"{", b"\xff", b'{"usage":5}', b'{"detail":"Not Found"}', b"null":
        meter = Meter(Route.CHAT)
        meter.take_body(body)
        assert findings(meter) == findings(Meter(Route.CHAT))


# -- the relay's own errors

MESSAGE = 'engine "x" broke\r\nand\n\nmore \u2028 \u00e9'


@pytest.mark.parametrize("status", [400, 401, 404, 408, 413, 417, 429, 431, 500, 502, 503, 504])
@pytest.mark.parametrize("route", ROUTES)
def test_error_body(route: Route, status: int) -> None:
    body = json.loads(error_body(route, status, "some_code", MESSAGE))
    if route is Route.MESSAGES:
        assert body["type"] == "error"
        assert body["error"].keys() >= {"type", "message"}
    else:
        assert body.keys() == {"error"}
        assert body["error"].keys() == {"message", "type", "param", "code"}
        assert body["error"]["param"] is None
        assert body["error"]["code"] == "some_code"
    assert body["error"]["message"] == MESSAGE
    assert isinstance(body["error"]["type"], str)


@pytest.mark.parametrize(
    ("route", "status", "kind"),
    [
        (Route.CHAT, 400, "invalid_request_error"), (Route.CHAT, 429, "rate_limit_error"),
        (Route.CHAT, 502, "server_error"), (Route.OTHER, 431, "invalid_request_error"),
        (Route.MESSAGES, 401, "authentication_error"), (Route.MESSAGES, 413, "request_too_large"),
        (Route.MESSAGES, 502, "api_error"), (Route.MESSAGES, 503, "overloaded_error"),
        (Route.MESSAGES, 504, "timeout_error"),
    ],
)  # fmt: skip
def test_error_types(route: Route, status: int, kind: str) -> None:
    assert json.loads(error_body(route, status, "c", "m"))["error"]["type"] == kind


def openai_raises(event: str, data: dict[str, Any]) -> bool:
    """The rule of `openai._streaming.Stream.__stream__`, in 1.x and 3.x."""
    return bool(data.get("error"))


def anthropic_raises(event: str, data: dict[str, Any]) -> bool:
    """The rule of `anthropic._streaming.Stream.__stream__`: the event's name, whatever the data."""
    return event == "error"


@pytest.mark.parametrize("route", ROUTES)
def test_error_frame_is_one_frame_that_the_sdk_raises_on(route: Route) -> None:
    frame = error_frame(route, 502, "upstream_disconnected", MESSAGE)
    assert frame.endswith(b"\n\n")
    assert frame.count(b"\n\n") == 1
    assert b"\r" not in frame
    fields = dict(line.split(": ", 1) for line in frame.decode().removesuffix("\n\n").split("\n"))
    data = json.loads(fields["data"])
    event = fields.get("event", "")
    if route is Route.MESSAGES:
        assert anthropic_raises(event, data)
        assert data["type"] == "error"
    else:
        assert openai_raises(event, data)
    if route is Route.RESPONSES:
        assert (event, data["type"]) == ("error", "error")
    assert data["error"]["message"] == MESSAGE


@pytest.mark.parametrize("route", ROUTES)
def test_the_relay_understands_its_own_error_frame(route: Route) -> None:
    meter = inspected(route, error_frame(route, 502, "upstream_disconnected", "engine broke"))
    assert meter.error == "engine broke"
    assert not meter.saw_end


OWN_ERROR = b'{"message":"too \\u006cong","type":"BadRequestError","param":null,"code":400}'


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("answer", [b'{"error":%b}', b'{"object":"error",\r\n "error" :\n%b}\n'])
def test_an_engines_error_object_goes_into_the_frame_as_it_is(route: Route, answer: bytes) -> None:
    frame = refusal_frame(route, 400, "upstream_error", "the engine answered 400", answer % OWN_ERROR)
    event, data = [b"", *frame.removesuffix(b"\n\n").split(b"\n")][-2:]
    assert (event == b"event: error") == (route in (Route.MESSAGES, Route.RESPONSES))
    assert b'"error":%b' % OWN_ERROR in data
    assert json.loads(data.removeprefix(b"data: "))["error"]["message"] == "too long"
    assert inspected(route, frame).error == "too long"


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (b'{"object":"error","message":"too long","code":400}', ": too long"),
        (b'{"error":"too long"}', ': {"error":"too long"}'),
        (b'{"error":null,"message":"too long"}', ": too long"),
        (b'{"detail":"Not Found"}', ': {"detail":"Not Found"}'),
        (b"[1]", ": [1]"),
        (b"<html>\xff", ": <html>\N{REPLACEMENT CHARACTER}"),
        (b'{"error":{"message":', ': {"error":{"message":'),
        (b"", ""),
    ],
)
def test_other_answers_are_quoted_in_a_frame_of_the_relays_own(route: Route, answer: bytes, said: str) -> None:
    message = "the engine answered 400"
    frame = refusal_frame(route, 400, "upstream_error", message, answer)
    assert frame == error_frame(route, 400, "upstream_error", message + said)
    assert frame.count(b"\n\n") == 1
