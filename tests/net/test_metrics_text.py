"""What a scrape says, read back by Prometheus's own parser."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from relay.core import metrics
from relay.core.board import Board
from relay.net import metrics_text as exposition
from relay.net.metrics_text import Processes, metrics_text, process_usage

if TYPE_CHECKING:
    from prometheus_client.registry import Collector

#: Labels as a sorted tuple, so that a sample has a key.
Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def parsed(blocks: Iterable[bytearray], *extra: Collector) -> dict[str, Metric]:
    text = metrics_text(blocks, extra).decode()
    return {family.name: family for family in text_string_to_metric_families(text)}


def samples(blocks: Iterable[bytearray], *extra: Collector) -> Samples:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in parsed(blocks, *extra).values()
        for sample in family.samples
    }


def test_every_family_has_its_name_type_and_help_before_anything_is_counted() -> None:
    families = parsed([])
    kinds = {
        metrics.CounterFamily: "counter", metrics.GaugeFamily: "gauge", metrics.HistogramFamily: "histogram",
    }  # fmt: skip
    assert [*families] == [family.name.removesuffix("_total") for family in metrics.FAMILIES]
    for family in metrics.FAMILIES:
        shown = families[family.name.removesuffix("_total")]
        assert (shown.type, shown.documentation) == (kinds[type(family)], family.help)
        assert shown.samples == []


def test_what_has_no_labels_is_there_from_the_start() -> None:
    """A rate needs the 0 before the first event."""
    found = samples([fresh_block()])
    assert found["relay_failovers_total", ()] == 0
    assert found["relay_prefill_seconds_count", ()] == 0


def test_one_scrape_is_the_sum_of_all_workers() -> None:
    blocks = [bytearray(8192) for _ in range(2)]
    for number, block in enumerate(blocks, 1):
        board = Board(block)
        board.counter(metrics.REQUESTS, "chat", "chat", "200", "--").add(number)
        board.gauge(metrics.IN_FLIGHT, "chat").set(number)
        board.histogram(metrics.EVENT_LOOP_LAG).observe(0.0002 * number)
    found = samples(blocks)
    labels = (("outcome", "--"), ("pool", "chat"), ("route", "chat"), ("status", "200"))
    assert found["relay_requests_total", labels] == 3
    assert found["relay_in_flight", (("pool", "chat"),)] == 3
    assert found["relay_event_loop_lag_seconds_count", ()] == 2
    assert found["relay_event_loop_lag_seconds_sum", ()] == pytest.approx(0.0006)


def test_buckets_are_cumulative_and_end_with_the_count() -> None:
    block = bytearray(8192)
    ttft = Board(block).histogram(metrics.FIRST_TOKEN, "chat", "m")
    for seconds in (0.0005, 0.001, 0.3, 59, 61, 1000):
        ttft.observe(seconds)
    family = parsed([block])[metrics.FIRST_TOKEN.name]
    buckets = [(s.labels["le"], s.value) for s in family.samples if s.name.endswith("_bucket")]
    assert [float(le) for le, _ in buckets] == [*metrics.FIRST_TOKEN_BOUNDS, float("inf")]
    values = dict(buckets)
    assert values["0.001"] == 2
    assert values["0.2"] == 2
    assert values["0.3"] == 3
    assert values["60.0"] == 4
    assert values["+Inf"] == 6
    (count,) = (s.value for s in family.samples if s.name.endswith("_count"))
    assert count == 6
    assert all(s.labels["model"] == "m" for s in family.samples)


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=20))
def test_a_model_of_any_name_breaks_nothing(model: str) -> None:
    """Models are what clients send: quotes, backslashes, line breaks and all."""
    block = bytearray(8192)
    board = Board(block)
    board.counter(metrics.TOKENS, "p", model, "prompt").add(3)
    board.counter(metrics.COST).add(0.5)
    found = samples([block])
    assert found["relay_tokens_total", (("kind", "prompt"), ("model", model), ("pool", "p"))] == 3
    assert found["relay_cost_total", ()] == 0.5


def test_the_same_values_are_the_same_text() -> None:
    blocks = [bytearray(8192) for _ in range(2)]
    for block, order in zip(blocks, (("in", "out"), ("out", "in")), strict=True):
        board = Board(block)
        for direction in order:
            board.counter(metrics.BYTES, direction).add()
    assert metrics_text(blocks[:1]) == metrics_text(blocks[1:])


def test_the_text_is_what_the_content_type_says() -> None:
    assert exposition.CONTENT_TYPE == "text/plain; version=0.0.4; charset=utf-8"
    lines = metrics_text([fresh_block()]).decode().splitlines()
    assert lines[0].startswith("# HELP relay_requests_total ")
    assert lines[1] == "# TYPE relay_requests_total counter"
    assert not any(line.startswith("# EOF") or "_created" in line for line in lines)


# -- processes


def test_a_process_is_measured_as_the_kernel_does() -> None:
    usage = process_usage(os.getpid())
    assert usage is not None
    times = os.times()
    assert usage.cpu_s == pytest.approx(times.user + times.system, abs=1)
    assert 10e6 < usage.resident_bytes < usage.virtual_bytes
    assert time.time() - 3600 < usage.started < time.time() + 1
    assert 3 <= usage.open_fds < usage.max_fds


def test_processes_are_added_up_and_one_that_is_gone_is_left_out() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        pids = [os.getpid(), child.pid]
        alone, both = samples([], Processes(pids[:1])), samples([], Processes(pids))
        usage = process_usage(child.pid)
        assert usage is not None
        assert both["process_max_fds", ()] == alone["process_max_fds", ()] + usage.max_fds
        assert both["process_virtual_memory_bytes", ()] > alone["process_virtual_memory_bytes", ()]
        assert both["process_start_time_seconds", ()] == pytest.approx(alone["process_start_time_seconds", ()], abs=0.1)
        assert child.stdin is not None
        child.stdin.close()
    assert process_usage(child.pid) is None
    after = samples([], Processes(pids))
    assert after["process_max_fds", ()] == alone["process_max_fds", ()]
    assert after["process_cpu_seconds_total", ()] >= alone["process_cpu_seconds_total", ()]


def test_the_cpu_time_of_ended_children_stays() -> None:
    """Else the counter would fall with a worker's death, which Prometheus takes for a restart of the daemon."""
    before = samples([], Processes([os.getpid()]))["process_cpu_seconds_total", ()]
    burn = "import time\nwhile time.process_time() < 0.2: pass"
    subprocess.run([sys.executable, "-c", burn], check=True)
    after = samples([], Processes([os.getpid()]))["process_cpu_seconds_total", ()]
    assert after - before > 0.15  # the kernel counts in hundredths


def test_no_process_at_all_says_nothing() -> None:
    assert not any(name.startswith("process_") for name, _ in samples([], Processes([])))


def fresh_block() -> bytearray:
    """A block that a board has been made on."""
    block = bytearray(8192)
    Board(block)
    return block
