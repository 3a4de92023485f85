"""Editing JSON objects: what is named changes, as any parser sees it, and not one other byte does."""

from __future__ import annotations

import json
import tracemalloc
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.core.document import MAX_MEMBERS, edit
from relay.core.request import Route, peek
from relay.core.rewrite import add_cost, ask_usage, force_stream
from relay.core.sse import split_frames
from tests.core.captured import CAPTURES, captured, frames_of

# -- edit


@pytest.mark.parametrize(
    ("body", "edited"),
    [
        (b"{}", b'{"k":1}'),
        (b" \r\n\t{ \t} \n", b' \r\n\t{"k":1 \t} \n'),
        (b'{"a":0}', b'{"a":0,"k":1}'),
        (b'{"a" : [ {"k":2} ] \n}\n', b'{"a" : [ {"k":2} ],"k":1 \n}\n'),
        (b'{"k":2}', b'{"k":1}'),
        (b'{ "k" : {"k":[2]} , "a":0 }', b'{ "k" : 1 , "a":0 }'),
        (b'{"k":2,"k":2,"a":0,"k":"3"}', b'{"k":1,"k":1,"a":0,"k":1}'),
        (b'{"\\u006b":2,"\\u006B":3}', b'{"\\u006b":1,"\\u006B":1}'),
        (b'{"K":2,"kk":3,"":4,"\\\\k":5}', b'{"K":2,"kk":3,"":4,"\\\\k":5,"k":1}'),
        (b'{"a":"\\"k\\":2","k":"\\\\"}', b'{"a":"\\"k\\":2","k":1}'),
        (b'{"a":1.0e+05,"b":1e999,"c":12345678901234567890123,"a":-0.0}',
         b'{"a":1.0e+05,"b":1e999,"c":12345678901234567890123,"a":-0.0,"k":1}'),
        ('{"a":"é😀","b":"\\ud83d\\ude00","é":1}'.encode(),
         '{"a":"é😀","b":"\\ud83d\\ude00","é":1,"k":1}'.encode()),
        (b'{"a":"\xff"}', b'{"a":"\xff","k":1}'),
    ],
)  # fmt: skip
def test_a_member_set(body: bytes, edited: bytes) -> None:
    assert edit(body, {"k": b"1"}) == edited
    assert edit(bytearray(body), {"k": b"1"}) == edited


@pytest.mark.parametrize(
    ("body", "edited"),
    [
        (b"{}", b"{}"),
        (b'{"a":0}', b'{"a":0}'),
        (b'{ "k":2 }', b"{  }"),
        (b'{ "k" : 2 , "a":0 }', b'{ "a":0 }'),
        (b'{ "a":0 , "k" : 2 }', b'{ "a":0 }'),
        (b'{"a":0,"k":2 , "b":1}', b'{"a":0 , "b":1}'),
        (b'{"k":2,"k":3,"a":0,"k":4,"\\u006b":5,"b":1,"k":6}', b'{"a":0,"b":1}'),
        (b'{"k":2,"k":3}', b"{}"),
    ],
)
def test_a_member_removed(body: bytes, edited: bytes) -> None:
    assert edit(body, {"k": None}) == edited


@pytest.mark.parametrize(
    ("body", "edited"),
    [
        (b"{}", b'{"o":{"k":1}}'),
        (b'{"o": null}', b'{"o": {"k":1}}'),
        (b'{"o":{}}', b'{"o":{"k":1}}'),
        (b'{"o": { "k" : false , "x" : 1.0 } }', b'{"o": { "k" : 1 , "x" : 1.0 } }'),
        (b'{"o":{"a":0},"o":{"k":2},"a":{"k":3}}', b'{"o":{"a":0,"k":1},"o":{"k":1},"a":{"k":3}}'),
        (b'{"o":[{"k":2}]}', b'{"o":[{"k":2}]}'),  # for the engine to refuse
        (b'{"o":"{}"}', b'{"o":"{}"}'),
    ],
)
def test_an_inner_member_set(body: bytes, edited: bytes) -> None:
    assert edit(body, {"o": {"k": b"1", "absent": None}}) == edited


