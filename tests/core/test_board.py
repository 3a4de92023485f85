"""Boards: one writer, readers that see whole entries at every moment, and sums that nothing is lost from."""

from __future__ import annotations

import math
import mmap
import multiprocessing
import os
import signal
from collections import Counter as Tally
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.core import board, metrics
from relay.core.board import Board, read, retire, total
from relay.core.histogram import Histogram

if TYPE_CHECKING:
    from relay.core.board import Block

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
NS = st.integers(0, 30 * 10**9)
SMALL = 8192
INTER_FRAME = metrics.INTER_FRAME.name


def counts_of(block: Block, name: str, *labels: str) -> list[float]:
    return read(block)[(name, *labels)]


# -- counting


def test_a_fresh_block_has_nothing_and_a_fresh_board_its_fixed_metrics() -> None:
    block = bytearray(SMALL)
    assert read(block) == {}
    Board(block)
    assert {key[0] for key in read(block)} == {family.name for family in metrics.FAMILIES if not family.labels}
    assert all(set(cells) == {0.0} for cells in read(block).values())


def test_counters_gauges_and_histograms() -> None:
    block = bytearray(SMALL)
    made = Board(block)
    requests = made.counter(metrics.REQUESTS, "chat", "chat", "200", "--")
    requests.add()
    requests.add(2)
    made.counter(metrics.COST).add(0.125)
    gauge = made.gauge(metrics.IN_FLIGHT, "chat")
    gauge.add(3)
    gauge.add(-1)
    made.gauge(metrics.QUEUE_DEPTH, "chat").set(7)
    lag = made.histogram(metrics.EVENT_LOOP_LAG)
    for seconds in (0.0, 0.0001, 0.00011, 10.0, 11.0):
        lag.observe(seconds)
    found = read(block)
    assert found["relay_requests_total", "chat", "chat", "200", "--"] == [3]
    assert found["relay_cost_total",] == [0.125]
    assert found["relay_in_flight", "chat"] == [2]
    assert found["relay_queue_depth", "chat"] == [7]
    *counts, above, summed = found["relay_event_loop_lag_seconds",]
    assert counts[:2] == [2, 1]  # a bound is inclusive
    assert (counts[-1], above, sum(counts)) == (1, 1, 4)
    assert summed == pytest.approx(21.00021)


def test_a_series_is_found_again() -> None:
    made = Board(bytearray(SMALL))
    assert made.counter(metrics.BYTES, "in") is made.counter(metrics.BYTES, "in")
    assert made.counter(metrics.BYTES, "in") is not made.counter(metrics.BYTES, "out")
    assert made.gauge(metrics.IN_FLIGHT, "a") is made.gauge(metrics.IN_FLIGHT, "a")
    assert made.histogram(metrics.ADDED, "relay") is made.histogram(metrics.ADDED, "relay")


@pytest.mark.parametrize("labels", [(), ("a", "b")])
def test_a_wrong_number_of_labels_is_a_mistake(labels: tuple[str, ...]) -> None:
    with pytest.raises(TypeError):
        Board(bytearray(SMALL)).counter(metrics.BYTES, *labels)


@given(st.lists(st.tuples(TEXT, TEXT, TEXT, TEXT, st.integers(0, 2**40))))
def test_whatever_the_labels_are_they_come_back(entries: list[tuple[str, str, str, str, int]]) -> None:
    block = bytearray(1 << 16)
    made = Board(block)
    expected: Tally[tuple[str, ...]] = Tally()
    for *labels, amount in entries:
        made.counter(metrics.REQUESTS, *labels).add(amount)
        expected["relay_requests_total", *labels] += amount
    found = {key: cells[0] for key, cells in read(block).items() if key[0] == "relay_requests_total"}
    assert found == expected


def test_a_cleared_gauge_is_gone_until_it_is_asked_for() -> None:
    block = bytearray(SMALL)
    made = Board(block)
    labels = ("chat", "serve", "http://10.0.0.1:8000")
    healthy = made.gauge(metrics.UPSTREAM_HEALTHY, *labels)
    assert counts_of(block, "relay_upstream_healthy", *labels) == [0]
    healthy.set(1)
    healthy.clear()
    assert ("relay_upstream_healthy", *labels) not in read(block)
    made.gauge(metrics.UPSTREAM_HEALTHY, *labels)
    assert counts_of(block, "relay_upstream_healthy", *labels) == [0]


# -- what clients can do to it


