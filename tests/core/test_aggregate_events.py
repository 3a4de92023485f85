"""Messages and responses: streams of typed events."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.core.aggregate import EngineError, aggregator_for
from relay.core.aggregate.parts import MOST_OBJECTS
from relay.core.request import Route
from tests.core.test_aggregate import aggregate


def sent(*events: dict[str, Any]) -> list[bytes]:
    return [b"event: %b\ndata: %b\n\n" % (event["type"].encode(), json.dumps(event).encode()) for event in events]


START: dict[str, Any] = {
    "type": "message_start",
    "message": {
        "id": "msg_1", "type": "message", "role": "assistant", "content": [], "model": "m", "stop_reason": None,
        "stop_sequence": None, "usage": {"input_tokens": 9, "cache_read_input_tokens": 4, "output_tokens": 1},
    },
}  # fmt: skip
END: list[dict[str, Any]] = [
    {
        "type": "message_delta",
        "delta": {"stop_reason": "end_turn", "stop_sequence": None},
        "usage": {"output_tokens": 15, "input_tokens": None},
    },
    {"type": "message_stop"},
]


def block(index: int, first: dict[str, Any], *deltas: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {"type": "content_block_start", "index": index, "content_block": first},
        *({"type": "content_block_delta", "index": index, "delta": delta} for delta in deltas),
        {"type": "content_block_stop", "index": index},
    ]


def content_of(*events: dict[str, Any]) -> Any:
    return aggregate(Route.MESSAGES, sent(START, *events, *END))["content"]


def json_delta(text: str) -> dict[str, Any]:
    return {"type": "input_json_delta", "partial_json": text}


TOOL = {"type": "tool_use", "id": "t1", "name": "f", "input": {}}


def test_blocks_have_a_limit() -> None:
    """Empty ones have no text that counts."""
    aggregator = aggregator_for(Route.MESSAGES, max_bytes=1 << 30, request=b"{}")
    begin = {"type": "content_block_start", "content_block": {}}
    for index in (*range(MOST_OBJECTS), 0):
        aggregator.feed(sent({**begin, "index": index})[0])
    with pytest.raises(EngineError):
        aggregator.feed(sent({**begin, "index": -1})[0])


def test_a_message_with_its_usage() -> None:
    events = sent(
        START, {"type": "ping"}, *block(0, {"type": "text", "text": ""}, {"type": "text_delta", "text": "a"}), *END
    )
    assert aggregate(Route.MESSAGES, events) == {
        "id": "msg_1", "type": "message", "role": "assistant", "model": "m",
        "content": [{"type": "text", "text": "a"}], "stop_reason": "end_turn", "stop_sequence": None,
        "usage": {"input_tokens": 9, "cache_read_input_tokens": 4, "output_tokens": 15},
    }  # fmt: skip


def test_what_a_message_delta_brings_is_kept() -> None:
    end = {
        "type": "message_delta",
        "delta": {"stop_reason": "tool_use", "container": {"id": "c"}},
        "usage": {"output_tokens": 2, "server_tool_use": {"web_search_requests": 1}},
        "context_management": {"x": 1},
    }
    body = aggregate(Route.MESSAGES, sent(START, end, END[1]))
    assert body["container"] == {"id": "c"}
    assert body["context_management"] == {"x": 1}
    assert body["usage"]["server_tool_use"] == {"web_search_requests": 1}
    assert "delta" not in body
    assert body["type"] == "message"


@pytest.mark.parametrize(
    ("events", "content"),
    [
        (block(0, {"type": "text", "text": "a"}, {"type": "text_delta", "text": "é"}, {"type": "text_delta"}),
         [{"type": "text", "text": "aé"}]),
        (block(0, {"type": "thinking", "thinking": "", "signature": ""}, {"type": "thinking_delta", "thinking": "x"},
               {"type": "thinking_delta", "thinking": "y"}, {"type": "signature_delta", "signature": "s"}),
         [{"type": "thinking", "thinking": "xy", "signature": "s"}]),
        (block(0, TOOL, json_delta(""), json_delta('{"a": "\\"'), json_delta('\\u00e9"}')),
         [{**TOOL, "input": {"a": '"é'}}]),
        (block(0, TOOL), [TOOL]),
        (block(0, TOOL, json_delta("")), [TOOL]),
        (block(0, TOOL, json_delta('{"a": ')), [TOOL]),  # cut by max_tokens
        (block(0, {"type": "text", "text": "", "citations": []}, {"type": "text_delta", "text": "a"},
               {"type": "citations_delta", "citation": {"n": 1}}, {"type": "citations_delta", "citation": {"n": 2}}),
         [{"type": "text", "text": "a", "citations": [{"n": 1}, {"n": 2}]}]),
        (block(0, {"type": "redacted_thinking", "data": "x"}), [{"type": "redacted_thinking", "data": "x"}]),
        (block(0, {"type": "new", "k": 1}, {"type": "new_delta", "k": 2}), [{"type": "new", "k": 2}]),
        ([], [{"type": "text", "text": ""}]),  # as vLLM has it
        (block(1, {"type": "text", "text": "b"}) + block(0, {"type": "text", "text": "a"})
         + block(10, {"type": "text", "text": "c"}),
         [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}, {"type": "text", "text": "c"}]),
    ],
)  # fmt: skip
def test_blocks(events: list[dict[str, Any]], content: list[Any]) -> None:
    assert content_of(*events) == content


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text('aé😀"\\\n', max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab", max_size=2), inner, max_size=3),
)


@given(st.dictionaries(st.text('ab"é', max_size=2), JSON, max_size=3), st.integers(1, 5), st.booleans())
def test_input_in_any_pieces(value: dict[str, Any], size: int, ascii_only: bool) -> None:
    text = json.dumps(value, ensure_ascii=ascii_only)
    pieces = [json_delta(text[start : start + size]) for start in range(0, len(text), size)]
    assert content_of(*block(0, TOOL, *pieces)) == [{**TOOL, "input": value}]


@pytest.mark.parametrize(
    "event",
    [
        {"type": "message_start"},
        {"type": "content_block_start", "index": 0},
        {"type": "content_block_start", "content_block": {}},
        {"type": "content_block_delta", "index": 0},
        {"type": "content_block_delta", "index": "x", "delta": {}},
        {"type": "content_block_delta", "index": 0, "delta": None},
        {"type": "message_delta"},
    ],
)
def test_events_that_lack_what_they_are_for(event: dict[str, Any]) -> None:
    with pytest.raises(EngineError) as caught:
        aggregate(Route.MESSAGES, sent(event))
    assert caught.value.status == 502


# -- responses


@pytest.mark.parametrize("kind", ["response.completed", "response.incomplete", "response.failed"])
def test_the_last_event_brings_the_response(kind: str) -> None:
    created = {"type": "response.created", "response": {"id": "r", "status": "in_progress"}}
    delta = {"type": "response.output_text.delta", "delta": "a"}
    last = {"id": "r", "status": kind.removeprefix("response."), "error": None, "new": [1.5]}
    assert aggregate(Route.RESPONSES, sent(created, delta, {"type": kind, "response": last})) == last
    assert aggregate(Route.RESPONSES, [*sent({"type": kind, "response": last}), b"data: [DONE]\n\n"]) == last


def test_a_response_is_the_engines_to_the_byte() -> None:
    aggregator = aggregator_for(Route.RESPONSES, max_bytes=100)
    aggregator.feed(b'data: {"response": {"a": 1.0e5, "b": "\\u00e9"}, "type": "response.completed"}\n\n')
    assert aggregator.result() == b'{"a": 1.0e5, "b": "\\u00e9"}'


def test_vllm_leaves_nulls_out_of_its_messages_as_others_do_not() -> None:
    """``exclude_none`` for bodies, ``exclude_unset`` for streams, in its ``entrypoints/anthropic``."""
    for id_, has_nulls in (("chatcmpl-1", False), ("msg_1", True)):
        message: dict[str, Any] = {
            "id": id_,
            "type": "message",
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
        }
        made = aggregate(
            Route.MESSAGES,
            [
                b"data: " + json.dumps(event).encode() + b"\n\n"
                for event in (
                    {"type": "message_start", "message": message},
                    {"type": "message_delta", "delta": {"stop_reason": "end_turn", "stop_sequence": None}},
                    {"type": "message_stop"},
                )
            ],
        )
        assert made["stop_reason"] == "end_turn"
        assert ("stop_sequence" in made) is has_nulls
