"""Every kind of fault, on every side, in every phase of an exchange: what the client is told, and that nothing is left.

The table is the specification: a row for each cell, also for those that cannot be. After each cell the engines' and the
client's connections are closed, every count and permit is back, and the same relay serves another request.
"""

from __future__ import annotations

import itertools
import os
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any, Final, NamedTuple, TypeAlias

import pytest
import trio

from relay.address import parse_upstream
from relay.config import PoolConfig, StreamConfig, TimeoutsConfig
from relay.net.shares import Permits
from tests.e2e.fleet import RunningFleet, running_fleet
from tests.e2e.harness import Client, ask, assert_cut_off, nothing_unreachable, request, until
from tests.e2e.pairs import PREFILLED, Half, says

#: Phases by the record's letters; ``D`` of a forced stream is the body made of it on its way to the client.
PHASES: Final = {
    ("plain", "client"): "RQCHD",
    ("plain", "engine"): "CHD",
    ("forced", "client"): "CHD",
    ("forced", "engine"): "CHD",
    ("split", "client"): "CPHD",
    ("split", "prefiller"): "CP",
    ("split", "decoder"): "CHD",
}
KINDS: Final = ("refuse", "reset", "stall", "half-close", "garbage", "slow")

# What the client is told: a status and code; `frame`: one whole frame, then an error frame with that code, and no end;
# `whole`: the good answer; `then 400`: another answer, to the garbage; `closed`: not a byte; `nothing`: it does
# not look; `passes`: the engine's own answer. Then the record's outcome and status; `-` and why,
# where a cell cannot be.
TABLE: Final = """
plain   client     R  refuse      -   a client connects; it has nothing to refuse
plain   client     R  reset       nothing                      CR  499
plain   client     R  stall       408 request_timeout          cR  408
plain   client     R  half-close  closed                       CR  499
plain   client     R  garbage     400 bad_request              RR  400
plain   client     R  slow        whole                        --  200
plain   client     Q  refuse      -   a client connects; it has nothing to refuse
plain   client     Q  reset       nothing                      CQ  499
plain   client     Q  stall       429 queue_full               rQ  429
plain   client     Q  half-close  closed                       CQ  499
plain   client     Q  garbage     whole, then 400              --  200
plain   client     Q  slow        -   its request has been read, and nothing goes to it yet
plain   client     C  refuse      -   a client connects; it has nothing to refuse
plain   client     C  reset       nothing                      CC  499
plain   client     C  stall       -   its request has been read, and nothing goes to it yet
plain   client     C  half-close  closed                       CC  499
plain   client     C  garbage     whole, then 400              --  200
plain   client     C  slow        -   its request has been read, and nothing goes to it yet
plain   client     H  refuse      -   a client connects; it has nothing to refuse
plain   client     H  reset       nothing                      CH  499
plain   client     H  stall       -   its request has been read, and nothing goes to it yet
plain   client     H  half-close  closed                       CH  499
plain   client     H  garbage     whole, then 400              --  200
plain   client     H  slow        -   its request has been read, and nothing goes to it yet
plain   client     D  refuse      -   a client connects; it has nothing to refuse
plain   client     D  reset       nothing                      CD  200
plain   client     D  stall       nothing                      cD  200
plain   client     D  half-close  nothing                      CD  200
plain   client     D  garbage     whole, then 400              --  200
plain   client     D  slow        whole                        --  200

plain   engine     C  refuse      502 upstream_error           UC  502
plain   engine     C  reset       502 upstream_disconnected    UH  502
plain   engine     C  stall       504 upstream_timeout         uC  504
plain   engine     C  half-close  502 upstream_disconnected    UH  502
plain   engine     C  garbage     502 upstream_error           UH  502
plain   engine     C  slow        whole                        --  200
plain   engine     H  refuse      503 passes                   --  503
plain   engine     H  reset       502 upstream_disconnected    UH  502
plain   engine     H  stall       504 upstream_timeout         uH  504
plain   engine     H  half-close  502 upstream_disconnected    UH  502
plain   engine     H  garbage     502 upstream_error           UH  502
plain   engine     H  slow        whole                        --  200
plain   engine     D  refuse      -   it has answered
plain   engine     D  reset       frame upstream_disconnected  UD  200
plain   engine     D  stall       frame upstream_timeout       uD  200
plain   engine     D  half-close  frame upstream_disconnected  UD  200
plain   engine     D  garbage     frame upstream_error         UD  200
plain   engine     D  slow        whole                        --  200

forced  client     C  refuse      -   a client connects; it has nothing to refuse
forced  client     C  reset       nothing                      CC  499
forced  client     C  stall       -   its request has been read, and nothing goes to it yet
forced  client     C  half-close  closed                       CC  499
forced  client     C  garbage     whole, then 400              --  200
forced  client     C  slow        -   its request has been read, and nothing goes to it yet
forced  client     H  refuse      -   a client connects; it has nothing to refuse
forced  client     H  reset       nothing                      CH  499
forced  client     H  stall       -   its request has been read, and nothing goes to it yet
forced  client     H  half-close  closed                       CH  499
forced  client     H  garbage     whole, then 400              --  200
forced  client     H  slow        -   its request has been read, and nothing goes to it yet
forced  client     D  refuse      -   a client connects; it has nothing to refuse
forced  client     D  reset       nothing                      CD  200
forced  client     D  stall       nothing                      cD  200
forced  client     D  half-close  nothing                      CD  200
forced  client     D  garbage     whole, then 400              --  200
forced  client     D  slow        whole                        --  200

forced  engine     C  refuse      502 upstream_error           UC  502
forced  engine     C  reset       502 upstream_disconnected    UH  502
forced  engine     C  stall       504 upstream_timeout         uC  504
forced  engine     C  half-close  502 upstream_disconnected    UH  502
forced  engine     C  garbage     502 upstream_error           UH  502
forced  engine     C  slow        whole                        --  200
forced  engine     H  refuse      503 passes                   --  503
forced  engine     H  reset       502 upstream_disconnected    UH  502
forced  engine     H  stall       504 upstream_timeout         uH  504
forced  engine     H  half-close  502 upstream_disconnected    UH  502
forced  engine     H  garbage     502 upstream_error           UH  502
forced  engine     H  slow        whole                        --  200
forced  engine     D  refuse      -   it has answered
forced  engine     D  reset       502 upstream_disconnected    UH  502
forced  engine     D  stall       504 upstream_timeout         uH  504
forced  engine     D  half-close  502 upstream_disconnected    UH  502
forced  engine     D  garbage     502 upstream_error           UH  502
forced  engine     D  slow        whole                        --  200

split   client     C  refuse      -   a client connects; it has nothing to refuse
split   client     C  reset       nothing                      CC  499
split   client     C  stall       -   its request has been read, and nothing goes to it yet
split   client     C  half-close  closed                       CC  499
split   client     C  garbage     whole, then 400              --  200
split   client     C  slow        -   its request has been read, and nothing goes to it yet
split   client     P  refuse      -   a client connects; it has nothing to refuse
split   client     P  reset       nothing                      CP  499
split   client     P  stall       -   its request has been read, and nothing goes to it yet
split   client     P  half-close  closed                       CP  499
split   client     P  garbage     whole, then 400              --  200
split   client     P  slow        -   its request has been read, and nothing goes to it yet
split   client     H  refuse      -   a client connects; it has nothing to refuse
split   client     H  reset       nothing                      CH  499
split   client     H  stall       -   its request has been read, and nothing goes to it yet
split   client     H  half-close  closed                       CH  499
split   client     H  garbage     whole, then 400              --  200
split   client     H  slow        -   its request has been read, and nothing goes to it yet
split   client     D  refuse      -   a client connects; it has nothing to refuse
split   client     D  reset       nothing                      CD  200
split   client     D  stall       nothing                      cD  200
split   client     D  half-close  nothing                      CD  200
split   client     D  garbage     whole, then 400              --  200
split   client     D  slow        whole                        --  200

split   prefiller  C  refuse      502 upstream_error           UP  502
split   prefiller  C  reset       502 upstream_disconnected    UP  502
split   prefiller  C  stall       504 upstream_timeout         uP  504
split   prefiller  C  half-close  502 upstream_disconnected    UP  502
split   prefiller  C  garbage     502 upstream_error           UP  502
split   prefiller  C  slow        whole                        --  200
split   prefiller  P  refuse      503 passes                   UP  503
split   prefiller  P  reset       502 upstream_disconnected    UP  502
split   prefiller  P  stall       504 upstream_timeout         uP  504
split   prefiller  P  half-close  502 upstream_disconnected    UP  502
split   prefiller  P  garbage     502 upstream_error           UP  502
split   prefiller  P  slow        whole                        --  200

split   decoder    C  refuse      502 upstream_error           UC  502
split   decoder    C  reset       502 upstream_disconnected    UH  502
split   decoder    C  stall       504 upstream_timeout         uC  504
split   decoder    C  half-close  502 upstream_disconnected    UH  502
split   decoder    C  garbage     502 upstream_error           UH  502
split   decoder    C  slow        whole                        --  200
split   decoder    H  refuse      503 passes                   --  503
split   decoder    H  reset       502 upstream_disconnected    UH  502
split   decoder    H  stall       504 upstream_timeout         uH  504
split   decoder    H  half-close  502 upstream_disconnected    UH  502
split   decoder    H  garbage     502 upstream_error           UH  502
split   decoder    H  slow        whole                        --  200
split   decoder    D  refuse      -   it has answered
split   decoder    D  reset       frame upstream_disconnected  UD  200
split   decoder    D  stall       frame upstream_timeout       uD  200
split   decoder    D  half-close  frame upstream_disconnected  UD  200
split   decoder    D  garbage     frame upstream_error         UD  200
split   decoder    D  slow        whole                        --  200
"""


