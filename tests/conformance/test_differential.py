"""Against llhttp: what the relay takes and sends on, a strict parser of another family reads as the same one message.

Messages go through a whole relay: made well-formed, cut anywhere, and half of them spoilt in a place or two. One that
was left as it was made has to be taken, so no mistake in what makes them can leave nothing to compare; and the share of
what was taken, with a body, and of what was taken though it was spoilt, has a floor.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from typing import Final

import h11
import trio
from hypothesis import example, given, settings
from hypothesis import strategies as st

from relay.config import LimitsConfig
from tests.conformance import llhttp
from tests.conformance.made import METHODS, Made, answers, left_as_made, requests, spoilt
from tests.conformance.peers import MAX_BODY_BYTES, send_in, url_of
from tests.conftest import TEST_LIMIT_S, running_relay
from tests.fuzz import checks

#: Fields that end with the connection they came on (RFC 9110 §7.6.1), and those the relay writes itself.
_OF_THE_CONNECTION: Final = frozenset(
    b"connection keep-alive proxy-connection te trailer transfer-encoding upgrade content-length x-request-id".split()
)
_OF_THE_REQUEST: Final = _OF_THE_CONNECTION | {b"host", b"expect", b"via", b"x-forwarded-for"}
_OF_THE_ANSWER: Final = _OF_THE_CONNECTION | {b"date", b"server-timing"}
#: Not removed, whatever ``Connection`` says, of those that are made here.
_KEPT: Final = frozenset(b"accept accept-encoding authorization cookie via x-forwarded-host x-forwarded-proto".split())
_OK: Final = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok"
#: Ends whatever a message has left open, as no byte of it can begin one.
_FILLER: Final = b"\0" * 10_000

#: What is taken though llhttp refuses it: see `tests.fuzz.checks`.
_EXTENSION: Final = re.compile(rb"(?m)^([0-9A-Fa-f]+)[ \t]*;[^\r\n]*(?=\r\n)")


def read(message: bytes) -> llhttp.Message:
    """A message of the relay's the plainest way there is: it must be readable so."""
    head, _, body = message.partition(b"\r\n\r\n")
    start, *lines = head.split(b"\r\n")
    pairs = (line.partition(b": ") for line in lines)
    method, target, version = start.split(b" ")
    assert version == b"HTTP/1.1"
    return llhttp.Message((method, target), [(name, value.strip(b" \t")) for name, _, value in pairs], body)


def end_to_end(fields: llhttp.Headers, own: Iterable[bytes]) -> llhttp.Headers:
    """Those that are to pass, but for `own`, which the relay writes anew."""
    named = {
        each.strip(b" \t") for name, value in fields if name == b"connection" for each in value.lower().split(b",")
    }
    return [field for field in fields if field[0] not in own and field[0] not in named - _KEPT]


def values(fields: llhttp.Headers, name: bytes) -> list[bytes]:
    return [value for found, value in fields if found == name]


class Engine:
    """Answers whatever has come by the end of a head, and keeps what comes on each connection, to its end."""

    def __init__(self) -> None:
        self.received: list[bytes] = []

    async def serve(self, stream: trio.SocketStream) -> None:
        number = len(self.received)
        self.received.append(b"")
        is_answered = False
        async for data in stream:
            self.received[number] += data
            if not is_answered and b"\r\n\r\n" in self.received[number]:
                is_answered = True
                await stream.send_all(_OK)


async def keep(stream: trio.SocketStream, got: bytearray) -> None:
    """All that comes up to the end."""
    with suppress(trio.BrokenResourceError):
        async for data in stream:
            got += data


