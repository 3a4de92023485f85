"""The engine's answers against recordings of a real vLLM: heads, field order, framing, and all that is no text."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import pytest

from relay_bench.engine import EngineConfig

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.bench.conftest import Answer, Client

    Recorded = Callable[[str], Answer]

#: What differs from run to run, and is compared by its kind only.
FREE = {"id", "created", "created_at", "content", "text", "delta", "arguments", "item_id", "call_id", "name"}
FREE |= {"prompt_tokens", "total_tokens", "completion_tokens", "input_tokens", "output_tokens", "cached_tokens"}
FREE |= {"stop_sequence", "root", "max_model_len", "model", "tools", "system_fingerprint", "message", "loc", "param"}


def shape(value: Any, key: str = "") -> Any:
    """`value` with its fields in order, and what differs between runs replaced by its type."""
    if isinstance(value, dict):
        return [(name, shape(item, name)) for name, item in value.items()]
    if isinstance(value, list):
        return [shape(item) for item in value]
    return type(value).__name__ if key in FREE else value


def frame_shape(frame: bytes) -> Any:
    """The lines of an event: their names, and the shape of the data."""
    lines = []
    for line in frame.decode().split("\n"):
        name, colon, value = line.partition(": ")
        is_json = value.startswith("{")
        lines.append((name + colon, shape(json.loads(value)) if is_json else value))
    return lines


def distinct(frames: list[bytes]) -> list[Any]:
    """The shapes of `frames`, each run of equal ones once: how long a text is does not matter."""
    shapes: list[Any] = []
    for frame in frames:
        text = json.dumps(frame_shape(frame))
        form = json.loads(re.sub(r'\["sequence_number", \d+\]', '["sequence_number", 0]', text))
        if not shapes or shapes[-1] != form:
            shapes.append(form)
    return shapes


TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]

STREAMS: list[tuple[str, str, dict[str, Any], dict[str, str]]] = [
    ("chat_200.stream_usage", "/v1/chat/completions", {"stream_options": {"include_usage": True}}, {}),
    ("chat_max1.stream", "/v1/chat/completions", {"max_tokens": 1}, {}),
    (
        "chat_eos_at_once.stream_usage",
        "/v1/chat/completions",
        {"stream_options": {"include_usage": True}},
        {"sim_tokens": "0"},
    ),
    (
        "chat_tool_required_single.stream_usage",
        "/v1/chat/completions",
        {"tools": TOOLS, "tool_choice": "required", "stream_options": {"include_usage": True}},
        {},
    ),
    (
        "comp_max1.stream_usage",
        "/v1/completions",
        {"max_tokens": 1, "stream_options": {"include_usage": True}},
        {},
    ),
    ("responses_basic.stream", "/v1/responses", {"max_tokens": None, "max_output_tokens": 16, "temperature": 0}, {}),
]


@pytest.mark.parametrize(("name", "path", "extra", "headers"), STREAMS, ids=[item[0] for item in STREAMS])
async def test_streams_are_framed_as_recorded(
    client: Client,
    recorded: Recorded,
    name: str,
    path: str,
    extra: dict[str, Any],
    headers: dict[str, str],
) -> None:
    real = recorded(name)
    ours = await client.stream_body(extra, path=path, keep=True, **headers)
    assert ours.names == real.names
    assert ours.is_whole
    assert len(ours.chunks) == len(ours.frames)  # one event per chunk
    assert distinct(ours.frames) == distinct(real.frames)


async def test_choices_advance_together_and_every_chunk_counts(client: Client, recorded: Recorded) -> None:
    real = recorded("comp_n2.stream_cont")
    options = {"include_usage": True, "continuous_usage_stats": True}
    ours = await client.stream_body({"n": 2, "stream_options": options}, path="/v1/completions")
    kinds = {json.dumps(frame_shape(frame)) for frame in real.frames}
    assert {json.dumps(frame_shape(frame)) for frame in ours.frames} == kinds
    data = [json.loads(frame[6:]) for frame in ours.frames[:-1]]
    assert [d["choices"][0]["index"] for d in data[:-1]] == [0, 1] * 4
    assert [d["usage"]["completion_tokens"] for d in data] == [1, 1, 2, 2, 3, 3, 4, 4, 8]


async def test_tool_call_with_two_choices(client: Client, recorded: Recorded) -> None:
    real = recorded("chat_n2_tool.stream_usage")
    extra = {"n": 2, "tools": TOOLS, "tool_choice": "required", "stream_options": {"include_usage": True}}
    ours = await client.stream_body(extra)
    assert {json.dumps(frame_shape(f)) for f in ours.frames} == {json.dumps(frame_shape(f)) for f in real.frames}
    choices = [json.loads(frame[6:])["choices"][0] for frame in ours.frames[:-2]]
    calls = [call for c in choices if c["index"] == 1 for call in c["delta"].get("tool_calls", [])]
    arguments = "".join(call["function"].get("arguments", "") for call in calls)
    assert json.loads(arguments) == {"city": "Zürich", "unit": "C"}


async def test_responses_tool_call(client: Client, recorded: Recorded) -> None:
    real = recorded("responses_tool_required.stream")
    tools = [{"type": "function", "name": "add", "parameters": {}}]
    extra = {"tools": tools, "tool_choice": "required", "max_tokens": None, "max_output_tokens": 120}
    ours = await client.stream_body(extra, path="/v1/responses")

    def names(answer: Answer) -> list[str]:
        found = [frame.split(b"\n")[0].decode() for frame in answer.frames]
        return [name for i, name in enumerate(found) if i == 0 or found[i - 1] != name]

    assert names(ours) == [*names(real)[:6], "event: response.completed"]
    for number in range(4):
        ours_fields, real_fields = (list(json.loads(a.frames[number].split(b"data: ")[1])) for a in (ours, real))
        assert ours_fields == real_fields


async def test_messages_events(client: Client, recorded: Recorded) -> None:
    real = recorded("messages_stop_seq.stream")
    ours = await client.stream_body({"max_tokens": 3}, path="/v1/messages")
    firsts = [frame.split(b"\n")[0] for frame in ours.frames]
    assert firsts[:2] == [frame.split(b"\n")[0] for frame in real.frames[:2]]
    assert firsts[2:5] == [b"event: content_block_delta"] * 3
    assert firsts[5:] == [frame.split(b"\n")[0] for frame in real.frames[3:]]
    assert [distinct([f])[0] for f in ours.frames[:3]] == [distinct([f])[0] for f in real.frames[:3]]
    assert b'"stop_reason":"max_tokens"' in ours.frames[6]
    assert b'"output_tokens":3' in ours.frames[6]


async def test_messages_tool_use(client: Client) -> None:
    extra = {"tools": [{"name": "add", "input_schema": {}}], "tool_choice": {"type": "any"}}
    ours = await client.stream_body(extra, path="/v1/messages")
    data = [json.loads(frame.partition(b"data: ")[2]) for frame in ours.frames]
    assert data[1]["content_block"] == {"type": "tool_use", "id": "chatcmpl-tool-0", "name": "add", "input": {}}
    arguments = "".join(d["delta"]["partial_json"] for d in data if d["type"] == "content_block_delta")
    assert json.loads(arguments) == {"city": "Zürich", "unit": "C"}
    assert data[-2]["delta"]["stop_reason"] == "tool_use"


BODIES: list[tuple[str, str, dict[str, Any]]] = [
    ("chat_max1.nonstream", "/v1/chat/completions", {"max_tokens": 1}),
    (
        "chat_tool_required_single.nonstream",
        "/v1/chat/completions",
        {"tools": TOOLS, "tool_choice": "required"},
    ),
    ("comp_max1.nonstream", "/v1/completions", {"max_tokens": 1}),
    ("responses_basic.nonstream", "/v1/responses", {"max_tokens": None, "max_output_tokens": 16}),
]


@pytest.mark.parametrize(("name", "path", "extra"), BODIES, ids=[item[0] for item in BODIES])
async def test_whole_answers_are_as_recorded(
    client: Client, recorded: Recorded, name: str, path: str, extra: dict[str, Any]
) -> None:
    real = recorded(name)
    ours = await client.ask({**client.ASK, **extra}, path=path)
    assert ours.names == [*real.names, "connection"]
    assert int(ours.headers["content-length"]) == len(ours.body)
    assert shape(ours.json()) == shape(real.json())


async def test_whole_message(client: Client, recorded: Recorded) -> None:
    real, ours = recorded("messages_stop_seq.nonstream"), await client.ask(client.ASK, path="/v1/messages")
    assert list(ours.json()) == list(real.json())
    assert ours.json()["content"] == [{"type": "text", "text": " The relay passes every"}]


ERRORS: list[tuple[str, str, bytes]] = [
    ("err_unknown_model.stream", "/v1/chat/completions", b'{"model":"nope","messages":[],"stream":true}'),
    ("messages_err_model.stream", "/v1/messages", b'{"model":"nope","messages":[],"stream":true}'),
    ("err_bad_json", "/v1/chat/completions", b'{"model": "tiny", "messages": ['),
    ("err_empty_body", "/v1/chat/completions", b""),
    ("err_body_array", "/v1/chat/completions", b"[1,2]"),
    ("err_no_messages", "/v1/chat/completions", b'{"model": "tiny"}'),
    ("err_n0", "/v1/chat/completions", b'{"messages":[],"n":0}'),
    (
        "err_stream_options_without_stream",
        "/v1/chat/completions",
        b'{"messages":[],"stream_options":{"include_usage":true}}',
    ),
    ("err_404", "/nothing", b"{}"),
]


@pytest.mark.parametrize(("name", "path", "body"), ERRORS, ids=[item[0] for item in ERRORS])
async def test_errors_are_byte_equal(client: Client, recorded: Recorded, name: str, path: str, body: bytes) -> None:
    real, ours = recorded(name), await client.ask(body, path=path)
    assert ours.head.split(b"\r\n")[0] == real.head.split(b"\r\n")[0]
    assert ours.names == [*real.names, "connection"]
    assert ours.body == real.body


@pytest.mark.parametrize(
    "body", [b"[" * 100_000, b'{"messages": "\xff"}', b'{"messages": "\\ud800"}'], ids=["deep", "no UTF-8", "surrogate"]
)
async def test_bodies_no_decoder_likes(client: Client, body: bytes) -> None:
    assert (await client.ask(body)).status == 400
    assert (await client.ask(client.ASK)).status == 200


@pytest.mark.parametrize(
    "field",
    [
        {"model": 1},
        {"stream": "yes"},
        {"n": "two"},
        {"max_tokens": [1]},
        {"max_tokens": 0},
        {"stream_options": [1], "stream": True},
        {"tools": {"a": 1}, "tool_choice": "required"},
        {"tools": [1], "tool_choice": "required"},
        {"tool_choice": 3},
        {"temperature": "hot"},
        {"kv_transfer_params": "none"},
    ],
    ids=str,
)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses"])
async def test_wrong_types_are_refused(client: Client, path: str, field: dict[str, Any]) -> None:
    answer = await client.ask({**client.ASK, **field}, path=path)
    assert answer.status in {400, 404}
    assert answer.json()["error"]["code"] == answer.status
    assert (await client.ask(client.ASK, path=path)).status == 200


@pytest.mark.parametrize(
    ("name", "method", "path"),
    [
        ("get_health", "GET", "/health"),
        ("get_version", "GET", "/version"),
        ("head_health", "HEAD", "/health"),
        ("err_405", "GET", "/v1/chat/completions"),
        ("err_404", "GET", "/nothing"),
    ],
)
async def test_reports_are_byte_equal(client: Client, recorded: Recorded, name: str, method: str, path: str) -> None:
    real, ours = recorded(name), await client.ask(method=method, path=path)
    assert ours.head.split(b"\r\n")[0] == real.head.split(b"\r\n")[0]
    assert {**ours.headers, "date": "", "connection": ""} == {**real.headers, "date": "", "connection": ""}
    assert ours.body == real.body


async def test_models(client: Client, recorded: Recorded) -> None:
    ours = await client.ask(method="GET", path="/v1/models")
    assert shape(ours.json()) == shape(recorded("get_v1_models").json())
    assert ours.json()["data"][0]["id"] == "tiny"


async def test_http_10_is_answered_in_11_chunked(client: Client, recorded: Recorded) -> None:
    ours = await client.stream(version="1.0")
    assert ours.head.startswith(b"HTTP/1.1 200 OK")
    assert ours.names == recorded("chat_http10.stream").names
    assert ours.is_whole


async def test_request_id_becomes_the_bodys(client: Client) -> None:
    for path, prefix in [
        ("/v1/chat/completions", "chatcmpl-"),
        ("/v1/completions", "cmpl-"),
        ("/v1/responses", "resp_"),
    ]:
        answer = await client.ask(client.ASK, path=path, x_request_id="my-req-42")
        assert answer.json()["id"] == prefix + "my-req-42"
    assert [request["id"] for request in client.engine.requests()] == ["my-req-42"] * 3


def final_usage(answer: Answer) -> list[Any]:
    """The usage of each JSON frame: absent, null or an object."""
    return [json.loads(frame[6:]).get("usage", "absent") for frame in answer.frames[:-1]]


async def test_usage_variants(client: Client) -> None:
    numbers = {"prompt_tokens": 3, "total_tokens": 7, "completion_tokens": 4}
    assert final_usage(await client.stream()) == ["absent"] * 5
    assert final_usage(await client.stream(sim_usage="include")) == [*["absent"] * 5, numbers]
    assert final_usage(await client.stream(sim_usage="null-others")) == [*[None] * 5, numbers]
    assert final_usage(await client.stream(sim_usage="on-last-choice")) == [*["absent"] * 4, numbers]
    counts = [usage["completion_tokens"] for usage in final_usage(await client.stream(sim_usage="force"))]
    assert counts == [0, 1, 2, 3, 4, 4]
    detailed = final_usage(await client.stream(sim_usage="include, details", sim_reasoning="1"))[-1]
    assert detailed["prompt_tokens_details"] == {"cached_tokens": 1}
    assert detailed["completion_tokens_details"] == {"reasoning_tokens": 1}


async def test_continuous_without_include_is_ignored_as_by_vllm(client: Client) -> None:
    options = {"include_usage": False, "continuous_usage_stats": True}
    assert final_usage(await client.stream_body({"stream_options": options})) == ["absent"] * 5


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"])
async def test_stream_and_whole_answer_say_the_same(client: Client, path: str) -> None:
    def texts(value: Any) -> str:
        if isinstance(value, dict):
            return "".join(texts(v) for k, v in value.items() if k in WANTED or isinstance(v, (dict, list)))
        if isinstance(value, list):
            return "".join(texts(item) for item in value)
        return value if isinstance(value, str) else ""

    WANTED = {"content", "text"}
    deltas = {b"response.output_text.delta", b"content_block_delta"}
    streamed = ""
    for frame in (await client.stream(path=path, sim_tokens="60")).frames:
        event, _, data = frame.rpartition(b"data: ")
        if data.startswith(b"{") and (not event or any(name in event for name in deltas)):
            value = json.loads(data)
            delta = value.get("delta")
            streamed += delta if isinstance(delta, str) else texts(value)
    whole = await client.ask(client.ASK, path=path, sim_tokens="60")
    assert "東京" in streamed
    assert streamed == texts(whole.json())


async def test_prefill_answers_with_a_kv_handle(client: Client) -> None:
    params = {"do_remote_decode": True, "do_remote_prefill": False}
    answer = await client.ask({**client.ASK, "kv_transfer_params": params})
    handle = answer.json()["kv_transfer_params"]
    assert handle["do_remote_prefill"] is True
    assert handle["remote_engine_id"]
    assert (await client.ask(client.ASK)).json()["kv_transfer_params"] is None


class TestStamp:
    @pytest.fixture
    def config(self) -> EngineConfig:
        return EngineConfig(stamp=True)

    async def test_tokens_carry_number_and_clock(self, client: Client) -> None:
        answer = await client.stream()
        contents = [json.loads(frame[6:])["choices"][0]["delta"]["content"] for frame in answer.frames[1:-1]]
        assert [re.fullmatch(r" (\d{5}):\d{15}", content)[1] for content in contents] == [  # type: ignore[index]
            "00000",
            "00001",
            "00002",
            "00003",
        ]
