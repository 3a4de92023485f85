"""Server-sent events as a client sees them: behind the relay the same as directly (WHATWG HTML §9.2.5, §9.2.6).

Any bytes, in any chunks, in any reads. What the relay changes on purpose is held here to be that and nothing else: a
last frame without its blank line is completed, comments are put in, a usage frame is left out.
"""

from __future__ import annotations

import base64
import json
import os
import random
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

import pytest
from httpx_sse._decoders import SSEDecoder, SSELineDecoder
from hypothesis import given, settings
from hypothesis import strategies as st

from relay.core.dialect import Meter
from relay.core.editor import UsageEditor
from relay.core.frames import FrameRelay, Pieces
from relay.core.framing import ChunkDecoder, CloseDecoder
from relay.core.request import Route
from tests.core.captured import dechunk
from tests.core.test_frames import chunked, cut_up

#: Whatever has a meaning to a parser, or looks as if it had.
PARTS: Final = [
    b"\n", b"\r", b"\r\n", b"\n\n", b"\r\r", b"\r\n\r\n", b"\n\r\n", b"\r\n\n",
    b"data", b"data:", b"data: ", b"data:  two spaces", b'data: {"choices":[]}', b"data: [DONE]", b"data : no field",
    b"event: e", b"event", b"event:", b"id: 7", b"id", b"id: a\0b", b"id:", b"retry: 10", b"retry: -1", b"retry: x",
    b":", b": comment", b":data: x", b"Data: x", b"field", b"x:y", b"\0", b"\xef\xbb\xbf", b"\xe2\x82", b"\xac",
    b"\xff", "\u2028\u2029\u0085\x0b\x0c".encode(), b"data: \xe2\x82\xac", b"0\r\n\r\n",
]  # fmt: skip
BODIES: Final = st.lists(st.sampled_from(PARTS), max_size=24).map(b"".join)
SIZES: Final = st.lists(st.integers(1, 30), max_size=30)


class Event(NamedTuple):
    """What a page gets."""

    type: str
    data: str
    last_id: str


class Seen(NamedTuple):
    """All that a stream does to a client."""

    events: list[Event]
    retry: int | None


def as_specified(body: bytes) -> Seen:
    """A parser written down from the standard, line by line."""
    text = body.decode("utf-8", "replace").removeprefix("\ufeff")
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")[:-1]  # what no line end follows is not read
    events, retry, last_id, kind, data = [], None, "", "", ""
    for line in lines:
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if not line:
            if data:
                events.append(Event(kind or "message", data.removesuffix("\n"), last_id))
            kind = data = ""
        elif name == "event":
            kind = value
        elif name == "data":
            data += value + "\n"
        elif name == "id" and "\0" not in value:
            last_id = value
        elif name == "retry" and value.isascii() and value.isdigit():
            retry = int(value)
    return Seen(events, retry)


def by_httpx_sse(body: bytes) -> list[tuple[str, str, str]]:
    """httpx-sse, which takes an event without data for one."""
    lines, decoder = SSELineDecoder(), SSEDecoder()
    events = [decoder.decode(line) for line in lines.decode(body.decode("utf-8", "replace"))]
    return [(event.event, event.data, event.id) for event in events if event is not None and event.data]


class Way(NamedTuple):
    """How a body comes, and goes."""

    chunks: list[int] | None  #: None: the body ends with the connection
    reads: list[int]
    takes_chunks: bool
    max_frame_bytes: int = 1 << 20
    comments: bool = False
    editor: UsageEditor | None = None


def through(body: bytes, way: Way) -> bytes:
    """What a client gets of a stream that ends cleanly."""
    decoder = CloseDecoder() if way.chunks is None else ChunkDecoder()
    raw = body if way.chunks is None else chunked(cut_up(body, way.chunks))
    relay = FrameRelay(
        decoder,
        Meter(Route.CHAT),
        is_chunked=way.takes_chunks,
        max_frame_bytes=way.max_frame_bytes,
        editor=way.editor,
    )
    sent = b""
    for piece in cut_up(raw, way.reads):
        out: Pieces = []
        buffer = bytearray(piece)
        relay.feed(piece, memoryview(buffer), out)
        sent += b"".join(out)
        buffer[:] = b"\xaa" * len(buffer)
        if way.comments:
            sent += relay.comment
    decoder.at_close()
    assert decoder.is_done
    rest: Pieces = []
    relay.finish(rest)
    sent += b"".join(rest)
    if not way.takes_chunks:
        return sent
    payload, *_ = dechunk(sent)
    return payload


WAYS: Final = st.builds(
    Way,
    chunks=st.none() | SIZES,
    reads=SIZES,
    takes_chunks=st.booleans(),
    max_frame_bytes=st.sampled_from([1 << 20, 20]),
    comments=st.just(False),
    editor=st.none(),
)


def completed(body: bytes) -> bytes:
    """`body` with a blank line behind it, for a last frame that has none."""
    return body + b"\n\n"


