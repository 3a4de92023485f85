"""Streams made into one body: recorded pairs, every spelling of a frame, ends, the limit, and what it costs."""

from __future__ import annotations

import json
import sys
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, Self

import pytest

from relay.core.aggregate import Aggregator, TooLarge, Truncated, aggregator_for, parts
from relay.core.framing import Buffer
from relay.core.request import Route
from tests.core.captured import CAPTURES, Captured, captured, frames_of, stream, streams

MANY = 10**8

#: The engine's own differences (facts/engines.md): a call cut by ``max_tokens``. Its body has the model's text, its
#: stream the call as far as it came; after complete calls, ``finish_reason`` is ``tool_calls`` against ``length``.
CUT_CALLS = {
    "chat_tool_auto_forced",
    "chat_tool_required_n2",
    "chat_tool_required_truncated",
    "responses_tool_required",
}
CUT_BEHIND_CALLS = {"chat_tool_auto_text_then_call"}
#: With ``echo`` and ``logprobs`` vLLM's body has ``prompt_logprobs`` for its stream's ``prompt_token_ids``.
ECHOED_LOGPROBS = {"comp_echo_logprobs"}


def aggregate(route: Route, frames: Iterable[Buffer], *, max_bytes: int = MANY, request: bytes = b"{}") -> Any:
    aggregator = aggregator_for(route, max_bytes=max_bytes, request=request)
    for frame in frames:
        aggregator.feed(frame)
    return json.loads(aggregator.result())


def aggregate_recorded(name: str) -> Any:
    answer = stream(name)
    request = (CAPTURES / f"{name}.request.json").read_bytes()
    return aggregate(answer.route, frames_of(answer.body), request=request)


# -- recorded pairs

BODIES = {answer.name: answer for answer in captured() if not answer.is_stream and answer.status == 200}


def base_name(answer: Captured) -> str:
    return answer.name.partition(".stream")[0]


PAIRS = [
    answer for answer in streams() if f"{base_name(answer)}.nonstream" in BODIES and answer.route is not Route.OTHER
]


def comparable(value: Any) -> Any:
    """What two answers to one request have in common: no ids, no times, arguments as the JSON they are."""
    if isinstance(value, list):
        return [comparable(item) for item in value]
    if not isinstance(value, dict):
        return value
    found = {key: comparable(item) for key, item in value.items() if key not in ("id", "created", "created_at")}
    if "arguments" in found:
        found["arguments"] = json.loads(found["arguments"])
    return found


def pair(answer: Captured) -> tuple[Any, Any]:
    """The engine's body, and the one made of its stream."""
    body = json.loads(BODIES[f"{base_name(answer)}.nonstream"].body)
    made = aggregate_recorded(answer.name)
    if "stream_usage" not in answer.name and "stream_cont" not in answer.name and "choices" in body:
        del body["usage"]  # nobody had asked for it
    return body, made


def test_there_are_pairs_of_every_route() -> None:
    assert len(PAIRS) >= 70
    assert {answer.route for answer in PAIRS} == {*Route} - {Route.OTHER}


@pytest.mark.parametrize(
    "answer",
    [answer for answer in PAIRS if base_name(answer) not in CUT_CALLS | CUT_BEHIND_CALLS | ECHOED_LOGPROBS],
    ids=repr,
)
def test_a_pair_is_equal(answer: Captured) -> None:
    body, made = pair(answer)
    assert comparable(made) == comparable(body)


@pytest.mark.parametrize("answer", [answer for answer in PAIRS if base_name(answer) in CUT_CALLS], ids=repr)
def test_a_pair_is_equal_but_for_the_call_that_was_cut(answer: Captured) -> None:
    body, made = pair(answer)
    if answer.route is Route.RESPONSES:
        assert [item["type"] for item in body.pop("output")] == ["message"]
        assert [item["type"] for item in made.pop("output")] == ["function_call"] * 3
    else:
        for ours, theirs in zip(made["choices"], body["choices"], strict=True):
            assert "<tool_call>" in theirs["message"].pop("content")
            assert not ours["message"].pop("content")
            assert ours["message"].pop("tool_calls")[0]["function"]["name"] == "add"
            assert ours["finish_reason"] == "length"
    assert comparable(made) == comparable(body)


@pytest.mark.parametrize("answer", [answer for answer in PAIRS if base_name(answer) in CUT_BEHIND_CALLS], ids=repr)
def test_a_pair_is_equal_but_for_why_it_ended(answer: Captured) -> None:
    body, made = pair(answer)
    assert body["choices"][0].pop("finish_reason") == "tool_calls"
    assert made["choices"][0].pop("finish_reason") == "length"
    assert comparable(made) == comparable(body)


