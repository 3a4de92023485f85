"""The histogram of gaps, beside a sorted list."""

from __future__ import annotations

from collections import Counter
from math import ceil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.core.histogram import Histogram

MINUTE_NS = 60 * 10**9
#: Below some microseconds the unit, 1,024 ns, is the limit rather than the steps per doubling.
UNIT_NS = 1024
TIMES = st.lists(st.integers(0, 20 * MINUTE_NS), min_size=1, max_size=60)
SHARES = [0.0, 0.5, 0.9, 0.99, 1.0]


def histogram(values: list[int]) -> Histogram:
    """A histogram of `values`."""
    made = Histogram()
    for value in values:
        made.add(value)
    return made


@pytest.mark.parametrize("share", SHARES)
@given(values=TIMES)
def test_quantiles_are_within_6_25_percent(share: float, values: list[int]) -> None:
    found = histogram(values).quantile(share)
    exact = sorted(values)[max(1, ceil(share * len(values))) - 1]  # the nearest rank
    assert found is not None
    assert abs(found - exact) <= max(0.0625 * exact, UNIT_NS)


@given(st.integers(0, 20 * MINUTE_NS))
def test_one_value_is_its_own_every_quantile(value: int) -> None:
    # One value is the greatest, too: what is answered is never beyond it.
    made = histogram([value])
    assert made.max_ns == value
    for share in SHARES:
        found = made.quantile(share)
        assert found is not None
        assert found <= value


def test_every_boundary_between_buckets() -> None:
    for bits in range(10, 41):
        for value in (1 << bits) - 1, 1 << bits, (1 << bits) + 1:
            found = histogram([value, 1 << 50]).quantile(0.0)
            assert found is not None
            assert abs(found - value) <= max(0.0625 * value, UNIT_NS)


def test_nothing_counted() -> None:
    assert Histogram().quantile(0.5) is None
    assert Histogram().count == 0
    assert Histogram().take() == {}


@given(st.lists(st.tuples(st.integers(0, 20 * MINUTE_NS), st.booleans()), max_size=40))
def test_what_is_taken_is_what_was_counted_since(values: list[tuple[int, bool]]) -> None:
    made, whole, taken = Histogram(), Histogram(), Counter[int]()
    for ns, is_taken in values:
        made.add(ns)
        whole.add(ns)
        if is_taken:
            taken.update(made.take())
    assert [made.quantile(share) for share in SHARES] == [whole.quantile(share) for share in SHARES]
    taken.update(made.take())
    assert taken == whole.take()
    assert made.take() == {}
    assert [made.quantile(share) for share in SHARES] == [whole.quantile(share) for share in SHARES]


def test_zeros() -> None:
    made = Histogram()
    made.add_zeros(99)
    made.add(10**9)
    assert made.count == 100
    assert made.quantile(0.5) == 0
    assert made.quantile(0.98) == 0
    top = made.quantile(1.0)
    assert top is not None
    assert abs(top - 10**9) <= 0.0625 * 10**9
    assert made.max_ns == 10**9
    only_zeros = Histogram()
    only_zeros.add_zeros(3)
    assert (only_zeros.quantile(0.5), only_zeros.quantile(1.0), only_zeros.max_ns) == (0, 0, 0)


def test_what_a_clock_should_not_give() -> None:
    made = histogram([-5, 10**18])
    assert made.count == 2
    assert made.quantile(0.0) == 0
    assert made.max_ns == 10**18
    top = made.quantile(1.0)
    assert top is not None
    assert 20 * MINUTE_NS < top <= 10**18
