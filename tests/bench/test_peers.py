"""Comparisons of peers: definitions, figures, the machine's accounts; and the command, with a relay it starts."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from relay_bench import cli
from relay_bench.load.records import Record
from relay_bench.peers import definition, machine, scenarios, summary
from relay_bench.peers.definition import Absent, Places, Values, filled, program_of, read_peers, words_of
from relay_bench.peers.scenarios import Held, Sample
from tests.bench.loading import record

MS = 1_000_000
PEERS = read_peers(definition.DEFINITIONS)
VALUES = Values(
    program="/bin/program", file="/f.py", folder="/tmp/x", definitions="/d", port=1001, port2=1002, model="tiny",
    engines=["127.0.0.1:9", "127.0.0.1:10"],
)  # fmt: skip

# -- definitions


def test_the_relay_comes_first_and_all_that_were_asked_for_are_there() -> None:
    wanted = {"nginx", "haproxy", "envoy", "caddy", "vllm-router", "smg", "sglang-router", "litellm"}
    assert next(iter(PEERS)) == "relay"
    assert set(PEERS) == {"relay", "relay-split", "fastapi-httpx", "vllm-ascend"} | wanted


@pytest.mark.parametrize("name", PEERS)
def test_no_placeholder_is_left_and_each_engine_is_named(name: str) -> None:
    peer = PEERS[name]
    texts = [filled(text, peer, VALUES) for text in peer.files.values()]
    texts += words_of(peer.run.command, peer, VALUES)
    texts += [filled(value, peer, VALUES) for value in peer.run.env.values()]
    whole = "\n".join(texts)
    assert not re.findall(r"@\w+@", whole)
    assert "1001" in whole
    assert all(re.search(rf"\b{port}\b", whole) for port in ("9", "10"))


def test_what_stands_alone_becomes_lines_and_words_become_words() -> None:
    run = definition.Run(
        command=["p", "@urls@", "--x=@port@"], engines={"urls": ["--at", "@url@"], "hosts": ["@host@"]}
    )
    peer = definition.Peer(find=definition.Find(), run=run, install="", notes="", language="")
    assert words_of(run.command, peer, VALUES) == [
        "p", "--at", "http://127.0.0.1:9", "--at", "http://127.0.0.1:10", "--x=1001",
    ]  # fmt: skip
    assert filled("a\n  @urls@\nb @hosts@ c @folder@\n", peer, VALUES) == (
        "a\n  --at http://127.0.0.1:9\n  --at http://127.0.0.1:10\nb 127.0.0.1 127.0.0.1 c /tmp/x\n"
    )


def test_programs_are_found_where_told_then_in_their_environment_then_on_the_path(tmp_path: Path) -> None:
    find = definition.Find(venv=["lib/*/prog"], path="sh")
    peer = definition.Peer(find=find, run=definition.Run(command=[]), install="get it", notes="", language="")
    places = Places(definitions=tmp_path, venvs=tmp_path)
    assert program_of("p", peer, places).name == "sh"
    program = tmp_path / "p" / "lib" / "v1" / "prog"
    program.parent.mkdir(parents=True)
    program.touch()
    assert program_of("p", peer, places) == program
    other = tmp_path / "other"
    other.touch()
    assert program_of("p", peer, msgspec.structs.replace(places, programs={"p": other})) == other
    elsewhere = Places(definitions=tmp_path, venvs=tmp_path, programs={"p": tmp_path / "p" / "lib"})
    with pytest.raises(Absent, match="p: get it"):
        program_of("p", peer, elsewhere)


def test_a_mistake_in_a_definition_is_told_with_its_file(tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_text(
        'install = "i"\nnotes = ""\nlanguage = ""\nspeed = 1\n[find]\n[run]\ncommand = []\n'
    )
    with pytest.raises(ValueError, match=r"x\.toml: .*speed"):
        read_peers(tmp_path)
    with pytest.raises(ValueError, match="no definitions"):
        read_peers(tmp_path / "nothing")


# -- figures


def sample(name: str, round_: int, cpu_us: int, scenario: str = "spread", **fields: Any) -> Sample:
    usual: dict[str, Any] = {
        "frames": 1000, "answers": 100, "seconds": 0.1, "engine_cpu_ns": 0, "client_cpu_ns": 0, "foreign_cores": 0.0,
    }  # fmt: skip
    return Sample(name=name, scenario=scenario, round=round_, cpu_ns=cpu_us * 1000, **(usual | fields))


def test_figures_are_medians_and_ratios_are_of_the_same_round() -> None:
    samples = [sample("a", at, cpu) for at, cpu in enumerate((10_000, 20_000, 40_000))]
    samples += [sample("b", at, cpu) for at, cpu in enumerate((20_000, 60_000, 80_000))]
    figure = summary.figure_of("cpu_us_per_frame_spread", "b", "a", samples)
    assert figure is not None
    assert (figure.median, figure.low, figure.high) == pytest.approx((60, 20, 80))
    assert figure.ratio == pytest.approx(2.0)
    assert figure.core_share == pytest.approx(0.6)
    assert summary.figure_of("cpu_us_per_request", "b", "a", samples) is None


@pytest.mark.parametrize("key", summary.COLUMNS)
def test_twice_the_work_is_a_ratio_of_two_in_every_column(key: str) -> None:
    samples = [sample(name, 0, cpu, summary.COLUMNS[key].scenario) for name, cpu in (("a", 10_000), ("b", 20_000))]
    figure = summary.figure_of(key, "b", "a", samples)
    assert figure is not None
    assert figure.ratio == pytest.approx(2.0)


def test_rows_hold_what_was_measured() -> None:
    def through(added_ms: int) -> list[Record]:
        return [record(index=at, first_content_ns=(11 + added_ms) * MS) for at in range(10)]

    records = {"direct": {0: through(0), 1: through(0)}, "a": {0: through(2)}}
    samples = [sample("a", 0, 50_000, "saturated"), sample("direct", 0, 0, "saturated", seconds=0.5)]
    held = [Held(name="a", streams=10, before_bytes=1 << 20, with_streams_bytes=(1 << 20) + 10 * 2048)]
    (row, other) = summary.rows_of(["a", "b"], samples, held, records)
    assert row.figures["cpu_us_per_frame_saturated"].median == pytest.approx(50)
    assert (row.ttft_p50_ms, row.ttft_p99_ms) == pytest.approx((2, 2))
    assert row.bytes_per_stream == 2048
    assert (row.saturated_frames_per_s, other.saturated_frames_per_s) == (10_000, None)
    assert (other.figures, other.ttft_p50_ms, other.memory_bytes) == ({}, None, None)
    assert summary.bound_by_harness([row, other]) == ["a"]
    assert summary.floor_of(samples)["saturated"]["frames_per_s"] == pytest.approx(2000)
    differences = summary.differences_of(["a", "b"], records, seed=1)
    assert {one.name for one in differences} == {"a"}
    assert {one.pairs for one in differences} == {10}


# -- the machine


def test_cores_are_given_back() -> None:
    before = os.sched_getaffinity(0)
    with machine.cores(pin=True) as cores:
        assert not cores.proxy or os.sched_getaffinity(0) == cores.harness == before - cores.proxy
        with machine.kept_to(cores.proxy):
            assert not cores.proxy or os.sched_getaffinity(0) == cores.proxy
    assert os.sched_getaffinity(0) == before
    with machine.cores(pin=False) as cores:
        assert str(cores) == "not pinned"


def test_what_others_use_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    busy = iter((100.0, 103.0))
    own = iter((10.0, 11.0))
    now = iter((0.0, 4.0))
    monkeypatch.setattr(machine, "machine_busy_s", lambda: next(busy))
    monkeypatch.setattr(machine, "_own_cpu_s", lambda: next(own))
    monkeypatch.setattr("time.monotonic", lambda: next(now))
    assert machine.Watch().foreign_cores() == pytest.approx(0.5)


# -- the command


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scenarios of a moment each."""
    brief = [
        msgspec.structs.replace(one, connections=4, window_s=0.4, ramp_s=min(one.ramp_s, 0.04))
        for one in scenarios.SCENARIOS
    ]
    monkeypatch.setattr("relay_bench.peers.rounds.SCENARIOS", tuple(brief))
    monkeypatch.setattr(scenarios, "HOLD", msgspec.structs.replace(scenarios.HOLD, connections=5, window_s=0.1))
    monkeypatch.setattr(scenarios, "_LATENCY", ("--request-rate", "100", "--num-prompts", "10"))


