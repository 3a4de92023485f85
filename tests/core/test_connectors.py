"""What holds for every connector: the client's body, the ids, the defaults, and what cannot be split."""

from __future__ import annotations

import ast
import json
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any, Final

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.core import connectors
from relay.core.connectors import CONNECTORS, connector_named
from relay.core.connectors.base import (
    KV_PARAMS,
    Concurrent,
    Connector,
    DecodeFirst,
    DecodeOnly,
    Endpoint,
    LegRequest,
    Plan,
    Role,
    Sequential,
    SplitRequest,
    drain,
)
from relay.core.connectors.recompute import is_recomputed
from relay.core.document import Change, edit
from relay.core.request import Route

ROUTES = [Route.CHAT, Route.COMPLETIONS, Route.RESPONSES, Route.MESSAGES]
PREFILL = Endpoint("http://p:8000", "p")
DECODE = Endpoint("http://d:8000", "d")
BOOTSTRAP_ANSWER = b'{"0":{"engine_id":"e"}}'
HANDLE = b'{ "do_remote_prefill": true, "port": 5600 }'
MESSAGE = b'{ "request_id": "chatcmpl-x", "do_remote_decode": true }'


def planned(name: str, request: SplitRequest, rng: Random | None = None) -> Plan:
    """One attempt between the two engines."""
    connector = connector_named(name)
    prefill, decode = connector.complete(PREFILL, "prefill"), connector.complete(DECODE, "decode")
    question = connector.preflight(prefill)
    if question is not None:
        prefill = question.parse(BOOTSTRAP_ANSWER)
    return connector.plan(request, prefill, decode, rng or Random(1))


def legs_of(plan: Plan) -> tuple[LegRequest | None, LegRequest]:
    """Both legs, the engines having answered as they should."""
    match plan:
        case DecodeOnly(decode=decode):
            return None, decode
        case Sequential(prefill=prefill, hand_over=hand_over):
            return prefill, hand_over(b'{"kv_transfer_params":%b}' % HANDLE).decode
        case Concurrent(prefill=prefill, decode=decode):
            return prefill, decode
        case DecodeFirst(decode=decode, prefill=prefill_of):
            return prefill_of(MESSAGE), decode


# -- the registry


def test_names() -> None:
    assert CONNECTORS == ("nixl", "mooncake", "ascend_mooncake", "p2p_nccl", "ascend_layerwise", "sglang", "none")
    assert [connector_named(name).name for name in CONNECTORS] == [*CONNECTORS]
    assert [name for name in CONNECTORS if connector_named(name).calls_back] == ["ascend_layerwise"]
    with pytest.raises(ValueError, match="allowed: nixl, mooncake"):
        connector_named("Nixl")


def test_each_connector_is_used_through_the_interface_alone() -> None:
    """No connector adds a public method: what the exchange can call is what `base` names."""
    for name in CONNECTORS:
        assert {word for word in dir(connector_named(name)) if word[0] != "_"} == {
            word for word in dir(Connector) if word[0] != "_"
        } | {"name"}


def test_connectors_know_the_interface_and_not_each_other() -> None:
    """But for mooncake, half of which is nixl's protocol under another name."""
    folder = Path(connectors.__file__).parent
    for path in folder.glob("*.py"):
        if path.name == "__init__.py":
            continue
        imported = {
            node.module.removeprefix("relay.core.connectors.")
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("relay.core.connectors")
        }
        assert imported <= ({"base", "nixl"} if path.name == "mooncake.py" else {"base"})


# -- addresses


@pytest.mark.parametrize(
    ("name", "role", "given", "completed"),
    [
        ("mooncake", "prefill", {}, {"bootstrap": "http://p:8998"}),
        ("mooncake", "prefill", {"host": "fd00::1"}, {"bootstrap": "http://[fd00::1]:8998"}),
        ("mooncake", "prefill", {"bootstrap": "http://b:1/"}, {"bootstrap": "http://b:1"}),
        ("mooncake", "prefill", {"bootstrap": "http://b:1", "host": ""}, {}),
        ("mooncake", "decode", {"host": ""}, {}),
        ("p2p_nccl", "prefill", {}, {"kv_address": "p:14579"}),
        ("p2p_nccl", "decode", {}, {"kv_address": "p:14579"}),
        ("p2p_nccl", "decode", {"host": "fd00::1"}, {"kv_address": "[fd00::1]:14579"}),
        ("p2p_nccl", "prefill", {"kv_address": "10.0.0.1:21001", "host": ""}, {}),
        ("sglang", "prefill", {}, {"bootstrap_port": 8998}),
        ("sglang", "prefill", {"bootstrap_port": 9000}, {}),
        ("sglang", "decode", {"host": ""}, {}),
        ("nixl", "prefill", {"host": ""}, {}),
        ("ascend_mooncake", "prefill", {"host": ""}, {}),
        ("ascend_layerwise", "prefill", {"host": ""}, {}),
        ("none", "prefill", {"host": ""}, {}),
    ],
)
def test_defaults(name: str, role: Role, given: dict[str, Any], completed: dict[str, Any]) -> None:
    endpoint = msgspec.structs.replace(PREFILL, **given)
    found = connector_named(name).complete(endpoint, role)
    assert found == msgspec.structs.replace(endpoint, **completed)
    assert connector_named(name).complete(found, role) == found


