"""Where a prompt's beginning ends: a conversation keeps it from turn to turn, and another one has another."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relay.core.balance.prompt import LOOK_BYTES, PREFIX_BYTES, TEXT_BYTES, prompt_prefix
from tests.core.captured import CAPTURES

TEXT = st.text(max_size=40)
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "ask",
            "parameters": {
                "properties": {"messages": {"type": "array"}, "prompt": {}, "input": []},
                "required": ["input"],
            },
        },
    }
]


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def system(text: str) -> dict[str, Any]:
    return {"role": "system", "content": text}


def prefix(compact: bool = False, **body: Any) -> bytes:
    return prompt_prefix(json.dumps(body, separators=(",", ":") if compact else None).encode())


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        # chat
        (b'{"messages":[{"role":"user","content":"a"}],"n":1}', b'[{"role":"user","content":"a"}'),
        (
            b'{"model":"m","messages":[{"content":"a","role":"user"},{"role":"assistant"}]}',
            b'[{"content":"a","role":"user"}',
        ),
        (
            b'{"messages" : [ {"role":"system","content":"s"} ,\n{"role":"user","content":[{"text":"}]"}]}, {"r":1}]}',
            b'[ {"role":"system","content":"s"} ,\n{"role":"user","content":[{"text":"}]"}]}',
        ),
        (b'{"messages":[{"role":"system","content":"s"}]}', b'[{"role":"system","content":"s"}'),
        # completions: text, texts, tokens, batches of tokens
        (b'{"model":"m","prompt":"a \\" b","n":1}', b'"a \\" b"'),
        (b'{"prompt":["a","b"],"n":1}', b'["a","b"]'),
        (b'{"prompt":[1,2,3],"n":1}', b"[1,2,3]"),
        (b'{"prompt":[[1,2],[3]],"n":1}', b"[[1,2],[3]]"),
        # responses: a text, or items
        (b'{"input":"hi","stream":true}', b'"hi"'),
        (
            b'{"instructions":"i","input":[{"role":"user","content":"a"},{"type":"reasoning"}]}',
            b'"i"[{"role":"user","content":"a"}',
        ),
        # messages: `system` is a key of its own
        (
            b'{"system":"s","max_tokens":1,"messages":[{"role":"user","content":"a"}]}',
            b'"s"[{"role":"user","content":"a"}',
        ),
        (b'{"system":[{"type":"text"}],"messages":[{"role":"user"}]}', b'[{"type":"text"}][{"role":"user"}'),
        (b'{"messages":[{"role":"user"}],"system":"s"}', b'[{"role":"user"}'),
        # what stands before the prompt is passed over, whatever it holds
        (
            b'{"tools":[{"messages":[{"role":"user"}],"prompt":"p"}],"messages":[{"role":"user","a":1}]}',
            b'[{"role":"user","a":1}',
        ),
        (b'{"metadata":{"input":"x","y":"]}"},"temperature":0.5e1,"input":"i"}', b'"i"'),
        (b' \n{ "a" : null , "prompt" : "p" }', b'"p"'),
        # no prompt
        (b"", b""),
        (b"{}", b""),
        (b"[]", b""),
        (b'"messages"', b""),
        (b'{"model":"m"}', b""),
        (b"--boundary\r\nContent-Disposition: form-data", b""),
    ],
)
def test_where_it_begins_and_ends(body: bytes, expected: bytes) -> None:
    assert prompt_prefix(body) == expected
    assert prompt_prefix(bytearray(body)) == expected


@given(
    first=st.lists(TEXT.map(system), max_size=2),
    question=TEXT,
    turns=st.lists(st.tuples(TEXT, TEXT), max_size=4),
    compact=st.booleans(),
    before=st.sampled_from([{}, {"model": "m", "temperature": 0.1}, {"tools": TOOLS}, {"system": "s"}]),
)
@settings(deadline=None)
def test_a_conversation_keeps_it(
    first: list[Any], question: str, turns: list[tuple[str, str]], compact: bool, before: dict[str, Any]
) -> None:
    messages = [*first, user(question)]
    at_first = prefix(compact, **before, messages=messages, stream=True)
    assert json.dumps(question).encode() in at_first
    for answer, reply in turns:
        messages += [assistant(answer), user(reply)]
        assert prefix(compact, **before, messages=messages, max_tokens=len(messages)) == at_first


@given(TEXT, TEXT)
@settings(deadline=None)
def test_conversations_behind_one_system_prompt_are_told_apart(one: str, other: str) -> None:
    instructions = system("You are an agent. " * 1000)
    prefixes = [prefix(messages=[instructions, user(text)]) for text in (one, other)]
    assert (prefixes[0] == prefixes[1]) == (one == other)


def test_conversations_behind_an_endless_system_prompt_share_it() -> None:
    instructions = system("x" * PREFIX_BYTES)
    one, other = (prefix(messages=[instructions, user(text)]) for text in ("one", "other"))
    assert one == other
    assert len(one) == PREFIX_BYTES


def test_a_growing_text_keeps_its_beginning() -> None:
    text = "Once upon a time, " * 100
    longer = text + "there was a relay."
    assert prefix(prompt=text, n=1) == prefix(prompt=longer, n=2) == prefix(input=text, n=1)
    assert len(prefix(prompt=text)) == TEXT_BYTES
    tokens = list(range(1000))
    assert prefix(prompt=tokens) == prefix(prompt=[*tokens, 1, 2])


def test_only_the_beginning_of_a_body_is_looked_at() -> None:
    body = json.dumps({"messages": [user("a" * 1_000_000)]}).encode()
    assert prompt_prefix(body) == prompt_prefix(body[:LOOK_BYTES]) == body[len('{"messages": ') :][:PREFIX_BYTES]
    # Not even whether the rest is JSON.
    assert prompt_prefix(body[:LOOK_BYTES] + b"}" * 1_000_000) == prompt_prefix(body)


def test_what_does_not_end_within_the_look_stands_for_the_rest() -> None:
    """Tools of more than 64 KiB before the messages: at least requests with the same tools share a seat."""
    tools = TOOLS * (LOOK_BYTES // 100)
    one = prefix(tools=tools, messages=[user("one")])
    assert one == prefix(tools=tools, messages=[user("other")])
    assert len(one) == PREFIX_BYTES
    assert one != prefix(tools=[{}, *tools], messages=[user("one")])


@pytest.mark.parametrize(
    "name", ["chat_tool_named.stream", "comp_basic.stream", "responses_basic.stream", "messages_stop_seq.stream"]
)
def test_recorded_requests_have_one(name: str) -> None:
    body = (CAPTURES / f"{name}.request.json").read_bytes()
    asked = json.loads(body)
    (prompt,) = (asked[key] for key in ("messages", "prompt", "input") if key in asked)
    found = prompt_prefix(body)
    assert json.loads(found + b"]" if found.startswith(b"[") else found) == prompt


def test_a_recorded_conversation_keeps_it_after_a_tool_call() -> None:
    """The tool's result is a turn like any other. Both requests were written alike, as one client's are."""
    first = json.loads((CAPTURES / "chat_tool_named.stream.request.json").read_bytes())
    later = json.loads((CAPTURES / "chat_tool_result_followup.stream.request.json").read_bytes())
    assert len(later["messages"]) > len(first["messages"])
    assert prefix(**first) == prefix(**later)


@given(st.binary(max_size=60) | st.text(max_size=60).map(str.encode))
def test_never_raises(noise: bytes) -> None:
    for body in (noise, b'{"messages":[' + noise, b'{"system":' + noise, b'{"prompt":' + noise, b'{"' + noise):
        assert len(prompt_prefix(body)) <= PREFIX_BYTES


@pytest.mark.parametrize("opening", [b"[", b'{"a":', b'[{"a":'])
def test_endless_nesting_does_not_raise(opening: bytes) -> None:
    assert prompt_prefix(b'{"messages":' + opening * 100_000)
    assert prompt_prefix(b'{"a":' + opening * 100_000)


def test_endless_numbers_do_not_raise() -> None:
    assert prompt_prefix(b'{"seed":' + b"1" * 60_000 + b',"prompt":"p"}')


def test_no_more_than_so_many_members_and_messages_are_looked_at() -> None:
    """Each takes Python a microsecond, and a body has room for thousands."""
    assert prompt_prefix(b'{%b"prompt":"a"}' % (b'"a":1,' * 255)) == b'"a"'
    assert prompt_prefix(b'{%b"prompt":"a"}' % (b'"a":1,' * 256)) == b""
    begin = b'{"messages":[' + b"{}," * 256
    assert prompt_prefix(begin + b'{"role":"user"}]}') == prompt_prefix(begin + b'{"role":"user","content":"b"}]}')
    begin = b'{"messages":[' + b"{}," * 255
    assert prompt_prefix(begin + b'{"role":"user"}]}') != prompt_prefix(begin + b'{"role":"user","content":"b"}]}')
