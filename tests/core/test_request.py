"""Peeking at request bodies: facts where they are, and never a judgement."""

from __future__ import annotations

import json

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.core.request import MAX_MODEL_CHARACTERS, RequestFacts, Route, may_stream, peek, route_of


@pytest.mark.parametrize(
    ("target", "route"),
    [
        (b"/v1/chat/completions", Route.CHAT),
        (b"/v1/chat/completions?api-version=1", Route.CHAT),
        (b"/v1/completions", Route.COMPLETIONS),
        (b"/v1/completions?", Route.COMPLETIONS),
        (b"/v1/responses", Route.RESPONSES),
        (b"/v1/messages", Route.MESSAGES),
        (b"/v1/messages?beta=true", Route.MESSAGES),
        (b"/v1/messages/count_tokens", Route.OTHER),
        (b"/v1/responses/resp_1", Route.OTHER),
        (b"/v1/chat/completions/", Route.OTHER),
        (b"//v1/chat/completions", Route.OTHER),
        (b"/V1/chat/completions", Route.OTHER),
        (b"/v1/chat%2Fcompletions", Route.CHAT),  # engines read escapes before they look where a path leads
        (b"/v1/chat/completion%73?a=%2F", Route.CHAT),
        (b"/v1/chat/completions%0a", Route.CHAT),  # Starlette's patterns end before a last line break, too
        (b"/v1/chat/completions%0A%0A", Route.OTHER),
        (b"/v1/chat/completions%3F", Route.OTHER),
        (b"/v1/chat/completions%", Route.OTHER),
        (b"/v1/embeddings?x=/v1/completions", Route.OTHER),
        (b"/", Route.OTHER),
        (b"*", Route.OTHER),
        (b"", Route.OTHER),
    ],
)
def test_route(target: bytes, route: Route) -> None:
    assert route_of(target) is route
    assert may_stream(route) == (route is not Route.OTHER)


def facts(body: bytes, **known: object) -> RequestFacts:
    return msgspec.structs.replace(RequestFacts(is_json=True), **known)


