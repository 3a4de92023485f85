"""One request's metrics, objectives, and inter-token latencies as properties."""

from __future__ import annotations

from itertools import accumulate, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relay_bench.load.records import Tally, inter_token_ns
from relay_bench.load.slo import Objective, is_good, parse_objectives
from relay_bench.load.stats import Histogram, histogram_of
from tests.bench.loading import record

MARKS = st.lists(st.integers(0, 10**9), min_size=1, max_size=40).map(sorted)


def test_metrics_of_a_good_answer() -> None:
    one = record(planned_ns=-1_000_000)
    found = {name: one.metric_s(name) for name in ("ttft", "ttft_planned", "e2el", "e2el_planned", "tpot", "send_lag")}
    assert found == pytest.approx(
        {"ttft": 0.010, "ttft_planned": 0.012, "e2el": 0.040, "e2el_planned": 0.042, "tpot": 0.010, "send_lag": 0.001}
    )
    assert one.metric_s("frame_gap_mean") == pytest.approx(0.010)


def test_what_never_came_has_no_metric() -> None:
    one = record(first_content_ns=None, last_content_ns=None)
    assert one.metric_s("ttft") is None
    assert one.metric_s("send_lag") == pytest.approx(0.001)
    assert record(completion_tokens=1).metric_s("tpot") is None
    assert record(completion_tokens=None).metric_s("tpot") is None
    with pytest.raises(KeyError):
        record().metric_s("tppt")


@settings(deadline=None)
@given(MARKS)
def test_without_counts_a_frame_is_a_token(marks: list[int]) -> None:
    assert inter_token_ns(marks, None) == [later - earlier for earlier, later in pairwise(marks)]


@settings(deadline=None)
@given(MARKS, st.data())
def test_tokens_share_their_frames_gap(marks: list[int], data: st.DataObject) -> None:
    new = data.draw(st.lists(st.integers(0, 5), min_size=len(marks), max_size=len(marks)))
    counts = list(accumulate(new))
    found = inter_token_ns(marks, counts)
    assert len(found) == counts[-1] - counts[0]
    assert all(value >= 0 for value in found)
    last = max((at for at in range(1, len(marks)) if new[at]), default=0)
    # together they are the time from the first frame to the last that brought a token, less rounding
    assert 0 <= marks[last] - marks[0] - sum(found) <= len(found)


def test_a_frame_of_three_tokens() -> None:
    assert inter_token_ns([0, 30, 40], [1, 4, 5]) == [10, 10, 10, 10]
    assert inter_token_ns([0, 30, 40], [1, 1, 3]) == [20, 20]


def test_objectives() -> None:
    ttft, tpot = parse_objectives(["ttft:10", "tpot:9.9"])
    assert ttft == Objective("ttft", 10.0)
    assert ttft.is_met(record())  # inclusive
    assert not tpot.is_met(record())
    assert tpot.is_met(record(completion_tokens=1))
    assert not tpot.is_met(record(completion_tokens=None))  # nobody knows
    assert is_good(record(), [ttft])
    assert not is_good(record(), [ttft, tpot])
    assert not is_good(record(label="truncated"), [ttft])
    (planned,) = parse_objectives(["ttft_planned:10"])
    assert not planned.is_met(record())  # 11 ms from planned: waiting at the client counts


@pytest.mark.parametrize("word", ["ttft", "ttft:", "itl:5", "ttft:-1", "ttft:nan"])
def test_what_is_no_objective(word: str) -> None:
    with pytest.raises(ValueError, match="METRIC:MS"):
        parse_objectives([word])


def test_tallies_add_up() -> None:
    def tally(ns: int) -> Tally:
        empty = (Histogram(), Histogram(), Histogram())
        return Tally([record(index=ns)], histogram_of([ns]), *empty, cpu_s=1.0, wall_s=float(ns), reads=2, retried=1)

    whole = tally(5)
    whole.merge(tally(7))
    assert [one.index for one in whole.records] == [5, 7]
    assert (whole.frame_gap.count, whole.cpu_s, whole.wall_s, whole.reads, whole.retried) == (2, 2.0, 7.0, 4, 2)
