"""The harness's own floor: what it measures where there is next to nothing to measure.

Two short runs against the built-in engine, which runs beside: requests one after the other to an engine that answers at
once, and as many frames as come. Their figures are client and engine together, so they are what no server measured
with this client on this machine can be seen to do better than.
"""

from __future__ import annotations

import subprocess
import sys
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final

import msgspec
import trio

from relay_bench import processes
from relay_bench.load import options, results, run
from relay_bench.load.target import resolve
from relay_bench.servers import START_S, said_url

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

#: Requests one after the other; enough for a median.
_SINGLE: Final = ("--max-concurrency", "1", "--num-prompts", "50", "--random-output-len", "2")
#: Streams as fast as they go.
_SATURATED: Final = ("--max-concurrency", "32", "--num-prompts", "64", "--random-output-len", "400")


class Floor(msgspec.Struct, frozen=True):
    """What the harness sees of an engine that takes no time."""

    ttft_ms: float  #: median
    client_delay_ms: float | None  #: median; None: this kernel gives no stamps
    frames_per_s: float  #: client and engine together
    cpu_us_per_frame: float  #: of the client
    engine_cpu_us_per_frame: float  #: of the built-in engine, requests included

    def __str__(self) -> str:
        delay = "not known" if self.client_delay_ms is None else f"{self.client_delay_ms * 1000:.0f} µs"
        return (
            f"TTFT {self.ttft_ms:.2f} ms, client delay {delay} (medians, one request at a time); "
            f"at most {self.frames_per_s:,.0f} frames/s from the built-in engine, {self.cpu_us_per_frame:.1f} µs of "
            f"the client's CPU each, {self.engine_cpu_us_per_frame:.1f} µs of the engine's"
        )


async def measure() -> Floor:
    """Measures the floor. Raises `LoadError`."""
    async with running_engine() as (url, pid):
        single = await run_against(url, _SINGLE)
        began_ns = processes.cpu_ns(pid)
        saturated = await run_against(url, _SATURATED)
        engine_ns = processes.cpu_ns(pid) - began_ns
    frames = saturated["content_frames"]
    return Floor(
        single["median_ttft_ms"],
        single["median_client_delay_ms"],
        frames / saturated["duration"],
        saturated["harness"]["cpu_us_per_frame"],
        engine_ns / frames / 1000,
    )


async def run_against(url: str, words: tuple[str, ...]) -> results.Result:
    """The result of a run with these flags against the built-in engine at `url`. Raises `LoadError`."""
    chosen = options.parsed(url, "--random-input-len", "16", *words)
    plan = options.plan_of(chosen, model="tiny")
    tally = await run.run_plan(plan, resolve(url), lambda *_: None)
    result = results.result_of(plan, tally, url=url)
    if not result["completed"] or result["failed"]:
        raise run.LoadError(f"the built-in engine failed: {result['failures']}")
    return result


@asynccontextmanager
async def running_engine(*words: str) -> AsyncGenerator[tuple[str, int], None]:
    """A built-in engine in a process of its own: its URL and process id. Raises `LoadError`."""
    command = [sys.executable, "-m", "relay_bench", "engine", "--listen", "127.0.0.1:0", "--max-seqs", "100000", *words]
    process = await trio.lowlevel.open_process(command, stderr=subprocess.PIPE)
    assert process.stderr is not None
    try:
        said = ""
        with trio.move_on_after(START_S):
            while not said_url(said) and (data := await process.stderr.receive_some()):
                said += data.decode("utf-8", "replace")
        if not (url := said_url(said)):
            raise run.LoadError(f"the built-in engine did not start: {said.strip()}")
        yield url, process.pid
    finally:
        with trio.CancelScope(shield=True, deadline=trio.current_time() + START_S):
            process.kill()
            await process.wait()
        await process.stderr.aclose()
