"""The page: whole, self-contained, and made of whatever results there are. Scales as properties."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree as ET

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relay_bench import cli, compare, sweep
from relay_bench.load.results import environment
from relay_bench.load.stats import Interval
from relay_bench.report.command import read_results
from relay_bench.report.page import page
from relay_bench.report.scale import LEAST_MS, linear, logarithmic, milliseconds
from tests.bench.loading import record
from tests.bench.test_load_results import result_for

if TYPE_CHECKING:
    from pathlib import Path

MS = 1_000_000


def detailed(**fields: Any) -> dict[str, Any]:
    records = [
        record(index=at, sent_ns=(1 + at) * MS, planned_ns=at * MS, first_content_ns=(11 + 2 * at) * MS,
               last_content_ns=99 * MS, done_ns=100 * MS, content_ns=[(11 + 2 * at) * MS, 60 * MS, 99 * MS])
        for at in range(5)
    ]  # fmt: skip
    records.append(record(index=5, label="truncated", error="<half>", content_ns=[]))
    return result_for(*records, is_detailed=True) | fields


def compared() -> dict[str, Any]:
    differences = [
        compare.Difference(
            name=name, metric=metric, pairs=9, direct_ms=1.0, through_ms=2.0, added=Interval(-0.1, 0.2 * at, 0.5 * at)
        )
        for at, name in enumerate(("relay", "ng<in>x"), 1)
        for metric in compare.METRICS
    ]
    costs = [compare.Cost(name="relay", cpu_us_per_frame=20.0, cpu_us_per_request=300.0, memory_bytes=1 << 25)]
    return {
        "kind": "compare", "date": "d", "label": None, "model_id": "m", "load": "open loop", "rounds": 1,
        "requests_per_round": 9, "differences": msgspec.to_builtins(differences), "environment": environment(),
        "costs": msgspec.to_builtins(costs), "runs": {name: [detailed()] for name in ("direct", "relay", "ng<in>x")},
    }  # fmt: skip


def swept(**fields: Any) -> dict[str, Any]:
    points = [sweep.Point(load=load, throughput=min(load, 4.0), attainment=1.0) for load in (1.0, 2.0, 4.0, 8.0)]
    return {
        "kind": "sweep", "date": "d", "label": None, "url": "u", "model_id": "m", "over": "rate", "attainment": 0.99,
        "goodput": ["ttft:50"], "points": msgspec.to_builtins(points), "best": 4.0, "knee": 4.0,
        "environment": environment(), "runs": [detailed(label=f"{point.load:g}/s") for point in points],
    } | fields  # fmt: skip


class Tags(HTMLParser):
    """All tags, and whether they close."""

    VOID = frozenset({"meta", "br"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()
        self.wrong: list[str] = []
        self.attributes: list[tuple[str, str]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)


@pytest.fixture(scope="module")
def document() -> str:
    named = [("a <run>", detailed()), ("b", detailed()), ("c", compared()), ("s", swept())]
    return page(named, "title & more")


def test_the_page_is_whole_and_needs_nothing_else(document: str) -> None:
    tags = Tags()
    tags.feed(document)
    assert tags.wrong == []
    assert tags.open == []
    assert not {"script", "link", "img", "iframe", "object"} & tags.seen
    assert not [(name, value) for name, value in tags.attributes if name in ("src", "href") or "url(" in value]
    assert "@import" not in document


def test_every_plot_is_valid_svg_within_its_box(document: str) -> None:
    plots = re.findall(r"<svg.*?</svg>", document)
    assert len(plots) >= 20
    for plot in plots:
        root = ET.fromstring(plot)
        _, _, width, height = map(float, root.attrib["viewBox"].split())
        assert root.attrib["aria-label"]
        assert "nan" not in plot
        assert "inf" not in re.sub(r"<text.*?</text>|<title>.*?</title>", "", plot)
        for node in root.iter():
            for name, most in (
                ("x", width),
                ("cx", width),
                ("x1", width),
                ("y", height),
                ("cy", height),
                ("y2", height),
            ):
                assert -1 <= float(node.attrib.get(name, 0)) <= most + 1


def test_names_and_errors_are_escaped(document: str) -> None:
    assert "a <run>" not in document
    assert "<half>" not in document
    assert "a &lt;run&gt;" in document
    assert "title &amp; more" in document


def test_what_matters_is_said(document: str) -> None:
    for text in (
        "knee 4",
        "meets objectives up to 4",
        "1 failed: truncated",
        "CPU µs per frame",
        "what each proxy adds",
    ):
        assert text in document


def test_a_sweep_that_found_nothing() -> None:
    document = page([("s", swept(best=None, knee=None))], "t")
    assert "no load tried" in document
    assert "no knee" in document
    assert "knee 4" not in document


def test_a_result_without_detail_has_distributions_and_no_streams() -> None:
    document = page([("r", result_for(record()))], "t")
    assert "inter-frame gap" in document
    assert "request by request" not in document


def test_a_result_in_which_all_failed() -> None:
    assert "1 failed: connect" in page([("r", result_for(record(label="connect"), is_detailed=True))], "t")


def test_plots_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = tmp_path / "found.json"
    found.write_text(json.dumps(compared()))
    drawn = tmp_path / "drawn.svg"
    titles = re.findall(r'aria-label="([^"]*)"', page([("found", compared())], ""))[:2]
    words = [word for title in titles for word in ("--plot", title)]
    assert cli.main(["report", str(found), "-o", str(drawn), *words]) == 0
    root = ET.fromstring(drawn.read_text())
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    shown = [text.text for text in root.iter("{http://www.w3.org/2000/svg}text") if text.get("class") == "title"]
    assert shown == titles
    groups = root.findall("{http://www.w3.org/2000/svg}g")
    assert len(groups) == 2
    assert all(len(list(group)) > 5 for group in groups)
    assert cli.main(["report", str(found), "-o", str(drawn), "--plot", "none such"]) == 2
    assert titles[0] in capsys.readouterr().err


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, many, out = tmp_path / "one.json", tmp_path / "many.jsonl", tmp_path / "r.html"
    one.write_text(json.dumps(detailed(label="named")))
    many.write_text("".join(json.dumps(result) + "\n" for result in (detailed(), swept())))
    assert [name for name, _ in read_results(str(one))] == ["named"]
    assert [name for name, _ in read_results(str(many))] == ["many 1", "many 2"]
    assert cli.main(["report", str(one), str(many), "-o", str(out), "--title", "T"]) == 0
    assert out.read_text().startswith("<!doctype html>")
    assert cli.main(["report", str(one), "-o", "-"]) == 0
    assert "<svg" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["", "nonsense", "[]", "{}", '{"environment":{}}'])
def test_what_is_no_result(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "x.json"
    file.write_text(text)
    assert cli.main(["report", str(file), "-o", str(tmp_path / "r.html")]) == 2
    assert capsys.readouterr().err.startswith("relay-bench report: ")
    assert cli.main(["report", str(tmp_path / "none")]) == 2


# -- scales


@settings(deadline=None)
@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=20), st.booleans())
def test_a_linear_scale_holds_its_values_and_has_ticks(values: list[float], from_zero: bool) -> None:
    scale = linear(values, from_zero=from_zero)
    assert scale.low < scale.high
    slack = (scale.high - scale.low) * 1e-6
    assert scale.low <= min(values) + slack
    assert scale.high >= max(values) - slack
    ticks = scale.ticks()
    assert 2 <= len(ticks) <= 20
    assert ticks == sorted(ticks)


@settings(deadline=None)
@given(st.lists(st.floats(0, 1e7), min_size=1, max_size=20))
def test_a_log_scale_too(values: list[float]) -> None:
    scale = logarithmic(values)
    places = [scale.place(max(value, LEAST_MS)) for value in sorted(values)]
    assert places == sorted(places)
    assert all(0 <= place <= 1 for place in places)
    ticks = scale.ticks()
    assert 2 <= len(ticks) <= 14
    assert ticks == sorted(set(ticks))


def test_times_are_in_the_unit_that_fits() -> None:
    assert [milliseconds(ms) for ms in (0.05, 5, 5000)] == ["50 µs", "5 ms", "5 s"]
