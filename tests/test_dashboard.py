"""The Grafana dashboard asks for metrics and labels that exist, and asks in a way that makes sense of their kind."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from relay.core.metrics import FAMILIES, Family, HistogramFamily
from relay.net.metrics_text import Processes

DASHBOARD = json.loads((Path(__file__).parents[1] / "systemd" / "grafana-dashboard.json").read_text())

#: Prometheus gives these to everything it scrapes.
OF_THE_SCRAPE = frozenset({"job", "instance"})

_SELECTOR = re.compile(r"\b((?:relay|process)_\w+)(?:\{([^}]*)\})?(\[[^\]]+\])?")
_LABELS_IN_SELECTOR = re.compile(r'(\w+)\s*(?:=~|!~|!=|=)\s*"')
_GROUPING = re.compile(r"\b(?:by|without|on|ignoring)\s*\(([^)]*)\)")
_QUERY_OF_VARIABLE = re.compile(r"label_values\((.+), (\w+)\)")


class Query(NamedTuple):
    """One expression, and where it stands."""

    panel: str
    expression: str
    legend: str


def panels() -> list[dict[str, Any]]:
    return [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]


def queries() -> list[Query]:
    return [
        Query(panel["title"], target["expr"], target["legendFormat"])
        for panel in panels()
        for target in panel["targets"]
    ]


def declared() -> dict[str, frozenset[str]]:
    """The labels of every sample's name that a scrape can have."""
    process = {sample.name for metric in Processes([os.getpid()]).collect() for sample in metric.samples}
    found = dict.fromkeys(process, OF_THE_SCRAPE)
    for family in FAMILIES:
        labels = OF_THE_SCRAPE | {*family.labels}
        if isinstance(family, HistogramFamily):
            found |= {family.name + "_bucket": labels | {"le"}, family.name + "_sum": labels}
            found[family.name + "_count"] = labels
        else:
            found[family.name] = labels
    return found


def problems(query: Query) -> Iterator[str]:
    """What is wrong with a query, by the declared families."""
    known = declared()
    selectors = _SELECTOR.findall(query.expression)
    if not selectors:
        yield "asks for nothing"
    for name, matchers, window in selectors:
        if name not in known:
            yield f"{name} is no metric"
            continue
        matched = {*_LABELS_IN_SELECTOR.findall(matchers)}
        grouped = {
            label.strip() for labels in _GROUPING.findall(query.expression) for label in labels.split(",") if label
        }
        for label in (matched | grouped) - known[name]:
            yield f"{name} has no label {label}"
        if name.endswith("_bucket") != ("histogram_quantile(" in query.expression and "le" in grouped):
            yield f"{name} and histogram_quantile over le belong together"
        is_counter = name.endswith(("_total", "_bucket", "_sum", "_count"))
        if is_counter != bool(window) or is_counter != bool(
            re.search(rf"\b(?:rate|increase)\({name}\b", query.expression)
        ):
            yield f"{name} is {'a counter' if is_counter else 'a gauge'}"
        for label in {*re.findall(r"\{\{(\w+)\}\}", query.legend)} - grouped:
            yield f"the legend has {label}, which the result has not"


@pytest.mark.parametrize("query", queries(), ids=lambda query: query.panel)
def test_a_query_fits_the_metrics(query: Query) -> None:
    assert [*problems(query)] == []


def alerts() -> list[str]:
    """The expressions that the README gives for alerts."""
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    paragraph = readme.partition("For alerts, ")[2].split("\n\n")[1]
    return [line.strip() for line in paragraph.splitlines()]


@pytest.mark.parametrize("expression", alerts())
def test_an_alert_fits_the_metrics(expression: str) -> None:
    assert [*problems(Query("README.md", expression, ""))] == []


@pytest.mark.parametrize(
    ("expression", "legend", "problem"),
    [
        ("sum(rate(relay_request_total[5m]))", "", "relay_request_total is no metric"),
        ("sum(rate(relay_inter_frame_seconds[5m]))", "", "relay_inter_frame_seconds is no metric"),
        ('sum(relay_in_flight{model="m"})', "", "relay_in_flight has no label model"),
        ("sum by (pool, model) (relay_in_flight)", "", "relay_in_flight has no label model"),
        ("sum by (le) (relay_in_flight)", "", "relay_in_flight has no label le"),
        ("sum by (pool) (relay_in_flight)", "{{upstream}}", "the legend has upstream, which the result has not"),
        ("relay_frames_total", "", "relay_frames_total is a counter"),
        ("rate(relay_in_flight[5m])", "", "relay_in_flight is a gauge"),
        ("sum(rate(relay_prefill_seconds_bucket[5m]))", "", "relay_prefill_seconds_bucket and histogram_quantile"),
        ("up", "", "asks for nothing"),
    ],
)
def test_a_wrong_query_is_found(expression: str, legend: str, problem: str) -> None:
    found = [*problems(Query("", expression, legend))]
    assert any(line.startswith(problem) for line in found)


@pytest.mark.parametrize("variable", DASHBOARD["templating"]["list"][1:], ids=lambda variable: variable["name"])
def test_a_variable_takes_its_values_from_a_label_that_exists(variable: dict[str, Any]) -> None:
    match = _QUERY_OF_VARIABLE.fullmatch(variable["definition"])
    assert match is not None
    selector, label = match.groups()
    ((name, matchers, _),) = _SELECTOR.findall(selector)
    assert {label, *_LABELS_IN_SELECTOR.findall(matchers)} <= declared()[name]
    assert variable["query"]["query"] == variable["definition"]


def test_every_metric_is_shown() -> None:
    shown = " ".join(query.expression for query in queries())

    def is_shown(family: Family) -> bool:
        suffix = "_bucket" if isinstance(family, HistogramFamily) else ""
        return re.search(rf"\b{family.name}{suffix}\b", shown) is not None

    assert [family.name for family in FAMILIES if not is_shown(family)] == []


def test_every_variable_used_is_defined() -> None:
    defined = {variable["name"] for variable in DASHBOARD["templating"]["list"]} | {"__rate_interval"}
    text = json.dumps(DASHBOARD).replace("$__all", "")
    assert {*re.findall(r"\$\{?(\w+)", text)} == defined


def test_panels_lie_side_by_side() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        columns = range(place["x"], place["x"] + place["w"])
        cells = {(x, y) for x in columns for y in range(place["y"], place["y"] + place["h"])}
        assert not cells & taken, panel["title"]
        assert max(columns) < 24
        taken |= cells
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(ids) == len(set(ids))
    assert all(len({target["refId"] for target in panel["targets"]}) == len(panel["targets"]) for panel in panels())
