"""Everything recorded from a real engine, through the real process: the client gets what was recorded, to the byte.

Two engines play the recordings. The built-in one frames their payloads anew, in every shape it knows. The `Player`
sends a recording's own bytes, framing included, in pieces of the test's choice, each once the relay has read the one
before: the relay sees exactly these splits, and a test knows what it has seen.
"""

from __future__ import annotations

import array
import fcntl
import json
import random
import re
import socket
import termios
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager
from itertools import pairwise
from pathlib import Path
from typing import Final

import pytest
import trio

from relay.core.request import Route
from tests.core.captured import CAPTURES, Captured, captured, dechunk, frames_of, streams
from tests.e2e import harness
from tests.e2e.children import Child, child, relay_child
from tests.e2e.harness import PATHS, PATIENCE_S, Answer, Client, error_frames, request

#: Exchanges at once, each on a connection of its own that carries many.
CLIENTS: Final = 8
PATH_OF: Final = dict(zip((Route.CHAT, Route.COMPLETIONS, Route.RESPONSES, Route.MESSAGES), PATHS, strict=True))
WHOLE: Final = tuple(answer for answer in streams() if answer.is_complete)
#: A chunk's size line, and the line end behind its data.
CHUNK_LINE_ENDS: Final = re.compile(rb"(?<=[0-9a-f])\r\n|\r\n(?=[0-9a-f]+\r\n)")


def recorded_bytes(answer: Captured) -> bytes:
    """An answer's bytes as they came off the engine's socket."""
    return (CAPTURES / f"{answer.name}.response.raw").read_bytes()


# -- the relays


def stopped_in_order(relay: Child) -> None:
    """Ends a relay; it must have had nothing to complain about."""
    assert relay.stop() == ""


@pytest.fixture(scope="module")
def before_engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Child]:
    """A relay before the built-in engine, which knows each recording by its name, a dot for the slash."""
    directory = tmp_path_factory.mktemp("engine")
    recordings = directory / "recordings"
    recordings.mkdir()
    for answer in captured():
        (recordings / f"{answer.name.replace('/', '.')}.response.raw").write_bytes(recorded_bytes(answer))
    listen = f"unix:{directory}/e"
    arguments = ("engine", "--listen", listen, "--captures", str(recordings))
    with (
        child(directory, "relay_bench", *arguments) as engine,
        relay_child(directory, engine.address, listen=f"unix:{directory}/r") as relay,
    ):
        yield relay
        stopped_in_order(relay)
    records = relay.records()
    assert records
    assert {record["outcome"] for record in records} == {"--"}


@pytest.fixture(scope="module")
def before_player(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Child]:
    """A relay before the socket that a test's `Player` listens on."""
    directory = tmp_path_factory.mktemp("player")
    with relay_child(directory, f"unix:{directory}/e", listen=f"unix:{directory}/r") as relay:
        yield relay
        stopped_in_order(relay)


async def connect(relay: Child) -> Client:
    return Client(await trio.open_unix_socket(relay.address.removeprefix("unix:")))


# -- the built-in engine


async def play_all(
    relay: Child, answers: Iterable[Captured], rechunk: str = "", clients: int = CLIENTS
) -> list[tuple[Captured, Answer]]:
    """Has the engine play `answers`, several at a time."""
    waiting = iter(answers)
    played: list[tuple[Captured, Answer]] = []

    async def ask_on() -> None:
        async with await connect(relay) as client:
            for answer in waiting:
                name = answer.name.replace("/", ".")
                path = PATH_OF.get(answer.route, PATHS[0])
                played.append((answer, await client.ask(request(path, sim_play=name, sim_rechunk=rechunk))))

    async with trio.open_nursery() as nursery:
        for _ in range(clients):
            nursery.start_soon(ask_on)
    return played