@pytest.mark.parametrize(
    ("body", "known"),
    [
        (b"{}", {}),
        (b' \r\n\t{"model" : "m"} ', {"model": "m"}),
        (b'{"model":"m","stream":true,"messages":[{"role":"user","content":"{\\"model\\":\\"x\\"}"}]}',
         {"model": "m", "wants_stream": True}),
        (b'{"messages":[{"model":"inner","stream":true}],"model":"m"}', {"model": "m"}),
        (b'{"stream":false,"stream_options":null,"n":null,"user":null,"model":null}', {}),
        (b'{"stream":true,"stream_options":{"include_usage":true,"continuous_usage_stats":true}}',
         {"wants_stream": True, "include_usage": True}),
        (b'{"stream_options":{}}', {}),
        (b'{"stream_options":{"include_usage":false}}', {}),
        (b'{"n":2,"user":"u","max_tokens":7}', {"n": 2, "user": "u", "max_tokens": 7}),
        (b'{"max_tokens":7,"max_completion_tokens":8}', {"max_tokens": 8}),
        (b'{"max_output_tokens":9}', {"max_tokens": 9}),
        (b'{"max_tokens":0}', {"max_tokens": 0}),
        (b'{"model":"a","model":"b"}', {"model": "b"}),  # as Python's parser
        (b'{"model":"\\u00e9\\ud83d\\ude00"}', {"model": "é😀"}),
        ('{"model":"é😀"}'.encode(), {"model": "é😀"}),
        (b'{"is_json":false,"size":1,"wants_stream":true}', {}),  # names of ours mean nothing in a body
        # of another type: absent, and the others are found all the same
        (b'{"model":1,"stream":true}', {"wants_stream": True}),
        (b'{"model":["m"],"user":"u"}', {"user": "u"}),
        (b'{"model":"%b","stream":true}' % (b"m" * MAX_MODEL_CHARACTERS),
         {"model": "m" * MAX_MODEL_CHARACTERS, "wants_stream": True}),
        (b'{"model":"%b","stream":true}' % (b"m" * (MAX_MODEL_CHARACTERS + 1)), {"wants_stream": True}),
        (b'{"model":"m","n":"2","stream":true}', {"model": "m", "wants_stream": True}),
        (b'{"n":1.5,"model":"m"}', {"model": "m"}),
        (b'{"n":1e999,"model":"m"}', {"model": "m"}),
        (b'{"n":1267650600228229401496703205376,"model":"m"}', {"model": "m", "n": 2**100}),
        (b'{"n":true,"user":{},"max_tokens":"7","model":"m"}', {"model": "m"}),
        (b'{"stream_options":[],"model":"m"}', {"model": "m"}),
        (b'{"stream_options":"x","model":"m","stream":true}', {"model": "m", "wants_stream": True}),
        (b'{"max_completion_tokens":"x","max_tokens":7}', {"max_tokens": 7}),
        # true as pydantic's lax mode has it
        (b'{"stream":1}', {"wants_stream": True}),
        (b'{"stream":1.0}', {"wants_stream": True}),
        (b'{"stream":"true"}', {"wants_stream": True}),
        (b'{"stream":"Yes"}', {"wants_stream": True}),
        (b'{"stream":0}', {}),
        (b'{"stream":2}', {}),
        (b'{"stream":"false"}', {}),
        (b'{"stream":[true]}', {}),
        (b'{"stream":true,"stream_options":{"include_usage":1}}', {"wants_stream": True, "include_usage": True}),
        # JSON, but not an object
        (b"[]", {}),
        (b'[{"model":"m"}]', {}),
        (b'"model"', {}),
        (b"null", {}),
        (b"1", {}),
    ],
)  # fmt: skip
def test_facts(body: bytes, known: dict[str, object]) -> None:
    assert peek(body) == facts(body, **known)
    assert peek(bytearray(body)) == facts(body, **known)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b'{"model":"m"',
        b'{"model":"m"} x',
        b'{"model":1} x',
        b'{"n":"2","messages":[}',
        b"[1,",
        b"model=m",
        b"\xff\xfe",
        b'{"model":"\xff"}',
        b'{"model":"\xff","n":"2"}',
        b'\xef\xbb\xbf{"model":"m"}',
        '{"model":"m"}'.encode("utf-16"),
        b'{"temperature":NaN}',
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"n":"2","a":' + b"[" * 100_000,
    ],
    ids=lambda body: repr(body[:30]),
)
def test_what_is_not_json(body: bytes) -> None:
    assert peek(body) == RequestFacts(is_json=False)


def test_deep_but_closed_nesting_is_no_crash() -> None:
    body = b'{"model":"m","a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    assert peek(body) == RequestFacts(is_json=False)


TEXT = st.text('aé😀"\\\n\0', max_size=5)
SCALARS = (
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False) | TEXT
)
JSON = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3))
KEYS = ["model", "stream", "stream_options", "n", "user", "max_tokens", "max_completion_tokens", "other"]


@given(st.dictionaries(st.sampled_from(KEYS), JSON), st.booleans())
def test_any_object_is_read_as_its_keys_say(body: dict[str, object], ascii_only: bool) -> None:
    found = peek(json.dumps(body, ensure_ascii=ascii_only, allow_nan=False).encode("utf-8", "surrogatepass"))
    assert found.is_json
    model, user, stream = body.get("model"), body.get("user"), body.get("stream")
    assert found.model == (model if isinstance(model, str) else None)
    assert found.user == (user if isinstance(user, str) else None)
    if isinstance(stream, bool | None):
        assert found.wants_stream is bool(stream)


@given(st.binary(max_size=80) | st.text(max_size=80).map(str.encode))
def test_never_raises(body: bytes) -> None:
    assert isinstance(peek(body), RequestFacts)
    peek(b'{"n":"x","model":' + body + b"}")
    peek(b'{"stream_options":{"include_usage":' + body + b"}}")