class Cell(NamedTuple):
    """One row."""

    mode: str
    side: str
    phase: str
    kind: str
    told: str
    outcome: str
    status: int

    def __str__(self) -> str:
        return "-".join(self[:4])


def rows() -> Iterator[list[str]]:
    for line in TABLE.splitlines():
        if line:
            yield line.split(None, 4)


def cells() -> Iterator[Cell]:
    for mode, side, phase, kind, rest in rows():
        if not rest.startswith("-  "):
            told, outcome, status = rest.rsplit(None, 2)
            yield Cell(mode, side, phase, kind, told, outcome, int(status))


def test_the_table_names_every_cell() -> None:
    asked = [(*at, phase, kind) for at, phases in PHASES.items() for phase, kind in itertools.product(phases, KINDS)]
    assert [tuple(row[:4]) for row in rows()] == asked


#: Small, where a cell waits for it to pass.
SHORT_S: Final = 0.15
#: Cells in which one limit, and only that, is short.
SHORT: Final = {
    "client R": "client_body_s",
    "client Q": "queue_s",
    "client D": "client_stall_s",
    "engine C": "connect_s",
    "engine H": "first_token_s",
    "engine D": "between_tokens_s",
    "prefiller C": "connect_s",
    "prefiller P": "prefill_s",
    "decoder C": "connect_s",
    "decoder H": "first_token_s",
    "decoder D": "between_tokens_s",
}
FRAME: Final = b'data: {"id":"c","choices":[{"index":0,"delta":{"content":"a"}}]}\n\n'
LAST: Final = (
    b'data: {"id":"c","choices":[{"index":0,"delta":{"content":"b"},"finish_reason":"stop"}]}\n\ndata: [DONE]\n\n'
)
HEAD: Final = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
REFUSAL: Final = (
    b"HTTP/1.1 503 Busy\r\ncontent-type: application/json\r\nretry-after: 7\r\ncontent-length: 15\r\n\r\n"
    b'{"mine":"busy"}'
)
GARBAGE: Final = b"SSH-2.0-x\r\n\r\n"
#: More than the sockets between relay and client hold here.
FLOOD: Final = b'data: {"id":"c","choices":[{"index":0,"delta":{"content":"%b"}}]}\n\n' % (b"x" * 1000) * 300
FLOODED: Final = FRAME + FLOOD + LAST
#: Of the client's socket, and of the relay's towards it.
SMALL_BUFFER: Final = 4096


