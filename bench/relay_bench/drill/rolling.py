"""Every engine replaced by another through the admin side, under load: nobody notices."""

from __future__ import annotations

import time

import msgspec
import trio

from relay_bench.drill.client import Crowd, End, examples
from relay_bench.drill.report import Report
from relay_bench.drill.rest import judge_rest, records_of
from relay_bench.drill.stage import EngineChild, RelayChild, Scene, holds, stage


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """How large, and how long."""

    engines: int = 3
    clients: int = 120
    tokens: range = range(10, 80)
    ttft_ms: float = 200.0
    step_ms: float = 20.0
    between_s: float = 3.0  #: load before each replacement, and after the last
    drain_s: float = 30.0  #: longest wait until an engine that was taken out has nothing more to do
    seed: int = 0


FULL = Plan()
QUICK = Plan(clients=30, tokens=range(2, 12), ttft_ms=50.0, between_s=0.2)


async def drill(scene: Scene, plan: Plan = FULL) -> Report:
    """Holds the drill. Raises `DrillError`."""
    report = Report("rolling")
    flags = ("--ttft-ms", f"{plan.ttft_ms:g}", "--step-ms", f"{plan.step_ms:g}")
    async with stage(scene) as here:
        old = await here.engines(plan.engines, *flags)
        relay = await here.relay(old, {})
        descriptors = await relay.descriptors_at_rest()
        crowd = Crowd(relay.address, plan.tokens, plan.seed)
        new: list[EngineChild] = []
        async with trio.open_nursery() as nursery:
            nursery.start_soon(crowd.run, plan.clients)
            for engine in old:
                await trio.sleep(plan.between_s)
                new += await here.engines(1, *flags)
                await relay.add(new[-1].url)
                await relay.remove(engine.url)
                drain_s = await _drain(report, relay, engine, plan.drain_s)
                served = (await engine.counts())["served"]
                await engine.stop()
                report.add(f"{engine.url} → {new[-1].url}", f"{served:,} requests, drained in {drain_s:.2f} s")
            await trio.sleep(plan.between_s)
            crowd.stop()
        in_pool = {upstream.url for upstream in await relay.upstreams()}
        served = min([(await engine.counts())["served"] for engine in new])
        await judge_rest(report, relay, new, descriptors, scene.settle_s)
        records = await records_of(report, relay)
    report.add("requests", len(crowd.outcomes))
    failed = [outcome for outcome in crowd.outcomes if outcome.end is not End.WHOLE]
    report.judge("zero errors", not failed, examples(failed))
    again = [record for record in records if record["attempts"] != 1 or record["outcome"] != "--"]
    report.judge("no attempt fails, not even one that another makes good", not again, f"{len(again):,} have")
    report.judge(
        "only the new engines are in the pool, and all are used",
        in_pool == {engine.url for engine in new} and served > 0,
        f"the one used least had {served:,} requests",
    )
    report.judge("one record for each request", sorted(record["id"] for record in records) == crowd.ids)
    return report


async def _drain(report: Report, relay: RelayChild, engine: EngineChild, limit_s: float) -> float:
    """Waits until an engine that was taken out has nothing more to do; how long that took, in seconds."""
    began = time.monotonic()

    async def is_drained() -> bool:
        if any(one["upstream"] == engine.url for one in await relay.exchanges()):
            return False
        counts = await engine.counts()
        return not counts["queued"] + counts["running"]

    has_drained = await holds(is_drained, limit_s)
    took_s = time.monotonic() - began
    report.judge(
        "an engine that is taken out gets nothing more",
        has_drained,
        "" if has_drained else f"busy after {took_s:.1f} s",
    )
    return took_s
