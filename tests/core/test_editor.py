"""Frames that change on their way: only the one meant, only the object meant, however the stream is cut."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from decimal import Decimal
from itertools import pairwise
from typing import Final, TypeAlias

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relay.core.cost import Prices
from relay.core.dialect import Meter
from relay.core.editor import UsageEditor
from relay.core.frames import FrameRelay, Pieces
from relay.core.framing import ChunkDecoder, CloseDecoder
from relay.core.request import Route
from relay.core.rewrite import is_usage_only, set_cached_tokens
from tests.core.captured import Captured, captured, dechunk, frames_of, streams

#: One for each, so that a sum shows what was counted.
PRICES: Final = Prices(Decimal(1_000_000), Decimal(500_000), Decimal(100_000_000))
MANY: Final = 1 << 20

ROLE: Final = b'data: {"choices":[{"index":0,"delta":{"role":"assistant","content":""}}]}\n\n'
TOKEN: Final = (
    b'data: {"id":"c","object":"chat.completion.chunk","created":1,"model":"m","choices":'
    b'[{"index":0,"delta":{"content":"a \\"usage\\":{}"},"logprobs":null,"finish_reason":null}]}\n\n'
)
USAGE: Final = b'data: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":2,"total_tokens":5}}\n\n'
PRICED: Final = (
    b'data: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":2,"total_tokens":5,'
    b'"prompt_total_cost":3,"completion_total_cost":200,"total_cost":203}}\n\n'
)
DONE: Final = b"data: [DONE]\n\n"
CHAT: Final = (ROLE, TOKEN, TOKEN, USAGE, DONE)


def through(
    raw: bytes, cuts: list[int], editor: UsageEditor, route: Route = Route.CHAT, *, is_chunked: bool = True
) -> tuple[bytes, FrameRelay]:
    """What becomes of an engine's bytes in pieces: the payload for the client."""
    relay = FrameRelay(CloseDecoder(), Meter(route), is_chunked=is_chunked, max_frame_bytes=MANY, editor=editor)
    sent = b""
    for begin, end in pairwise([0, *sorted(cuts), len(raw)]):
        out: Pieces = []
        buffer = bytearray(raw[begin:end])
        relay.feed(bytes(buffer), memoryview(buffer), out)
        sent += b"".join(out)
        buffer[:] = b"\xaa" * len(buffer)
    out = []
    relay.decoder.at_close()
    relay.finish(out)
    sent += b"".join(out)
    return (dechunk(sent)[0] if is_chunked else sent), relay


def in_chunks(frames: tuple[bytes, ...]) -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(frame), frame) for frame in frames) + b"0\r\n\r\n"


def through_chunks(
    raw: bytes, cuts: list[int], editor: UsageEditor, route: Route = Route.CHAT
) -> tuple[bytes, FrameRelay]:
    """The same for a body in chunks, to a client that takes them: the way of ordinary frames."""
    relay = FrameRelay(ChunkDecoder(), Meter(route), is_chunked=True, max_frame_bytes=MANY, editor=editor)
    sent = b""
    for begin, end in pairwise([0, *sorted(cuts), len(raw)]):
        out: Pieces = []
        buffer = bytearray(raw[begin:end])
        relay.feed(bytes(buffer), memoryview(buffer), out)
        sent += b"".join(out)
        buffer[:] = b"\xaa" * len(buffer)
    assert relay.decoder.is_done
    out = []
    relay.finish(out)
    payload, is_whole = dechunk(sent + b"".join(out))
    assert is_whole
    return payload, relay


Cut: TypeAlias = Callable[[bytes], list[int]]
CUTS: Final[dict[str, Cut]] = {"in one piece": lambda _: [], "byte by byte": lambda raw: [*range(1, len(raw))]}


@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
def test_exactly_the_usage_frame_is_hidden(cut: Cut) -> None:
    raw = in_chunks(CHAT)
    payload, relay = through_chunks(raw, cut(raw), UsageEditor(hides_usage=True))
    assert payload == ROLE + TOKEN + TOKEN + DONE
    assert (relay.finder.frames, relay.meter.content_frames, relay.meter.saw_end) == (4, 2, True)
    assert relay.meter.usage is not None
    assert relay.meter.usage.total_tokens == 5
    body = b"".join(CHAT)
    for is_chunked in (True, False):
        assert through(body, cut(body), UsageEditor(hides_usage=True), is_chunked=is_chunked)[0] == payload


@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
def test_costs_come_into_the_usage_object(cut: Cut) -> None:
    raw = in_chunks(CHAT)
    payload, relay = through_chunks(raw, cut(raw), UsageEditor(prices=PRICES))
    assert payload == ROLE + TOKEN + TOKEN + PRICED + DONE
    assert relay.finder.frames == 5
    body = b"".join(CHAT)
    for is_chunked in (True, False):
        assert through(body, cut(body), UsageEditor(prices=PRICES), is_chunked=is_chunked)[0] == payload