@pytest.mark.parametrize("answer", [answer for answer in PAIRS if base_name(answer) in ECHOED_LOGPROBS], ids=repr)
def test_a_pair_is_equal_but_for_what_is_said_of_the_prompt(answer: Captured) -> None:
    body, made = pair(answer)
    assert body["choices"][0].pop("prompt_logprobs")
    assert made["choices"][0].pop("prompt_logprobs") is None
    assert comparable(made) == comparable(body)


# -- frames in every spelling


def reframed(frame: bytes, line_end: bytes, *, field: bytes = b"data: ", more: bytes = b"") -> bytes:
    """The same event with other line ends, its data spread over lines where it is an object."""
    lines = [line for line in frame.split(b"\n") if line]
    data = b"".join(line.removeprefix(b"data: ") for line in lines if line.startswith(b"data: "))
    spread = json.dumps(json.loads(data), indent=1).encode() if data.startswith(b"{") else data
    others = [line for line in lines if not line.startswith(b"data: ")]
    return line_end.join(
        [*others, *([more] if more else []), *(field + line for line in spread.split(b"\n")), b"", b""]
    )


SPELLINGS: dict[str, Callable[[bytes], Buffer]] = {
    "crlf": lambda frame: reframed(frame, b"\r\n"),
    "cr": lambda frame: reframed(frame, b"\r"),
    "no space": lambda frame: reframed(frame, b"\n", field=b"data:"),
    "comments and fields": lambda frame: reframed(frame, b"\n", more=b": hi\nid: 1\nretry: 5\nx\nevent"),
    "blank lines in front": lambda frame: b"\r\n\n" + frame,
    "no blank line behind": lambda frame: frame.rstrip(b"\n"),
    "bytearray": bytearray,
}


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize(
    "name",
    ["chat_n2_tool.stream_usage", "comp_basic.stream_cont", "messages_stop_seq.stream", "responses_basic.stream"],
)
def test_spelling_of_frames_does_not_matter(name: str, spelling: str) -> None:
    frames = frames_of(stream(name).body)
    plain = aggregate(stream(name).route, frames)
    assert aggregate(stream(name).route, map(SPELLINGS[spelling], frames)) == plain
    assert aggregate(stream(name).route, [b"\xef\xbb\xbf" + frames[0], b": ping\n\n", *frames[1:]]) == plain


# -- ends

ONE_OF_EACH = ["chat_n2_tool.stream", "comp_basic.stream_usage", "messages_stop_seq.stream", "responses_basic.stream"]


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_a_stream_cut_anywhere_is_truncated(name: str) -> None:
    answer = stream(name)
    frames = frames_of(answer.body)
    for count in range(len(frames)):
        with pytest.raises(Truncated, match="ended without"):
            aggregate(answer.route, frames[:count])
    assert aggregate(answer.route, frames)


@pytest.mark.parametrize("name", ["fail/sigkill_api_stream", "fail/client_abort_stream"])
def test_a_recorded_cut_is_truncated(name: str) -> None:
    with pytest.raises(Truncated, match=r"\[DONE\]"):
        aggregate(Route.CHAT, frames_of(stream(name).body)[:-1])


@pytest.mark.parametrize(
    ("route", "frames", "missing"),
    [
        (Route.CHAT, [], "without a choice"),
        (Route.CHAT, [{"choices": []}, {"choices": None}], "without a choice"),
        (Route.CHAT, [{"choices": [{"index": 0, "delta": {"content": "a"}}]}], "finish_reason"),
        (Route.CHAT, [{"choices": [{"index": 0, "finish_reason": "stop"}, {"index": 1}]}], "finish_reason"),
        (Route.COMPLETIONS, [{"choices": [{"index": 0, "text": "a", "finish_reason": None}]}], "finish_reason"),
        (Route.MESSAGES, [{"type": "message_stop"}], "stop_reason"),
        (Route.MESSAGES, [{"type": "message_start", "message": {"stop_reason": None}}, {"type": "message_stop"}],
         "stop_reason"),
        (Route.MESSAGES, [], "message_stop"),
        (Route.RESPONSES, [{"type": "response.completed"}], "response.completed"),
    ],
)  # fmt: skip
def test_an_end_mark_alone_is_no_answer(route: Route, frames: list[Any], missing: str) -> None:
    events = [b"data: %b\n\n" % json.dumps(frame).encode() for frame in frames]
    with pytest.raises(Truncated, match=missing):
        aggregate(route, [*events, b"data: [DONE]\n\n"])


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_what_comes_behind_the_end_is_ignored(name: str) -> None:
    answer = stream(name)
    frames = frames_of(answer.body)
    assert aggregate(answer.route, [*frames, b"data: [DONE]\n\n", b"data: x\n\n"]) == aggregate(answer.route, frames)