def test_changes_of_all_kinds_at_once() -> None:
    body = b'{"a": 1, "b": {"c": 2}, "d": 3}'
    changes = {"a": None, "b": {"c": None, "new": b"[]"}, "d": b"{}", "e": b'"f"', "g": None}
    assert edit(body, changes) == b'{"b": {"new":[]}, "d": {},"e":"f"}'
    assert edit(b'{"a":1}', {"a": None, "b": b"2"}) == b'{"b":2}'
    assert edit(b"{}", {'"\n': b"0"}) == b'{"\\"\\n":0}'


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"null",
        b'"{}"',
        b"{",
        b'{"a":1} x',
        b'{"a":1,}',
        b'{"a":NaN}',
        b'\xef\xbb\xbf{"a":1}',
        b'{"\xff":1}',
        b'{"a":"\\ud83d"}',
        '{"a":1}'.encode("utf-16"),
        b'{"a":' + b"[" * 100_000,
        b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b"{" + b",".join([b'"a":0'] * (MAX_MEMBERS + 1)) + b"}",
        b'{"o":{' + b",".join([b'"a":0'] * (MAX_MEMBERS + 1)) + b"}}",
    ],
    ids=lambda body: repr(body[:30]),
)
def test_what_cannot_be_edited(body: bytes) -> None:
    with pytest.raises(ValueError):
        edit(body, {"k": b"1", "o": {"k": b"1"}})


def test_as_many_members_as_allowed() -> None:
    body = b"{" + b",".join([b'"a":0'] * MAX_MEMBERS) + b"}"
    assert edit(body, {"a": b"1"}) == body.replace(b"0", b"1")


BLANK = st.text(" \t\r\n", max_size=2).map(str.encode)
NAMES = ["stream", "stream_options", "model", "", "é", '"\\']
TEXT = st.text('aé😀"\\\n\0:,{}[]', max_size=5)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES) | TEXT, inner)
)


def test_a_long_key_takes_no_memory() -> None:
    """Of each escape in it nothing is kept: clients choose their keys."""
    body = b'{"%b":1}' % (rb"\n" * 1_000_000)
    tracemalloc.start()
    try:
        edited = edit(body, {"a": b"2"})
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert edited is not None
    assert edited.endswith(b'"a":2}')
    assert peak < 10 * len(body)


@st.composite
def member_texts(draw: st.DrawFn) -> tuple[str, bytes, bytes, bytes]:
    """One member: its name, its text up to the value, the value, the blank space behind it."""
    name = draw(st.sampled_from(NAMES))
    key = json.dumps(name, ensure_ascii=draw(st.booleans())).encode()
    if name and name.isalpha() and draw(st.booleans()):
        key = b'"%b"' % "".join(f"\\u{ord(letter):04x}" for letter in name).encode()
    indent, ascii_only = draw(st.sampled_from([None, 1])), draw(st.booleans())
    value = json.dumps(draw(VALUES), indent=indent, ensure_ascii=ascii_only).encode()
    return name, draw(BLANK) + key + draw(BLANK) + b":" + draw(BLANK), value, draw(BLANK)


CHANGES = st.dictionaries(st.sampled_from(NAMES), st.sampled_from([b"true", b'{"x":[1, 2]}', b'"\\u00e9"']))


def pairs(body: bytes) -> list[tuple[str, Any]]:
    found = json.loads(body, object_pairs_hook=list)
    assert isinstance(found, list)
    return found