def chunk(payload: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(payload), payload)


BEGIN: Final = HEAD + chunk(FRAME)
REST: Final = chunk(LAST) + b"0\r\n\r\n"

Act: TypeAlias = Callable[[trio.SocketStream], Awaitable[None]]


async def until_left(stream: trio.SocketStream) -> None:
    """Until the relay hangs up."""
    while await stream.receive_some():
        pass


async def reset(stream: trio.SocketStream) -> None:
    stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    stream.socket.close()
    await trio.lowlevel.checkpoint()


async def half_close(stream: trio.SocketStream) -> None:
    await stream.send_eof()
    await until_left(stream)


async def refuse(stream: trio.SocketStream) -> None:
    await stream.send_all(REFUSAL)


def saying(data: bytes) -> Act:
    async def act(stream: trio.SocketStream) -> None:
        await stream.send_all(data)
        await until_left(stream)

    return act


def slowly(data: bytes) -> Act:
    """Each byte in a segment of its own."""

    async def act(stream: trio.SocketStream) -> None:
        stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for at in range(len(data)):
            await stream.send_all(data[at : at + 1])

    return act


class Hold:
    """An engine that says so much, and no more until it may."""

    def __init__(self, begin: bytes, rest: bytes) -> None:
        self.begun = trio.Event()
        self.may_go_on = trio.Event()
        self._begin = begin
        self._rest = rest

    async def __call__(self, stream: trio.SocketStream) -> None:
        if self._begin:
            await stream.send_all(self._begin)
        self.begun.set()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._leave, stream, nursery.cancel_scope)
            await self.may_go_on.wait()
            nursery.cancel_scope.cancel()
        if self.may_go_on.is_set():
            await stream.send_all(self._rest)

    async def _leave(self, stream: trio.SocketStream, scope: trio.CancelScope) -> None:
        with suppress(trio.BrokenResourceError):
            await until_left(stream)
        scope.cancel()


