"""Which requests become other requests."""

from __future__ import annotations

import json
from typing import Any

import pytest

from relay.core.conversion import Conversion, convert
from relay.core.request import Route, peek

GENERATING = (Route.CHAT, Route.COMPLETIONS, Route.RESPONSES, Route.MESSAGES)


def converted(route: Route, body: bytes, *, force_stream: bool = True, ask_usage: bool = True) -> Conversion:
    return convert(route, peek(body), body, force_stream=force_stream, ask_usage=ask_usage)


@pytest.mark.parametrize("route", GENERATING)
@pytest.mark.parametrize("body", [b'{"model":"m"}', b'{"stream":false, "n" : 2}', b'{"stream":null}', b"{}"])
def test_who_did_not_ask_for_a_stream_gets_one_made_into_a_body(route: Route, body: bytes) -> None:
    found = converted(route, body)
    assert (found.is_forced, found.hides_usage) == (True, False)
    expected = {**json.loads(body), "stream": True}
    if route in (Route.CHAT, Route.COMPLETIONS):
        expected["stream_options"] = {"include_usage": True}
    assert json.loads(found.body) == expected
    assert converted(route, body, force_stream=False) == Conversion(body)


@pytest.mark.parametrize(
    ("route", "members"),
    [
        *((route, {"prompt_logprobs": value}) for route in GENERATING for value in (0, 1, -1)),
        (Route.COMPLETIONS, {"echo": True, "logprobs": 0}),
        (Route.COMPLETIONS, {"echo": "true", "logprobs": 5}),
        (Route.COMPLETIONS, {"use_beam_search": True}),
        (Route.RESPONSES, {"background": True}),
        (Route.CHAT, {"kv_transfer_params": {"do_remote_decode": True}}),
        (Route.CHAT, {"stream_options": {"include_usage": True}}),  # refused without `stream`, by vLLM and OpenAI
    ],
)
def test_what_no_stream_can_answer_stays(route: Route, members: dict[str, Any]) -> None:
    body = json.dumps({"model": "m", **members}).encode()
    assert converted(route, body) == Conversion(body)
    off = json.dumps({"model": "m", **dict.fromkeys(members)}).encode()
    assert converted(route, off).is_forced


@pytest.mark.parametrize(
    ("route", "members"),
    [
        (Route.COMPLETIONS, {"echo": True}),
        (Route.COMPLETIONS, {"echo": False, "logprobs": 1}),
        (Route.CHAT, {"logprobs": True, "top_logprobs": 2, "echo": True}),
        (Route.RESPONSES, {"background": False}),
        (Route.COMPLETIONS, {"use_beam_search": False, "prompt_logprobs": None}),
    ],
)
def test_what_a_stream_can_answer_does_not(route: Route, members: dict[str, Any]) -> None:
    assert converted(route, json.dumps(members).encode()).is_forced


@pytest.mark.parametrize("body", [b"", b"[]", b"3", b"not json", b'{"stream":', b'\xff{"a":1}', b'"text"'])
@pytest.mark.parametrize("route", GENERATING)
def test_what_is_no_request_stays(route: Route, body: bytes) -> None:
    assert converted(route, body) == Conversion(body, is_unread=True)


def test_other_routes_stay() -> None:
    assert converted(Route.OTHER, b'{"input":"a"}') == Conversion(b'{"input":"a"}')


def test_an_object_of_too_many_members_stays() -> None:
    body = json.dumps(dict.fromkeys(map(str, range(5000)))).encode()
    assert converted(Route.CHAT, body) == Conversion(body, is_unread=True)


@pytest.mark.parametrize("route", [Route.CHAT, Route.COMPLETIONS])
def test_a_stream_is_asked_for_its_usage(route: Route) -> None:
    body = b'{"stream": true , "n":1e0}'
    asked = b'{"stream": true , "n":1e0,"stream_options":{"include_usage":true}}'
    assert converted(route, body) == Conversion(asked, hides_usage=True)
    assert converted(route, body, ask_usage=False) == Conversion(body)


def test_a_client_that_asked_keeps_its_request() -> None:
    body = b'{"stream":true,"stream_options":{"include_usage":true,"continuous_usage_stats":true}}'
    assert converted(Route.CHAT, body) == Conversion(body)


def test_continuous_usage_that_meant_nothing_goes_on_meaning_nothing() -> None:
    body = b'{"stream":true,"stream_options":{"continuous_usage_stats":true,"include_usage":false}}'
    asked = b'{"stream":true,"stream_options":{"include_usage":true}}'
    assert converted(Route.CHAT, body) == Conversion(asked, hides_usage=True)


@pytest.mark.parametrize("route", [Route.RESPONSES, Route.MESSAGES])
def test_dialects_that_always_tell_are_not_asked(route: Route) -> None:
    assert converted(route, b'{"stream":true}') == Conversion(b'{"stream":true}')