@pytest.mark.usefixtures("small")
def test_compare_peers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    definitions = tmp_path / "peers"
    definitions.mkdir()
    (definitions / "relay.toml").write_text((definition.DEFINITIONS / "relay.toml").read_text())
    (definitions / "ghost.toml").write_text(
        'install = "call a medium"\nnotes = ""\nlanguage = ""\n[find]\n[run]\ncommand = ["@program@"]\n'
    )
    (definitions / "broken.toml").write_text(
        'install = ""\nnotes = ""\nlanguage = ""\n[find]\npython = true\n[run]\n'
        'command = ["@program@", "-c", "raise SystemExit(\'no thanks\')"]\n'
    )
    file = tmp_path / "c.json"
    words = ["compare", "--peers", "all", "--definitions", str(definitions), "--rounds", "1", "--max-foreign", "1000"]
    assert cli.main([*words, "--save-result", "--result-dir", str(tmp_path), "--result-filename", "c.json"]) == 0
    result = json.loads(file.read_bytes())
    assert result["failures"] == []
    assert result["skipped"]["ghost"] == "call a medium"
    assert "no thanks" in result["skipped"]["broken"]
    (row,) = result["rows"]
    assert row["name"] == "relay"
    assert set(row["figures"]) == set(summary.COLUMNS)
    assert all(figure["median"] > 0 for figure in row["figures"].values())
    assert row["ttft_p50_ms"] is not None
    assert row["memory_bytes"] > 1 << 20
    assert {name: len(runs) for name, runs in result["runs"].items()} == {"direct": 1, "relay": 1}
    assert {one["metric"] for one in result["differences"]} >= {"ttft", "frame_delay"}
    assert not result["lingering"]
    captured = capsys.readouterr()
    assert "call a medium" in captured.err
    assert "harness floor" in captured.out

    page = tmp_path / "page.html"
    assert cli.main(["report", str(file), "-o", str(page)]) == 0
    document = page.read_text()
    assert "CPU per frame, spread" in document
    assert "call a medium" in document
    assert document.count("<svg") >= 10


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--peers", "relay,quux"], "'quux' is none of relay"),
        (["--peers", "relay,relay"], "each name once"),
        (["--peers", "relay", "--rounds", "0"], "--rounds"),
        (["--peers", "relay", "--peer-env", "quux=/"], "wanted NAME=PATH"),
        (["--peers", "relay", "--peer-env", "nginx=/no/such/file"], "no such file"),
        (["--peers", "vllm-ascend"], "none of them is here"),
    ],
)
def test_what_the_flags_refuse(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["compare", *words]) == 2
    assert message in capsys.readouterr().err


def test_the_install_script_knows_what_pip_does_not_have() -> None:
    script = definition.DEFINITIONS / "install"
    done = subprocess.run([sys.executable, script, "haproxy"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "haproxy: not to be had by pip" in done.stderr
