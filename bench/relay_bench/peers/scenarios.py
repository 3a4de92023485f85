"""What every contender meets, and what each time is measured."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

import msgspec
import trio

from relay_bench.crowd import Crowd, MeasureError
from relay_bench.groups import leaf
from relay_bench.load import options, run
from relay_bench.load.target import resolve
from relay_bench.peers.machine import Watch
from relay_bench.peers.running import MODEL

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from relay_bench.load.options import Plan
    from relay_bench.load.records import Tally
    from relay_bench.peers.running import EngineServer
    from relay_bench.servers import Server

#: Frames of the recording that saturated streams are made of: an engine that plays one sends more than it could make.
RECORDED_FRAMES: Final = 512
#: Seconds of a stream beyond its window, so that none ends within it, however slowly the others begin.
_MARGIN_S: Final = 12.0
#: Seconds for requests to leave the engines once their clients have.
_SETTLE_S: Final = 15.0
_SETTLE_LOOK_S: Final = 0.05
#: Seconds for all streams to begin.
_BEGIN_S: Final = 10.0
#: From a stream's beginning to the window.
_LEAD_S: Final = 0.2


class Scenario(msgspec.Struct, frozen=True, kw_only=True):
    """Connections that each have a stream, or one short request behind the other."""

    name: str
    title: str
    connections: int
    window_s: float
    engine: dict[str, str]  #: the engine's ``x-sim-*`` headers, underscores in their names
    step_ms: float = 0.0
    ramp_s: float = 0.0  #: over which streams begin
    tokens: int = 0  #: of an answer; 0: as many as outlast the window
    body_bytes: int = 0
    repeats: bool = False  #: a request follows each answer
    counts_answers: bool = False  #: and not frames

    def request(self) -> bytes:
        """The request as bytes."""
        outlasting = int((self.ramp_s + self.window_s + _LEAD_S + _MARGIN_S) * 1000 / (self.step_ms or 1))
        begin = b'{"model":"%b","stream":true,"max_tokens":%d,"messages":[{"role":"user","content":"' % (
            MODEL.encode(),
            self.tokens or outlasting,
        )
        end = b'"}]}'
        body = begin + b"x" * max(self.body_bytes - len(begin) - len(end), 1) + end
        head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: bench\r\ncontent-type: application/json\r\n"
        return head + b"content-length: %d\r\n\r\n" % len(body) + body


def reduced(scenario: Scenario) -> Scenario:
    """A tenth of the streams."""
    return msgspec.structs.replace(
        scenario, connections=max(scenario.connections // 10, 1), ramp_s=scenario.ramp_s / 10
    )


def paced(name: str, title: str, window_s: float, *, own_clock: bool) -> Scenario:
    """100 streams, a frame each 20 ms."""
    clock = "own" if own_clock else "shared"
    # begun 10.2 ms apart, streams have their frames spread evenly over the 20 ms
    return Scenario(
        name=name,
        title=title,
        connections=100,
        window_s=window_s,
        engine={"step_ms": "20", "clock": clock},
        step_ms=20,
        ramp_s=1.02 if own_clock else 0.0,
    )


#: Those of CPU, in the order of the table.
SCENARIOS: Final = (
    paced("spread", "100 streams, a frame each 20 ms, spread", 2.5, own_clock=True),
    paced("at_once", "the same, all at once", 2.5, own_clock=False),
    Scenario(
        name="saturated",
        title="32 streams as fast as they come",
        connections=32,
        window_s=1.5,
        engine={"play": "saturated", "step_ms": "0"},
        tokens=RECORDED_FRAMES,
        repeats=True,
    ),
    Scenario(
        name="short",
        title="requests of 1 KB, answers of 4 frames, 4 connections",
        connections=4,
        window_s=1.5,
        engine={"step_ms": "0"},
        tokens=2,
        body_bytes=1024,
        repeats=True,
        counts_answers=True,
    ),
)
#: Streams held open for their memory: a frame each second.
HOLD: Final = Scenario(
    name="hold", title="500 open streams", connections=500, window_s=0.5, engine={"step_ms": "1000"}, step_ms=1000,
    tokens=120,
)  # fmt: skip
#: The schedule of latency: requests a second and how many, and the engine's pace.
LATENCY_ENGINE: Final = {"ttft_ms": "20", "step_ms": "5"}
_LATENCY: Final = ("--request-rate", "25", "--num-prompts", "100", "--random-input-len", "50", "--num-warmups", "3")
_LATENCY_ANSWER: Final = ("--random-output-len", "8", "--stamps", "--timeout-s", "30")


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """One contender in one scenario, once."""

    name: str
    scenario: str
    round: int
    frames: int
    answers: int
    seconds: float
    is_reduced: bool = False  #: a tenth of the scenario's streams, as all of them were too many
    cpu_ns: int  #: of the proxy
    engine_cpu_ns: int
    client_cpu_ns: int
    foreign_cores: float  #: that others took of the machine meanwhile


class Held(msgspec.Struct, frozen=True, kw_only=True):
    """What open streams take of memory."""

    name: str
    streams: int
    before_bytes: int
    with_streams_bytes: int


def record_answer(engine: EngineServer, captures: Path) -> None:
    """Has the engine make the answer of which saturated streams are made, and keeps it for it to play."""
    body = Scenario(name="", title="", connections=1, window_s=0, engine={}, tokens=RECORDED_FRAMES - 3).request()
    status, payload = engine.ask("POST", "/v1/chat/completions", body.partition(b"\r\n\r\n")[2].decode())
    if status != 200:
        raise MeasureError(f"the engine: {status}")
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n\r\n"
    (captures / "saturated.response.raw").write_bytes(head + payload)


def sample(scenario: Scenario, server: Server, engines: Sequence[EngineServer], round_: int) -> Sample:
    """One contender in one scenario. Raises `MeasureError`."""
    is_direct = server in engines
    request = scenario.request()
    again = request if scenario.repeats else b""
    with Crowd(server.name, server.address, scenario.connections) as crowd:
        if scenario.ramp_s:
            crowd.ask_in_turn(request, scenario.ramp_s / scenario.connections)
        else:
            crowd.ask(request)
        if not scenario.repeats:
            crowd.run_until_all_began(_BEGIN_S)
        crowd.run_for(_LEAD_S, again)
        watch, client_ns = Watch(), time.process_time_ns()
        cpu, engine_cpu = server.cpu_ns(), sum(engine.cpu_ns() for engine in engines)
        frames, answers, began = crowd.frames, crowd.answers, time.perf_counter()
        crowd.run_for(scenario.window_s, again)
        found = Sample(
            name=server.name,
            scenario=scenario.name,
            round=round_,
            frames=crowd.frames - frames,
            answers=crowd.answers - answers,
            seconds=time.perf_counter() - began,
            cpu_ns=0 if is_direct else server.cpu_ns() - cpu,
            engine_cpu_ns=sum(engine.cpu_ns() for engine in engines) - engine_cpu,
            client_cpu_ns=time.process_time_ns() - client_ns,
            foreign_cores=watch.foreign_cores(),
        )
    if not (found.answers if scenario.counts_answers else found.frames):
        raise MeasureError(f"{server.name}: {scenario.title}: nothing came within {scenario.window_s:g} s")
    return found


def held(server: Server) -> Held:
    """The memory that `HOLD` takes. Raises `MeasureError`."""
    before = server.memory_bytes()
    with Crowd(server.name, server.address, HOLD.connections) as crowd:
        crowd.ask(HOLD.request())
        crowd.run_until_all_began(_BEGIN_S)
        crowd.run_for(HOLD.window_s)
        return Held(
            name=server.name,
            streams=HOLD.connections,
            before_bytes=before,
            with_streams_bytes=server.memory_bytes(),
        )


def latency(server: Server, seed: str) -> tuple[Plan, Tally]:
    """The schedule of latency once; of one `seed`, the same instants whichever the server. Raises `LoadError`."""
    chosen = options.parsed(server.url, *_LATENCY, *_LATENCY_ANSWER)
    chosen.seed = seed
    plan = options.plan_of(chosen, model=MODEL, variant=server.name)
    try:
        return plan, trio.run(run.run_plan, plan, resolve(server.url), lambda *_: None)
    except* run.LoadError as errors:
        raise MeasureError(f"{server.name}: {leaf(errors)}") from None


def settle(engines: Sequence[EngineServer]) -> int:
    """Waits until the engines have nothing left to do; how many requests they still had when patience ended."""
    end = time.monotonic() + _SETTLE_S
    while True:
        left = sum(engine.generating() for engine in engines)
        if not left or time.monotonic() > end:
            return left
        time.sleep(_SETTLE_LOOK_S)
