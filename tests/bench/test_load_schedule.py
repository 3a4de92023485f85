"""Schedules: how many, when, the same again."""

from __future__ import annotations

import json
import math
import random
import statistics
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relay_bench.load.schedule import (
    NS,
    Constant,
    Curve,
    ExponentialRamp,
    LinearRamp,
    arrivals,
    curve_of,
    number_within,
    positions,
    read_trace,
)

RATES = st.floats(0.1, 1000)
BURSTINESS = st.sampled_from([0.1, 0.5, 1.0, 2.0, 50.0, math.inf])


@st.composite
def curves(draw: st.DrawFn) -> Curve:
    start, end = draw(RATES), draw(RATES)
    kind = draw(st.sampled_from(["", "linear", "exponential"]))
    return curve_of(rate=start if not kind else math.inf, strategy=kind, start=start, end=end)


@settings(deadline=None)
@given(curves(), st.integers(1, 300), BURSTINESS, st.integers())
def test_the_number_is_exact_and_the_order_is_that_of_time(
    curve: Curve, total: int, burstiness: float, seed: int
) -> None:
    instants = arrivals(total, curve, burstiness=burstiness, rng=random.Random(seed))
    assert len(instants) == total
    assert instants == sorted(instants)
    assert instants[0] >= 0
    # all of them take as long as the curve takes for so many: the rate is met, whatever was drawn
    assert curve.count(instants[-1] / NS) == pytest.approx(total, rel=1e-6, abs=1e-5)


@settings(deadline=None)
@given(curves(), st.integers(1, 200), BURSTINESS, st.integers())
def test_the_same_seed_is_the_same_schedule(curve: Curve, total: int, burstiness: float, seed: int) -> None:
    one, other = (arrivals(total, curve, burstiness=burstiness, rng=random.Random(seed)) for _ in range(2))
    assert one == other


@settings(deadline=None)
@given(st.integers(1, 500), RATES)
def test_constant_gaps(total: int, rate: float) -> None:
    instants = arrivals(total, Constant(rate), burstiness=math.inf, rng=random.Random(0))
    assert instants == [round(number / rate * NS) for number in range(1, total + 1)]


@settings(deadline=None)
@given(RATES, RATES, st.integers(2, 300), st.sampled_from(["linear", "exponential"]))
def test_a_ramp_has_its_rates_at_its_ends(start: float, end: float, total: int, strategy: str) -> None:
    curve = curve_of(rate=math.inf, strategy=strategy, start=start, end=end)
    h = total * 1e-4
    first, near_first, near_last, last = curve.instants([0, h, total - h, total], total)
    assert first == 0
    assert h / (near_first - first) == pytest.approx(start, rel=0.05, abs=0.05 * max(start, end))
    assert h / (last - near_last) == pytest.approx(end, rel=0.05, abs=0.05 * max(start, end))


def test_a_falling_ramp_to_zero_ends() -> None:
    instants = LinearRamp(10.0, 0.0).instants([0.0, 5.0, 10.0], 10)
    assert instants == pytest.approx([0.0, 2 - math.sqrt(2), 2.0])


@pytest.mark.parametrize(("burstiness", "deviation"), [(0.25, 2.0), (1.0, 1.0), (4.0, 0.5)])
def test_gaps_vary_as_the_gamma_distribution_says(burstiness: float, deviation: float) -> None:
    found = positions(20_000, burstiness, random.Random(1))
    gaps = [later - earlier for earlier, later in pairwise([0.0, *found])]
    assert statistics.fmean(gaps) == pytest.approx(1.0)
    assert statistics.pstdev(gaps) == pytest.approx(deviation, rel=0.05)


def test_all_at_once() -> None:
    assert arrivals(3, Constant(math.inf), burstiness=1.0, rng=random.Random(0)) == [0, 0, 0]


@settings(deadline=None)
@given(RATES, st.floats(0.5, 100))
def test_a_duration_takes_as_many_as_fit(rate: float, seconds: float) -> None:
    curve = Constant(rate)
    total = number_within(curve, seconds)
    last = arrivals(total, curve, burstiness=1.0, rng=random.Random(0))[-1] / NS
    assert total == 1 or last <= seconds + 1e-6
    assert last > seconds - 1 / rate - 1e-6


def test_an_infinite_rate_has_no_duration() -> None:
    with pytest.raises(ValueError, match="--duration"):
        number_within(Constant(math.inf), 1.0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rate": 0.0}, "--request-rate"),
        ({"rate": math.nan}, "--request-rate"),
        ({"rate": math.inf, "strategy": "square", "start": 1, "end": 2}, "wanted linear or exponential"),
        ({"rate": math.inf, "strategy": "linear"}, "at least one above 0"),
        ({"rate": math.inf, "strategy": "exponential", "start": 0, "end": 2}, "above 0"),
    ],
)
def test_what_is_no_rate(fields: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        curve_of(**fields)  # type: ignore[arg-type]


def test_a_flat_ramp_is_constant() -> None:
    assert curve_of(rate=math.inf, strategy="exponential", start=5, end=5) == Constant(5)
    assert isinstance(curve_of(rate=math.inf, strategy="exponential", start=5, end=6), ExponentialRamp)


def test_traces_in_both_forms() -> None:
    mooncake = {"timestamp": 27_500, "input_length": 6758, "output_length": 500, "hash_ids": [1]}
    entries = read_trace(f"12.5\n\n{json.dumps(mooncake)}\n7\n")
    assert [entry.at_ns for entry in entries] == [0, round(5.5 * NS), round(20.5 * NS)]
    assert (entries[2].input_len, entries[2].output_len) == (6758, 500)
    assert entries[0].input_len is None


@pytest.mark.parametrize("text", ["", "soon\n", "true\n", '{"time": 1}\n', "1\nNaN\n", "[]\n"])
def test_what_is_no_trace(text: str) -> None:
    with pytest.raises(ValueError, match=r"line \d|empty"):
        read_trace(text)
