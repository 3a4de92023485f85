"""Result files: vLLM's keys where they mean the same, and no others of its names; the command."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import pytest
from rich.console import Console

from relay_bench import cli
from relay_bench.load import terminal
from relay_bench.load.records import Record, Tally
from relay_bench.load.results import histogram_from, most_at_once, result_of
from relay_bench.load.stats import Histogram, histogram_of
from tests.bench.loading import engine_child, plan_for, record, tally_of

if TYPE_CHECKING:
    from collections.abc import Iterator

MS = 1_000_000

#: Keys of vLLM 0.33's result, of those that a plain run has; see results.py for the ones left out.
VLLM_KEYS = [
    "date", "endpoint_type", "backend", "label", "model_id", "tokenizer_id", "num_prompts", "request_rate",
    "burstiness", "max_concurrency", "duration", "completed", "failed", "total_input_tokens", "total_output_tokens",
    "request_throughput", "request_goodput", "output_throughput", "total_token_throughput",
]  # fmt: skip
VLLM_DETAIL = ["input_lens", "output_lens", "ttfts", "itls", "start_times", "errors", "latencies"]


def result_for(*records: Record, words: tuple[str, ...] = (), is_detailed: bool = False) -> dict[str, Any]:
    plan = plan_for("--num-prompts", "3", *words, is_detailed=is_detailed)
    return result_of(plan, tally_of(*records, gaps=histogram_of([10 * MS])), url="http://x")


# -- results


def test_vllms_keys_come_first_and_in_its_order() -> None:
    result = result_for(record(), is_detailed=True)
    assert [key for key in result if key in VLLM_KEYS] == VLLM_KEYS
    assert set(VLLM_DETAIL) <= result.keys()
    for metric in ("ttft", "tpot", "e2el"):
        assert {f"{name}_{metric}_ms" for name in ("mean", "median", "std", "p99")} <= result.keys()
    assert json.loads(json.dumps(result)) == result
    # these would mean something else here
    assert not {"max_output_tokens_per_s", "queue_times", "mean_client_queue_time_ms"} & result.keys()


#: A result of vLLM 0.32's ``vllm bench serve --save-detailed``; its arrays are cut to two requests.
CAPTURED = json.loads((Path(__file__).with_name("data") / "vllm_bench_serve.json").read_bytes())
#: Why each of these has no place in ours is in results.py; nobody plots the other two.
LEFT_OUT = {"queue_times", "max_output_tokens_per_s", "rtfx", "generated_texts"}


def kind_of(value: Any) -> Any:
    """What a reader of the JSON can tell: numbers are numbers, lists are of something."""
    if isinstance(value, list):
        return [kind_of(value[0])] if value else []
    return float if isinstance(value, int) and not isinstance(value, bool) else type(value)


def test_every_key_of_a_captured_result_is_there_and_of_its_type() -> None:
    words = ("--request-rate", "2", "--max-concurrency", "4")
    plan = plan_for("--num-prompts", "3", *words, is_detailed=True)
    itl = histogram_of([10 * MS, 20 * MS])
    tally = Tally([record(itls_ns=[10 * MS] * 3)], itl, itl, Histogram(), Histogram(), 0.1, 1.0)
    result = result_of(plan, tally, url="http://x")
    assert CAPTURED.keys() >= LEFT_OUT
    for key, value in CAPTURED.items():
        if key not in LEFT_OUT and value is not None and key != "tokenizer_id":
            assert kind_of(result[key]) == kind_of(value), key
        assert key in result or key in LEFT_OUT
    assert result["tokenizer_id"] is None  # there is none


def test_arrays_are_seconds_and_summaries_milliseconds_as_in_vllms() -> None:
    """The traps: in one file, one quantity stands in two units."""
    second = record(index=1, first_content_ns=31 * MS, last_content_ns=61 * MS)
    result = result_for(record(), second, is_detailed=True)
    for array, metric in (("ttfts", "ttft"), ("latencies", "e2el")):
        assert fmean(result[array]) * 1000 == pytest.approx(result[f"mean_{metric}_ms"])
    assert result["duration"] == pytest.approx(max(result["end_times"]))
    assert result["output_throughput"] == pytest.approx(8 / result["duration"])
    assert result["start_times"] == [pytest.approx(0.001)] * 2


def test_units_are_vllms() -> None:
    result = result_for(record(), is_detailed=True)
    assert result["ttfts"] == [pytest.approx(0.010)]
    assert result["mean_ttft_ms"] == pytest.approx(10.0)
    assert result["mean_ttft_planned_ms"] == pytest.approx(11.0)
    assert result["duration"] == pytest.approx(0.042)
    assert result["request_rate"] == "inf"


def test_gaps_are_not_called_inter_token_latency() -> None:
    result = result_for(record())
    assert result["mean_frame_gap_ms"] == pytest.approx(10.0)
    assert result["mean_itl_ms"] is None
    assert "itl" not in result["histograms"]


def test_failures_are_in_no_latency_and_in_the_denominator() -> None:
    slow = record(index=1, first_content_ns=900 * MS, last_content_ns=900 * MS, label="truncated", error="half")
    other = record(index=2, label="truncated")
    result = result_for(record(), slow, other, words=("--goodput", "ttft:50"))
    assert (result["completed"], result["failed"], result["sent"]) == (1, 2, 3)
    assert result["failures"] == {"truncated": {"count": 2, "example": "half"}}
    assert result["mean_ttft_ms"] == pytest.approx(10.0)
    assert result["slo_attainment"] == pytest.approx(1 / 3)
    assert result["goodput_config"] == {"ttft": 50.0}


def test_nothing_succeeded() -> None:
    result = result_for(record(label="connect", first_content_ns=None, last_content_ns=None))
    assert result["mean_ttft_ms"] is None
    assert result["request_throughput"] == 0
    text = drawn(result)
    assert "no request succeeded" in text
    assert "connect" in text


def test_records_outside_the_window_do_not_count() -> None:
    result = result_for(record(), record(index=1, is_measured=False, label="reset"))
    assert (result["sent"], result["failed"], result["num_prompts"]) == (1, 0, 2)


@pytest.mark.parametrize(
    ("one", "cpu_s", "why"),
    [
        (record(sent_ns=20 * MS, first_content_ns=21 * MS), 0.1, "sent late: p99 20.0 ms"),
        (record(), 0.95, "busy for 95%"),
        (record(due_ns=0, sent_ns=9 * MS), 0.5, ""),
    ],
)
def test_a_client_that_was_late_says_so(one: Record, cpu_s: float, why: str) -> None:
    result = result_of(plan_for("--num-prompts", "1"), tally_of(one, cpu_s=cpu_s), url="http://x")
    degraded = result["harness"]["degraded"]
    assert (why in degraded[0]) if why else not degraded
    assert ("DEGRADED" in drawn(result)) is bool(why)


def test_a_late_reader_is_degraded_too() -> None:
    tally = tally_of(record())
    tally.client_delay = histogram_of([50 * MS])
    result = result_of(plan_for("--num-prompts", "1", "--max-lag-ms", "40"), tally, url="http://x")
    assert "the client read late" in result["harness"]["degraded"][0]


def test_a_crowded_machine_is_named() -> None:
    tally = tally_of(record(sent_ns=20 * MS, first_content_ns=21 * MS))
    tally.waited_s = 0.2
    result = result_of(plan_for("--num-prompts", "1"), tally, url="http://x")
    assert "kept the load processes from a core for 20.0%" in result["harness"]["degraded"][1]


def test_a_process_that_had_nothing_to_do_is_not_counted_as_idle() -> None:
    plan = plan_for("--num-prompts", "2", "--processes", "8")
    harness = result_of(plan, tally_of(record(), record(index=1), cpu_s=1.9), url="http://x")["harness"]
    assert (harness["processes"], harness["cpu_share"]) == (2, pytest.approx(0.95))
    assert "busy for 95%" in harness["degraded"][0]


def test_histograms_come_back_from_a_file() -> None:
    result = json.loads(json.dumps(result_for(record())))
    assert histogram_from(result, "frame_gap") == histogram_of([10 * MS])
    assert histogram_from(result, "itl") == Histogram()


def test_most_at_once() -> None:
    spans = [(0, 10), (5, 15), (10, 20)]
    assert most_at_once([record(sent_ns=start, done_ns=end) for start, end in spans]) == 2


def drawn(result: dict[str, Any], width: int = 160) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(terminal.rendered(result))
    return console.export_text()


def test_the_terminal_shows_both_times_to_first_token_and_draws_them() -> None:
    records = [record(index=at, first_content_ns=(11 + at) * MS, last_content_ns=50 * MS) for at in range(20)]
    text = drawn(
        result_of(plan_for("--num-prompts", "20"), tally_of(*records, gaps=histogram_of([1, MS])), url="http://x")
    )
    assert "TTFT from planned" in text
    assert "TTFT from sent" in text
    assert "no token counts" in text
    assert "█" in text


def test_tables_fit_80_columns() -> None:
    records = [record(index=at, first_content_ns=(11 + at) * MS, last_content_ns=12_345 * MS) for at in range(20)]
    tally = tally_of(*records, gaps=histogram_of([11_000 * MS, 22_222 * MS]))
    tally.itl = tally.client_delay = tally.frame_delay = tally.frame_gap
    lines = drawn(result_of(plan_for("--num-prompts", "20"), tally, url="http://x"), width=80).splitlines()
    assert max(map(len, lines)) <= 80
    for title in terminal.TITLES.values():
        assert any(title in line and re.search("[▁-█]", line) for line in lines), title


def test_bins_hold_every_value() -> None:
    for values in ([5], [0, 0, 3], [1, 10**6, 10**9], [10**9, 10**9 + 1]):
        bins = terminal.log_bins(histogram_of(values), 10)
        assert sum(share for *_, share in bins) == pytest.approx(1.0)
        assert len(bins) <= 10


# -- the command, against an engine in a process of its own


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with engine_child("--ttft-ms", "5", "--step-ms", "1") as url:
        yield url


def test_load_by_several_processes(url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "load",
        url,
        "--request-rate",
        "400",
        "--num-prompts",
        "40",
        "--random-input-len",
        "5",
        "--random-output-len",
    ]
    words += ["6", "--processes", "2", "--continuous-usage", "--goodput", "ttft:60000", "--max-lag-ms", "60000"]
    words += ["--save-detailed", "--result-dir", str(tmp_path), "--result-filename", "r.json", "--metadata", "gpu=none"]
    words += ["--save-requests", str(tmp_path / "requests.jsonl"), "--no-floor"]
    assert cli.main(words) == 0
    result = json.loads((tmp_path / "r.json").read_bytes())
    assert (result["completed"], result["failed"], result["gpu"]) == (40, 0, "none")
    assert (result["total_output_tokens"], result["total_input_tokens"]) == (240, 200)
    assert result["itl_source"] == {"continuous": 40}
    assert histogram_from(result, "frame_gap").count == histogram_from(result, "itl").count == 200
    assert len(result["ttfts"]) == 40
    assert 5 <= result["median_ttft_ms"] <= result["median_ttft_planned_ms"] + 0.001
    assert result["slo_attainment"] == 1.0
    lines = (tmp_path / "requests.jsonl").read_bytes().splitlines()
    assert [json.loads(line)["index"] for line in lines] == list(range(40))
    assert "TTFT from planned" in capsys.readouterr().out


def test_failures_and_a_floor(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["load", url, "--num-prompts", "3", "--random-input-len", "5", "--random-output-len", "4"]
    assert cli.main([*words, "--header", "x-sim-fault: die-after:2"]) == 1
    captured = capsys.readouterr()
    assert "3 failed: truncated" in captured.out
    assert "harness floor: TTFT" in captured.out


def test_there_is_no_such_server(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["load", "http://127.0.0.1:1", "--no-floor"]) == 2
    assert "/v1/models does not answer (connect: Connection refused)" in capsys.readouterr().err
    assert cli.main(["load", "ftp://x"]) == 2
    assert capsys.readouterr().err.startswith("relay-bench load: ftp://x")


def test_a_verb_that_there_is_not() -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main(["lode"])
    assert exit_.value.code == 2
