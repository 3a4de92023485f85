"""Chat and completions: every field of an answer, in any pieces, from engines other than the recorded one too."""

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


def sent(*chunks: Any) -> list[bytes]:
    """Chunks as a stream that has ended."""
    return [*(b"data: %b\n\n" % json.dumps(chunk).encode() for chunk in chunks), b"data: [DONE]\n\n"]


def deltas(*pieces: dict[str, Any], **members: Any) -> list[bytes]:
    """A stream of one choice."""
    chunks = [{"choices": [{"index": 0, "delta": piece}]} for piece in pieces]
    return sent(*chunks, {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop", **members}]})


def message_of(*pieces: dict[str, Any]) -> Any:
    return aggregate(Route.CHAT, deltas(*pieces))["choices"][0]["message"]


# -- fields of chat


@pytest.mark.parametrize(
    ("pieces", "message"),
    [
        ([{"content": "a"}], {"role": "assistant", "content": "a"}),
        ([{"role": "tool"}, {"role": "x", "content": "a"}], {"role": "tool", "content": "a"}),
        ([{"role": "assistant"}], {"role": "assistant", "content": None}),
        ([{"content": None}, {"content": None}], {"role": "assistant", "content": None}),
        ([{"role": "assistant", "content": ""}], {"role": "assistant", "content": ""}),
        ([{"content": ""}, {"content": "a"}, {"content": None}, {"content": "é\n\"\\"}],
         {"role": "assistant", "content": "aé\n\"\\"}),
        ([{"content": ""}, {"reasoning": "a"}, {"reasoning": "b"}],
         {"role": "assistant", "content": None, "reasoning": "ab"}),
        ([{"reasoning_content": "a"}, {"reasoning_content": "b", "content": "c"}],
         {"role": "assistant", "content": "c", "reasoning_content": "ab"}),
        ([{"content": "", "reasoning_content": None}], {"role": "assistant", "content": "", "reasoning_content": None}),
        ([{"refusal": None, "content": ""}, {"refusal": "I "}, {"refusal": "can't"}],
         {"role": "assistant", "content": "", "refusal": "I can't"}),
        ([{"audio": {"id": "a1"}}, {"audio": {"transcript": "x"}}, {"audio": {"transcript": "y", "expires_at": 5}}],
         {"role": "assistant", "content": None, "audio": {"id": "a1", "transcript": "xy", "expires_at": 5}}),
        ([{"annotations": [{"a": 1}]}, {"annotations": []}, {"annotations": [{"b": 2}, {"c": 3}]}],
         {"role": "assistant", "content": None, "annotations": [{"a": 1}, {"b": 2}, {"c": 3}]}),
        ([{"annotations": []}], {"role": "assistant", "content": None, "annotations": []}),
        ([{"function_call": {"name": "f", "arguments": ""}}, {"function_call": {"arguments": "{"}},
          {"function_call": {"name": "f", "arguments": "}"}}],
         {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}}),
        ([{"new": 1}, {"new": None}, {"new": 2, "newer": {"a": 1}}, {"newer": {"b": 1}}],
         {"role": "assistant", "content": None, "new": 2, "newer": {"b": 1}}),
        ([{"content": [{"type": "text"}]}], {"role": "assistant", "content": [{"type": "text"}]}),
    ],
)  # fmt: skip
def test_a_message(pieces: list[dict[str, Any]], message: dict[str, Any]) -> None:
    assert message_of(*pieces) == message


def call(index: int | None = None, call_id: str | None = None, name: str | None = None, text: str | None = None) -> Any:
    """A piece of a tool call with the keys that have a value."""
    function = {key: value for key, value in (("name", name), ("arguments", text)) if value is not None}
    members = {"index": index, "id": call_id, "function": function or None}
    return {key: value for key, value in members.items() if value is not None}


def whole(call_id: str, name: str, text: str) -> Any:
    return {"id": call_id, "function": {"name": name, "arguments": text}}


@pytest.mark.parametrize(
    ("pieces", "calls"),
    [
        ([[call(0, "a", "f", "{}")]], [whole("a", "f", "{}")]),
        ([[call(0, "a", "f")], [call(0, text='{"x":')], [call(0, text='"\\u00e9é"}')]],
         [whole("a", "f", '{"x":"\\u00e9é"}')]),
        # in parallel, in pieces, mixed, and out of order
        ([[call(1, "b", "g")], [call(0, "a", "f", "1"), call(1, text="3")], [call(1, text="4"), call(0, text="2")]],
         [whole("a", "f", "12"), whole("b", "g", "34")]),
        ([[call(10, "k", "f", "")], [call(9, "j", "f", "")]], [whole("j", "f", ""), whole("k", "f", "")]),
        # ids and names that are repeated, or repeated as nothing
        ([[call(0, "a", "f")], [call(0, "a", "f", "1")], [call(0, "", "", "2")]], [whole("a", "f", "12")]),
        ([[call(0, "", "")], [call(0, "a", "f", "1")]], [whole("a", "f", "1")]),
        # without an index
        ([[call(None, "a", "f", "1"), call(None, "b", "g", "2")], [call(None, text="3")]],
         [whole("a", "f", "1"), whole("b", "g", "23")]),
        # no arguments at all
        ([[call(0, "a", "f")]], [whole("a", "f", "")]),
        ([[{"index": 0, "id": "a", "function": {"name": "f", "arguments": None}}]], [whole("a", "f", "")]),
    ],
)  # fmt: skip
def test_tool_calls(pieces: list[Any], calls: list[Any]) -> None:
    message = message_of(*({"tool_calls": piece} for piece in pieces))
    assert message == {"role": "assistant", "content": None, "tool_calls": calls}


@pytest.mark.parametrize("nothing", [{}, {"tool_calls": None}, {"tool_calls": []}])
def test_no_tool_calls_the_engine_did_not_send(nothing: dict[str, Any]) -> None:
    assert message_of({"content": "a"}, nothing) == {"role": "assistant", "content": "a", **nothing}


@pytest.mark.parametrize(
    ("choice", "vllm", "content"),
    [
        (b'"auto"', True, None),
        (b'"required"', True, ""),
        (b'{"type":"function","function":{"name":"f"}}', True, ""),
        (b"null", True, None),
        (b'"required"', False, None),
        (b"x", True, None),
    ],
)
def test_content_beside_calls_is_as_vllm_has_it(choice: bytes, vllm: bool, content: str | None) -> None:
    """vLLM's first delta has ``content: ""`` in each of these; its body only where a call was demanded."""
    frames = deltas({"role": "assistant", "content": ""}, {"tool_calls": [call(0, "a", "f", "{}")]})
    if vllm:
        frames[0] = frames[0].replace(b'{"choices"', b'{"prompt_token_ids":null,"choices"')
    request = b'{"tool_choice":%b}' % choice
    assert aggregate(Route.CHAT, frames, request=request)["choices"][0]["message"]["content"] == content


def test_members_of_answer_and_choice() -> None:
    choice = {"index": 0, "delta": {"content": "a"}, "logprobs": None, "finish_reason": None}
    first = {"id": "c1", "object": "chat.completion.chunk", "created": 1, "model": "m", "service_tier": None,
             "prompt_token_ids": [1, 2], "usage": None, "new": 1, "choices": [choice]}  # fmt: skip
    second = {**first, "id": "c2", "created": 2, "model": "n", "prompt_token_ids": None, "system_fingerprint": "a",
              "service_tier": "default", "new": 2}  # fmt: skip
    end = {"choices": [{"index": 0, "finish_reason": "stop", "stop_reason": 7, "matched_stop": 2, "weird": [1]}],
           "kv_transfer_params": {"a": 1}, "usage": {"prompt_tokens": 1}}  # fmt: skip
    usage = {"prompt_tokens": 2, "prompt_tokens_details": {"cached_tokens": 1}}
    after = {"choices": [], "usage": usage, "system_fingerprint": "b", "metrics": {"x": 1}}
    body = aggregate(Route.CHAT, sent(first, second, end, after))
    (choice,) = body.pop("choices")
    assert {key: value for key, value in body.items() if value is not None} == {
        "id": "c1",
        "object": "chat.completion",
        "created": 1,
        "model": "m",
        "service_tier": "default",
        "prompt_token_ids": [1, 2],
        "new": 2,
        "system_fingerprint": "b",
        "kv_transfer_params": {"a": 1},
        "metrics": {"x": 1},
        "usage": {**usage, "completion_tokens_details": None},
    }
    assert choice["message"]["content"] == "aa"
    assert (choice["stop_reason"], choice["matched_stop"], choice["weird"]) == (7, 2, [1])


def test_log_probabilities_and_token_ids_are_extended() -> None:
    def piece(token: str, **logprobs: Any) -> Any:
        return {"choices": [{"index": 0, "delta": {"content": token}, "logprobs": logprobs, "token_ids": [len(token)]}]}

    frames = sent(
        piece("a", content=[{"token": "a", "logprob": -1.5}], refusal=None),
        piece("bc", content=[{"token": "b"}, {"token": "c"}], refusal=[{"token": "r"}]),
        {"choices": [{"index": 0, "finish_reason": "stop", "logprobs": None, "token_ids": None}]},
    )
    (choice,) = aggregate(Route.CHAT, frames)["choices"]
    assert choice["logprobs"]["content"] == [{"token": "a", "logprob": -1.5}, {"token": "b"}, {"token": "c"}]
    assert choice["logprobs"]["refusal"] == [{"token": "r"}]
    assert choice["token_ids"] == [1, 2]


def test_lists_may_be_spaced() -> None:
    end = b',"delta":{},"finish_reason":"stop"}]}\n\n'
    frames = [b'data: {"choices":[{"index":0,"token_ids":%b%b' % (ids, end) for ids in (b"[ ]", b"[ 1 , 2 ]", b"[\t]")]
    frames += [frames[1], b"data: [DONE]\n\n"]
    assert aggregate(Route.CHAT, frames)["choices"][0]["token_ids"] == [1, 2, 1, 2]


def test_numbers_and_escapes_stay_as_they_were_written() -> None:
    frame = (
        b'data: {"created":12345678901234567890123,"choices":[{"index":0,"delta":{"content":"\\u00e9\\/"},'
        b'"logprobs":{"content":[{"logprob":-0.10}]},"finish_reason":"stop"}]}\n\n'
    )
    aggregator = aggregator_for(Route.CHAT, max_bytes=1000)
    aggregator.feed(frame)
    aggregator.feed(b"data: [DONE]\n\n")
    body = aggregator.result()
    assert b'"created":12345678901234567890123' in body
    assert b'"content":"\\u00e9\\/"' in body
    assert b'"logprob":-0.10' in body


# -- other engines


def test_an_answer_of_openai() -> None:
    head: dict[str, Any] = {
        "id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "gpt", "usage": None,
        "service_tier": "default", "system_fingerprint": "fp", "obfuscation": "xx",
    }  # fmt: skip

    def chunk(delta: dict[str, Any], finish: str | None = None) -> Any:
        return {**head, "choices": [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}]}

    frames = sent(
        chunk({"role": "assistant", "content": "", "refusal": None}),
        chunk({"content": "Hi"}),
        chunk({}, "stop"),
        {**head, "choices": [], "usage": {"prompt_tokens": 1}},
    )
    assert aggregate(Route.CHAT, frames) == {
        **head,
        "object": "chat.completion",
        "choices": [
            {"index": 0, "message": {"role": "assistant", "content": "Hi", "refusal": None}, "logprobs": None,
             "finish_reason": "stop"}
        ],
        "usage": {"prompt_tokens": 1},
    }  # fmt: skip