def test_models_are_bounded() -> None:
    block = bytearray(1 << 18)
    made = Board(block)
    for number in range(board.MOST_MODELS + 5):
        made.counter(metrics.TOKENS, "p", f"model-{number}", "prompt").add()
        made.counter(metrics.TOKENS, "p", f"model-{number}", "completion").add(2)
    found = {key: cells for key, cells in read(block).items() if key[0] == "relay_tokens_total"}
    assert len({key[2] for key in found}) == board.MOST_MODELS + 1
    assert found["relay_tokens_total", "p", "other", "prompt"] == [5]
    assert found["relay_tokens_total", "p", "other", "completion"] == [10]
    # the first come keep their names, in every family
    made.histogram(metrics.FIRST_TOKEN, "p", "model-0").observe(1)
    made.histogram(metrics.FIRST_TOKEN, "p", "model-104").observe(1)
    names = {key[2] for key in read(block) if key[0] == metrics.FIRST_TOKEN.name}
    assert names == {"model-0", "other"}


def test_keys_are_bounded_and_the_rest_are_one() -> None:
    block = bytearray(board.BOARD_BYTES)
    made = Board(block)
    for number in range(board.MOST_KEYS + 5):
        name = f"{number:05}" + "k" * 59  # as long as a name may be
        made.counter(metrics.KEY_REQUESTS, name).add()
        made.gauge(metrics.KEY_IN_FLIGHT, name).add()
        made.counter(metrics.KEY_COST, name).add()
        for kind in metrics.TOKEN_KINDS:
            made.counter(metrics.KEY_TOKENS, name, kind).add()
        for limit in metrics.KEY_LIMITS:
            made.counter(metrics.KEY_REFUSALS, name, limit).add()
    found = read(block)
    assert len([key for key in found if key[0] == "relay_key_requests_total"]) == board.MOST_KEYS + 1
    assert found["relay_key_in_flight", "other"] == found["relay_key_requests_total", "other"] == [5]
    assert found["relay_metrics_dropped_total",] == [0]
    assert made._words[1] < board.BOARD_BYTES * 0.3  # there is room for the others


def test_a_model_with_a_long_name_is_another() -> None:
    block = bytearray(SMALL)
    made = Board(block)
    made.counter(metrics.TOKENS, "p", "m" * 128, "prompt").add()
    made.counter(metrics.TOKENS, "p", "m" * 129, "prompt").add()
    names = {key[2] for key in read(block) if key[0] == "relay_tokens_total"}
    assert names == {"m" * 128, "other"}


def test_models_beyond_the_bound_take_no_memory() -> None:
    made = Board(bytearray(1 << 18))
    for number in range(board.MOST_MODELS + 1):
        made.counter(metrics.TOKENS, "p", f"model-{number}", "prompt")
    before = repr(made), len(made._counters)
    for number in range(1000):
        made.counter(metrics.TOKENS, "p", f"another-{number}", "prompt").add()
    assert (repr(made), len(made._counters)) == before


def test_a_full_board_counts_what_it_cannot_hold() -> None:
    block = bytearray(4096)
    made = Board(block)
    labels = [str(number) for number in range(100)]
    for label in labels:
        made.counter(metrics.REQUESTS, "pool", "chat", label, "--").add(5)
    found = read(block)
    held = [key for key in found if key[0] == "relay_requests_total"]
    assert 0 < len(held) < 100
    assert all(found[key] == [5] for key in held)
    assert found["relay_metrics_dropped_total",] == [100 - len(held)]
    # histograms and gauges without a place do no harm, either
    made.histogram(metrics.FIRST_TOKEN, "pool", "model").observe(3)
    made.gauge(metrics.IN_FLIGHT, "p" * 4096).set(3)
    before = {**found, ("relay_metrics_dropped_total",): [102 - len(held)]}
    assert read(block) == before
    made.counter(metrics.REQUESTS, "pool", "chat", "0", "--").add()
    assert counts_of(block, "relay_requests_total", "pool", "chat", "0", "--") == [6]


def test_a_block_too_small_for_anything_is_refused() -> None:
    with pytest.raises(ValueError, match="256 bytes"):
        Board(bytearray(256))


# -- readers and successors


class Watched:
    """Stands for the words of a block: calls `look` before and after each store."""

    def __init__(self, words: memoryview[int], look: Callable[[], None]) -> None:
        self.words, self.look = words, look
        self.stored: list[int] = []

    def __getitem__(self, at: int) -> int:
        return self.words[at]

    def __setitem__(self, at: int, value: int) -> None:
        self.look()
        self.words[at] = value
        self.stored.append(at)
        self.look()