@pytest.mark.parametrize(
    "rechunk",
    [
        "",
        "size:100000000",  # all in one chunk
        "frames:3",
        "split:2",
        "split:7,ext",
        "size:7",
        "size:1000,writes:333",
        "frames:5,ext,writes:64",
        "length",
        "length,size:61",
        "close",
        "close,split:3",
    ],
)
async def test_streams_under_every_framing(before_engine: Child, rechunk: str) -> None:
    played = await play_all(before_engine, streams(), rechunk)
    assert len(played) == len(streams())
    for recorded, answer in played:
        assert (answer.status, answer.end) == (200, "whole"), recorded
        assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert answer.payload == recorded.body, recorded


async def test_streams_in_chunks_of_one_byte(before_engine: Child, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "PATIENCE_S", 30.0)  # the longest are 300,000 chunks
    for recorded, answer in await play_all(before_engine, streams(), "bytes", clients=1):
        assert (answer.status, answer.end) == (200, "whole"), recorded
        assert answer.payload == recorded.body, recorded


async def test_streams_in_writes_of_one_byte(before_engine: Child) -> None:
    """All but the longest, for each byte is a turn of the engine's scheduler."""
    answers = [answer for answer in streams() if len(answer.body) < 15_000]
    assert len(answers) > 80
    for recorded, answer in await play_all(before_engine, answers, "writes:1", clients=2):
        assert (answer.status, answer.end) == (200, "whole"), recorded
        assert answer.payload == recorded.body, recorded


async def test_json_answers_and_errors(before_engine: Child) -> None:
    answers = [
        answer
        for answer in captured()
        if (b"content-type", b"application/json") in answer.headers and not answer.name.startswith("head_")
    ]
    assert {answer.status for answer in answers} == {200, 400, 403, 404, 405, 500}
    for recorded, answer in await play_all(before_engine, answers):
        assert (answer.status, answer.end) == (recorded.status, "whole"), recorded
        assert answer.headers["content-type"] == "application/json"
        assert answer.payload == recorded.body, recorded


# -- the player


class Player:
    """An engine on a unix socket: answers each request with the pieces it was last told to."""

    def __init__(self) -> None:
        self.pieces: Sequence[bytes] = ()
        self.then_closes = False
        self.pause_after = -1  #: so many pieces, until `go_on` is set
        self.paused = trio.Event()
        self.go_on = trio.Event()

    def play(self, pieces: Sequence[bytes], *, then_closes: bool = False, pause_after: int = -1) -> None:
        """What the next request gets."""
        self.pieces, self.then_closes, self.pause_after = pieces, then_closes, pause_after
        self.paused, self.go_on = trio.Event(), trio.Event()

    async def serve(self, stream: trio.SocketStream) -> None:
        received = b""
        async for data in stream:
            received += data
            length = re.search(rb"(?si)\r\ncontent-length: *(\d+).*\r\n\r\n", received)
            if b"\r\n\r\n" not in received or (length and len(received) < length.end() + int(length[1])):
                continue
            received = b""
            for number, piece in enumerate(self.pieces):
                if number == self.pause_after:
                    self.paused.set()
                    await self.go_on.wait()
                await stream.send_all(piece)
                await self._until_read(stream)
            if self.then_closes:
                break
        await stream.aclose()

    async def _until_read(self, stream: trio.SocketStream) -> None:
        """What a unix socket has sent counts as its own until the peer has read it (unix_outq_len in the kernel)."""
        unread = array.array("i", [1])
        with trio.fail_after(PATIENCE_S):
            while unread[0]:
                await trio.lowlevel.checkpoint()
                fcntl.ioctl(stream.socket.fileno(), termios.TIOCOUTQ, unread)


@asynccontextmanager
async def playing(relay: Child) -> AsyncIterator[tuple[Player, Client]]:
    """A `Player` behind `relay`, and a client of the relay."""
    player = Player()
    path = Path(relay.address.removeprefix("unix:")).with_name("e")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        try:
            async with trio.open_nursery() as nursery:
                serve = trio.SocketListener(trio.socket.from_stdlib_socket(listener))
                await nursery.start(trio.serve_listeners, player.serve, [serve])
                async with await connect(relay) as client:
                    yield player, client
                nursery.cancel_scope.cancel()
        finally:
            path.unlink()


