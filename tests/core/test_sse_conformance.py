"""Server-sent events as a client sees them: behind the relay the same as directly (WHATWG HTML §9.2.5, §9.2.6).

Any bytes, in any chunks, in any reads. What the relay changes on purpose is held here to be that and nothing else: a
last frame without its blank line is completed, comments are put in, a usage frame is left out.
"""

from __future__ import annotations

import base64
import json
import random
import re
import subprocess
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Final, Literal, NamedTuple

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
#: As vLLM writes a token, of one stream: only the text differs, and with it the size.
TOKEN: Final = (
    b'data: {"id":"chatcmpl-1","object":"chat.completion.chunk","created":1795227833,"model":"tiny","choices":[{'
    b'"index":0,"delta":{"content":"%b"},"logprobs":null,"finish_reason":null,"token_ids":null}]}\n\n'
)
TEXTS: Final = [
    b"a", b" the", b"x" * 40, b"", b"\\n", b"\\n\\n", b'\\"', b"\\\\", b"\\u20ac", " €".encode(), "\u2028".encode(),
    b"data: ", b"{}]", b'\\"}]', b": [DONE]", b"\\\\\\n",
]  # fmt: skip
TOKENS: Final = [TOKEN % text for text in TEXTS]
#: Whole events beside them.
FRAMES: Final = [
    TOKEN.replace(b'"content":"%b"', b'"role":"assistant","content":""'),
    TOKEN.replace(b'"finish_reason":null', b'"finish_reason":"stop"') % b"",
    b'data: {"object":"chat.completion.chunk","choices":[],"usage":{"prompt_tokens":3,"completion_tokens":2}}\n\n',
    b"data: [DONE]\n\n", b": ping\n\n", b"event: e\ndata: x\n\n", b"data: a\ndata:b\ndata\n\n", b"id: 7\ndata: x\n\n",
    b"retry: 10\n\n", b"id:\nretry: 3\ndata:  y\n\n", b"event: e\n\n", b"data:\n\n", b"\n", b'data: {"error":{}}\n\n',
    b'event: content_block_delta\ndata: {"type":"content_block_delta","index":0,"delta":{"text":"a"}}\n\n',
]  # fmt: skip
#: A body is a run of these.
MIX: Final = TOKENS, TOKENS, FRAMES, PARTS
LINE_ENDS: Final = [b"\n", b"\n", b"\n", b"\r\n", b"\r"]


def body_of(parts: Iterable[bytes], line_end: bytes = b"\n", start: bytes = b"") -> bytes:
    return start + b"".join(part.replace(b"\n", line_end) if len(part) > 2 else part for part in parts)


#: Of tokens mostly, in whatever lines; or of anything.
STREAMS: Final = st.builds(
    body_of,
    st.lists(st.sampled_from(MIX).flatmap(st.sampled_from), min_size=1, max_size=12),
    st.sampled_from(LINE_ENDS),
    st.sampled_from([b"", b"", b"", b"\xef\xbb\xbf"]),
)
ANYTHING: Final = st.lists(st.sampled_from(PARTS), max_size=24).map(b"".join)
RUNS: Final = st.lists(st.sampled_from([*TOKENS, *TOKENS, FRAMES[0], FRAMES[1]]), min_size=3, max_size=12).map(b"".join)
BODIES: Final = st.sampled_from([RUNS, RUNS, STREAMS, STREAMS, ANYTHING]).flatmap(lambda bodies: bodies)
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

    chunks: list[int] | Literal["frames"] | None  #: None: the body ends with the connection
    reads: list[int] | Literal["chunks"]
    takes_chunks: bool
    max_frame_bytes: int = 1 << 20
    comments: bool = False
    editor: UsageEditor | None = None


def on_the_wire(body: bytes, chunks: list[int] | Literal["frames"] | None) -> bytes:
    """A body as an engine sends it."""
    if chunks is None:
        return body
    return chunked(re.findall(rb"(?s).+?\n\n|.+\Z", body) if chunks == "frames" else cut_up(body, chunks))