def test_an_answer_of_sglang() -> None:
    def chunk(delta: dict[str, Any], **members: Any) -> Any:
        choice = {"index": 0, "delta": {"role": None, "content": None, "reasoning_content": None, "tool_calls": None}
                  | delta, "logprobs": None, "finish_reason": None, "matched_stop": None} | members  # fmt: skip
        return {"id": "c", "object": "chat.completion.chunk", "created": 1, "choices": [choice], "model": "m"}

    function = {"name": "f", "arguments": "{}"}
    frames = sent(
        chunk({"role": "assistant", "content": ""}),
        chunk({"reasoning_content": "hm"}),
        chunk(
            {
                "tool_calls": [
                    {"id": "call_1", "index": 0, "type": "function", "function": {**function, "arguments": ""}}
                ]
            }
        ),
        chunk(
            {
                "tool_calls": [
                    {"id": None, "index": 0, "type": "function", "function": {"name": None, "arguments": "{}"}}
                ]
            }
        ),
        chunk({}, finish_reason="tool_calls", matched_stop=151645),
        {"id": "c", "choices": [], "usage": {"prompt_tokens": 1, "reasoning_tokens": 1}},
    )
    assert aggregate(Route.CHAT, frames, request=b'{"tool_choice":"required"}') == {
        "id": "c", "object": "chat.completion", "created": 1, "model": "m",
        "choices": [{
            "index": 0,
            "message": {"role": "assistant", "content": None, "reasoning_content": "hm",
                        "tool_calls": [{"id": "call_1", "type": "function", "function": function}]},
            "logprobs": None, "finish_reason": "tool_calls", "matched_stop": 151645,
        }],
        "usage": {"prompt_tokens": 1, "reasoning_tokens": 1},
    }  # fmt: skip


