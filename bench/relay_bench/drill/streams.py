"""Thousands of streams at once over two workers: every frame of each arrives, and what a stream and a frame cost."""

from __future__ import annotations

import resource
import time
from collections import Counter
from typing import TYPE_CHECKING, Final

import msgspec
import trio

from relay_bench.drill.client import READ_BYTES, Ask, End, Outcome, Reading, examples
from relay_bench.drill.report import DrillError, Report
from relay_bench.drill.rest import judge_rest, records_of
from relay_bench.drill.stage import Scene, pace, stage
from relay_bench.processes import cpu_ns, descriptors, family, memory_bytes, raise_descriptor_limit

if TYPE_CHECKING:
    from relay_bench.drill.stage import RelayChild

#: Connections from one local address: below what net.ipv4.ip_local_port_range leaves by default.
_FROM_ONE_ADDRESS: Final = 20_000
#: Descriptors of a process beside its streams'.
_OTHER_DESCRIPTORS: Final = 500
#: Clients that are connecting at once: fewer than wait to be accepted.
_AT_ONCE: Final = 200


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """How many, and how long."""

    streams: int = 10_000
    workers: int = 2
    engines: int = 2
    tokens: int = 30
    step_ms: float = 4000.0  # one process of clients takes no more frames
    seed: int = 0


FULL = Plan()
QUICK = Plan(streams=50, tokens=40, step_ms=50.0)


class _Streams:
    """All of them, a client each."""

    def __init__(self, address: tuple[str, int], plan: Plan) -> None:
        self._address = address
        self._plan = plan
        self._connecting = trio.CapacityLimiter(_AT_ONCE)
        self.outcomes: list[Outcome] = []
        self.refusals: Counter[str] = Counter()
        self.begun = 0
        self.frames = 0
        self.is_decided = trio.Event()  #: all have begun, or one has ended before
        self.first_ended = trio.Event()

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            for number in range(self._plan.streams):
                nursery.start_soon(self._stream, number)
        self.first_ended.set()  # also where all were refused

    async def _stream(self, number: int) -> None:
        ask = Ask(id=f"drill-{number}", tokens=self._plan.tokens)
        reading = Reading(ask.tokens)
        try:
            async with self._connecting:
                stream = await _connect(self._address, f"127.0.0.{2 + number // _FROM_ONE_ADDRESS}")
                await stream.send_all(b"".join(ask.encode()))
        except OSError as error:
            self.refusals[str(error)] += 1
            self._begin()
            return
        async with stream:
            await self._read(stream, reading)
        self.outcomes.append(Outcome(ask.id, *reading.end()))
        self.first_ended.set()
        self.is_decided.set()

    async def _read(self, stream: trio.SocketStream, reading: Reading) -> None:
        answer = reading.answer
        while not answer.is_done:
            try:
                data = await stream.receive_some(READ_BYTES)
            except trio.BrokenResourceError:
                data = b""
            before = answer.frames
            reading.feed(data)
            self.frames += answer.frames - before
            if answer.frames and not before:
                self._begin()
            if not data:
                return

    def _begin(self) -> None:
        self.begun += 1
        if self.begun == self._plan.streams:
            self.is_decided.set()


async def _connect(address: tuple[str, int], local: str) -> trio.SocketStream:
    """A connection from `local`; by hand, as trio's own looks up the names of both in threads. Raises OSError."""
    sock = trio.socket.socket()
    try:
        await sock.bind((local, 0))
        await sock.connect(address)
    except BaseException:
        sock.close()
        raise
    return trio.SocketStream(sock)


async def drill(scene: Scene, plan: Plan = FULL) -> Report:
    """Holds the drill. Raises `DrillError`."""
    report = Report("streams")
    raise_descriptor_limit()
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = 3 * plan.streams // 2 + _OTHER_DESCRIPTORS  # two for each stream, should a worker get three quarters
    if most < needed:
        raise DrillError(
            f"{plan.streams:,} streams may take {needed:,} descriptors in a process; the limit is {most:,}: ulimit -Hn"
        )
    async with stage(scene) as here:
        engines = await here.engines(plan.engines, *pace(0, plan.step_ms), "--max-seqs", str(plan.streams))
        settings = {"daemon.workers": str(plan.workers), "limits.max_connections": str(2 * plan.streams)}
        relay = await here.relay(engines, settings)
        at_rest = await relay.descriptors_at_rest()
        before = memory_bytes(relay.process.pid)
        streams = _Streams(relay.address, plan)
        began = time.monotonic()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(streams.run)
            await streams.is_decided.wait()
            is_held = not streams.first_ended.is_set()
            report.add("streams begun", f"{streams.begun:,} in {time.monotonic() - began:.1f} s")
            if is_held:
                await _measure(report, relay, streams, before)
        report.judge("all are held at once", is_held, f"{streams.begun:,} before the first ended")
        await judge_rest(report, relay, engines, at_rest, scene.settle_s)
        records = await records_of(report, relay)
    refused = streams.refusals.total()
    report.judge(
        "no connection is refused", not refused, f"{refused:,}{''.join(f'; {each}' for each in streams.refusals)}"
    )
    broken = [outcome for outcome in streams.outcomes if outcome.end is not End.WHOLE]
    report.judge(
        "no frame is lost, and none torn",
        not broken,
        f"{streams.frames:,} frames; streams not whole: {examples(broken)}",
    )
    whole = sum(record["outcome"] == "--" for record in records)
    report.judge("one good record for each", whole == len(records) == plan.streams, f"{whole:,} of {len(records):,}")
    return report


async def _measure(report: Report, relay: RelayChild, streams: _Streams, before: int) -> None:
    """What the relay takes from now until the first stream ends."""
    pid = relay.process.pid
    began, cpu, frames = time.monotonic(), cpu_ns(pid), streams.frames
    held = memory_bytes(pid)
    for process in family(pid):
        if (open_now := descriptors(process)) > _AT_ONCE:  # a worker; two for each stream
            memory = f"{memory_bytes(process, alone=True) / 1e6:.1f} MB"
            report.add(f"worker {process}", f"about {open_now // 2:,} streams, {memory}")
    await streams.first_ended.wait()
    took_s, cpu, frames = time.monotonic() - began, cpu_ns(pid) - cpu, streams.frames - frames
    report.add("all held for", f"{took_s:.1f} s")
    report.add("memory of the relay (PSS)", f"{before / 1e6:.1f} MB idle, {held / 1e6:.1f} MB then")
    report.add("frames in that time", f"{frames:,}, {frames / took_s:,.0f} a second")
    report.add("CPU of the relay", f"{cpu / 1e3 / max(frames, 1):.1f} µs a frame, {cpu / 1e9 / took_s:.2f} cores")