@settings(max_examples=150)
@given(body=BODIES, way=WAYS)
def test_the_events_are_the_same(body: bytes, way: Way) -> None:
    got = through(body, way)
    assert got.startswith(body)
    assert set(got[len(body) :]) <= set(b"\r\n")  # and nothing else is ever added
    for parse in PARSERS:
        assert parse(got) in (parse(body), parse(completed(body)))


@settings(max_examples=80)
@given(body=BODIES, way=WAYS)
def test_whole_frames_pass_to_the_byte(body: bytes, way: Way) -> None:
    whole = body + b"data: last\n\n"
    assert through(whole, way) == whole


@settings(max_examples=80)
@given(body=BODIES, way=WAYS)
def test_a_last_frame_of_data_is_completed(body: bytes, way: Way) -> None:
    unfinished = body + b"\n\ndata: last"
    assert as_specified(through(unfinished, way)) == as_specified(completed(unfinished))


@settings(max_examples=150)
@given(body=BODIES, way=WAYS)
def test_comments_are_no_events(body: bytes, way: Way) -> None:
    """Of a stream that begins with a byte order mark the relay's comment must not be the beginning."""
    without, commented = through(body, way), through(body, way._replace(comments=True))
    assert commented.replace(b": keep-alive\n\n", b"") == without
    if not re.match(rb"(?:: keep-alive\n\n)+\xef\xbb\xbf", commented):
        assert as_specified(commented) == as_specified(without)


USAGE: Final = b'data: {"object":"chat.completion.chunk","choices":[],"usage":{"prompt_tokens":3}}'


@settings(max_examples=80)
@given(
    frames=st.lists(
        st.sampled_from([USAGE, b"data: x", b'data: {"choices":[{"index":0}],"usage":{}}', b": c", b"id: 7\ndata: y"])
    ),
    end=st.sampled_from([b"\n", b"\r\n", b"\r"]),
    way=WAYS.filter(lambda way: way.max_frame_bytes > 20),
)
def test_a_usage_frame_is_hidden_and_no_other(frames: list[bytes], end: bytes, way: Way) -> None:
    def body_of(given: list[bytes]) -> bytes:
        return b"".join(frame.replace(b"\n", end) + end * 2 for frame in given)

    got = through(body_of(frames), way._replace(editor=UsageEditor(hides_usage=True)))
    assert as_specified(got) == as_specified(body_of([frame for frame in frames if frame != USAGE]))


#: Each must see the same of a stream before and behind the relay, whatever that is.
PARSERS: Final[list[Callable[[bytes], object]]] = [as_specified, by_httpx_sse]


# -- npm's eventsource-parser

SCRIPT: Final = """
const {createParser} = require('eventsource-parser')
const lines = require('fs').readFileSync(0, 'utf8').trim().split('\\n')
const parse = (pieces) => {
  const seen = []
  const onEvent = (e) => seen.push([e.event || '', e.data, e.id || ''])
  const parser = createParser({onEvent, onRetry: (r) => seen.push(r)})
  const decoder = new TextDecoder('utf-8', {ignoreBOM: true})
  for (const piece of pieces) parser.feed(decoder.decode(Buffer.from(piece, 'base64'), {stream: true}))
  return seen
}
for (const line of lines) console.log(JSON.stringify(JSON.parse(line).map(parse)))
"""


@pytest.fixture(scope="module")
def node_environment() -> dict[str, str]:
    """Where node finds the package; `npm install -g eventsource-parser` brings it."""
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        pytest.skip("needs node and npm")
    root = subprocess.run([npm, "root", "-g"], capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    if not os.path.isdir(f"{root}/eventsource-parser"):
        pytest.skip("needs npm's eventsource-parser: npm install -g eventsource-parser")
    return {**os.environ, "NODE_PATH": root}


def encoded(pieces: Iterator[bytes]) -> list[str]:
    return [base64.b64encode(piece).decode() for piece in pieces]


def test_a_parser_of_others_sees_the_same(node_environment: dict[str, str]) -> None:
    rng = random.Random(8)

    def sizes() -> list[int]:
        return [rng.randint(1, 30) for _ in range(rng.randint(0, 30))]

    lines = []
    for _ in range(1500):
        body = b"".join(rng.choices(PARTS, k=rng.randint(0, 24)))
        way = Way(rng.choice([None, sizes()]), sizes(), rng.random() < 0.5)
        got = through(body, way)
        asked = [cut_up(body, sizes()), cut_up(got, sizes()), iter([completed(body)])]
        lines.append(json.dumps([encoded(pieces) for pieces in asked]))
    command = ["node", "-e", SCRIPT]
    said = subprocess.run(
        command, input="\n".join(lines), capture_output=True, text=True, check=True, timeout=60, env=node_environment
    ).stdout.split("\n")[:-1]  # not splitlines: U+2028 is no line end
    assert len(said) == len(lines)
    events = 0
    for line in said:
        direct, behind, whole = json.loads(line)
        assert behind in (direct, whole)
        events += len(behind)
    assert events > 500
