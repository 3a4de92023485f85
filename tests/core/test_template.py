"""A chunk is like another only where the pattern would have found it, of that size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from relay.core import ordinary
from relay.core.dialect import Meter
from relay.core.frames import FrameRelay
from relay.core.framing import ChunkDecoder
from relay.core.request import Route
from relay.core.template import MOST_BYTES, Template
from tests.core.captured import Captured, frames_of, stream, streams


def chunk(frame: bytes, *, padding: bytes = b"") -> bytes:
    """One frame in a chunk; the size behind `padding`."""
    return b"%b%x\r\n%b\r\n" % (padding, len(frame), frame)


def ordinary_end(route: Route, data: bytes, position: int = 0) -> int:
    """The end of the chunk at `position` where the pattern finds it, and its size is right; else `position`."""
    found = ordinary.CHUNKS[route].pattern.match(data, position)
    if found is None or int(found[1], 16) != found.end() - found.end(1) - 4:
        return position
    return found.end()


def template_of(route: Route, data: bytes) -> Template:
    """The template that the chunk at the beginning of `data` makes."""
    form = ordinary.CHUNKS[route]
    found = form.pattern.match(data)
    assert found is not None
    return Template(found, is_line=form.is_line)


CHAT: Final = (
    b'data: {"id":"c","choices":[{"index":0,"delta":{"content":"%b"},"logprobs":null,"finish_reason":null}]}\n\n'
)
CALL: Final = (
    b'data: {"id":"c","choices":[{"index":0,"delta":{"tool_calls":[{"index":0,"function":{"arguments":"%b"}}]},'
    b'"logprobs":null,"finish_reason":null}]}\n\n'
)
COMPLETION: Final = b'data: {"id":"c","choices":[{"index":0,"text":"%b","finish_reason":null}]}\n\n'
EVENT: Final = b"event: content_block_delta\ndata: {%b}\n\n"
TYPED: Final = b'data: {"type":"response.output_text.delta","delta":"%b"}\n\n'
FORMS: Final = [
    pytest.param(Route.CHAT, CHAT, id="chat"),
    pytest.param(Route.CHAT, CALL, id="call"),
    pytest.param(Route.OTHER, CHAT, id="other"),
    pytest.param(Route.COMPLETIONS, COMPLETION, id="completion"),
    pytest.param(Route.MESSAGES, EVENT, id="event"),
    pytest.param(Route.RESPONSES, TYPED, id="typed"),
]


@pytest.mark.parametrize(("route", "form"), FORMS)
@pytest.mark.parametrize("text", [b"a", b" the", "né\u2028".encode(), b"x" * 300, b"}],", b":null"])
def test_another_text_of_any_length(route: Route, form: bytes, text: bytes) -> None:
    template = template_of(route, chunk(form % b"one"))
    data = b"before" + chunk(form % text)
    assert template.end_of(data + b"behind", 6) == len(data) == ordinary_end(route, data, 6)
    assert template.end_of(data, 6) == len(data)
    for stop in range(6, len(data)):
        assert template.end_of(data[:stop], 6) == 6


@pytest.mark.parametrize(("route", "form"), FORMS)
def test_texts_of_changing_length(route: Route, form: bytes) -> None:
    template = template_of(route, chunk(form % b"one"))
    for length in (1, 300, 2, 200, 20, 3):
        data = chunk(form % (b"x" * length))
        assert template.end_of(data, 0) == len(data)


@pytest.mark.parametrize(("route", "form"), FORMS)
def test_the_longest_that_is_known(route: Route, form: bytes) -> None:
    template = template_of(route, chunk(form % b"one"))
    room = MOST_BYTES - len(form % b"")
    for length, is_known in ((room - 1, True), (room, False)):
        data = chunk(form % (b"x" * length))
        assert template.end_of(data, 0) == (len(data) if is_known else 0)


@pytest.mark.parametrize(("route", "form"), FORMS)
@pytest.mark.parametrize(
    "change",
    [
        lambda form: chunk(form % b""),
        lambda form: chunk(form % b'a\\"b'),
        lambda form: chunk(form % b"a\\"),
        lambda form: chunk(form % b"a\\\nb"),
        lambda form: chunk(form % b"a\\b\nc"),
        lambda form: chunk(form % b"a\rb"),
        lambda form: chunk(form % (b"x" * MOST_BYTES)),
        lambda form: chunk(form % b"a", padding=b"0"),
        lambda form: chunk(form % b"a", padding=b"1"),
        lambda form: chunk(form % b"a").upper(),
        lambda form: chunk(form % b"a").replace(b"\r\n", b";x\r\n", 1),
        lambda form: chunk(form % b"a").replace(b"\r\n", b"\r\r\n", 1),
        lambda form: chunk(form % b"a").replace(b"\r\n", b"\r\nJUNK\r\n", 1),
        lambda form: chunk(form.replace(b"\n\n", b"\n") % b"a"),
        lambda form: chunk(form.replace(b"data", b"date") % b"a"),
        lambda form: chunk(form.replace(b"}", b',"usage":{}}', 1) % b"a"),
        lambda form: chunk(form % b"a" + form % b"b"),
        lambda form: chunk(form % b"a")[:-2] + b"\n\n",
        lambda form: b"",
        lambda form: b"0\r\n\r\n",
    ],
)
@pytest.mark.parametrize(("first", "padding"), [(b"one", b""), (b"x" * 300, b""), (b"one", b"00000")])
def test_what_is_not_alike_is_left_to_the_pattern(
    route: Route, form: bytes, change: Callable[[bytes], bytes], first: bytes, padding: bytes
) -> None:
    data = change(form)
    end = template_of(route, chunk(form % first, padding=padding)).end_of(data, 0)
    assert end in (0, ordinary_end(route, data))


PIECES: Final = st.sampled_from(
    [b"a", b'"', b"\\", b"\r", b"\n", b"\n\n", b"\r\n", b"}", b'"}', b"data: ", b'"},"logprobs":null', b"{", b"\xff"]
)


@given(
    st.sampled_from([form.values for form in FORMS]),
    st.sampled_from([b"one", b"x" * 300]),
    st.sampled_from([b"", b"0", b"00000"]),
    st.lists(PIECES, max_size=6).map(b"".join),
    st.integers(-3, 3),
    st.integers(0, 200) | st.integers(0, 8),
    PIECES | st.sampled_from([b"", b"\r\nJUNK"]),
)
@example((Route.CHAT, CHAT), b"x" * 300, b"", b"a", 0, 2, b"\r")
@example((Route.CHAT, CHAT), b"one", b"00000", b"a", 0, 2, b"\r\nJUNK")
def test_whatever_is_found_the_pattern_finds(
    route_and_form: tuple[Route, bytes], first: bytes, padding: bytes, text: bytes, off: int, at: int, put: bytes
) -> None:
    route, form = route_and_form
    frame = form % text
    data = b"%x\r\n%b\r\n" % (len(frame) + off, frame)
    data = data[:at] + put + data[at:]
    template = template_of(route, chunk(form % first, padding=padding))
    end = template.end_of(data, 0)
    assert end in (0, ordinary_end(route, data))


@pytest.mark.parametrize("captured", streams(), ids=repr)
def test_recorded_streams(captured: Captured) -> None:
    data = b"".join(map(chunk, frames_of(captured.body)))
    template = None
    position = 0
    while position < len(data):
        end = ordinary_end(captured.route, data, position)
        if template is not None:
            assert template.end_of(data, position) in (position, end)
        if end > position:
            template = template_of(captured.route, data[position:])
        position = end if end > position else data.index(b"\n\n\r\n", position) + 4


# -- which frames of a stream the pattern still sees


def seen_by_the_pattern(route: Route, frames: list[bytes]) -> list[int]:
    """Those, of frames that come one a read."""
    relay = FrameRelay(ChunkDecoder(), Meter(route), is_chunked=True, max_frame_bytes=1 << 20)
    match, seen = relay._match_ordinary, []
    for number, frame in enumerate(frames):

        def looked_at(*args: object, number: int = number) -> object:
            seen.append(number)
            return match(*args)  # type: ignore[call-overload]

        relay._match_ordinary = looked_at  # type: ignore[assignment]
        read = chunk(frame)
        relay.feed(read, memoryview(read), [])
    assert relay.meter.content_frames == relay.finder.frames == len(frames)
    return seen


def test_frames_are_known_from_the_third_on() -> None:
    assert seen_by_the_pattern(Route.CHAT, [CHAT % b"a"] * 9) == [0, 1]


@pytest.mark.parametrize("text", [b"\\n", b"\\n\\n", b"a\\tb", b"\\u00e9", b"\\\\n", b"\xe2\x80\xa8\\r"])
@pytest.mark.parametrize("form", [CHAT, CALL, COMPLETION])
def test_a_frame_with_an_escape_is_known(form: bytes, text: bytes) -> None:
    frames = [form % b"a"] * 9
    frames[5] = form % text
    assert seen_by_the_pattern(Route.COMPLETIONS if form is COMPLETION else Route.CHAT, frames) == [0, 1]


@pytest.mark.parametrize("text", [b'\\"', b'\\"a', b"\\\\", b"a\\\\"])
def test_a_frame_with_a_quote_or_a_backslash_at_its_end_makes_no_new_template(text: bytes) -> None:
    frames = [CHAT % b"a"] * 9
    frames[5] = CHAT % text
    assert seen_by_the_pattern(Route.CHAT, frames) == [0, 1, 5]


def test_two_frames_in_a_row_make_a_new_template() -> None:
    frames = [CHAT % b"a"] * 4 + [CALL % b"b"] * 5
    assert seen_by_the_pattern(Route.CHAT, frames) == [0, 1, 4, 5]


def test_of_two_choices_in_turn_one_is_known() -> None:
    other = CHAT.replace(b'"index":0', b'"index":1')
    assert seen_by_the_pattern(Route.CHAT, [CHAT % b"a", other % b"b"] * 4) == [0, 1, 2, 4, 6]


def test_long_frames_make_no_template() -> None:
    assert seen_by_the_pattern(Route.CHAT, [CHAT % (b"x" * MOST_BYTES)] * 4) == [0, 1, 2, 3]


@pytest.mark.parametrize("name", ["chat_long_1500.stream_usage", "comp_basic.stream", "responses_basic.stream"])
def test_most_frames_of_a_recorded_stream_are_known(name: str) -> None:
    captured = stream(name)
    frames = [frame for frame in frames_of(captured.body) if ordinary_end(captured.route, chunk(frame))]
    left = sum(b'\\"' in frame for frame in frames)
    assert len(frames) > 8
    assert len(seen_by_the_pattern(captured.route, frames)) <= 2 + left