async def forward(made: list[Made]) -> tuple[list[bytes], llhttp.Messages]:
    """What the engine gets of what a client sends on one connection, request by request; and what the client gets."""
    engine = Engine()
    async with trio.open_nursery() as nursery:
        url = await url_of(engine.serve, nursery)
        limits = LimitsConfig(max_head_bytes=4096, max_body_bytes=MAX_BODY_BYTES)
        async with running_relay(url, limits=limits) as relay, await relay.connect() as client:
            got = bytearray()
            with trio.fail_after(TEST_LIMIT_S):
                async with trio.open_nursery() as reading:
                    reading.start_soon(keep, client, got)
                    await send_in([piece for message in made for piece in message.pieces] + [_FILLER], client)
        nursery.cancel_scope.cancel()
    return engine.received, llhttp.responses(bytes(got))


_ABSOLUTE: Final = re.compile(rb"(?i)https?://[^/?]*")
_CLOSES: Final = re.compile(rb"(?i)\nconnection:[ \t]*close|HTTP/1\.0\r\n")


def must_be_taken(made: list[Made]) -> int:
    """Those that were left as they were made, up to one behind which there is no other."""
    count = 0
    for message in made:
        if not message.is_good:
            break
        count += 1
        if _CLOSES.search(message.data):
            break
    return count


def check_requests(made: list[Made], counts: Counter[str]) -> None:
    received, answered = trio.run(forward, made)
    taken = len(received)
    must = must_be_taken(made)
    assert taken >= must, answered
    assert answered.error is None, answered
    statuses = [message.start for message in answered.whole if message.start != 100]
    assert statuses[:taken] == [200] * taken
    assert all(400 <= status < 600 for status in statuses[taken:])  # type: ignore[operator]
    data = b"".join(message.data for message in made) + _FILLER
    seen = llhttp.requests(data)
    for number, sent in enumerate(received):
        written, again = read(sent), llhttp.requests(sent)
        if written.start[0] not in METHODS:  # type: ignore[index]
            break  # llhttp has a list of them, and reads on behind none
        assert again.is_one, (again, sent)
        assert again.whole == [written]
        assert values(written.headers, b"content-length") in ([], [b"%d" % len(written.body)])
        counts["taken"] += 1
        if number >= len(seen.whole):
            seen = llhttp.requests(_EXTENSION.sub(rb"\1", data))
        assert number < len(seen.whole), (seen, written)
        check_sent_on(seen.whole[number], written)
        counts["with a body"] += bool(written.body)
        counts["taken all the same"] += number >= must
        counts["taken all the same, with a body"] += number >= must and bool(written.body)
    counts["spoilt"] += not made[-1].is_good


def check_sent_on(came: llhttp.Message, went: llhttp.Message) -> None:
    method, target = came.start  # type: ignore[misc]
    absolute = _ABSOLUTE.match(target)
    if absolute is not None:
        rest = target[absolute.end() :]
        target = rest if rest.startswith(b"/") else b"*" if not rest and method == b"OPTIONS" else b"/" + rest
    assert went.start == (method, target)
    assert went.body == came.body
    own = _OF_THE_REQUEST | ({b"accept-encoding"} if went.start == (b"POST", b"/v1/chat/completions") else set())
    fields = end_to_end(came.headers, own)
    passed = [field for field in went.headers if field[0] not in own]
    assert passed[: len(fields)] == fields
    assert {name for name, _ in passed[len(fields) :]} <= {b"x-forwarded-proto", b"x-forwarded-host"}


# -- answers

_REQUEST: Final = b"GET /p HTTP/1.1\r\nHost: a\r\n\r\n"
_FRAMING: Final = (b"content-length", b"transfer-encoding")
_ERROR_FRAME: Final = re.compile(rb'(?:\r\n|\n|\r){0,2}data: \{"error":\{.*\}\}\n\n\Z')
_WITHOUT_CONTROLS: Final = bytes(
    0x20 if (byte < 0x20 and byte != 0x09) or byte == 0x7F else byte for byte in range(256)
)


class Answering:
    """Answers one request after the other, on whatever connection; hangs up behind what was spoilt."""

    def __init__(self, made: list[Made]) -> None:
        self._made = iter(enumerate(made))
        self.said = [trio.Event() for _ in made]  #: the n-th answer, and that it ended its connection, if so

    async def serve(self, stream: trio.SocketStream) -> None:
        with suppress(trio.BrokenResourceError):
            while await stream.receive_some():
                number, message = next(self._made)
                await send_in(message.pieces, stream)
                if not (message.is_good and final_of(llhttp.responses(message.data))):
                    await stream.aclose()
                    self.said[number].set()
                    return
                self.said[number].set()