class Address(Half):
    """One engine, at an address that can be closed, full, or open."""

    def __init__(self, good: bytes, nursery: trio.Nursery) -> None:
        super().__init__(says(good))
        self._nursery = nursery
        self._sock = socket.socket()
        self._sock.bind(("127.0.0.1", 0))
        self._fillers: list[socket.socket] = []
        self.url = f"http://127.0.0.1:{self._sock.getsockname()[1]}"
        self.connections = 0  #: open
        self.at_once: Act | None = None  #: done to the next connection instead of reading from it

    def once(self, act: Act) -> None:
        """What is done for the next request."""
        self.script.append(lambda _, stream: act(stream))

    def fill(self) -> None:
        """Has the address take no connection: its backlog is full."""
        self._sock.listen(0)
        for _ in range(3):
            self._fillers.append(filler := socket.socket())
            filler.setblocking(False)
            filler.connect_ex(self._sock.getsockname())

    async def open(self) -> None:
        while self._fillers:
            self._fillers.pop().close()
        self._sock.listen(64)
        listener = trio.SocketListener(trio.socket.from_stdlib_socket(self._sock))
        await self._nursery.start(trio.serve_listeners, self.serve, [listener])

    async def serve(self, stream: trio.SocketStream) -> None:
        self.connections += 1
        try:
            if self.at_once is None:
                await super().serve(stream)
            else:
                act, self.at_once = self.at_once, None
                with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                    await act(stream)
        finally:
            self.connections -= 1


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


class Stage:
    """Engines, the relay before them, and what there is of everything while nothing goes on."""

    def __init__(self, engines: dict[str, Address]) -> None:
        self.engines = engines
        self.relay: RunningFleet
        self.held = memoryview(bytearray(8 * 8)).cast("d")  #: permits, of the pool and each engine

    @contextmanager
    def limited(self, nursery: trio.Nursery) -> Iterator[None]:
        """Gives the pool and each engine one permit, as where several workers share a limit."""
        fleet = self.relay.worker.service.fleet
        all_of_them: list[Any] = [*fleet.pools, *fleet.upstreams]
        for number, each in enumerate(all_of_them):
            fd = os.eventfd(1, os.EFD_SEMAPHORE | os.EFD_NONBLOCK | os.EFD_CLOEXEC)
            each.permits = Permits(fd, number, self.held)
            each.permits.on_free = fleet.pools[0].advance
            nursery.start_soon(each.permits.watch)
        yield
        for each in all_of_them:
            each.permits = None

    async def at_rest(self, descriptors: int) -> None:
        """Waits until nothing goes on any more, and so many descriptors are open."""
        worker = self.relay.worker
        service, pump = worker.service, worker.pump
        await until(lambda: not worker.connections)
        service.fleet.close_idle()
        await until(lambda: not any(engine.connections for engine in self.engines.values()))
        assert not service.active
        assert not service.callbacks
        assert [(pool.in_flight, pool.queued) for pool in service.fleet.pools] == [(0, 0)]
        assert [upstream.outstanding for upstream in service.fleet.upstreams] == [0] * len(self.engines)
        assert not any(self.held)
        assert worker.budget.used == 0
        assert repr(pump).startswith("<Pump pairs=0 streaming=0 ")
        assert not pump.commented
        await until(lambda: open_descriptors() == descriptors)