def test_a_route_without_a_dialect() -> None:
    with pytest.raises(ValueError, match="other"):
        aggregator_for(Route.OTHER, max_bytes=1)


# -- the limit, and what it costs


def chunk(delta: dict[str, Any], **members: Any) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": None, **members}
    return b"data: %b\n\n" % json.dumps({"id": "x", "choices": [choice]}).encode()


GROWING: dict[str, Callable[[int], bytes]] = {
    "content": lambda _: chunk({"content": "token"}),
    "reasoning": lambda _: chunk({"reasoning_content": "token"}),
    "arguments": lambda _: chunk({"tool_calls": [{"index": 0, "function": {"arguments": "token"}}]}),
    "logprobs": lambda _: chunk({}, logprobs={"content": [{"token": "a"}]}),
    "token ids": lambda _: chunk({}, token_ids=[1, 2]),
    "annotations": lambda _: chunk({"annotations": [{"type": "url_citation"}]}),
    "tool calls": lambda number: chunk({"tool_calls": [{"index": number}]}),
    "members": lambda number: chunk({f"m{number}": 1}),
    "choices": lambda number: b'data: {"choices":[{"index":%d}]}\n\n' % number,
}


@pytest.mark.parametrize("growing", GROWING)
def test_nothing_grows_beyond_the_limit(growing: str) -> None:
    aggregator = aggregator_for(Route.CHAT, max_bytes=2000)
    frames = map(GROWING[growing], range(2000))
    with pytest.raises(TooLarge, match="2000 bytes"):
        deque(map(aggregator.feed, frames), maxlen=0)
    assert 2000 < aggregator.size < 2100


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_the_limit_is_about_the_answer_not_the_stream(name: str) -> None:
    answer = stream(name)
    frames = frames_of(answer.body)
    size = len(json.dumps(aggregate(answer.route, frames)))
    assert aggregate(answer.route, frames, max_bytes=2 * size)
    with pytest.raises(TooLarge):
        aggregate(answer.route, frames, max_bytes=size // 4)


def test_what_does_not_grow_is_not_counted() -> None:
    aggregator = aggregator_for(Route.CHAT, max_bytes=500)
    for number in range(1000):
        aggregator.feed(chunk({"role": "assistant"}, stop_reason=number))
    assert aggregator.size < 200


def calls_of(function: Callable[..., Any], *args: Any) -> int:
    """How many functions, C's included, are called."""
    count = 0

    def on_event(_frame: object, event: str, _arg: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(on_event)
    try:
        function(*args)
    finally:
        sys.setprofile(before)
    return count


def test_work_is_linear_in_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    moved = 0

    class Counted(bytearray):
        def __iadd__(self, more: bytes) -> Self:  # type: ignore[misc,override]  # of all buffers, only bytes come
            nonlocal moved
            moved += len(more)
            return super().__iadd__(more)

    monkeypatch.setattr(parts, "bytearray", Counted, raising=False)
    aggregator = aggregator_for(Route.CHAT, max_bytes=MANY)
    frame = chunk({"content": "token"})
    aggregator.feed(frame)
    costs = {calls_of(aggregator.feed, frame) for _ in range(3000)}
    assert len(costs) == 1  # each frame the same, however long the answer is by now
    assert moved == 3001 * len("token")  # each byte once

    def end(aggregator: Aggregator) -> int:
        aggregator.feed(chunk({}, finish_reason="stop"))
        aggregator.feed(b"data: [DONE]\n\n")
        return calls_of(aggregator.result)

    short = aggregator_for(Route.CHAT, max_bytes=MANY)
    short.feed(frame)
    assert end(aggregator) == end(short)
    assert json.loads(aggregator.result())["choices"][0]["message"]["content"] == "token" * 3001


def test_an_aggregator_tells_its_state() -> None:
    aggregator = aggregator_for(Route.COMPLETIONS, max_bytes=MANY)
    assert repr(aggregator) == "<CompletionsAggregator open 0 bytes>"
    aggregator.feed(b"data: [DONE]\n\n")
    assert repr(aggregator) == "<CompletionsAggregator complete 0 bytes>"
