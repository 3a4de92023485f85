"""The micro benchmarks run, and count what they say they count. Their figures are not judged here."""

from __future__ import annotations

import json
import os
import shutil
import sys
from typing import TYPE_CHECKING

import pytest

from relay_bench import cli, micro, micro_client, micro_process

if TYPE_CHECKING:
    from pathlib import Path


def test_a_frame_has_the_size_it_says_and_is_whole() -> None:
    frame = micro.frame_of(300)
    assert len(frame) == 300
    assert frame.startswith(b"data: {")
    assert frame.endswith(b"}\n\n")
    json.loads(frame.removeprefix(b"data: "))


@pytest.mark.parametrize("name", micro.PARTS)
def test_a_part_does_its_work_and_holds_nothing_of_it(name: str) -> None:
    part = micro.PARTS[name]()
    part.work(3)  # it asserts its own count
    held, peak = micro._memory(micro.PARTS[name], 2_000)
    if name.startswith("aggregate"):  # it keeps the answer: the text of each frame, six bytes
        assert held < 40
        assert peak < 1 << 19
    else:
        assert held < 1
        assert peak < 8_192


def test_the_pure_half_prints_a_table_and_writes_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "micro.json"
    assert cli.main(["micro", "--quick", "--only", "pure", "--json", str(file)]) == 0
    result = json.loads(file.read_bytes())
    assert [cost["part"] for cost in result["pure"]] == list(micro.PARTS)
    assert all(cost["ns"] > 0 for cost in result["pure"])
    assert "process" not in result
    assert "FrameRelay.feed" in capsys.readouterr().out


def test_the_running_relay_is_measured_and_cores_are_given_back(tmp_path: Path) -> None:
    cores = os.sched_getaffinity(0)
    file = tmp_path / "micro.json"
    assert micro.main(["--quick", "--only", "process", "--json", str(file)]) == 0
    costs = json.loads(file.read_bytes())["process"]
    proxies = {cost["proxy"] for cost in costs}
    assert proxies == ({"relay"} if shutil.which("openssl") is None else {"relay", "TLS"})
    units = [[cost["unit"] for cost in costs if cost["proxy"] == proxy] for proxy in proxies]
    assert units == [["frame", "frame", "request"]] * len(proxies)
    assert all(cost["count"] > 0 and cost["cpu_us"] >= 0 for cost in costs)
    assert os.sched_getaffinity(0) == cores


def test_rows_set_nginx_beside_the_relay() -> None:
    costs = [
        micro_process.ProcessCost(test="a", proxy=proxy, unit="frame", count=10, per_s=1000, cpu_us=cpu_us)
        for proxy, cpu_us in (("relay", 24.0), ("nginx", 16.0))
    ]
    names, rows = micro_process.rows(costs)
    assert rows == [("a", "24.0", "1,000", "16.0", "1,000", "1.50")]
    assert len(names) == len(rows[0])


def test_a_server_that_does_not_start_is_an_error() -> None:
    command = [sys.executable, "-c", "raise SystemExit('no')"]
    with pytest.raises(micro_client.MeasureError, match="the engine did not start: no"):
        with micro_process._started("engine", command, None):
            pytest.fail("it did")
