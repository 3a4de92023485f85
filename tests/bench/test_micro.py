"""The micro benchmarks run, and count what they say they count. Their figures are not judged here."""

from __future__ import annotations

import json
import os
import shutil
import sys
from typing import TYPE_CHECKING

import pytest

from relay_bench import cli, servers
from relay_bench.micro import process, pure

if TYPE_CHECKING:
    from pathlib import Path


def test_a_frame_has_the_size_it_says_and_is_whole() -> None:
    frame = pure.frame_of(300)
    assert len(frame) == 300
    assert frame.startswith(b"data: {")
    assert frame.endswith(b"}\n\n")
    json.loads(frame.removeprefix(b"data: "))


@pytest.mark.parametrize("name", pure.PARTS)
def test_a_part_does_its_work_and_holds_nothing_of_it(name: str) -> None:
    part = pure.PARTS[name]()
    part.work(3)  # it asserts its own count
    held, peak = pure._memory(pure.PARTS[name], 2_000)
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
    assert [cost["part"] for cost in result["pure"]] == list(pure.PARTS)
    assert all(cost["ns"] > 0 for cost in result["pure"])
    assert "process" not in result
    assert "FrameRelay.feed" in capsys.readouterr().out


def test_the_running_relay_is_measured_and_cores_are_given_back(tmp_path: Path) -> None:
    cores = os.sched_getaffinity(0)
    file = tmp_path / "micro.json"
    assert cli.main(["micro", "--quick", "--only", "process", "--json", str(file)]) == 0
    costs = json.loads(file.read_bytes())["process"]
    proxies = {cost["proxy"] for cost in costs}
    assert proxies == ({"relay"} if shutil.which("openssl") is None else {"relay", "TLS"})
    units = [[cost["unit"] for cost in costs if cost["proxy"] == proxy] for proxy in proxies]
    assert units == [["frame", "frame", "request"]] * len(proxies)
    assert all(cost["count"] > 0 and cost["cpu_us"] >= 0 for cost in costs)
    assert os.sched_getaffinity(0) == cores


def test_rows_set_nginx_beside_the_relay() -> None:
    costs = [
        process.ProcessCost(test="a", proxy=proxy, unit="frame", count=10, per_s=1000, cpu_us=cpu_us)
        for proxy, cpu_us in (("relay", 24.0), ("nginx", 16.0))
    ]
    names, rows = process.rows(costs)
    assert rows == [("a", "24.0", "1,000", "16.0", "1,000", "1.50")]
    assert len(names) == len(rows[0])


def test_a_server_that_does_not_start_is_an_error() -> None:
    command = [sys.executable, "-c", "raise SystemExit('no')"]
    with pytest.raises(servers.StartError, match="the engine did not start: no"):
        with servers.listening("engine", command, servers.Server):
            pytest.fail("it did")


def test_a_server_may_say_more_than_where_it_listens() -> None:
    """A warning of Python, or of relay's own, stands in front."""
    assert servers.said_url("warning: x\nrelay: listening on http://127.0.0.1:1\n") == "http://127.0.0.1:1"
    assert servers.said_url("relay-bench engine: listening on http://127.0.0.1:2\nmore") == "http://127.0.0.1:2"
    assert servers.said_url("relay: listening on http://127.0.0.1") == ""  # and the rest of the port?
    script = "import signal; print('warning\\nrelay: listening on http://127.0.0.1:3'); signal.pause()"
    command = ["sh", "-c", f'exec {sys.executable} -u -c "$0" >&2', script]
    with servers.listening("relay", command, servers.Server) as server:
        assert server.address == ("127.0.0.1", 3)
        assert not server.has_ended
    assert server.has_ended


@pytest.mark.parametrize(
    ("what", "names"), [("balance", {"balance", "key_us"}), ("metering", {"metering"}), ("metrics", {"metrics"})]
)
def test_other_parts(what: str, names: set[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "micro.json"
    assert cli.main(["micro", what, "--quick", "--json", str(file)]) == 0
    assert json.loads(file.read_bytes()).keys() == {"machine", *names}
    assert "µs" in capsys.readouterr().out or what == "metrics"


def test_nginx_without_its_configuration_is_left_out_and_told_of(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(process, "NGINX_CONF", tmp_path / "none")
    monkeypatch.setattr(process, "TESTS", process._QUICK_TESTS[:1])
    monkeypatch.setattr(process, "_measure_short", lambda name, *_: process.ProcessCost(
        test="short", proxy=name, unit="request", count=1, per_s=1, cpu_us=1))  # fmt: skip
    costs = process.measure(nginx=sys.executable)
    assert "nginx is left out" in capsys.readouterr().err
    assert "nginx" not in {cost.proxy for cost in costs}
