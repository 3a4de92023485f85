"""The prefill body: one token of the very prompt, and what one handle cannot serve."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.core.document import Document, edit
from relay.core.prefill import obstacle, one_token, prompts
from relay.core.request import Route
from tests.core.captured import CAPTURES

ROUTES = [Route.CHAT, Route.COMPLETIONS, Route.RESPONSES, Route.MESSAGES]

#: What the rewrite may touch.
TOUCHED = [
    *["stream", "stream_options", "min_tokens", "max_tokens", "max_completion_tokens", "max_output_tokens", "store"],
]


@pytest.mark.parametrize(
    ("route", "body", "prefill"),
    [
        (Route.CHAT, b'{"max_tokens":64}', b'{"max_tokens":1,"min_tokens":1,"stream":false}'),
        (Route.CHAT, b'{"stream":true}', b'{"stream":false,"max_tokens":1,"min_tokens":1}'),
        (Route.CHAT, b'{"max_completion_tokens":64,"min_tokens":9}', b'{"min_tokens":1,"max_tokens":1,"stream":false}'),
        (Route.CHAT, b'{"max_tokens":2,"stream_options":{"include_usage":true},"max_completion_tokens":3}',
         b'{"max_tokens":1,"min_tokens":1,"stream":false}'),
        (Route.COMPLETIONS, b'{ "prompt" : "1.0e5" , "max_tokens" : null }',
         b'{ "prompt" : "1.0e5" , "max_tokens" : 1,"min_tokens":1,"stream":false }'),
        (Route.RESPONSES, b'{"max_output_tokens":64,"store":true,"max_tokens":7}',
         b'{"max_output_tokens":1,"store":false,"max_tokens":7,"min_tokens":1,"stream":false}'),
        (Route.MESSAGES, b'{"max_tokens":64,"thinking":{"type":"disabled"}}',
         b'{"max_tokens":1,"thinking":{"type":"disabled"},"min_tokens":1,"stream":false}'),
        (Route.MESSAGES, b'{"thinking":{"type":"enabled","budget_tokens":2048},"max_tokens":4096}',
         b'{"max_tokens":1,"min_tokens":1,"stream":false}'),
        (Route.MESSAGES, b'{"thinking":"odd","max_tokens":4096}',
         b'{"thinking":"odd","max_tokens":1,"min_tokens":1,"stream":false}'),
        (Route.CHAT, b'{"thinking":{"type":"enabled"},"max_tokens":4096}',
         b'{"thinking":{"type":"enabled"},"max_tokens":1,"min_tokens":1,"stream":false}'),
    ],
)  # fmt: skip
def test_one_token_in_one_piece(route: Route, body: bytes, prefill: bytes) -> None:
    assert one_token(Document(body), route, {}) == prefill


def test_a_limit_in_escapes_or_said_twice_is_found() -> None:
    body = rb'{"max\u005ftokens":64,"max_tokens":65,"str\u0065am":true}'
    assert (
        one_token(Document(body), Route.CHAT, {})
        == rb'{"max\u005ftokens":1,"max_tokens":1,"str\u0065am":false,"min_tokens":1}'
    )


@pytest.mark.parametrize("member", [
    '"tools":[{"type":"function"}]', '"tool_choice":"required"', '"response_format":{"type":"json_object"}',
    '"chat_template_kwargs":{"enable_thinking":false}', '"logprobs":true,"top_logprobs":5', '"stop":["\\n"]',
    '"structured_outputs":{"regex":"a+"}',
    '"temperature":1e-05', '"seed":12345678901234567890', '"reasoning_effort":"low"',
])  # fmt: skip
def test_what_may_be_in_the_prompt_or_refused_stays(member: str) -> None:
    client = b'{"messages":[],%b}' % member.encode()
    assert (
        one_token(Document(client), Route.CHAT, {}) == client[:-1] + b',"max_tokens":1,"min_tokens":1,"stream":false}'
    )


@pytest.mark.parametrize("body", [b"", b"[]", b"null", b'"x"', b"{", b'{"a":1}x', b'{"a":NaN}'])
def test_what_is_no_object_is_refused(body: bytes) -> None:
    with pytest.raises(ValueError):
        one_token(Document(body), Route.CHAT, {})


@pytest.mark.parametrize(("route", "name"), [
    (Route.CHAT, "pd/pd_chat_stream"), (Route.CHAT, "pd/pd_chat_nonstream"),
    (Route.COMPLETIONS, "pd/pd_comp_stream"), (Route.COMPLETIONS, "pd/pd_comp_nonstream"),
])  # fmt: skip
def test_as_a_real_prefiller_was_asked(route: Route, name: str) -> None:
    """But for `min_tokens`, which those recordings were made without."""
    client = (CAPTURES / f"{name}.reference_direct.request.json").read_bytes()
    asked = json.loads((CAPTURES / f"{name}.1prefill.request.json").read_bytes())
    del asked["kv_transfer_params"]
    assert json.loads(one_token(Document(client), route, {})) == {**asked, "min_tokens": 1}


@pytest.mark.parametrize("name", ["pd_err_prefill_min_tokens_kept", "pd_err_prefill_stream_options_kept"])
def test_what_a_real_prefiller_refused_is_not_asked(name: str) -> None:
    refused = (CAPTURES / f"fail/{name}.request.json").read_bytes()
    prefill = json.loads(one_token(Document(refused), Route.CHAT, {}))
    assert prefill["min_tokens"] == prefill["max_tokens"] == 1
    assert "stream_options" not in prefill


def test_what_made_a_real_prefiller_write_five_tokens_is_gone() -> None:
    kept = (CAPTURES / "fail/pd_prefill_max_completion_tokens_kept.request.json").read_bytes()
    assert "max_completion_tokens" not in json.loads(one_token(Document(kept), Route.CHAT, {}))


@pytest.mark.parametrize(
    ("body", "name"),
    [
        (b"{}", None),
        (b'{"n":1,"best_of":null,"echo":false,"truncation":"disabled","background":false}', None),
        (b'{"n":2}', "n"),
        (b'{"n":"2"}', "n"),  # two to pydantic
        (b'{"n":1,"n":2}', "n"),
        (b'{"n":[1]}', "n"),
        (b'{"best_of":3}', "best_of"),
        (b'{"use_beam_search":true}', "use_beam_search"),
        (b'{"use_beam_search":false}', None),
        (b'{"prompt":"[\\"a\\",\\"b\\"]"}', None),
        (b'{"prompt":["a"]}', None),
        (b'{"prompt":["a","b"]}', "prompt"),
        (b'{"prompt":[ [1,2] , [3] ]}', "prompt"),
        (b'{"prompt":[1,2,3]}', None),
        (b'{"prompt":[]}', None),
        (b'{"prompt_embeds":"AAAA"}', "prompt_embeds"),
        (b'{"prompt_logprobs":0}', "prompt_logprobs"),
        (b'{"prompt_logprob_token_ids":[1]}', "prompt_logprob_token_ids"),
        (b'{"logprobs":5}', None),
        (b'{"echo":true}', None),
        (b'{"echo":true,"logprobs":0}', "echo"),
        (b'{"truncate_prompt_tokens":-1}', "truncate_prompt_tokens"),
        (b'{"truncate_prompt_tokens":100}', None),
        (b'{"truncation":"auto"}', "truncation"),
        (b'{"truncation":null}', "truncation"),  # vLLM asks whether it is "disabled"
        (b'{"background":true}', "background"),
        (b'{"previous_response_id":"resp_1"}', "previous_response_id"),
        (b'{"messages":[{"n":2,"prompt":["a","b"]}]}', None),
        (b'{"\\u006e":2}', "n"),
        (b'{"n":1,"messages":"\xff"}', None),  # for the engine to refuse
    ],
    ids=lambda value: repr(value)[:50],
)
def test_what_one_handle_cannot_serve(body: bytes, name: str | None) -> None:
    assert obstacle(Document(body)) == name
    assert obstacle(Document(bytearray(body))) == name


def test_the_request_whose_real_answer_held_one_handle_of_two_has_an_obstacle() -> None:
    assert obstacle(Document((CAPTURES / "fail/pd_prefill_comp_batch2.request.json").read_bytes())) == "prompt"
    assert obstacle(Document((CAPTURES / "fail/pd_prefill_n2_kept.request.json").read_bytes())) == "n"


@pytest.mark.parametrize(("body", "count"), [
    (b'{"prompt":"a"}', 1), (b'{"prompt":["a","b","c"]}', 3), (b'{"prompt":[[1],[2]]}', 2), (b'{"prompt":[1,2]}', 1),
    (b"{}", 1), (b"", 1), (b"\xff", 1), (b'{"prompt":{"a":1}}', 1), (b'{"prompt":["a",1]}', 2),
])  # fmt: skip
def test_prompts_are_counted(body: bytes, count: int) -> None:
    assert prompts(body) == count


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
NAMES = st.sampled_from([*TOUCHED, "model", "prompt", "messages", "n", "tools"]) | st.text(max_size=5)


@given(st.dictionaries(NAMES, JSON, max_size=8), st.sampled_from(ROUTES), st.sampled_from([None, 1]), st.booleans())
def test_of_any_request_nothing_else_changes(
    client: dict[str, Any], route: Route, indent: int | None, ascii_only: bool
) -> None:
    body = json.dumps(client, indent=indent, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
    try:
        prefill = one_token(Document(body), route, {"kv_transfer_params": b'{"a":1}'})
    except ValueError:
        with pytest.raises(ValueError):
            edit(body, {})
        return
    asked = json.loads(prefill)
    limit = "max_output_tokens" if route is Route.RESPONSES else "max_tokens"
    assert asked[limit] == asked["min_tokens"] == 1
    assert asked["stream"] is False
    assert "stream_options" not in asked
    assert route is not Route.CHAT or "max_completion_tokens" not in asked
    assert asked["kv_transfer_params"] == {"a": 1}
    without: dict[str, None] = dict.fromkeys([*TOUCHED, "kv_transfer_params"])
    assert [*json.loads(edit(prefill, without)).items()] == [*json.loads(edit(body, without)).items()]
    assert edit(prefill, without).strip() == edit(body, without).strip()


@given(st.binary(max_size=60) | st.text(max_size=60).map(str.encode))
def test_looking_never_raises(raw: bytes) -> None:
    for body in (raw, b'{"prompt":' + raw + b"}", b'{"n":' + raw + b',"prompt":["a","b"]}'):
        assert 0 <= prompts(body) <= 1 + body.count(b",")
        try:
            document = Document(body)
        except ValueError:
            continue
        assert obstacle(document) in {None, "n", "prompt"}
