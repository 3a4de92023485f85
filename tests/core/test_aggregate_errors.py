"""Errors inside a stream: the status and the body that a client who has not asked for a stream is owed."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import event, given
from hypothesis import strategies as st

from relay.core.aggregate import AggregateError, EngineError
from relay.core.request import Route
from tests.core.captured import CAPTURES, frames_of, stream
from tests.core.test_aggregate import aggregate


def error_of(route: Route, *frames: bytes) -> EngineError:
    with pytest.raises(EngineError) as caught:
        aggregate(route, frames)
    return caught.value


@pytest.mark.parametrize(
    ("name", "status"),
    [("err_bad_schema.stream", 400), ("fail/engine_killed_stream", 500), ("fail/sigterm_stream", 500)],
)
def test_recorded_errors(name: str, status: int) -> None:
    answer = stream(name)
    error = error_of(answer.route, *frames_of(answer.body))
    assert error.status == status
    told = json.loads(next(line[6:] for line in answer.body.split(b"\n") if line.startswith(b'data: {"error"')))
    assert json.loads(error.body) == told
    assert error.message == told["error"]["message"]


def test_the_body_is_what_the_engine_says_without_a_stream() -> None:
    """The same failure, recorded both ways: equal to the byte."""
    raw = (CAPTURES / "fail" / "engine_killed_nonstream.response.raw").read_bytes()
    head, _, body = raw.partition(b"\r\n\r\n")
    error = error_of(Route.CHAT, *frames_of(stream("fail/engine_killed_stream").body))
    assert error.body == body
    assert head.split()[1] == b"%d" % error.status


@pytest.mark.parametrize(
    ("error", "status"),
    [
        ({"code": 400}, 400),
        ({"code": 503, "type": "BadRequestError"}, 503),
        ({"code": "429"}, 429),
        ({"code": 200, "type": "BadRequestError"}, 400),
        ({"code": 1002}, 500),
        ({"code": None, "type": "NotFoundError"}, 404),
        ({"type": "Bad Request Error"}, 400),
        ({"type": "invalid_request_error"}, 400),
        ({"type": "overloaded_error"}, 529),
        ({"type": "server_error", "code": "rate_limit_exceeded"}, 429),
        ({"type": "internal_error"}, 500),
        ({"type": 5}, 500),
        ({"code": True}, 500),
    ],
)
def test_the_status_of_an_error(error: dict[str, Any], status: int) -> None:
    data = json.dumps({"error": {"message": "m", **error}}).encode()
    assert error_of(Route.CHAT, b"data: %b\n\n" % data).status == status
    assert error_of(Route.MESSAGES, b"event: error\ndata: %b\n\n" % data).status == status


@pytest.mark.parametrize(
    ("route", "frame", "status", "body"),
    [
        # SGLang: nested in the stream, flat without
        (Route.CHAT, b'data: {"error": {"object": "error", "message": "m", "type": "x", "code": 400}}\n\n', 400,
         {"object": "error", "message": "m", "type": "x", "code": 400}),
        (Route.COMPLETIONS, b'data: {"object":"error","message":"m","code":404}\n\n', 404,
         {"object": "error", "message": "m", "code": 404}),
        # llama.cpp before September 2025
        (Route.CHAT, b'error: {"code":503,"message":"m","type":"unavailable_error"}\n\n', 503,
         {"error": {"code": 503, "message": "m", "type": "unavailable_error"}}),
        # an error that is a string
        (Route.CHAT, b'data: {"error":"m","code":422}\n\n', 422,
         {"error": {"message": "m", "type": "invalid_request_error", "param": None, "code": "upstream_error"}}),
        (Route.CHAT, b'event: error\ndata: {"message":"m"}\n\n', 500, {"error": {"message": "m"}}),
        # Responses: flat, by OpenAI; nested, by the SDK's other form
        (Route.RESPONSES, b'event: error\ndata: {"type":"error","code":"server_error","message":"m"}\n\n', 500,
         {"error": {"message": "m", "type": "server_error", "param": None, "code": "server_error"}}),
        (Route.RESPONSES, b'data: {"error":{"message":"m","code":400},"type":"error"}\n\n', 400,
         {"error": {"message": "m", "code": 400}}),
        # Messages: Anthropic's own, and another API's
        (Route.MESSAGES, b'event: error\ndata: {"type":"error","error":{"type":"api_error","message":"m"}}\n\n', 500,
         {"type": "error", "error": {"type": "api_error", "message": "m"}}),
        (Route.MESSAGES, b'data: {"error":{"message":"m","type":"BadRequestError","param":null,"code":400}}\n\n', 400,
         {"type": "error", "error": {"type": "invalid_request_error", "message": "m"}}),
    ],
)  # fmt: skip
def test_the_body_of_an_error(route: Route, frame: bytes, status: int, body: Any) -> None:
    error = error_of(route, frame)
    assert error.status == status
    assert error.message == "m"
    assert json.loads(error.body) == body


@pytest.mark.parametrize("route", [route for route in Route if route is not Route.OTHER])
@pytest.mark.parametrize(
    "frame",
    [b"data: oops\n\n", b"data: [1]\n\n", b'data: {"a":\n\n', b"data: \xff\n\n", b"event: error\ndata: oops\n\n",
     b"event: error\ndata: [1]\n\n", b'data: {"a":' + b"[" * 100_000 + b"\n\n"],
    ids=lambda frame: repr(frame[:30]),
)  # fmt: skip
def test_what_cannot_be_read_is_a_bad_gateway(route: Route, frame: bytes) -> None:
    error = error_of(route, frame)
    assert error.status == 502
    assert json.loads(error.body)["error"]["message"] == error.message
    assert len(error.body) < 1000


@pytest.mark.parametrize("choices", ["x", [1], [{"index": 0, "delta": {"tool_calls": [1]}}]])
def test_choices_of_another_shape(choices: Any) -> None:
    frames = [b'data: {"choices":%b}\n\n' % json.dumps(choices).encode(), b"data: [DONE]\n\n"]
    with pytest.raises(AggregateError):
        aggregate(Route.CHAT, frames)


def test_what_is_no_error() -> None:
    empty = b'"error":null,"choices":[{"index":0,"delta":{"content":"{\\"error\\":1}"},"finish_reason":"stop"}]'
    for nothing in (b"null", b"{}", b'""', b"false"):
        frame = b"data: {%b}\n\n" % empty.replace(b"null", nothing, 1)
        assert aggregate(Route.CHAT, [frame, b"data: [DONE]\n\n"])["choices"][0]["finish_reason"] == "stop"


MEMBERS = ["choices", "index", "delta", "finish_reason", "error", "type", "message", "response", "content_block",
           "usage", "code", "object", "tool_calls", "function", "content", "logprobs"]  # fmt: skip
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-1, 500)
    | st.sampled_from(["error", "message_start", "message_stop", "response.completed", ""]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(MEMBERS), inner, max_size=4),
)
EVENTS = st.dictionaries(st.sampled_from(MEMBERS), VALUES, max_size=4)


@given(
    st.sampled_from([route for route in Route if route is not Route.OTHER]),
    st.lists(
        EVENTS.map(lambda members: b"data: %b\n\n" % json.dumps(members).encode()) | st.binary(max_size=20), max_size=4
    ),
)
def test_any_stream_makes_json_or_one_of_our_errors(route: Route, frames: list[bytes]) -> None:
    try:
        made = aggregate(route, [*frames, b"data: [DONE]\n\n"])
    except EngineError as error:
        made = json.loads(error.body)
        event(f"status {error.status}")
    except AggregateError as error:
        event(type(error).__name__)
        return
    assert isinstance(made, dict)
