"""Sweeps: knees and searches as pure functions over servers that are formulas; the command against an engine."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, NoReturn

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relay_bench import cli, sweep
from relay_bench.load import progress
from relay_bench.sweep import Point, best_of, is_saturated, knee_of, next_load, point_of
from tests.bench.loading import engine_child

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


def served(load: float, capacity: float) -> Point:
    """A server that does what it can."""
    return Point(load=load, throughput=min(load, capacity), attainment=1.0 if load <= capacity else 0.2)


@settings(deadline=None)
@given(st.integers(1, 6))
def test_the_knee_is_where_the_line_bends(at: int) -> None:
    points = [served(2.0**step, 2.0**at) for step in range(9)]
    knee = knee_of(points)
    assert knee is not None
    assert knee.load == 2.0**at
    assert knee_of(list(reversed(points))) == knee


def test_a_straight_line_has_no_knee() -> None:
    assert knee_of([served(load, 1000) for load in (1, 2, 4, 8, 16)]) is None
    assert knee_of([served(1, 9), served(2, 9)]) is None
    assert knee_of([served(load, 1) for load in (1, 2, 3)]) is None


def test_a_run_no_longer_than_an_answer_says_nothing_of_throughput() -> None:
    whole = {"failed": 0, "harness": {"degraded": False}, "request_throughput": 9.0, "completed": 20}
    steady = point_of(10, {**whole, "duration": 2.2, "completion_rate": 10.0})
    assert (steady.throughput, steady.is_short) == (10.0, False)
    burst = point_of(2048, {**whole, "duration": 2.2, "completion_rate": 12_000.0})
    assert (burst.throughput, burst.is_short) == (9.0, True)
    at_once = point_of(2048, {**whole, "duration": 2.2, "completion_rate": None})
    assert (at_once.throughput, at_once.is_short) == (9.0, True)
    points = [served(2.0**step, 16) for step in range(7)]
    assert knee_of([*points, burst]) == knee_of(points)


def test_saturation() -> None:
    assert is_saturated([served(10, 5)], by_rate=True)
    assert not is_saturated([served(10, 9.5)], by_rate=True)
    assert is_saturated([served(8, 5), served(16, 5)], by_rate=False)
    assert not is_saturated([served(16, 5)], by_rate=False)


@settings(deadline=None)
@given(st.floats(0.5, 900), st.sampled_from([0.02, 0.05, 0.2]))
def test_a_search_finds_the_highest_rate_within_its_precision(capacity: float, precision: float) -> None:
    points: list[Point] = []
    while (load := next_load(points, 0.99, start=1.0, precision=precision, whole=False)) is not None:
        assert load not in [point.load for point in points]
        points.append(served(load, capacity))
    best = best_of(points, 0.99)
    assert best is not None
    assert best.load <= capacity <= best.load * (1 + precision) * 1.001
    assert len(points) < 30


@settings(deadline=None)
@given(st.integers(1, 3000))
def test_a_search_over_concurrency_finds_the_very_number(capacity: int) -> None:
    points: list[Point] = []
    while (load := next_load(points, 0.99, start=1.0, precision=1e-9, whole=True)) is not None:
        assert load == int(load) >= 1
        points.append(served(load, capacity))
    best = best_of(points, 0.99)
    assert best is not None
    assert best.load == capacity


def test_a_server_that_meets_nothing_ends_the_search() -> None:
    points: list[Point] = []
    while (load := next_load(points, 0.99, start=1.0, precision=0.05, whole=False)) is not None:
        points.append(served(load, 0.0))
    assert best_of(points, 0.99) is None
    assert len(points) < 10


def test_luck_beyond_a_miss_and_a_late_client_do_not_count() -> None:
    points = [served(1, 5), Point(load=2, throughput=2, attainment=0.5), served(4, 5)]
    best = best_of(points, 0.9)
    assert best is not None
    assert best.load == 1
    assert best_of([Point(load=1, throughput=1, attainment=1.0, is_degraded=True)], 0.9) is None


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """Four at once, each 16 ms: at most 250 requests a second."""
    with engine_child("--ttft-ms", "10", "--step-ms", "2", "--max-seqs", "4") as url:
        yield url


USUAL = ["--random-input-len", "5", "--random-output-len", "4", "--max-lag-ms", "60000"]


def test_sweep_over_a_list(url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["sweep", url, "--max-concurrencies", "1,4,16", "--num-prompts", "24", *USUAL]
    assert cli.main([*words, "--save-result", "--result-dir", str(tmp_path), "--result-filename", "s.json"]) == 0
    result = json.loads((tmp_path / "s.json").read_bytes())
    assert [point["load"] for point in result["points"]] == [1, 4, 16]
    assert [run["max_concurrent_requests"] for run in result["runs"]] == [1, 4, 16]
    assert result["over"] == "concurrency"
    assert "knee" in capsys.readouterr().out


def test_a_search_that_cannot_succeed(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["sweep", url, "--over", "concurrency", "--goodput", "ttft:1", "--num-prompts", "6", *USUAL]
    assert cli.main(words) == 1
    assert "no load tried meets" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "1, 2, 4 … requests/s until throughput no longer follows (at most 4096, --most); 9 requests each, the "
             "first takes about 9 s"),
        (["--over", "concurrency", "--goodput", "ttft:1"], "1, 2, 4 … at once until --goodput is missed, then halving"),
        (["--request-rates", "300,100"], "300, 100 requests/s; 9 requests each"),
        (["--max-concurrencies", "2"], "2 at once; 9 requests each (--num-prompts, --duration)"),
        (["--request-rates", "300", "--duration", "0.1"], "300 requests/s; 0.1 s each"),
    ],
)  # fmt: skip
def test_a_sweep_says_what_it_will_do(
    words: list[str], said: str, url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def nothing(*_: object, **__: object) -> NoReturn:
        raise ValueError("not today")

    monkeypatch.setattr(sweep, "_points", nothing)
    assert cli.main(["sweep", url, "--num-prompts", "9", *words]) == 2
    assert f"{url}, tiny: {said}" in " ".join(capsys.readouterr().err.split())


def test_where_there_is_no_bar_lines_say_how_it_goes(
    url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "_LINE_S", 0.0)
    assert cli.main(["sweep", url, "--max-concurrencies", "4", "--num-prompts", "200", *USUAL]) == 0
    assert re.search(r"4 at once: \d+ of 200 requests, [\d.]+ req/s", capsys.readouterr().err)


@pytest.mark.parametrize(
    "words", [["--request-rates", "1", "--max-concurrencies", "1"], ["--start", "0"], ["--attainment", "2"]]
)
def test_what_the_flags_refuse(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["sweep", "http://127.0.0.1:1", *words]) == 2
    assert "--" in capsys.readouterr().err
