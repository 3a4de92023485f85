"""Every kind of fault, on every side, in every phase of an exchange: what the client is told, and that nothing is left.

The table is the specification: a row for each cell, also for those that cannot be. After each cell there is one record
for each request, and the metrics say the same; the engines' and the client's connections are closed, but for those of
engines that have answered to the end; every count and permit is back, and the same relay serves another request.

A split pool's protocol is nixl here, which asks one engine after the other; `test_split` has the others.
"""

from __future__ import annotations

import itertools
import os
import socket
import struct
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import partial
from typing import Any, Final, NamedTuple, TypeAlias

import pytest
import trio

from relay.config import PoolConfig, StreamConfig, TimeoutsConfig
from relay.core.board import read
from relay.net.fleet import Pool
from relay.net.pool import Upstream
from relay.net.shares import Permits
from tests.e2e.fleet import RunningFleet, close_kept, engines_of, running_fleet
from tests.e2e.harness import Client, ask, assert_cut_off, nothing_unreachable, request, until
from tests.e2e.pairs import PREFILLED, Half, says

#: Phases by the record's letters; ``D`` of a forced stream is the body made of it on its way to the client, ``D`` of a
#: prefiller the body of its answer, which for the record is still ``P``.
PHASES: Final = {
    ("plain", "client"): "RQCHD",
    ("plain", "engine"): "CHD",
    ("forced", "client"): "RQCHD",
    ("forced", "engine"): "CHD",
    ("split", "client"): "RQCPHD",
    ("split", "prefiller"): "CPD",
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

forced  client     R  refuse      -   a client connects; it has nothing to refuse
forced  client     R  reset       nothing                      CR  499
forced  client     R  stall       408 request_timeout          cR  408
forced  client     R  half-close  closed                       CR  499
forced  client     R  garbage     400 bad_request              RR  400
forced  client     R  slow        whole                        --  200
forced  client     Q  refuse      -   a client connects; it has nothing to refuse
forced  client     Q  reset       nothing                      CQ  499
forced  client     Q  stall       429 queue_full               rQ  429
forced  client     Q  half-close  closed                       CQ  499
forced  client     Q  garbage     whole, then 400              --  200
forced  client     Q  slow        -   its request has been read, and nothing goes to it yet
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

split   client     R  refuse      -   a client connects; it has nothing to refuse
split   client     R  reset       nothing                      CR  499
split   client     R  stall       408 request_timeout          cR  408
split   client     R  half-close  closed                       CR  499
split   client     R  garbage     400 bad_request              RR  400
split   client     R  slow        whole                        --  200
split   client     Q  refuse      -   a client connects; it has nothing to refuse
split   client     Q  reset       nothing                      CQ  499
split   client     Q  stall       429 queue_full               rQ  429
split   client     Q  half-close  closed                       CQ  499
split   client     Q  garbage     whole, then 400              --  200
split   client     Q  slow        -   its request has been read, and nothing goes to it yet
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
split   prefiller  D  refuse      -   it has answered
split   prefiller  D  reset       502 upstream_disconnected    UP  502
split   prefiller  D  stall       504 upstream_timeout         uP  504
split   prefiller  D  half-close  502 upstream_disconnected    UP  502
split   prefiller  D  garbage     502 upstream_error           UP  502
split   prefiller  D  slow        whole                        --  200

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
    "prefiller D": "prefill_s",
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
#: A prefiller's answer, in the middle of its body.
_BODY: Final = PREFILLED.partition(b"\r\n\r\n")[2]
PREFILL_BEGIN: Final = HEAD.replace(b"text/event-stream", b"application/json") + chunk(_BODY[:9])
PREFILL_REST: Final = chunk(_BODY[9:]) + b"0\r\n\r\n"

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

    @property
    def pool(self) -> Pool:
        (pool,) = self.relay.worker.service.fleet.pools
        return pool

    @contextmanager
    def limited(self, nursery: trio.Nursery) -> Iterator[None]:
        """Gives the pool, where it has a limit, and each engine one permit, as where several workers share a limit."""
        pool = self.pool
        limited: list[Any] = [*([pool] if pool.config.max_in_flight else []), *pool.upstreams]
        for number, each in enumerate(limited):
            fd = os.eventfd(1, os.EFD_SEMAPHORE | os.EFD_NONBLOCK | os.EFD_CLOEXEC)
            each.permits = Permits(fd, number, self.held)
            each.permits.on_free = partial(self._freed, each)
            nursery.start_soon(each.permits.watch)
        yield
        for each in limited:
            each.permits = None

    def _freed(self, each: Pool | Upstream) -> None:
        if isinstance(each, Upstream):
            self.pool.groups[each.role].refresh(each)
        self.pool.advance()

    async def at_rest(self, descriptors: int, kept: Collection[str]) -> None:
        """Waits until nothing goes on any more, and so many descriptors are open.

        To the engines that are `kept` there is one connection each until then, to others none: nothing but what has
        happened on them closes them.
        """
        worker = self.relay.worker
        service, pump = worker.service, worker.pump
        await until(lambda: not worker.connections)
        wanted = {name: int(name in kept) for name in self.engines}
        idle = {url: upstream.idle for url, upstream in self.relay.upstreams.items()}
        assert {name: idle[engine.url] for name, engine in self.engines.items()} == wanted
        await until(lambda: {name: engine.connections for name, engine in self.engines.items()} == wanted)
        await close_kept(worker)
        await until(lambda: not any(engine.connections for engine in self.engines.values()))
        assert not service.active
        assert not service.callbacks
        assert (self.pool.in_flight, self.pool.queued) == (0, 0)
        assert [upstream.outstanding for upstream in service.fleet.upstreams] == [0] * len(self.engines)
        assert not any(self.held)
        assert worker.budget.used == 0
        assert repr(pump).startswith("<Pump pairs=0 streaming=0 ")
        assert not pump.commented
        await until(lambda: open_descriptors() == descriptors)

    def assert_counted(self, ends: Collection[tuple[str, int]]) -> None:
        """The metrics have each end, an outcome and a status, as often as it is in `ends`, and nothing under way."""
        tally = self.relay.worker.service.tally
        tally.take_in(self.relay.worker.service)
        counted: Counter[tuple[str, int]] = Counter()
        under_way = {}
        for (name, *labels), (value, *_) in read(tally.block).items():
            if name == "relay_requests_total":
                _, _, status, outcome = labels
                counted[outcome, int(status)] += int(value)
            elif name in ("relay_in_flight", "relay_queue_depth", "relay_upstream_in_flight"):
                under_way[name, *labels] = value
        assert counted == Counter(ends)
        assert len(under_way) == 2 + len(self.engines)
        assert not any(under_way.values()), under_way


@asynccontextmanager
async def stage(mode: str, *, is_pool_limited: bool = True, **timeouts: float) -> AsyncIterator[Stage]:
    """One exchange at a time, by a limit of the pool, or else of its engines alone."""
    good = BEGIN + REST
    async with trio.open_nursery() as nursery:
        if mode == "split":
            stand = Stage({"prefiller": Address(PREFILLED, nursery), "decoder": Address(good, nursery)})
            of_role = {"prefill": "prefiller", "decode": "decoder"}
        else:
            stand = Stage({"engine": Address(good, nursery)})
            of_role = {"upstreams": "engine"}
        roles: dict[str, Any] = {role: engines_of([stand.engines[name].url], most=1) for role, name in of_role.items()}
        pool = PoolConfig(**roles, max_in_flight=int(is_pool_limited), max_queue=1, drain_kv=False)
        tables: dict[str, Any] = {
            "timeouts": TimeoutsConfig(**{"upstream_idle_s": 0.0, **timeouts}),
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
    upstream = stand.relay.upstreams[engine.url]
    begin, good = (b"", PREFILLED) if cell.side == "prefiller" else (b"", BEGIN + REST)
    garbage = GARBAGE
    if cell.phase == "D":
        begin, good = (PREFILL_BEGIN, PREFILL_REST) if cell.side == "prefiller" else (BEGIN, REST)
        garbage = b"zz\r\n"
    head = begin[: begin.find(b"\r\n\r\n") + 4]
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
            await until(lambda: upstream.heads.find(head) is not None)
            if cell.told.startswith("frame"):
                await until(lambda: stand.relay.worker.pump.frames > 0)
        await act(stream)

    engine.once(turn)


async def reaches_phase(stand: Stage, phase: str) -> None:
    """Waits until an exchange is in that phase; or is over, where that has a short limit and the machine is busy."""
    relay = stand.relay
    active = relay.worker.service.active
    await until(lambda: bool(relay.records) or any(exchange.phase.value == phase for exchange in active))


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
        if cell.phase == "Q":
            await until(lambda: bool(stand.pool.queued or stand.relay.records))
            # Who waits holds nothing, also no engine of one role while there is none of the other.
            assert (stand.pool.in_flight, sum(each.outstanding for each in stand.pool.upstreams)) == (1, 1)
        elif cell.phase in "CD":
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


def ends_of(cell: Cell) -> list[tuple[str, int]]:
    """Outcome and status of each request of a cell, in any order."""
    ends = [(cell.outcome, cell.status)]
    if cell.told.endswith("then 400"):
        ends.append(("RR", 400))
    if cell.phase == "Q":
        ends.append(("--", 200))  # what it waits for
    return ends


def kept_in(cell: Cell, engines: Collection[str]) -> Collection[str]:
    """The engines that have answered to the end, so that their connections are kept; what was cut short is closed."""
    if cell.outcome == "--" or cell.phase == "Q":
        return engines
    refuses = (cell.side, cell.phase, cell.kind) == ("prefiller", "P", "refuse")
    is_prefilled = cell.mode == "split" and cell.side != "prefiller" and cell.phase in "CHD"
    return ["prefiller"] if refuses or is_prefilled else []


async def open_all(stand: Stage) -> None:
    for engine in stand.engines.values():
        await engine.open()


@pytest.mark.parametrize("cell", [*cells()], ids=str)
async def test_a_cell(cell: Cell) -> None:
    limit = SHORT.get(f"{cell.side} {cell.phase}")
    short = {limit: SHORT_S} if limit and cell.kind == "stall" else {}
    # In the queue of a split pool an engine of each role is waited for, elsewhere a place in the pool.
    is_pool_limited = (cell.mode, cell.phase) != ("split", "Q")
    async with stage(cell.mode, is_pool_limited=is_pool_limited, **short) as stand:
        before = open_descriptors()
        ends = ends_of(cell)
        with nothing_unreachable():
            await (run_client_cell if cell.side == "client" else run_engine_cell)(cell, stand)
            await stand.relay.record(len(ends))
            await until(lambda: not stand.relay.worker.connections)
        assert sorted((record.outcome, record.status) for record in stand.relay.records) == sorted(ends)
        await stand.at_rest(before, kept_in(cell, stand.engines))
        stand.assert_counted(ends)

        following = await ask(stand.relay.port, ask_of(cell))
        assert (following.status, following.end) == (200, "whole")
        await stand.relay.record(len(ends) + 1)
        assert stand.relay.records[-1].attempts == 1
        await stand.at_rest(before, stand.engines)
        stand.assert_counted([*ends, ("--", 200)])