@pytest.mark.parametrize(
    ("name", "role", "given", "message"),
    [
        ("mooncake", "prefill", {"host": ""}, "bootstrap = "),
        ("mooncake", "prefill", {"bootstrap": "10.0.0.1:8998"}, "http://HOST:PORT"),
        ("p2p_nccl", "prefill", {"host": ""}, "kv_address = "),
        ("p2p_nccl", "decode", {"host": ""}, "kv_address = "),
        ("p2p_nccl", "decode", {"kv_address": "a___b:1"}, "HOST:PORT"),
        ("p2p_nccl", "decode", {"kv_address": "10.0.0.1"}, "HOST:PORT"),
        ("p2p_nccl", "decode", {"kv_address": "tcp://10.0.0.1:5"}, "HOST:PORT"),
        ("sglang", "prefill", {"host": ""}, "http://HOST:PORT"),
    ],
)
def test_what_no_default_can_mend(name: str, role: Role, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        connector_named(name).complete(msgspec.structs.replace(PREFILL, **given), role)


def test_brackets_around_a_bootstrap_host() -> None:
    prefill = Endpoint("http://[fd00::1]:8000", "fd00::1", bootstrap_port=1)
    plan = connector_named("sglang").plan(SplitRequest(Route.CHAT, b"{}", "r"), prefill, DECODE, Random(1))
    assert isinstance(plan, Concurrent)
    assert json.loads(plan.decode.body)["bootstrap_host"] == "[fd00::1]"


# -- what is not split


@pytest.mark.parametrize("name", CONNECTORS)
@pytest.mark.parametrize("route", [Route.CHAT, Route.OTHER])
@pytest.mark.parametrize("body", [b"", b"[]", b"null", b"\xff", b"--boundary", b"\x89PNG{"])
def test_a_body_that_is_no_object_is_for_the_engine_to_refuse(name: str, route: Route, body: bytes) -> None:
    assert planned(name, SplitRequest(route, body, "req-1", 2)) == DecodeOnly(LegRequest(body, "req-1-2"))


#: Objects that Python's parser reads, and the relay does not.
UNREAD: Final = [
    b"{",
    b'{"a":NaN}',
    b'{"a":"\\ud800"}',
    b"\xef\xbb\xbf{}",
    "{}".encode("utf-16"),
    "\n{}".encode("utf-32-be"),
    b"{%b}" % b",".join(b'"%d":0' % at for at in range(4097)),
    b'{"a":' * 100_000,
]


@pytest.mark.parametrize("name", CONNECTORS)
@pytest.mark.parametrize("route", [Route.CHAT, Route.OTHER])
@pytest.mark.parametrize("body", UNREAD, ids=lambda body: repr(body)[:20])
def test_an_object_that_only_an_engine_may_read_is_refused(name: str, route: Route, body: bytes) -> None:
    with pytest.raises(ValueError, match=r"object|nested"):
        planned(name, SplitRequest(route, body, "req-1"))


@pytest.mark.parametrize("name", CONNECTORS)
def test_other_routes_go_to_a_decoder_without_a_handle(name: str) -> None:
    body = b'{"n":2,"kv_transfer_params":{},"kv_transfer_param\\u0073":{}, "input":"a"}'
    less = b'{"n":2, "input":"a"}'
    assert planned(name, SplitRequest(Route.OTHER, body, "req-1")) == DecodeOnly(LegRequest(less, "req-1"))


@pytest.mark.parametrize(
    ("body", "less"),
    [
        ('{"vllm_xargs":{"kv_transfer_params":"E","a":1}}', '{"vllm_xargs":{"a":1}}'),
        (
            '{"sampling_params":{"extra_args":{"kv_transfer_params":{}}}}',
            '{"sampling_params":{"extra_args":{}}}',
        ),
        ('{"sampling_params":{"n":1},"vllm_xargs":null}', '{"sampling_params":{"n":1},"vllm_xargs":null}'),
        ('{"sampling_params":3,"vllm_xargs":[]}', '{"sampling_params":3,"vllm_xargs":[]}'),
    ],
)
def test_a_handle_is_taken_out_wherever_vllm_would_look(body: str, less: str) -> None:
    plan = planned("nixl", SplitRequest(Route.OTHER, body.encode(), "req-1"))
    assert plan == DecodeOnly(LegRequest(less.encode(), "req-1"))


#: With which requests a connector does without a prefill. `n` and lists of prompts: one handle serves one sequence,
#: so only those whose protocol has a handle for each, or none, split them.
ONE_HANDLE = {"nixl", "mooncake", "ascend_mooncake", "ascend_layerwise"}


@pytest.mark.parametrize("name", CONNECTORS)
@pytest.mark.parametrize(
    ("route", "body", "because"),
    [
        (Route.CHAT, b'{"n":2}', "n"),
        (Route.COMPLETIONS, b'{"prompt":["a","b"]}', "prompt"),
        (Route.COMPLETIONS, b'{"prompt":"a","echo":true,"logprobs":1}', "echo"),
        (Route.CHAT, b'{"prompt_logprobs":1}', "prompt_logprobs"),
        (Route.CHAT, b'{"truncate_prompt_tokens":-1}', "truncate_prompt_tokens"),
    ],
)
def test_what_is_decoded_without_prefill(name: str, route: Route, body: bytes, because: str) -> None:
    client = edit(body, {KV_PARAMS: b'{"remote_host":"203.0.113.9"}'})
    plan = planned(name, SplitRequest(route, client, "req-1", 3))
    if name in ONE_HANDLE:
        assert plan == DecodeOnly(LegRequest(body, "req-1-3"), because)
    else:
        assert not isinstance(plan, DecodeOnly)


def test_responses_are_not_layerwise() -> None:
    plan = planned("ascend_layerwise", SplitRequest(Route.RESPONSES, b"{}", "r"))
    assert plan == DecodeOnly(LegRequest(b"{}", "r"), "route")


# -- any request

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
MEMBERS = st.sampled_from([
    "model", "messages", "prompt", "n", "stream", "stream_options", "max_tokens", "max_completion_tokens", "min_tokens",
    "max_output_tokens", "tools", "thinking", "store", "request_id", KV_PARAMS, "bootstrap_room", "bootstrap_host",
])  # fmt: skip
OBJECTS = st.dictionaries(MEMBERS | st.text(max_size=4), JSON, max_size=8)
#: What a connector may write into the decoder's body, and those that cut the prefiller's down.
HANDED = [KV_PARAMS, "bootstrap_host", "bootstrap_port", "bootstrap_room", "request_id"]
CUT = [
    *["stream", "stream_options", "max_tokens", "max_completion_tokens", "max_output_tokens", "min_tokens"],
    *["n", "best_of", "store", "thinking"],
]


def less(body: bytes | bytearray, members: list[str]) -> bytes:
    """A body without some members."""
    without: dict[str, Change] = dict.fromkeys(members)
    return edit(body, without).strip()


@given(OBJECTS, st.sampled_from(CONNECTORS), st.sampled_from(ROUTES), st.sampled_from([None, 1]), st.booleans())
def test_the_client_s_own_bytes_reach_both_engines(
    client: dict[str, Any], name: str, route: Route, indent: int | None, ascii_only: bool
) -> None:
    body = json.dumps(client, indent=indent, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
    request = SplitRequest(route, body, "req-1", 1, "http://relay/v1/metaserver")
    try:
        untouched = less(body, HANDED)
    except ValueError:  # a lone surrogate
        with pytest.raises(ValueError, match="object"):
            planned(name, request)
        return
    prefill, decode = legs_of(planned(name, request))
    assert less(decode.body, HANDED) == untouched
    if not client.keys() & set(HANDED):
        handed = [member for member in HANDED if member in json.loads(bytes(decode.body))]
        assert less(decode.body, handed) == body.strip()
    if prefill is not None:
        assert less(prefill.body, HANDED + CUT) == less(body, HANDED + CUT)
        asked = json.loads(bytes(prefill.body))
        assert asked["stream"] is False
        assert "stream_options" not in asked
        if name != "sglang":
            assert asked["max_output_tokens" if route is Route.RESPONSES else "max_tokens"] == asked["min_tokens"] == 1


@given(OBJECTS, st.sampled_from(["nixl", "mooncake", "ascend_mooncake", "ascend_layerwise"]), st.sampled_from(ROUTES))
def test_a_client_s_own_handle_never_reaches_an_engine(client: dict[str, Any], name: str, route: Route) -> None:
    body = json.dumps({**client, KV_PARAMS: {"remote_host": "203.0.113.9"}}).encode()
    try:
        edit(body, {})
    except ValueError:
        return
    for leg in legs_of(planned(name, SplitRequest(route, body, "req-1"))):
        assert leg is None or b"203.0.113.9" not in leg.body


@given(st.binary(max_size=60) | st.text(max_size=60).map(str.encode), st.sampled_from(CONNECTORS))
def test_nothing_a_peer_sends_raises(raw: bytes, name: str) -> None:
    for body in (raw, b'{"n":%b}' % raw, b'{"prompt":[%b]}' % raw, b'{"thinking":%b}' % raw):
        with suppress(ValueError):
            planned(name, SplitRequest(Route.MESSAGES, body, "r"))
    connector_named(name).callback_key(raw)
    connector_named(name).callback_key(b'{"request_id":%b}' % raw)
    plan = planned(name, SplitRequest(Route.CHAT, b"{}", "r"))
    if isinstance(plan, Sequential):
        plan.hand_over(raw)
        handed = plan.hand_over(b'{"kv_transfer_params":%b}' % raw)
        drain(handed.decode, Route.CHAT)


# -- ids


@pytest.mark.parametrize("name", CONNECTORS)
def test_every_attempt_has_ids_of_its_own_and_both_legs_the_same(name: str) -> None:
    rng, seen = Random(7), set()
    for attempt in range(1, 6):
        prefill, decode = legs_of(planned(name, SplitRequest(Route.CHAT, b"{}", "req-1", attempt), rng))
        assert prefill is not None
        assert prefill.request_id == decode.request_id
        seen.add(decode.request_id)
    assert len(seen) == 5


@pytest.mark.parametrize("name", ["mooncake", "p2p_nccl", "ascend_layerwise", "sglang"])
def test_two_clients_of_one_id_share_nothing(name: str) -> None:
    """What the engines find each other by does not come from the client."""
    rng, request = Random(7), SplitRequest(Route.CHAT, b"{}", "same")
    first, second = (legs_of(planned(name, request, rng))[1] for _ in range(2))
    assert (first.request_id, first.body) != (second.request_id, second.body)


# -- an answer given up


@pytest.mark.parametrize(
    ("event", "request_body", "is_so"),
    [
        (b'{"choices":[{"index":0,"delta":{},"finish_reason":"stop","stop_reason":"recomputed"}]}', b"{}", True),
        (b'{"choices":[{"index":0,"text":"","stop_reason":"recomputed"}]}', b'{"stop":"x"}', True),
        (b'{"choices":[{"stop_reason":null},{"stop_reason":"recomputed"}]}', b'{"stop":["x"],"messages":[]}', True),
        (b'{"type":"message_delta","delta":{"stop_reason":"stop_sequence","stop_sequence":"recomputed"}}', b"{}", True),
        (b'{"type":"message","stop_reason":"stop_sequence","stop_sequence":"recomputed"}', b"{}", True),
        (b'{"choices":[{"delta":{"content":"recomputed"},"stop_reason":null}]}', b"{}", False),
        (b'{"choices":[{"delta":{"content":"\\"recomputed\\""},"stop_reason":"end"}]}', b"{}", False),
        (b'{"choices":[{"stop_reason":128009}],"model":"recomputed"}', b"{}", False),
        (b'{"choices":[{"stop_reason":"recomputed"}]}', b'{"stop":"recomputed"}', False),
        (b'{"choices":[{"stop_reason":"recomputed"}]}', b'{"stop":["a","recomputed"]}', False),
        (b'{"delta":{"stop_sequence":"recomputed"}}', b'{"stop_sequences":["recomputed"]}', False),
        (b'{"type":"response.output_text.delta","delta":"recomputed"}', b"{}", False),
        (b'["recomputed"]', b"{}", False),
        (b'"recomputed', b"{}", False),
        (b"[DONE]", b"{}", False),
    ],
)
def test_recomputed(event: bytes, request_body: bytes, is_so: bool) -> None:
    assert is_recomputed(event, request_body) is is_so