@settings(max_examples=60, deadline=None)
@given(st.data(), st.sampled_from([answer for answer in streams() if 0 < len(answer.body) < 20_000]))
def test_recordings_in_any_pieces_change_in_nothing_else(data: st.DataObject, answer: Captured) -> None:
    raw = answer.raw_body if answer.raw_body != answer.body and answer.is_complete else b""
    cuts = data.draw(st.lists(st.integers(0, max(0, len(raw) - 1)), max_size=12))
    for editor in (UsageEditor(hides_usage=True), UsageEditor(prices=PRICES)):
        if raw:
            payload, relay = through_chunks(raw, cuts, editor, answer.route)
        else:
            payload, relay = through(answer.body, [], editor, answer.route)
        frames = frames_of(answer.body)
        meter = Meter(answer.route)
        expected = []
        for frame in frames:
            edited = UsageEditor(hides_usage=editor.hides_usage, prices=editor.prices).edit(frame, meter)
            expected.append(b"" if edited is None else edited)
        assert payload.startswith(b"".join(expected[:-1]))
        assert payload == b"".join(expected) or not answer.body.endswith(b"\n\n")
        changed = [frame for frame, new in zip(frames, expected, strict=True) if new != frame]
        assert all(b'"usage":{' in frame for frame in changed)
        if editor.hides_usage:
            assert all(is_usage_only(frame) for frame in changed)
        assert relay.meter.usage == meter.usage


@pytest.mark.parametrize(
    ("frame", "is_it"),
    [
        (USAGE, True),
        (b'data:{ "usage" : {} , "choices" : [ ] }\r\n\r\n', True),
        (b'event: x\ndata: {"usage":{},\ndata: "choices":[]}\n\n', True),
        (TOKEN, False),
        (b'data: {"choices":[],"usage":null}\n\n', False),
        (b'data: {"choices":[{"index":0,"delta":{}}],"usage":{"prompt_tokens":1}}\n\n', False),
        (b'data: {"usage":{"prompt_tokens":1}}\n\n', False),  # no chunk of these dialects
        (b'event: message_delta\ndata: {"type":"message_delta","usage":{"output_tokens":1}}\n\n', False),
        (b'data: {"choices":{},"usage":{}}\n\n', False),
        (b'data: "usage"\n\n', False),
        (DONE, False),
        (b": usage\n\n", False),
    ],
)
def test_what_is_nothing_but_usage(frame: bytes, is_it: bool) -> None:
    assert is_usage_only(frame) is is_it
    assert (UsageEditor(hides_usage=True).edit(frame, Meter(Route.CHAT)) is None) is is_it


def test_frames_that_are_no_concern_pass_as_the_same_object() -> None:
    editor = UsageEditor(hides_usage=True, prices=PRICES)
    meter = Meter(Route.CHAT)
    for frame in (ROLE, DONE, b"data: not json\n\n", b": ping\n\n", b'data: {"usage": 3}\n\n'):
        assert not editor.concerns(frame) or editor.edit(frame, meter) is frame


def test_a_last_frame_without_its_blank_line_is_edited_too() -> None:
    assert through(ROLE + USAGE[:-2], [], UsageEditor(prices=PRICES))[0] == ROLE + PRICED
    assert through(ROLE + USAGE[:-1], [], UsageEditor(prices=PRICES))[0] == ROLE + PRICED
    assert through(ROLE + USAGE[:-2], [], UsageEditor(hides_usage=True))[0] == ROLE


def test_nothing_but_a_hidden_frame_leaves_a_well_formed_body() -> None:
    payload, relay = through_chunks(in_chunks((USAGE,)), [], UsageEditor(hides_usage=True))
    assert (payload, relay.finder.frames) == (b"", 0)


def test_cocoon_whole_events_byte_by_byte_and_json() -> None:
    """The scenarios of a billing proxy: cost in, ``[DONE]`` verbatim, a torn end completed, other frames passed on."""
    frames = (b"data: hello, not JSON\n\n", TOKEN, USAGE, b"data: [DONE]\n\n")
    for cuts in ([], [*range(1, len(b"".join(frames)))]):
        payload, relay = through(b"".join(frames), cuts, UsageEditor(prices=PRICES))
        assert payload == b"data: hello, not JSON\n\n" + TOKEN + PRICED + b"data: [DONE]\n\n"
        assert relay.meter.opaque_frames == 1
    torn, _ = through(b"".join(frames).removesuffix(b"\n\n"), [], UsageEditor(prices=PRICES))
    assert torn == payload
    body = b'{"choices": [{"message": {"content": "a"}}], "usage": {"prompt_tokens": 3, "completion_tokens": 2}}'
    after = UsageEditor(prices=PRICES).edit_body(body, Meter(Route.CHAT))
    assert after == body[:-2] + b',"prompt_total_cost":3,"completion_total_cost":200,"total_cost":203}}'


