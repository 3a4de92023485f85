"""Thousands of split requests, many of them hung up on in any phase: no load stays, and no handle at a prefiller."""

from __future__ import annotations

import time
from collections import Counter
from typing import TYPE_CHECKING, Any

import trio

from relay_bench.drill import hangups
from relay_bench.drill.client import End, Outcome, examples
from relay_bench.drill.report import Report
from relay_bench.drill.rest import judge_rest, records_of
from relay_bench.drill.stage import EngineChild, Scene, holds, stage

if TYPE_CHECKING:
    from collections.abc import Sequence


class Plan(hangups.Plan, frozen=True, kw_only=True):
    """How large, and how long; `engines` of each role. Prefill and the decoder's first token take as long each."""

    engines: int = 2
    requests: int = 5_000
    hang_ups: float = 0.5
    tokens: range = range(2, 20)
    ttft_ms: float = 20.0
    step_ms: float = 5.0
    wait_s: float = 0.15


FULL = Plan()
QUICK = Plan(requests=500)


async def drill(scene: Scene, plan: Plan = FULL) -> Report:
    """Holds the drill. Raises `DrillError`."""
    report = Report("split")
    flags = ("--ttft-ms", f"{plan.ttft_ms:g}", "--step-ms", f"{plan.step_ms:g}")
    asks = hangups.draw(plan)
    outcomes: list[Outcome] = []
    async with stage(scene) as here:
        prefillers, decoders = await here.engines(plan.engines, *flags), await here.engines(plan.engines, *flags)
        settings = {
            "pool.upstreams": "[]",
            "pool.prefill": str([engine.url for engine in prefillers]),
            "pool.decode": str([engine.url for engine in decoders]),
            "pool.max_in_flight": str(plan.places),
            "pool.max_queue": str(plan.clients),
        }
        relay = await here.relay([], settings)
        descriptors = await relay.descriptors_at_rest()
        began = time.monotonic()
        left = iter(asks)
        async with trio.open_nursery() as nursery:
            for _ in range(plan.clients):
                nursery.start_soon(hangups.ask_in_turn, relay.address, left, plan.wait_s, outcomes)
        took_s = time.monotonic() - began
        await judge_rest(report, relay, [*prefillers, *decoders], descriptors, scene.settle_s)
        await _judge_handles(report, prefillers, scene.settle_s)
        decoded = await _sum(decoders)
        records = await records_of(report, relay)
    report.add("requests", f"{len(outcomes):,} in {took_s:.1f} s, {plan.clients} clients for {plan.places} places")
    report.add("decoders' requests", f"{decoded['completed']:,} completed, {decoded['aborted']:,} aborted")
    asked = sum(record["upstream"] is not None and record["outcome"] != "CC" for record in records)
    report.add("handles drained", decoded["served"] - asked)
    _judge(report, outcomes, records)
    return report


async def _sum(engines: Sequence[EngineChild]) -> Counter[str]:
    """The engines' own counts, together."""
    counts: Counter[str] = Counter()
    for engine in engines:
        found = await engine.counts()
        counts.update({name: count for name, count in found.items() if name != "requests"})
    return counts


async def _judge_handles(report: Report, prefillers: Sequence[EngineChild], limit_s: float) -> None:
    counts = await _sum(prefillers)

    async def is_none_held() -> bool:
        nonlocal counts
        counts = await _sum(prefillers)
        return counts["handles_held"] == 0

    await holds(is_none_held, limit_s)
    report.add("handles", f"{counts['handles_given']:,} given, {counts['handles_taken']:,} taken")
    report.judge("no handle is left at a prefiller", counts["handles_held"] == 0, f"{counts['handles_held']:,} held")


def _judge(report: Report, outcomes: Sequence[Outcome], records: Sequence[dict[str, Any]]) -> None:
    letters = Counter(record["outcome"] for record in records)
    report.add("records' outcomes", ", ".join(f"{outcome} {count:,}" for outcome, count in letters.most_common()))
    phases = ("CR", "CQ", "CP", "CH", "CD")
    report.judge("clients have hung up in all phases", all(letters[phase] for phase in phases), ", ".join(phases))
    failed = [outcome for outcome in outcomes if outcome.end not in (End.WHOLE, End.LEFT)]
    report.judge("clients that stay have whole answers", not failed, f"{examples(failed)} have not")
    report.judge(
        "one record for each request begun", len(records) == len(outcomes), f"{len(records):,} of {len(outcomes):,}"
    )