@asynccontextmanager
async def stage(mode: str, **timeouts: float) -> AsyncIterator[Stage]:
    good = BEGIN + REST
    async with trio.open_nursery() as nursery:
        if mode == "split":
            stand = Stage({"prefiller": Address(PREFILLED, nursery), "decoder": Address(good, nursery)})
            of_role = {"prefill": "prefiller", "decode": "decoder"}
        else:
            stand = Stage({"engine": Address(good, nursery)})
            of_role = {"upstreams": "engine"}
        roles: dict[str, Any] = {role: (parse_upstream(stand.engines[name].url),) for role, name in of_role.items()}
        pool = PoolConfig(**roles, max_in_flight=1, max_queue=1, drain_kv=False)
        tables: dict[str, Any] = {
            "timeouts": TimeoutsConfig(**timeouts),
            "stream": StreamConfig(force_stream=mode == "forced"),
        }
        async with running_fleet(pool, **tables) as stand.relay:
            stand.relay.worker.listeners.sockets[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SMALL_BUFFER)
            with stand.limited(nursery):
                yield stand
        nursery.cancel_scope.cancel()


# -- what a cell does


def ask_of(cell: Cell) -> bytes:
    return request(body={"stream": cell.mode != "forced"})


def engine_fails(cell: Cell, stand: Stage) -> None:
    """Has an engine do as the cell says to the next request."""
    engine = stand.engines[cell.side]
    begin, good = (b"", PREFILLED) if cell.side == "prefiller" else (b"", BEGIN + REST)
    garbage = GARBAGE
    if cell.phase == "D":
        begin, good, garbage = BEGIN, REST, b"zz\r\n"
    acts: dict[str, Act] = {
        "refuse": refuse,
        "reset": reset,
        "stall": until_left,
        "half-close": half_close,
        "garbage": saying(garbage),
        "slow": slowly(good),
    }
    act = acts[cell.kind]
    if cell.phase == "C":
        if cell.kind == "stall":
            engine.fill()
        elif cell.kind != "refuse" and cell.kind != "slow":
            engine.at_once = act
        return

    async def turn(stream: trio.SocketStream) -> None:
        if begin:
            await stream.send_all(begin)
            # A reset must not overtake what came before it.
            await until(lambda: stand.relay.worker.pump.frames > 0 or cell.mode == "forced")
        await act(stream)

    engine.once(turn)


async def reaches_phase(stand: Stage, phase: str) -> None:
    await until(lambda: any(exchange.phase.value == phase for exchange in stand.relay.worker.service.active))


async def run_engine_cell(cell: Cell, stand: Stage) -> None:
    for name, engine in stand.engines.items():
        if name != cell.side or cell.phase != "C" or cell.kind not in ("refuse", "stall", "slow"):
            await engine.open()
    engine = stand.engines[cell.side]
    engine_fails(cell, stand)
    async with await Client.connect(stand.relay.port) as client:
        if cell.phase == "C" and cell.kind == "slow":
            engine._sock.listen(64)  # connected by the kernel, accepted when the request is there
            await client.send(ask_of(cell))
            await reaches_phase(stand, "P" if cell.side == "prefiller" else "H")
            await engine.open()
            await assert_told(cell, client)
            return
        await client.send(ask_of(cell))
        await assert_told(cell, client)
    if cell.phase == "C" and cell.kind in ("refuse", "stall"):
        await engine.open()


async def assert_told(cell: Cell, client: Client) -> None:
    """What the client gets is as the table says."""
    if cell.told == "nothing":
        return
    answer = await client.answer()
    told, _, code = cell.told.partition(" ")
    if told == "closed":
        assert answer.head == b""
    elif told == "frame":
        assert_cut_off(answer, code, frames=1)
    elif told.startswith("whole"):
        assert (answer.status, answer.end) == (200, "whole")
        if cell.mode == "forced":
            (choice,) = answer.json()["choices"]
            assert (choice["message"]["content"][0], choice["message"]["content"][-1]) == ("a", "b")
        else:
            assert answer.payload in (FRAME + LAST, FLOODED)
        if code:
            assert (await client.answer()).status == 400
            assert await client.is_closed()
    elif code == "passes":
        assert (answer.status, answer.end, answer.payload) == (int(told), "whole", b'{"mine":"busy"}')
        assert answer.headers["retry-after"] == "7"
    else:
        assert (answer.status, answer.end, answer.error["code"]) == (int(told), "whole", code)
        assert await client.is_closed()