def test_a_reader_never_sees_half_an_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    block = bytearray(SMALL)
    made = Board(block)
    before = read(block)
    used = made._words[1]
    seen: list[dict[tuple[str, ...], list[float]]] = []
    words = Watched(made._words, lambda: seen.append(read(block)))
    monkeypatch.setattr(made, "_words", words)
    made.counter(metrics.BYTES, "in")
    assert words.stored == [used // 8, 1]  # the entry's head, then the number of bytes used
    assert seen == [before, before, before, {**before, ("relay_bytes_total", "in"): [0.0]}]


@pytest.mark.parametrize("stale", ["head", "key"])
def test_an_entry_whose_stores_came_late_is_seen_the_next_time(stale: str) -> None:
    """What a reader on another core of a weakly ordered machine may see: the number of bytes, but not yet the entry."""
    block = bytearray(SMALL)
    made = Board(block)
    before, used = read(block), made._words[1]
    made.counter(metrics.BYTES, "in").add()
    late = slice(used, used + 8) if stale == "head" else slice(used + 8, used + 16)
    there, block[late] = block[late], bytes(8)
    assert read(block) == before
    block[late] = there
    assert read(block) == {**before, ("relay_bytes_total", "in"): [1.0]}


def test_a_successor_goes_on_where_the_dead_one_stopped() -> None:
    block = bytearray(SMALL)
    first = Board(block)
    first.counter(metrics.TOKENS, "p", "m", "prompt").add(5)
    first.histogram(metrics.ADDED, "relay").observe(0.001)
    first.gauge(metrics.IN_FLIGHT, "p").set(3)
    retire(block)
    assert ("relay_in_flight", "p") not in read(block)
    assert counts_of(block, "relay_tokens_total", "p", "m", "prompt") == [5]

    second = Board(block)
    assert repr(second) == repr(first)
    second.counter(metrics.TOKENS, "p", "m", "prompt").add()
    second.histogram(metrics.ADDED, "relay").observe(0.001)
    second.gauge(metrics.IN_FLIGHT, "p").add()
    assert counts_of(block, "relay_tokens_total", "p", "m", "prompt") == [6]
    assert sum(counts_of(block, "relay_added_seconds", "relay")[:-1]) == 2
    assert counts_of(block, "relay_in_flight", "p") == [1]


def test_a_successor_clears_gauges_and_knows_the_models() -> None:
    block = bytearray(1 << 18)
    first = Board(block)
    first.gauge(metrics.QUEUE_DEPTH, "p").set(9)
    for number in range(board.MOST_MODELS):
        first.counter(metrics.TOKENS, "p", f"model-{number}", "prompt")
    second = Board(block)
    assert ("relay_queue_depth", "p") not in read(block)
    second.counter(metrics.TOKENS, "p", "one more", "prompt").add()
    assert counts_of(block, "relay_tokens_total", "p", "other", "prompt") == [1]


def test_what_a_writer_left_half_written_does_not_count() -> None:
    block = bytearray(SMALL)
    used = Board(block)._words[1]
    block[used : used + 64] = b"\xff" * 64
    Board(block).counter(metrics.BYTES, "in").add()
    assert counts_of(block, "relay_bytes_total", "in") == [1]


def _count_until_killed(block: mmap.mmap, ready: int) -> None:
    made = Board(block)
    for _ in range(1000):
        made.counter(metrics.FRAMES).add()
    made.gauge(metrics.IN_FLIGHT, "p").set(4)
    os.write(ready, b"!")
    signal.pause()


def test_a_killed_process_loses_nothing() -> None:
    context = multiprocessing.get_context("fork")
    with mmap.mmap(-1, 2 * SMALL) as shared:
        whole = memoryview(shared)
        slots = [whole[:SMALL], whole[SMALL:]]
        Board(slots[1]).counter(metrics.FRAMES).add(5)
        read_end, write_end = os.pipe()
        child = context.Process(target=_count_until_killed, args=(slots[0], write_end))
        child.start()
        assert os.read(read_end, 1) == b"!"
        os.kill(child.pid or 0, signal.SIGKILL)
        child.join()
        os.close(read_end)
        os.close(write_end)
        assert total(slots)["relay_frames_total",] == [1005]
        assert total(slots)["relay_in_flight", "p"] == [4]
        retire(slots[0])
        assert total(slots)["relay_frames_total",] == [1005]
        assert ("relay_in_flight", "p") not in total(slots)
        for view in (*slots, whole):
            view.release()


# -- sums


def test_totals_add_up_and_health_is_the_best_said_of_it() -> None:
    blocks = [bytearray(SMALL) for _ in range(4)]
    upstream = ("chat", "serve", "http://10.0.0.1:8000")
    for number, block in enumerate(blocks[:3]):
        made = Board(block)
        made.counter(metrics.BYTES, "in").add(10)
        made.gauge(metrics.IN_FLIGHT, "chat").set(number + 1)
        made.gauge(metrics.UPSTREAM_HEALTHY, *upstream).set(number != 1)
        made.gauge(metrics.UPSTREAM_IN_FLIGHT, *upstream).set(4)
        made.histogram(metrics.ADDED, "relay").observe(0.001)
        made.counter(metrics.TOKENS, "chat", f"model-{number}", "prompt").add(3)
    found = total(blocks)
    assert found["relay_bytes_total", "in"] == [30]
    assert found["relay_in_flight", "chat"] == [6]
    assert found["relay_upstream_healthy", *upstream] == [1]
    assert found["relay_upstream_in_flight", *upstream] == [12]
    assert sum(found["relay_added_seconds", "relay"][:-1]) == 3
    assert found["relay_added_seconds", "relay"][-1] == pytest.approx(0.003)
    assert found["relay_tokens_total", "chat", "model-1", "prompt"] == [3]
    assert total([]) == {}


def test_a_total_changes_no_block() -> None:
    blocks = [bytearray(SMALL) for _ in range(2)]
    for block in blocks:
        Board(block).counter(metrics.BYTES, "in").add()
    copies = [bytes(block) for block in blocks]
    total(blocks)
    assert [bytes(block) for block in blocks] == copies


def test_a_reader_needs_no_right_to_write() -> None:
    block = bytearray(SMALL)
    Board(block).counter(metrics.BYTES, "in").add()
    assert read(memoryview(bytes(block))) == read(block)


# -- gaps


@given(st.lists(st.lists(st.tuples(NS, st.booleans()), max_size=20), min_size=1, max_size=4))
def test_folding_now_and_then_is_counting_each_gap_once(streams: list[list[tuple[int, bool]]]) -> None:
    """Some streams of one model, each folded after some of its gaps, and flushed in between."""
    block = bytearray(SMALL)
    series = Board(block).histogram(metrics.INTER_FRAME, "p", "m")
    for stream in streams:
        gaps = Histogram()
        for ns, is_time_to_fold in stream:
            gaps.add(ns)
            if is_time_to_fold:
                series.fold(gaps)
        series.flush()
        series.fold(gaps)
        series.fold(gaps)
    series.flush()
    series.flush()

    every = [ns / 1e9 for stream in streams for ns, _ in stream]
    *counts, summed = counts_of(block, INTER_FRAME, "p", "m")
    assert sum(counts) == len(every)
    assert summed == pytest.approx(sum(every), rel=0.0626, abs=1e-6 * (len(every) + 1))
    # Below each bound lie the gaps that surely do, and none of those that surely do not.
    for at, bound in enumerate(metrics.FRAME_BOUNDS):
        below = sum(counts[: at + 1])
        assert sum(value <= bound * 0.93 for value in every) <= below <= sum(value <= bound * 1.07 for value in every)


def test_folded_gaps_are_those_of_the_pump() -> None:
    block = bytearray(SMALL)
    made = Board(block)
    gaps = Histogram()
    gaps.add(25_000_000)
    gaps.add_zeros(3)
    made.histogram(metrics.INTER_FRAME, "p", "m").fold(gaps)
    assert sum(counts_of(block, INTER_FRAME, "p", "m")) == 0  # not before the flush
    made.flush()
    *counts, summed = counts_of(block, INTER_FRAME, "p", "m")
    at = metrics.FRAME_BOUNDS.index(0.03)
    assert [(index, count) for index, count in enumerate(counts) if count] == [(0, 3), (at, 1)]
    assert summed == pytest.approx(0.025, rel=0.0626)
    gaps.add(10**15)
    made.histogram(metrics.INTER_FRAME, "p", "m").fold(gaps)
    made.flush()
    assert counts_of(block, INTER_FRAME, "p", "m")[len(metrics.FRAME_BOUNDS)] == 1  # above every bound


def test_a_stream_without_gaps_folds_to_nothing() -> None:
    block = bytearray(SMALL)
    made = Board(block)
    made.histogram(metrics.INTER_FRAME, "p", "m").fold(Histogram())
    made.flush()
    assert not any(counts_of(block, INTER_FRAME, "p", "m"))


def test_counts_are_exact_far_beyond_a_stream() -> None:
    block = bytearray(SMALL)
    counter = Board(block).counter(metrics.BYTES, "out")
    counter.add(2**52)
    counter.add()
    assert math.fsum([*counts_of(block, "relay_bytes_total", "out"), -(2.0**52)]) == 1