@given(BLANK, st.lists(member_texts(), min_size=1, max_size=6), BLANK, CHANGES)
def test_values_change_in_place_and_nothing_else_to_the_byte(
    before: bytes, members: list[tuple[str, bytes, bytes, bytes]], after: bytes, changes: dict[str, bytes]
) -> None:
    body = before + b"{" + b",".join(key + value + blank for _, key, value, blank in members) + b"}" + after
    assert edit(body, {}) == body

    replaced = [key + changes.get(name, value) for name, key, value, _ in members]
    names = {name for name, *_ in members}
    added = [json.dumps(name, ensure_ascii=False).encode() + b":" + new
             for name, new in changes.items() if name not in names]  # fmt: skip
    texts = [text + blank for text, (*_, blank) in zip(replaced[:-1], members[:-1], strict=True)]
    expected = b",".join([*texts, replaced[-1], *added]) + members[-1][3]
    assert edit(body, changes) == before + b"{" + expected + b"}" + after


@given(st.lists(member_texts(), max_size=6), st.sets(st.sampled_from(NAMES)), CHANGES)
def test_every_occurrence_removed_is_gone_for_any_parser(
    members: list[tuple[str, bytes, bytes, bytes]], removed: set[str], changes: dict[str, bytes]
) -> None:
    body = b"{" + b",".join(key + value + blank for _, key, value, blank in members) + b"}"
    kept = [(name, json.loads(changes.get(name, value), object_pairs_hook=list))
            for name, _, value, _ in members if name not in removed]  # fmt: skip
    names = {name for name, *_ in members} | removed
    added = [(name, json.loads(new, object_pairs_hook=list)) for name, new in changes.items() if name not in names]
    assert pairs(edit(body, {**changes, **dict.fromkeys(removed)})) == kept + added


@given(st.dictionaries(st.sampled_from(NAMES) | TEXT, VALUES), st.sampled_from(NAMES), VALUES)
def test_the_object_is_what_it_was_but_for_the_change(before: dict[str, Any], name: str, value: Any) -> None:
    edited = edit(json.dumps(before).encode(), {name: json.dumps(value).encode()})
    assert json.loads(edited) == {**before, name: value}
    assert edit(edited, {name: None}) == edit(json.dumps(before).encode(), {name: None})


# -- requests


@pytest.mark.parametrize("route", [Route.CHAT, Route.COMPLETIONS])
def test_forced_to_stream_with_usage(route: Route) -> None:
    body = b'{"model":"m", "stream" :false,"stream_options":{"continuous_usage_stats":true}, "n":1}'
    assert force_stream(body, route) == (
        b'{"model":"m", "stream" :true,'
        b'"stream_options":{"continuous_usage_stats":true,"include_usage":true}, "n":1}'
    )  # fmt: skip
    assert force_stream(b"{}", route) == b'{"stream":true,"stream_options":{"include_usage":true}}'


@pytest.mark.parametrize("route", [Route.RESPONSES, Route.MESSAGES])
def test_forced_to_stream_where_usage_always_comes(route: Route) -> None:
    assert force_stream(b'{"stream": null}', route) == b'{"stream": true}'
    assert ask_usage(b'{"stream": true }', route) == b'{"stream": true }'


@pytest.mark.parametrize("path", sorted(CAPTURES.glob("chat_*stream.request.json")), ids=lambda path: str(path.stem))
def test_recorded_requests_ask_for_what_was_meant(path: Any) -> None:
    body = path.read_bytes()
    if not peek(body).is_json or not body.lstrip().startswith(b"{"):
        pytest.skip("sent to be refused")
    forced = force_stream(body, Route.CHAT)
    facts = peek(forced)
    assert facts.wants_stream
    assert facts.include_usage
    rest = edit(forced, {"stream": None, "stream_options": None})
    assert rest == edit(body, {"stream": None, "stream_options": None})
    before = json.loads(body)
    options = (before.get("stream_options") or {}) | {"include_usage": True}
    options.pop("continuous_usage_stats", None)
    assert json.loads(ask_usage(body, Route.CHAT)) == before | {"stream_options": options}


# -- costs

COSTS = {
    "prompt_total_cost": Decimal("0.00000012"),
    "completion_total_cost": Decimal("1E-9"),
    "total_cost": Decimal("0.000000121"),
}
ADDED = b'"prompt_total_cost":0.00000012,"completion_total_cost":0.000000001,"total_cost":0.000000121'


