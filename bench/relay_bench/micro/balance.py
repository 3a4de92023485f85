"""``relay-bench micro balance``: what picking an upstream costs, for every policy and several sizes of fleet.

Each pick is followed by the `take` of a load, and loads are given back in the order they were taken, so that seats, of
weights 1 to 4, carry some four streams each in uneven amounts, as at work. Only the pick is timed; affinities are asked
for a new key every time. Figures are the median and the 99th percentile of all picks in microseconds, less what reading
the clock costs. (The most that one took tells what else the machine did.) A change is not among them and has a column
of its own: a seat leaves or comes back, half each, with the pick that follows.
"""

from __future__ import annotations

import json
import random
import time
from collections import deque
from statistics import median
from typing import Any, Final

import msgspec

from relay.core.balance import POLICIES, Balancer, Load, Seat, make_balancer
from relay_bench.micro.pure import no_garbage_collection
from relay_bench.micro.table import print_table

SIZES: Final = (3, 100, 1000)
#: Sizes of the bodies that a prompt's beginning is read from.
BODY_BYTES: Final = (2_000, 20_000, 200_000, 1_000_000)

_STREAMS_PER_SEAT: Final = 4


class PickCost(msgspec.Struct, frozen=True):
    """What a pick costs, in microseconds."""

    policy: str
    seats: int
    median_us: float
    p99_us: float
    change_us: float  #: a seat leaves or comes back, and the pick after that


def measure_policy(policy: str, seats: int, *, picks: int) -> PickCost:
    """The cost of one policy over so many seats."""
    rng = random.Random(seats)
    row = [Seat(f"http://10.0.{at >> 8}.{at & 255}:8000", weight=rng.randint(1, 4)) for at in range(seats)]
    balancer = make_balancer(policy, row, rng=rng)
    loads: deque[Load] = deque()
    _picks(balancer, loads, rng, seats * _STREAMS_PER_SEAT + 100)
    costs = sorted(_picks(balancer, loads, rng, picks))
    change = _change_us(balancer, rng.choices(row, k=20))
    return PickCost(policy, seats, median(costs), costs[-(len(costs) // 100)], change)


def _picks(balancer: Balancer, loads: deque[Load], rng: random.Random, count: int) -> list[float]:
    """Picks under a steady load; the microseconds of each."""
    clock, overhead = time.perf_counter_ns, _clock_ns()
    costs = []
    for _ in range(count):
        key = rng.randbytes(16)
        began = clock()
        seat = balancer.pick(key)
        ended = clock()
        assert seat is not None
        costs.append(max(ended - began - overhead, 0) / 1000)
        loads.append(balancer.take(seat, rng.choice((500, 2_000, 20_000))))
        if len(loads) > len(balancer) * _STREAMS_PER_SEAT:
            loads.popleft().release()
    return costs


def _change_us(balancer: Balancer, seats: list[Seat]) -> float:
    """A seat leaves and comes back, and each is followed by a pick: half of all that."""
    costs = []
    for seat in seats:
        began = time.perf_counter_ns()
        for is_available in (False, True):
            balancer.set_available(seat, is_available)
            balancer.pick(b"key")
        costs.append((time.perf_counter_ns() - began) / 2000)
    return median(costs)


def measure_key(size: int, *, rounds: int) -> float:
    """Microseconds for the key of a chat request of so many bytes, half of them instructions: the best of rounds."""
    words = 'Instructions are long and have\nline breaks, "quotes" and so on. '
    messages = [{"role": "system", "content": (words * (size // len(words) + 1))[: size // 2]}]
    messages += [
        {"role": "user", "content": "Hello?"},
        {"role": "assistant", "content": words * (size // len(words) // 2)},
    ]
    body = json.dumps({"model": "tiny", "temperature": 0, "messages": messages, "stream": True}).encode()
    balancer = make_balancer("prefix_affinity", [], rng=random.Random(1))
    best = float("inf")
    for _ in range(rounds):
        began = time.perf_counter_ns()
        balancer.key_of(None, body)
        best = min(best, (time.perf_counter_ns() - began) / 1000)
    return best


def _clock_ns() -> int:
    clock = time.perf_counter_ns
    return min(-clock() + clock() for _ in range(1000))


def shown(*, quick: bool = False) -> dict[str, Any]:
    """Measures, prints the tables, and answers what is in them."""
    picks = 200 if quick else 20_000
    with no_garbage_collection():
        costs = [measure_policy(policy, seats, picks=picks) for policy in POLICIES for seats in SIZES]
        keys = {str(size): measure_key(size, rounds=picks // 40) for size in BODY_BYTES}
    print_table(
        "Picking an upstream, µs",
        ("policy", "upstreams", "median", "p99", "change"),
        [
            (cost.policy, f"{cost.seats:,}", *(f"{us:.2f}" for us in (cost.median_us, cost.p99_us, cost.change_us)))
            for cost in costs
        ],
    )
    print_table(
        "prefix_affinity: the key of a request, once for all its attempts",
        ("bytes of body", "µs"),
        [(f"{int(size):,}", f"{us:.1f}") for size, us in keys.items()],
    )
    return {"balance": costs, "key_us": keys}
