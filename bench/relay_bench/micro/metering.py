"""What metering costs a frame of the running relay: beside one that only passes frames on, in turns."""

from __future__ import annotations

import statistics
from contextlib import ExitStack
from typing import Any, Final

import msgspec

from relay_bench import processes
from relay_bench.micro.process import StreamTest, cores, engine, measure_streams, relay
from relay_bench.micro.table import print_table

TESTS: Final = (StreamTest(100, 20, 4), StreamTest(100, 0, 3))
_QUICK_TESTS: Final = (StreamTest(2, 10, 0.2), StreamTest(2, 0, 0.2))
ROUNDS: Final = 5


class MeteringCost(msgspec.Struct, frozen=True, kw_only=True):
    """One test: medians over the rounds, of CPU per frame, and of the ratio within each round."""

    test: str
    metered_us: float
    unmetered_us: float
    ratio: float
    least: float  #: the ratio of one round
    most: float


def measure(*, quick: bool = False) -> list[MeteringCost]:
    """All tests. Raises `MeasureError`, `StartError`."""
    processes.raise_descriptor_limit()
    with cores() as (own, other), ExitStack() as stack:
        behind = stack.enter_context(engine(own)).url
        metered = stack.enter_context(relay(behind, other))
        unmetered = stack.enter_context(relay(behind, other, program="relay_bench.micro.unmetered"))
        costs = []
        for test in _QUICK_TESTS if quick else TESTS:
            pairs: list[tuple[float, float]] = []
            for number in range(1 if quick else ROUNDS):
                both = [("metered", metered), ("unmetered", unmetered)]
                if number % 2:
                    both.reverse()
                found = {name: measure_streams(name, proxy, test).cpu_us for name, proxy in both}
                pairs.append((found["metered"], found["unmetered"]))
            ratios = [one / other for one, other in pairs]
            with_it, without = (statistics.median(each) for each in zip(*pairs, strict=True))
            costs.append(
                MeteringCost(
                    test=test.name, metered_us=with_it, unmetered_us=without,
                    ratio=round(statistics.median(ratios), 3), least=round(min(ratios), 3), most=round(max(ratios), 3),
                )
            )  # fmt: skip
        return costs


def shown(*, quick: bool = False) -> dict[str, Any]:
    """Measures, prints the table, and answers what is in it."""
    costs = measure(quick=quick)
    print_table(
        "Metering, CPU µs per frame",
        ("test", "metered", "not", "ratio", "rounds"),
        [
            (cost.test, f"{cost.metered_us:.2f}", f"{cost.unmetered_us:.2f}", f"{cost.ratio:.2f}",
             f"{cost.least:.2f} to {cost.most:.2f}")
            for cost in costs
        ],
    )  # fmt: skip
    return {"metering": costs}