@pytest.mark.parametrize(
    ("answer", "priced"),
    [
        (b'data: {"choices":[],"usage":{"prompt_tokens":1}}\n\n',
         b'data: {"choices":[],"usage":{"prompt_tokens":1,%b}}\n\n'),
        (b'data: {"usage": { } , "choices": []}\r\n\r\n', b'data: {"usage": {%b } , "choices": []}\r\n\r\n'),
        (b'\xef\xbb\xbfevent: message_delta\rid:1\rdata:{"delta":{},"usage":{"output_tokens":1}}\r\r',
         b'\xef\xbb\xbfevent: message_delta\rid:1\rdata:{"delta":{},"usage":{"output_tokens":1,%b}}\r\r'),
        (b': {"usage":{}}\nevent: response.completed\n'
         b'data: {"response":{"usage":{"input_tokens":1}, "output":[{"usage":{}}]},"type":"x"}\n\n',
         b': {"usage":{}}\nevent: response.completed\n'
         b'data: {"response":{"usage":{"input_tokens":1,%b}, "output":[{"usage":{}}]},"type":"x"}\n\n'),
        (b'data: {"usage":\ndata\ndata:  {"a":\nid: 7\ndata: 1\ndata:},\r\ndata: "x":"data: "}\n\n',
         b'data: {"usage":\ndata\ndata:  {"a":\nid: 7\ndata: 1,%b\ndata:},\r\ndata: "x":"data: "}\n\n'),
        (b'{\n  "choices": [],\n  "usage": {\n    "total_tokens": 3\n  }\n}',
         b'{\n  "choices": [],\n  "usage": {\n    "total_tokens": 3,%b\n  }\n}'),
        (b'{"usage":{"a":1},"usage":{"b":2}}', b'{"usage":{"a":1,%b},"usage":{"b":2,%b}}'),
    ],
)  # fmt: skip
def test_costs_go_into_the_usage_object(answer: bytes, priced: bytes) -> None:
    assert add_cost(answer, COSTS) == priced.replace(b"%b", ADDED)
    assert add_cost(bytearray(answer), COSTS) == priced.replace(b"%b", ADDED)


def test_costs_of_a_relay_behind_are_replaced() -> None:
    assert (
        add_cost(b'{"usage":{"total_cost":9,"a":1}}', {"total_cost": Decimal(2)}) == b'{"usage":{"total_cost":2,"a":1}}'
    )


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"data: [DONE]\n\n",
        b": keep-alive\n\n",
        b'data: {"choices":[{"delta":{"content":"\\"usage\\":{}"}}],"usage":null}\n\n',
        b'data: {"usage":[]}\n\n',
        b'data: {"usage":{"a":1}\n\n',
        b'data: {"response":null}\n\n',
        b'data: {"response":{"usage":null}}\n\n',
        b'event: message_start\ndata: {"message":{"usage":{}},"type":"message_start"}\n\n',
        b'{"error":{"usage":{}}}',
        b"\xff\xfe",
    ],
)
def test_an_answer_without_usage_stays_as_it_is(answer: bytes) -> None:
    assert add_cost(answer, COSTS) == answer


def test_recorded_answers_change_in_their_usage_alone() -> None:
    priced = 0
    for answer in captured():
        for part in frames_of(answer.body) if answer.is_stream else [answer.body]:
            after = add_cost(part, COSTS)
            assert after.replace(b"," + ADDED, b"") == part
            priced += after != part
            assert (after != part) == (b'"usage":{' in part and b"message_start" not in part), part
    assert priced > 200


@given(st.binary(max_size=40) | st.text('data:{}"usage,\r\n ', max_size=40).map(str.encode))
def test_any_bytes_can_be_priced(answer: bytes) -> None:
    frames = [answer[start:stop] for start, stop in split_frames(answer, 0, len(answer))]
    for part in [answer, *frames]:
        assert add_cost(part, COSTS).replace(b"," + ADDED, b"").replace(ADDED, b"") == part