async def run_client_cell(cell: Cell, stand: Stage) -> None:
    if cell.phase == "R":
        await open_all(stand)
        await client_fails_in_its_request(cell, stand)
        return
    hold = Hold(*held_back(cell))
    engine = stand.engines["prefiller" if cell.phase == "P" else "decoder" if cell.mode == "split" else "engine"]
    if cell.phase == "C":
        engine.fill()
        for other in stand.engines.values():
            if other is not engine:
                await other.open()
    else:
        await open_all(stand)
        engine.once(hold)
    async with (
        await Client.connect(stand.relay.port) as blocker,
        await Client.connect(stand.relay.port, receive_buffer=SMALL_BUFFER) as client,
    ):
        if cell.phase == "Q":
            await blocker.send(ask_of(cell))
            await hold.begun.wait()
        await client.send(ask_of(cell))
        if cell.phase == "D":
            await reaches_phase(stand, "D")
        elif cell.phase in "QC":
            await reaches_phase(stand, cell.phase)
        else:
            await hold.begun.wait()
        if cell.kind in ("reset", "half-close"):
            client.leave("rst" if cell.kind == "reset" else "fin")
            await stand.relay.record()
        elif cell.kind == "garbage":
            await client.send(b"GARBAGE\r\n\r\n")
        elif cell.kind == "slow":
            for _ in range(100):
                client._buffer += await client.stream.receive_some(97)
        if cell.phase == "C" and cell.kind == "garbage":
            await engine.open()
        if cell.kind == "stall":
            await stand.relay.record()
        hold.may_go_on.set()
        if cell.kind != "reset":
            await assert_told(cell, client)
        if cell.phase == "Q":
            assert (await blocker.answer()).end == "whole"
    if cell.phase == "C" and cell.kind != "garbage":
        await engine.open()


def held_back(cell: Cell) -> tuple[bytes, bytes]:
    """What an engine sends before the client's fault, and after."""
    if cell.phase == "P":
        return b"", PREFILLED
    if cell.phase != "D":
        return b"", BEGIN + REST
    if cell.mode == "forced" or cell.kind in ("stall", "slow"):
        return BEGIN + chunk(FLOOD) + REST, b""
    return BEGIN, REST


async def client_fails_in_its_request(cell: Cell, stand: Stage) -> None:
    data = ask_of(cell)
    async with await Client.connect(stand.relay.port) as client:
        if cell.kind == "garbage":
            await client.send(b"GARBAGE\r\n\r\n")
        elif cell.kind == "slow":
            await slowly(data)(client.stream)
        else:
            await client.send(data[:-5])
            await until(lambda: any(not each.is_waiting for each in stand.relay.worker.connections))
        if cell.kind in ("reset", "half-close"):
            client.leave("rst" if cell.kind == "reset" else "fin")
        await assert_told(cell, client)


async def open_all(stand: Stage) -> None:
    for engine in stand.engines.values():
        await engine.open()


@pytest.mark.parametrize("cell", [*cells()], ids=str)
async def test_a_cell(cell: Cell) -> None:
    limit = SHORT.get(f"{cell.side} {cell.phase}")
    short = {limit: SHORT_S} if limit and cell.kind == "stall" else {}
    async with stage(cell.mode, **short) as stand:
        before = open_descriptors()
        at = 2 if cell.told.endswith("400") and "then" in cell.told else 1
        with nothing_unreachable():
            await (run_client_cell if cell.side == "client" else run_engine_cell)(cell, stand)
            await stand.relay.record(at)
            await until(lambda: not stand.relay.worker.connections)
        letters = [(record.outcome, record.status) for record in stand.relay.records]
        assert (cell.outcome, cell.status) in letters
        if at == 2:
            assert ("RR", 400) in letters
        if cell.outcome != "--" and cell.phase != "Q":
            # What was under way has been closed, and not kept for the next.
            assert not any(each.idle for each in stand.relay.worker.service.fleet.upstreams if each.role != "prefill")
        await stand.at_rest(before)

        following = await ask(stand.relay.port, ask_of(cell))
        assert (following.status, following.end) == (200, "whole")
        assert stand.relay.records[-1].attempts == 1
        await stand.at_rest(before)