def final_of(seen: llhttp.Messages) -> list[llhttp.Message]:
    """The whole answers in it but for interim ones."""
    return [each for each in seen.whole if each.start >= 200]  # type: ignore[operator]


async def relayed(made: list[Made]) -> list[bytes]:
    """What a client gets for one request after the other, all over one connection, as long as that lasts."""
    engine = Answering(made)
    async with trio.open_nursery() as nursery:
        url = await url_of(engine.serve, nursery)
        got: list[bytes] = []
        async with running_relay(url) as relay:
            client = None
            for said in engine.said:
                client = client or await relay.connect()
                with trio.fail_after(TEST_LIMIT_S):
                    await client.send_all(_REQUEST)
                    data, is_open = await one_answer(client)
                    await said.wait()
                got.append(data)
                if not is_open:
                    await client.aclose()
                    client = None
            if client is not None:
                await client.aclose()
        nursery.cancel_scope.cancel()
    return got


async def one_answer(stream: trio.SocketStream) -> tuple[bytes, bool]:
    """All that comes up to the end of an answer, or of the connection; and whether that goes on."""
    got = b""
    while True:
        data = await stream.receive_some()
        got += data
        if not data:
            return got, False
        whole = llhttp.responses(got).whole
        if whole and whole[-1].start >= 200:  # type: ignore[operator]
            is_closing = (b"connection", b"close") in whole[-1].headers
            if is_closing:
                got += await stream.receive_some()
            return got, not is_closing


def check_answers(made: list[Made], counts: Counter[str]) -> None:
    for message, got in zip(made, trio.run(relayed, made), strict=True):
        check_answer(message, got, counts)


def check_answer(message: Made, got: bytes, counts: Counter[str]) -> None:
    seen = llhttp.responses(got)
    assert seen.error is None, (seen, got)
    final = final_of(seen)
    assert (len(final), seen.begun - seen.completed) in ((1, 0), (0, 1)), seen  # whole, or cut
    counts["spoilt"] += not message.is_good
    if final and final[0].start == 502:
        assert not message.is_good
        return
    went = final[0] if final else llhttp.Message(seen.status, seen.last_headers, seen.last_body)
    counts["taken"] += 1
    is_stream = (b"x-accel-buffering", b"no") in went.headers
    readings = [llhttp.responses(data) for data in (message.data, *tidied(message.data))]
    if not final:
        assert not message.is_good
        body = _ERROR_FRAME.sub(b"", went.body) if is_stream else went.body
        assert any(begin_alike(body, came.last_body) for came in readings), (readings, seen)
        counts["cut"] += 1
        return
    came = next((each for each in map(whole_of, readings) if each is not None), None)
    assert came is not None, (readings, seen)
    assert went.start == came.start
    own = _OF_THE_ANSWER | ({b"x-accel-buffering"} if is_stream else set())
    fields = end_to_end(came.headers, own)
    passed = [field for field in went.headers if field[0] not in own]
    assert passed[: len(fields)] == fields
    assert passed[len(fields) :] in ([], [(b"cache-control", b"no-cache")] if is_stream else [])
    assert went.body.startswith(came.body)
    assert not went.body[len(came.body) :].strip(b"\r\n" if is_stream else b"")
    counts["with a body"] += bool(went.body)
    counts["taken all the same"] += not message.is_good
    counts["taken all the same, with a body"] += not message.is_good and bool(went.body)


def whole_of(seen: llhttp.Messages) -> llhttp.Message | None:
    """The answer, where it is whole or lasts to the end of its connection."""
    if final := final_of(seen):
        return final[0]
    if seen.error is not None or seen.begun == seen.completed:
        return None
    if any(values(seen.last_headers, name) for name in _FRAMING):
        return None
    return llhttp.Message(seen.status, seen.last_headers, seen.last_body)


