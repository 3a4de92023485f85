"""Comparisons: pairs, differences, what is drawn; and the command against two engines, one of them slower."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relay_bench import cli, compare
from relay_bench.load.stats import Interval
from tests.bench.loading import record

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MS = 1_000_000


def test_pairs_are_of_the_same_request_and_need_both_sides() -> None:
    direct = [record(index=at) for at in range(5)]
    through = [
        record(index=2, first_content_ns=13 * MS),
        record(index=0, first_content_ns=12 * MS),
        record(index=1, label="reset"),
        record(index=9),
        record(index=3, first_content_ns=None),
        record(index=4, is_measured=False),  # in a closed loop, windows need not hold the same requests
    ]
    (first, second) = compare.paired_differences(direct, through, "ttft")
    assert first == pytest.approx((10, 12))
    assert second == pytest.approx((10, 11))


def test_the_difference_is_the_median_of_the_pairs() -> None:
    direct = [[record(index=at) for at in range(20)] for _ in range(3)]
    through = [[record(index=at, first_content_ns=(13 + at % 3) * MS) for at in range(20)] for _ in range(3)]
    found = compare.difference_of("p", "ttft", direct, through, seed=1)
    assert found is not None
    assert found.pairs == 60
    assert (found.direct_ms, found.through_ms) == pytest.approx((10.0, 13.0))
    assert found.added.estimate == pytest.approx(3.0)
    assert found.added.low >= 2.0 - 1e-9
    assert found.added.high <= 4.0 + 1e-9
    assert compare.difference_of("p", "frame_delay", direct, through, seed=1) is None


@settings(deadline=None)
@given(st.floats(-5, 5), st.floats(0, 5), st.floats(0, 5), st.integers(3, 60))
def test_whiskers_stay_in_their_box(low: float, one: float, other: float, width: int) -> None:
    interval = Interval(low, low + one, low + one + other)
    left, right = min(0.0, interval.low), max(0.0, interval.high)
    text = compare.whiskers(interval, left, right, width)
    assert len(text.plain) == width
    assert "●" in text.plain
    assert (str(text.style) == "") is (not interval.excludes_zero)


@pytest.fixture(scope="module")
def urls() -> Iterator[list[str]]:
    words = [sys.executable, "-m", "relay_bench", "engine", "--listen", "127.0.0.1:0", "--stamp", "--step-ms", "1"]
    engines = [subprocess.Popen([*words, "--ttft-ms", ttft], stderr=subprocess.PIPE, text=True) for ttft in ("5", "45")]
    try:
        yield [
            (engine.stderr.readline() if engine.stderr else "").partition("listening on ")[2].strip()
            for engine in engines
        ]
    finally:
        for engine in engines:
            engine.terminate()
            engine.communicate()


def test_compare(urls: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    direct, slower = urls
    words = [
        "compare",
        "--direct",
        direct,
        "--through",
        f"slow={slower}",
        "--pid",
        f"slow={os.getpid()}",
        "--rounds",
        "2",
    ]
    words += ["--num-prompts", "15", "--request-rate", "300", "--random-input-len", "5", "--random-output-len", "4"]
    words += [
        "--stamps",
        "--max-lag-ms",
        "60000",
        "--save-result",
        "--result-dir",
        str(tmp_path),
        "--result-filename",
        "c.json",
    ]
    assert cli.main(words) == 0
    result = json.loads((tmp_path / "c.json").read_bytes())
    by_metric = {row["metric"]: row for row in result["differences"]}
    assert set(by_metric) == set(compare.METRICS)
    assert by_metric["ttft"]["pairs"] == 30
    assert by_metric["ttft"]["direct_ms"] >= 5
    assert by_metric["ttft"]["through_ms"] >= 45
    assert {name: len(runs) for name, runs in result["runs"].items()} == {"direct": 2, "slow": 2}
    assert [cost["name"] for cost in result["costs"]] == ["slow"]
    text = capsys.readouterr().out
    assert "●" in text
    assert "CPU µs/frame" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--through", "x"], "wanted NAME="),
        (["--through", "direct=http://127.0.0.1:1"], "names must differ"),
        (["--through", "a=http://127.0.0.1:1", "--through", "a=http://127.0.0.1:2"], "names must differ"),
        (["--through", "a=http://127.0.0.1:1", "--pid", "b=1"], "no --through is called 'b'"),
        (["--through", "a=http://127.0.0.1:1", "--rounds", "0"], "--rounds"),
        (["--through", "a=http://127.0.0.1:1", "--pid", "a=4194305"], "no process 4194305"),
    ],
)
def test_what_the_flags_refuse(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["compare", "--direct", "http://127.0.0.1:1", *words]) == 2
    assert message in capsys.readouterr().err


def test_a_proxy_that_does_not_run_is_named(urls: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    dead = "http://127.0.0.1:1"
    assert cli.main(["compare", "--direct", urls[0], "--through", f"near={urls[1]}", "--through", f"far={dead}"]) == 2
    assert f"far ({dead}): Connection refused; is it running?" in capsys.readouterr().err
