"""Histograms beside sorted lists; percentiles beside the standard library; intervals that hold what they should."""

from __future__ import annotations

import random
import statistics

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relay_bench.load.stats import Histogram, Interval, histogram_of, middle_ns, paired_interval, percentile

TIMES = st.lists(st.integers(0, 2**42), min_size=1, max_size=200)


@settings(deadline=None)
@given(TIMES, st.floats(0, 1))
def test_a_quantile_is_within_two_thousandths(values: list[int], q: float) -> None:
    found = histogram_of(values).quantile_ns(q)
    exact = sorted(values)[int(q * (len(values) - 1))]
    assert found == pytest.approx(exact, rel=0.002, abs=0.5)


@settings(deadline=None)
@given(TIMES)
def test_moments_and_extremes_are_exact(values: list[int]) -> None:
    histogram = histogram_of(values)
    assert (histogram.count, histogram.min_ns, histogram.max_ns) == (len(values), min(values), max(values))
    assert histogram.mean_ns == pytest.approx(statistics.fmean(values))
    assert histogram.std_ns == pytest.approx(statistics.pstdev(values), rel=1e-6, abs=1e-4 * max(values) + 1e-9)


@settings(deadline=None)
@given(TIMES, TIMES)
def test_two_added_up_are_one_of_both(one: list[int], other: list[int]) -> None:
    merged = histogram_of(one)
    merged.merge(histogram_of(other))
    whole = histogram_of(one + other)
    assert merged.counts == whole.counts
    assert (merged.count, merged.total, merged.min_ns, merged.max_ns) == (
        whole.count,
        whole.total,
        whole.min_ns,
        whole.max_ns,
    )


@settings(deadline=None)
@given(TIMES)
def test_steps_rise_to_one(values: list[int]) -> None:
    steps = histogram_of(values).steps()
    assert steps == sorted(steps)
    assert steps[-1][1] == 1.0


@settings(deadline=None)
@given(st.integers(0, 2**50))
def test_every_value_is_in_a_bucket_near_it(value: int) -> None:
    (index,) = histogram_of([value]).counts
    assert middle_ns(index) == pytest.approx(value, rel=1 / 512, abs=0.5)


def test_an_empty_one_knows_nothing() -> None:
    empty = Histogram()
    assert (empty.mean_ns, empty.std_ns, empty.quantile_ns(0.5)) == (None, None, None)
    full = histogram_of([7])
    full.merge(empty)
    empty.merge(full)
    assert (full.count, empty.min_ns, empty.max_ns) == (1, 7, 7)
    full.clear()
    assert full == Histogram()


def test_negative_values_count_as_zero() -> None:
    assert histogram_of([-5, 3]).min_ns == 0


def test_it_survives_both_encodings() -> None:
    histogram = histogram_of([1, 1000, 10**9])
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(histogram), type=Histogram) == histogram
    packed = msgspec.json.decode(msgspec.json.encode(msgspec.to_builtins(histogram, str_keys=True)))
    assert msgspec.convert(packed, Histogram, strict=False) == histogram


@settings(deadline=None)
@given(st.lists(st.floats(0, 1e6), min_size=2, max_size=60))
def test_percentiles_are_interpolated_as_the_inclusive_method_does(values: list[float]) -> None:
    wanted = statistics.quantiles(values, n=100, method="inclusive")
    ordered = sorted(values)
    assert [percentile(ordered, q / 100) for q in range(1, 100)] == pytest.approx(wanted)


def test_the_interval_holds_a_shift_and_not_zero() -> None:
    rng = random.Random(3)
    rounds = [[0.5 + rng.gauss(0, 0.1) for _ in range(100)] for _ in range(5)]
    interval = paired_interval(rounds, random.Random(1))
    assert interval.low < 0.5 < interval.high
    assert interval.low <= interval.estimate <= interval.high
    assert interval.excludes_zero


def test_rounds_that_disagree_make_it_wide() -> None:
    noise = random.Random(3)
    alike = [[noise.gauss(0, 0.1) for _ in range(100)] for _ in range(5)]
    drifting = [[value + shift for value in values] for values, shift in zip(alike, (-1, -0.5, 0, 0.5, 1), strict=True)]
    narrow, wide = (paired_interval(rounds, random.Random(1)) for rounds in (alike, drifting))
    assert wide.high - wide.low > 5 * (narrow.high - narrow.low)
    assert not wide.excludes_zero


def test_the_same_seed_is_the_same_interval_and_no_pair_is_none() -> None:
    rounds = [[1.0, 2.0, 3.0], [], [2.0]]
    assert paired_interval(rounds, random.Random(1)) == paired_interval(rounds, random.Random(1))
    assert Interval(-1, 0, 1).excludes_zero is False
    with pytest.raises(ValueError, match="no pair"):
        paired_interval([[], []], random.Random(1))
