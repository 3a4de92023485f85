"""Three engines under load, one killed: who has begun is told once, who has not notices nothing, and it comes back."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import msgspec
import trio

from relay_bench.drill.client import Crowd, End, examples
from relay_bench.drill.report import Report
from relay_bench.drill.rest import judge_rest, records_of
from relay_bench.drill.stage import Scene, holds, stage

if TYPE_CHECKING:
    from collections.abc import Sequence


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """How large, and how long."""

    engines: int = 3
    clients: int = 120
    tokens: range = range(10, 80)
    ttft_ms: float = 200.0
    step_ms: float = 20.0
    before_s: float = 5.0  #: load before the kill
    down_s: float = 5.0  #: until the engine is started again
    back_s: float = 40.0  #: longest wait until it is used again
    after_s: float = 5.0  #: load after that
    seed: int = 0


FULL = Plan()
QUICK = Plan(clients=30, tokens=range(5, 30), before_s=0.6, down_s=0.2, back_s=15.0, after_s=0.2)


async def drill(scene: Scene, plan: Plan = FULL) -> Report:
    """Holds the drill. Raises `DrillError`."""
    report = Report("kill")
    flags = ("--ttft-ms", f"{plan.ttft_ms:g}", "--step-ms", f"{plan.step_ms:g}")
    async with stage(scene) as here:
        engines = await here.engines(plan.engines, *flags)
        relay = await here.relay(engines, {})
        descriptors = await relay.descriptors_at_rest()
        crowd = Crowd(relay.address, plan.tokens, plan.seed)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(crowd.run, plan.clients)
            await trio.sleep(plan.before_s)
            victim = engines[0]
            at_kill = [one["phase"] for one in await relay.exchanges() if one["upstream"] == victim.url]
            await victim.kill()
            await trio.sleep(plan.down_s)
            again = engines[0] = await here.engine_again(victim, *flags)
            restarted = time.monotonic()

            async def is_used() -> bool:
                return (await again.counts())["served"] > 0

            is_back = await holds(is_used, plan.back_s)
            back_s = time.monotonic() - restarted
            await trio.sleep(plan.after_s if is_back else 0)
            crowd.stop()
        served_again = (await again.counts())["served"]
        await judge_rest(report, relay, engines, descriptors, scene.settle_s)
        records = await records_of(report, relay)
    report.add("requests", len(crowd.outcomes))
    report.add("with the engine just before its death", f"{len(at_kill)}, of them streaming {at_kill.count('data')}")
    _judge(report, crowd, records, victim.url)
    report.judge(
        "the engine is used again after its restart",
        is_back,
        f"after {back_s:.1f} s; then {served_again:,} requests" if is_back else f"not within {back_s:.1f} s",
    )
    return report


def _judge(report: Report, crowd: Crowd, records: Sequence[dict[str, Any]], victim: str) -> None:
    """What clients saw, beside what the relay has written of it."""
    told = {outcome.id for outcome in crowd.that(End.TOLD)}
    begun = {record["id"] for record in records if record["outcome"] == "UD" and record["upstream"] == victim}
    moved = [record for record in records if record["attempts"] > 1 and record["outcome"] == "--"]
    report.add("streams cut off by it", len(begun))
    report.add("requests moved to another engine", len(moved))
    report.add("clients' answers whole", len(crowd.that(End.WHOLE)))
    report.judge("the kill has met streams, and requests before their first frame", bool(begun and moved))
    refused = crowd.that(End.REFUSED)
    report.judge("no client sees an error before the commit point", not refused, examples(refused))
    broken = crowd.that(End.BROKEN)
    report.judge(
        "every stream that had begun on it, and no other, ends with exactly one error frame",
        told == begun and not broken,
        f"{len(told & begun):,} of {len(begun):,}, {len(told - begun):,} others; otherwise broken: {examples(broken)}",
    )
    report.judge("one record for each request", sorted(record["id"] for record in records) == crowd.ids)