def requests_of_recordings() -> dict[str, tuple[str, str]]:
    """Method and path of each recorded answer; the few without an entry were chats."""
    found = {answer.name: ("POST", PATHS[0]) for answer in captured()}
    for index in CAPTURES.rglob("index.jsonl"):
        folder = index.parent.relative_to(CAPTURES)
        for entry in map(json.loads, index.read_text().splitlines()):
            found[str(folder / entry["name"])] = entry["method"], entry["path"]
    return found


def cut_at(raw: bytes, positions: Iterable[int]) -> list[bytes]:
    """`raw` in pieces."""
    return [raw[begin:end] for begin, end in pairwise([0, *sorted(positions), len(raw)]) if begin < end]


def in_line_ends(raw: bytes) -> list[bytes]:
    """Cut between CR and LF wherever the framing has one."""
    return cut_at(raw, (match.start() + 1 for match in CHUNK_LINE_ENDS.finditer(raw)))


def behind_line_ends(raw: bytes) -> list[bytes]:
    """Cut behind each LF of the framing: sizes, data and their ends all come apart."""
    return cut_at(raw, (match.end() for match in CHUNK_LINE_ENDS.finditer(raw)))


def at_random(seed: int, most: int) -> Callable[[bytes], list[bytes]]:
    """Pieces of 1 to `most` bytes."""

    def cut(raw: bytes) -> list[bytes]:
        rng = random.Random(f"{seed} {len(raw)}")
        positions = [0]
        while positions[-1] < len(raw):
            positions.append(positions[-1] + rng.randint(1, most))
        return cut_at(raw, positions[:-1])

    return cut


CUTS: Final = {
    "in one piece": lambda raw: [raw],
    "in line ends": in_line_ends,
    "behind line ends": behind_line_ends,
    "small pieces": at_random(1, 300),
    "large pieces": at_random(2, 20_000),
}


@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
async def test_streams_as_recorded_in_any_pieces(before_player: Child, cut: Callable[[bytes], list[bytes]]) -> None:
    """The recorded bytes, with the engine's own chunks and head."""
    requests = requests_of_recordings()
    async with playing(before_player) as (player, client):
        for recorded in WHOLE:
            player.play(cut(recorded_bytes(recorded)), then_closes=(b"connection", b"close") in recorded.headers)
            answer = await client.ask(request(requests[recorded.name][1]))
            assert (answer.status, answer.end) == (200, "whole"), recorded
            assert answer.payload == recorded.body, recorded


async def test_short_streams_really_byte_by_byte(before_player: Child) -> None:
    """The relay reads every byte by itself: a stream of each dialect."""
    shortest = {recorded.route: recorded for recorded in sorted(WHOLE, key=lambda answer: -len(answer.raw_body))}
    assert set(shortest) == set(PATH_OF)
    async with playing(before_player) as (player, client):
        for route, recorded in shortest.items():
            raw = recorded_bytes(recorded)
            player.play(cut_at(raw, range(len(raw))))
            answer = await client.ask(request(PATH_OF[route]))
            assert (answer.status, answer.end, answer.payload) == (200, "whole", recorded.body), recorded


async def test_cut_recordings_end_in_an_error_frame(before_player: Child) -> None:
    """Of engines that died on the way: all that is whole, then the error, and the connection's end."""
    cut = [recorded for recorded in streams() if not recorded.is_complete]
    assert cut
    for recorded in cut:
        async with playing(before_player) as (player, client):
            player.play([recorded_bytes(recorded)], then_closes=True)
            answer = await client.ask(request())
            assert (answer.status, answer.end, answer.rest) == (200, "fin", b""), recorded
            assert error_frames(answer) == answer.frames[-1:]
            whole = recorded.body[: recorded.body.rfind(b"\n\n") + 2]
            assert b"".join(answer.frames[:-1]) == whole, recorded