def test_the_cost_of_a_message_counts_what_its_start_has_told() -> None:
    start = b'event: message_start\ndata: {"type":"message_start","message":{"usage":{"input_tokens":7}}}\n\n'
    delta = b'event: message_delta\ndata: {"type":"message_delta","delta":{},"usage":{"output_tokens":2}}\n\n'
    payload, _ = through(start + delta, [], UsageEditor(prices=PRICES), Route.MESSAGES)
    assert payload.startswith(start)
    usage = json.loads(payload.rpartition(b"data: ")[2])["usage"]
    assert usage == {"output_tokens": 2, "prompt_total_cost": 7, "completion_total_cost": 200, "total_cost": 207}


# -- cached tokens, carried over from a prefiller


@pytest.mark.parametrize(
    ("answer", "after"),
    [
        (b'data: {"choices":[],"usage":{"prompt_tokens":3}}\n\n',
         b'data: {"choices":[],"usage":{"prompt_tokens":3,"prompt_tokens_details":{"cached_tokens":2}}}\n\n'),
        (b'{"usage":{"prompt_tokens":3,"prompt_tokens_details":null, "x":1}}',
         b'{"usage":{"prompt_tokens":3,"prompt_tokens_details":{"cached_tokens":2}, "x":1}}'),
        (b'data: {"usage":{"prompt_tokens":3,"prompt_tokens_details":{"cached_tokens": 0,"audio_tokens":1}}}\r\n\r\n',
         b'data: {"usage":{"prompt_tokens":3,"prompt_tokens_details":{"cached_tokens": 2,"audio_tokens":1}}}\r\n\r\n'),
        (b'data: {"response":{"usage":{"input_tokens":3,"input_tokens_details":{"cached_tokens":0}}}}\n\n',
         b'data: {"response":{"usage":{"input_tokens":3,"input_tokens_details":{"cached_tokens":2}}}}\n\n'),
        (b'{"object":"response","usage":{"input_tokens":3}}',
         b'{"object":"response","usage":{"input_tokens":3,"input_tokens_details":{"cached_tokens":2}}}'),
        (b'data: {"type":"message_delta","usage":{"input_tokens":3,"output_tokens":1}}\n\n', None),
        (b'data: {"choices":[],"usage":null}\n\n', None),
        (b'data: {"usage":{"prompt_tokens":null}}\n\n', None),
        (b"data: [DONE]\n\n", None),
        (b"", None),
    ],
)  # fmt: skip
def test_cached_tokens_are_set_and_nothing_else(answer: bytes, after: bytes | None) -> None:
    assert set_cached_tokens(answer, 2) == (answer if after is None else after)
    if after is None:
        assert set_cached_tokens(answer, 2) is answer


def test_recordings_say_what_was_set() -> None:
    told = 0
    for answer in captured():
        for part in frames_of(answer.body) if answer.is_stream else [answer.body]:
            after = set_cached_tokens(part, 1)
            if after != part:
                meter = Meter(answer.route)
                (meter.inspect if answer.is_stream else meter.take_body)(after)
                assert meter.usage is not None
                assert meter.usage.cached_tokens == 1
                told += 1
    assert told > 150


def test_cached_tokens_count_in_record_and_cost() -> None:
    editor = UsageEditor(prices=PRICES)
    editor.cached_tokens = 2
    payload, relay = through(b"".join(CHAT), [], editor)
    usage = json.loads(frames_of(payload)[3][6:])["usage"]
    assert usage["prompt_tokens_details"] == {"cached_tokens": 2}
    assert usage["prompt_total_cost"] == 2
    assert relay.meter.usage is not None
    assert relay.meter.usage.cached_tokens == 2
    assert editor.edits_bodies


def test_many_random_pieces_of_a_stream_with_continuous_usage() -> None:
    frames = tuple(
        b'data: {"choices":[{"index":0,"delta":{"content":"t"}}],"usage":{"prompt_tokens":3,"total_tokens":%d}}\n\n'
        % number
        for number in range(1, 30)
    )  # fmt: skip
    raw = in_chunks((*frames, USAGE, DONE))
    rng = random.Random(5)
    for _ in range(20):
        payload, relay = through_chunks(raw, rng.sample(range(1, len(raw)), 40), UsageEditor(hides_usage=True))
        assert payload == b"".join(frames) + DONE
        assert relay.meter.content_frames == 29