def begin_alike(one: bytes, other: bytes) -> bool:
    return one.startswith(other) or other.startswith(one)


def tidied(data: bytes) -> list[bytes]:
    """An answer with its head as h11 reads it, which puts some things right; and without extensions of chunks."""
    parser = h11.Connection(h11.CLIENT)
    parser.send(h11.Request(method="GET", target="/", headers=[("host", "a")]))
    parser.send(h11.EndOfMessage())
    parser.receive_data(data)
    event = parser.next_event()
    while isinstance(event, h11.InformationalResponse):
        event = parser.next_event()
    assert isinstance(event, h11.Response)
    has_body = event.status_code not in (204, 304)
    fields = [field for field in event.headers if has_body or field[0] not in _FRAMING]
    lines = [b"HTTP/%b %d " % (event.http_version, event.status_code), *(b"%b: %b" % field for field in fields)]
    head = b"\r\n".join(line.translate(_WITHOUT_CONTROLS) for line in lines) + b"\r\n\r\n"
    rest = bytes(parser.trailing_data[0])
    return [head + rest, head + _EXTENSION.sub(rb"\1", rest)]


def shares(counts: Counter[str], *floors: tuple[str, str, float]) -> None:
    """Fails where too few of one are the other: nothing was compared then."""
    for part, whole, floor in floors:
        assert counts[part] >= floor * counts[whole] > 0, (part, whole, counts)


_CHUNKED: Final = b"POST /p HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
_SPOILT_SHARES: Final = ("taken all the same", "spoilt", 0.06), ("taken all the same, with a body", "spoilt", 0.03)


def test_requests() -> None:
    counts: Counter[str] = Counter()

    @settings(max_examples=500)
    @given(requests())
    @example(
        [left_as_made(b"POST /p HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n")]
    )
    @example([spoilt(b"POST /p HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n5 \r\nhello\r\n0\r\n\r\n")])
    @example(
        [spoilt(b"POST /p HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n")]
    )
    @example([spoilt(b"POST /p HTTP/1.1\r\nHost: a\r\nX: y\nContent-Length: 5\r\n\r\nhello")])
    def check(made: list[Made]) -> None:
        counts["connections"] += 1
        check_requests(made, counts)

    check()
    shares(counts, ("taken", "connections", 0.7), ("with a body", "taken", 0.25), *_SPOILT_SHARES)


def test_answers() -> None:
    counts: Counter[str] = Counter()

    @settings(max_examples=500)
    @given(answers())
    @example([spoilt(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n")])
    @example([spoilt(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5 \r\nhello\r\n0\r\n\r\n")])
    def check(made: list[Made]) -> None:
        counts["answers"] += len(made)
        check_answers(made, counts)

    check()
    shares(counts, ("taken", "answers", 0.5), ("with a body", "taken", 0.25), *_SPOILT_SHARES)


_CHUNK_PARTS: Final = st.sampled_from([
    b"0\r\n\r\n", b"0\r\nX: y\r\n\r\n", b"5\r\nhello\r\n", b"05\r\nhello\r\n", b"5;a=b\r\nhello\r\n",
    b"A\r\n0123456789\r\n", b"0", b"5", b" ", b"\t", b";",
    b"\r", b"\n", b"\r\n", b"a", b":", b"-", b"+", b"x", b"\0", b"hello", b'"', b",", b"_", b"\xff",
    b"Content-Length: 5\r\n",
])  # fmt: skip


@given(st.integers(0, 31), st.lists(_CHUNK_PARTS, max_size=8))
@example(5, [b"5", b" ", b"\r\n", b"hello", b"\r\n", b"0\r\n\r\n"])
def test_chunked_bodies(cut: int, parts: list[bytes]) -> None:
    checks.framing(bytes([cut]) + b"".join(parts))
    checks.framing(bytes([cut]) + b"".join(parts) + b"\r\n0\r\n\r\n")