# -- completions


def test_completions() -> None:
    def chunk(index: int, text: str, **members: Any) -> Any:
        return {"id": "x", "object": "text_completion", "choices": [{"index": index, "text": text, **members}]}

    frames = sent(
        chunk(1, "a", logprobs={"tokens": ["a"], "token_logprobs": [None], "top_logprobs": None, "text_offset": [0]}),
        chunk(0, "", logprobs=None),
        chunk(1, "b", finish_reason="length",
              logprobs={"tokens": ["b"], "token_logprobs": [-1], "top_logprobs": [{"b": -1}], "text_offset": [1]}),
        chunk(0, "c", finish_reason="stop", stop_reason="s"),
    )  # fmt: skip
    assert aggregate(Route.COMPLETIONS, frames) == {
        "id": "x", "object": "text_completion",
        "choices": [
            {"index": 0, "text": "c", "logprobs": None, "finish_reason": "stop", "stop_reason": "s"},
            {"index": 1, "text": "ab", "finish_reason": "length",
             "logprobs": {"tokens": ["a", "b"], "token_logprobs": [None, -1], "top_logprobs": [{"b": -1}],
                          "text_offset": [0, 1]}},
        ],
    }  # fmt: skip


# -- any pieces

WORDS = st.text('aé😀"\\\n\0', max_size=4)
ARGUMENTS = st.lists(WORDS, min_size=1, max_size=4)