async def test_all_other_answers_as_recorded(before_player: Child) -> None:
    """Status, type and body of whatever the engine said to any method on any path."""
    others = [recorded for recorded in captured() if not recorded.is_stream]
    requests = requests_of_recordings()
    async with playing(before_player) as (player, client):
        for recorded in others:
            raw = recorded_bytes(recorded)
            player.play([raw], then_closes=(b"connection", b"close") in recorded.headers)
            method, path = requests[recorded.name]
            answer = await client.ask(request(path, {"stream": False}, method=method))
            assert (answer.status, answer.end) == (recorded.status, "whole"), recorded
            content_type = dict(recorded.headers).get(b"content-type", b"").decode()
            assert answer.headers.get("content-type", "") == content_type, recorded
            assert answer.payload == recorded.body, recorded


# -- a pause in mid-frame


HEAD: Final = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
LAST_CHUNK: Final = b"0\r\n\r\n"


def chunked(payload: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(payload), payload)


def in_one_chunk(before: list[bytes], frame: bytes, split: int) -> tuple[bytes, bytes]:
    """The frame in a chunk of its own, of which `split` bytes have come; and the rest of it."""
    return b"".join(map(chunked, before)) + b"%x\r\n%b" % (len(frame), frame[:split]), frame[split:] + b"\r\n"


def in_two_chunks(before: list[bytes], frame: bytes, split: int) -> tuple[bytes, bytes]:
    """The frame's beginning shares a chunk with what is before it; its rest comes in another."""
    return chunked(b"".join(before) + frame[:split]), chunked(frame[split:]) if frame[split:] else b""


def held_by(client: socket.socket) -> bytes:
    """All that has come, without waiting."""
    held = b""
    try:
        while data := client.recv(65536):
            held += data
    except BlockingIOError:
        pass
    return held


@pytest.mark.parametrize("line_end", [b"\n", b"\r\n"], ids=["LF", "CRLF"])
@pytest.mark.parametrize("framed", [in_one_chunk, in_two_chunks])
@pytest.mark.parametrize("already", [0, 1, 2])
async def test_at_a_pause_in_mid_frame_the_client_holds_whole_frames_and_no_more(
    before_player: Child,
    line_end: bytes,
    framed: Callable[[list[bytes], bytes, int], tuple[bytes, bytes]],
    already: int,
) -> None:
    """At every place where a frame can be torn, and at its end, with `already` frames before it."""
    recorded = next(recorded for recorded in WHOLE if recorded.name == "chat_200.stream")
    frames = [frame.replace(b"\n", line_end) for frame in frames_of(recorded.body)[: already + 1]]
    *before, torn = frames
    async with playing(before_player) as (player, other):
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(before_player.address.removeprefix("unix:"))
            client.setblocking(False)
            for split in range(1, len(torn) + 1):
                first, rest = framed(before, torn, split)
                player.play([HEAD + first, rest + LAST_CHUNK], pause_after=1)
                client.send(request())
                with trio.fail_after(PATIENCE_S):
                    await player.paused.wait()  # the relay has read all of `first` ...
                assert (await other.ask(request("/-/live", method="GET"))).status == 200  # ... and is done with it
                held = held_by(client)
                head, _, body = held.partition(b"\r\n\r\n")
                whole = frames if split == len(torn) else before
                assert dechunk(body) == (b"".join(whole), False), split
                assert bool(head) == bool(whole)  # the head goes out with the first frame
                player.go_on.set()
                with trio.fail_after(PATIENCE_S):
                    while not held.endswith(LAST_CHUNK):
                        await trio.lowlevel.wait_readable(client)
                        held += held_by(client)
                assert dechunk(held.partition(b"\r\n\r\n")[2]) == (b"".join(frames), True), split
