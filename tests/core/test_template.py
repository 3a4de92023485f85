"""A chunk is like another only where the pattern would have found it, of that size."""

from __future__ import annotations

import re
from typing import Final

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from relay.core import ordinary
from relay.core.request import Route
from relay.core.template import MOST_BYTES, Template
from tests.core.captured import Captured, frames_of, streams


def chunk(frame: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(frame), frame)


def ordinary_end(route: Route, data: bytes, position: int = 0) -> int:
    """The end of the chunk at `position` where the pattern finds it, and its size is right; else `position`."""
    found = ordinary.CHUNKS[route].match(data, position)
    if found is None or int(found[1], 16) != found.end() - found.end(1) - 4:
        return position
    return found.end()


def template_of(route: Route, data: bytes) -> Template:
    found = ordinary.CHUNKS[route].match(data)
    assert found is not None
    return Template(found, ordinary.STRAYS[route])


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
    assert template.end_of(data + b"behind", 6, len(data) + 6) == len(data) == ordinary_end(route, data, 6)
    assert template.end_of(data, 6, len(data)) == len(data)
    for stop in range(6, len(data)):  # what is behind it is of an earlier read
        assert template.end_of(data, 6, stop) == 6


@pytest.mark.parametrize(("route", "form"), FORMS)
@pytest.mark.parametrize(
    "change",
    [
        lambda form: chunk(form % b""),
        lambda form: chunk(form % b'a\\"b'),
        lambda form: chunk(form % b"a\\"),
        lambda form: chunk(form % (b"x" * MOST_BYTES)),
        lambda form: b"0" + chunk(form % b"a"),
        lambda form: chunk(form % b"a").upper(),
        lambda form: b"1" + chunk(form % b"a"),
        lambda form: chunk(form % b"a").replace(b"\r\n", b";x\r\n", 1),
        lambda form: chunk(form.replace(b"\n\n", b"\n") % b"a"),
        lambda form: chunk(form.replace(b"data", b"date") % b"a"),
        lambda form: chunk(form.replace(b"}", b',"usage":{}}', 1) % b"a"),
        lambda form: chunk(form % b"a" + form % b"b"),
        lambda form: chunk(form % b"a")[:-2] + b"\n\n",
        lambda form: b"",
        lambda form: b"0\r\n\r\n",
    ],
)
def test_what_is_not_alike_is_left_to_the_pattern(route: Route, form: bytes, change: object) -> None:
    assert callable(change)
    data = change(form)
    end = template_of(route, chunk(form % b"one")).end_of(data, 0, len(data))
    assert end in (-1, 0, ordinary_end(route, data))
    if route is not Route.MESSAGES and route is not Route.RESPONSES:  # whose text is all there is in a line
        assert end <= 0


PIECES: Final = st.sampled_from(
    [b"a", b'"', b"\\", b"\r", b"\n", b"\n\n", b"\r\n", b"}", b'"}', b"data: ", b'"},"logprobs":null', b"{", b"\xff"]
)


@given(
    st.sampled_from([form.values for form in FORMS]),
    st.lists(PIECES, max_size=6).map(b"".join),
    st.integers(-3, 3),
    st.integers(0, 200),
    PIECES | st.just(b""),
)
@example((Route.CHAT, CHAT), b"a", 0, 0, b"")
def test_whatever_is_found_the_pattern_finds(
    route_and_form: tuple[Route, bytes], text: bytes, off: int, at: int, put: bytes
) -> None:
    route, form = route_and_form
    frame = form % text
    data = b"%x\r\n%b\r\n" % (len(frame) + off, frame)
    data = data[:at] + put + data[at:]
    template = template_of(route, chunk(form % b"one"))
    end = template.end_of(data, 0, len(data))
    assert end in (-1, 0, ordinary_end(route, data))


@pytest.mark.parametrize("captured", streams(), ids=repr)
def test_recorded_streams(captured: Captured) -> None:
    data = b"".join(map(chunk, frames_of(captured.body)))
    template = None
    position = known = plain = 0
    while position < len(data):
        end = ordinary_end(captured.route, data, position)
        if template is not None:
            alike = template.end_of(data, position, len(data))
            assert alike in (-1, position, end)
            known += alike > position
        if end > position:
            plain += not re.search(rb"[\\]", data[position:end])
            found = ordinary.CHUNKS[captured.route].match(data, position)
            assert found is not None
            if template is None:
                template = Template(found, ordinary.STRAYS[captured.route])
        position = end if end > position else data.index(b"\n\n\r\n", position) + 4
    if captured.name in ("chat_long_1500.stream_usage", "comp_basic.stream", "responses_basic.stream"):
        assert known >= plain - 1 >= 8