@st.composite
def streamed_choices(draw: st.DrawFn) -> tuple[list[list[Any]], list[Any]]:
    """Per choice the pieces of its delta in order; and the messages they make."""
    pieces: list[list[Any]] = []
    messages: list[Any] = []
    for _ in range(draw(st.integers(1, 3))):
        reasoning, content = draw(st.lists(WORDS, max_size=4)), draw(st.lists(WORDS, min_size=1, max_size=4))
        calls = draw(st.lists(ARGUMENTS, max_size=3))
        own: list[Any] = [{"role": "assistant"}, *({"reasoning": word} for word in reasoning)]
        own += [{"content": word} for word in content]
        per_call: list[list[Any]] = [
            [{"index": number, "id": f"id{number}", "function": {"name": "f", "arguments": words[0]}},
             *({"index": number, "function": {"arguments": word}} for word in words[1:])]
            for number, words in enumerate(calls)
        ]  # fmt: skip
        own += [{"tool_calls": [piece]} for piece in draw(interleaved(per_call))]
        pieces.append(own)
        message: dict[str, Any] = {"role": "assistant", "content": "".join(content)}
        if reasoning:
            message["reasoning"] = "".join(reasoning)
        if calls:
            message["tool_calls"] = [whole(f"id{number}", "f", "".join(words)) for number, words in enumerate(calls)]
        if not message["content"] and ("tool_calls" in message or message.get("reasoning")):
            message["content"] = None
        messages.append(message)
    return pieces, messages


@st.composite
def interleaved(draw: st.DrawFn, lists: list[list[Any]]) -> list[Any]:
    """All items, each list's in its order."""
    turns = draw(st.permutations([number for number, items in enumerate(lists) for _ in items]))
    left = [iter(items) for items in lists]
    return [next(left[number]) for number in turns]


@given(streamed_choices(), st.data(), st.booleans())
def test_any_pieces_in_any_order_make_the_message(
    found: tuple[list[list[Any]], list[Any]], data: st.DataObject, ascii_only: bool
) -> None:
    pieces, messages = found
    choices = [
        [{"index": number, "delta": piece} for piece in own] + [{"index": number, "finish_reason": "stop"}]
        for number, own in enumerate(pieces)
    ]
    in_turn = data.draw(interleaved(choices))
    chunks = []
    while in_turn:
        size = data.draw(st.integers(1, 3))
        chunks.append({"choices": in_turn[:size]})
        in_turn = in_turn[size:]
    frames = [b"data: %b\n\n" % json.dumps(chunk, ensure_ascii=ascii_only).encode() for chunk in chunks]
    made = aggregate(Route.CHAT, [*frames, b"data: [DONE]\n\n"])["choices"]
    assert [choice["message"] for choice in made] == messages
    assert [choice["index"] for choice in made] == list(range(len(messages)))


def test_choices_have_a_limit() -> None:
    """An object of ours is many times the size of the text that counts."""
    aggregator = aggregator_for(Route.CHAT, max_bytes=1 << 30, request=b"{}")
    pieces = ",".join(f'{{"index":{index}}}' for index in range(MOST_OBJECTS))
    aggregator.feed(f'data: {{"choices":[{pieces}]}}\n\n'.encode())
    aggregator.feed(b'data: {"choices":[{"index":0}]}\n\n')
    with pytest.raises(EngineError):
        aggregator.feed(b'data: {"choices":[{"index":-1}]}\n\n')