def in_reads(raw: bytes, reads: list[int] | Literal["chunks"]) -> Iterable[bytes]:
    """It, as it comes: a chunk of a whole frame at a time, as mostly, or in pieces of those sizes."""
    return re.findall(rb"(?s).+?\n\n\r\n|.+\Z", raw) if reads == "chunks" else cut_up(raw, reads)


def through(body: bytes, way: Way, relays: list[FrameRelay] | None = None) -> bytes:
    """What a client gets of a stream that ends cleanly; `relays` takes note of what it went through."""
    decoder = CloseDecoder() if way.chunks is None else ChunkDecoder()
    raw = on_the_wire(body, way.chunks)
    relay = FrameRelay(
        decoder,
        Meter(Route.CHAT),
        is_chunked=way.takes_chunks,
        max_frame_bytes=way.max_frame_bytes,
        editor=way.editor,
    )
    if relays is not None:
        relays.append(relay)
    sent = b""
    for piece in in_reads(raw, way.reads):
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


READS: Final = st.sampled_from(
    [st.just("chunks"), st.just("chunks"), SIZES, st.lists(st.integers(200, 800), max_size=8)]
).flatmap(lambda reads: reads)
WAYS: Final = st.builds(
    Way,
    chunks=st.sampled_from([st.just("frames"), st.just("frames"), SIZES, st.none()]).flatmap(lambda chunks: chunks),
    reads=READS,
    takes_chunks=st.sampled_from([True, True, False]),
    max_frame_bytes=st.sampled_from([1 << 20, 20]),
    comments=st.just(False),
    editor=st.none(),
)


def completed(body: bytes) -> bytes:
    """`body` with a blank line behind it, for a last frame that has none."""
    return body + b"\n\n"


def test_the_events_are_the_same() -> None:
    counts: Counter[str] = Counter()

    @settings(max_examples=200)
    @given(body=BODIES, way=WAYS)
    def check(body: bytes, way: Way) -> None:
        relays: list[FrameRelay] = []
        got = through(body, way, relays)
        assert got.startswith(body)
        assert set(got[len(body) :]) <= set(b"\r\n")  # and nothing else is ever added
        for parse in PARSERS:
            assert parse(got) in (parse(body), parse(completed(body)))
        counts["bodies"] += 1
        counts["with events"] += bool(as_specified(body).events)
        counts["with a template"] += relays[0]._template is not None

    check()
    assert counts["with events"] >= 0.4 * counts["bodies"] > 0, counts
    assert counts["with a template"] >= 0.03 * counts["bodies"], counts


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


def encoded(pieces: Iterator[bytes]) -> list[str]:
    return [base64.b64encode(piece).decode() for piece in pieces]


def compared(lines: list[str], environment: dict[str, str]) -> int:
    """Of each body, directly, behind the relay and completed, has node read the events; answers how many there are."""
    command = ["node", "-e", SCRIPT]
    said = subprocess.run(
        command, input="\n".join(lines), capture_output=True, text=True, check=True, timeout=60, env=environment
    ).stdout.split("\n")[:-1]  # not splitlines: U+2028 is no line end
    assert len(said) == len(lines)
    events = 0
    for line in said:
        direct, behind, whole = json.loads(line)
        assert behind in (direct, whole)
        events += len(behind)
    return events


def test_a_parser_of_others_sees_the_same(node_environment: dict[str, str]) -> None:
    rng = random.Random(8)

    def sizes() -> list[int]:
        return [rng.randint(1, 30) for _ in range(rng.randint(0, 30))]

    lines = []
    for _ in range(1500):
        parts = [rng.choice(rng.choice(MIX)) for _ in range(rng.randint(0, 12))]
        body = body_of(rng.choice([parts, rng.choices(PARTS, k=rng.randint(0, 24))]), rng.choice(LINE_ENDS))
        way = Way(rng.choice([None, "frames", sizes()]), rng.choice(["chunks", [], sizes()]), rng.random() < 0.5)
        got = through(body, way)
        cuts = sizes()  # the same for all: of lines that end in CR this parser makes other events where it is cut there
        asked = [cut_up(each, cuts) for each in (body, got, completed(body))]
        lines.append(json.dumps([encoded(pieces) for pieces in asked]))
    assert compared(lines, node_environment) > 3000
