"""What is worth drawing of results."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import msgspec

from relay_bench.compare import METRICS as COMPARED
from relay_bench.compare import Difference
from relay_bench.load.results import Result, histogram_from
from relay_bench.load.stats import Histogram, percentile
from relay_bench.load.terminal import TITLES
from relay_bench.report.scale import LEAST_MS, Scale, linear, logarithmic, milliseconds, percent
from relay_bench.report.svg import COLOURS, Plot

if TYPE_CHECKING:
    from collections.abc import Iterable

#: Metrics of which a distribution is drawn, in this order.
DISTRIBUTIONS: Final = ("ttft_planned", "ttft", "frame_gap", "itl", "tpot", "frame_delay", "client_delay", "send_lag")
#: Streams of a Gantt chart at most.
_MOST_STREAMS: Final = 80
#: Dots of a scatter plot at most; more make a page nobody can open.
_MOST_DOTS: Final = 4000

Named = list[tuple[str, Result]]


def distributions(named: Named) -> list[str]:
    """Cumulative distributions, log scale: a plot for each metric, a line for each result."""
    found = []
    for metric in DISTRIBUTIONS:
        lines = [(name, histogram_from(result, metric)) for name, result in named]
        found.append(cdf(TITLES[metric], lines))
    return [plot for plot in found if plot]


def cdf(title: str, lines: Iterable[tuple[str, Histogram]]) -> str:
    """A cumulative distribution for each name; nothing where no histogram holds a value."""
    lines = [(name, histogram) for name, histogram in lines if histogram.count]
    if not lines:
        return ""
    # the tail is what matters; on the other side, a few frames that came together would squeeze all others
    ends = [ns / 1e6 for _, one in lines for q in (0.01, 0.9999) if (ns := one.quantile_ns(q)) is not None]
    plot = Plot(
        logarithmic(ends),
        Scale(low=0, high=1, text=percent),
        x_label=f"{title}, log scale",
        y_label="share of values",
        title=title,
    )
    for at, (name, histogram) in enumerate(lines):
        colour, is_second_use = COLOURS[at % len(COLOURS)], at >= len(COLOURS)
        steps = [(max(ns / 1e6, LEAST_MS), share) for ns, share in histogram.steps()]
        plot.path([(steps[0][0], 0.0), *steps], colour, is_stepped=True, dash="6 3" if is_second_use else "")
        plot.key(f"{name} ({histogram.count:,}{', dashed' if is_second_use else ''})", colour)
    return plot.svg()


def merged(results: Iterable[Result], metric: str) -> Histogram:
    """A metric over several runs."""
    whole = Histogram()
    for result in results:
        whole.merge(histogram_from(result, metric))
    return whole


def timeline(result: Result) -> str:
    """Time to first token of each request over the run; needs a detailed result."""
    if not result.get("planned_times"):
        return ""
    rows = list(zip(result["planned_times"], result["start_times"], result["ttfts"], result["errors"], strict=True))
    rows = rows[:: 1 + len(rows) // _MOST_DOTS]
    good = [(planned, (sent - planned + ttft) * 1000) for planned, sent, ttft, error in rows if not error]
    if not good:
        return ""
    y = logarithmic([ms for _, ms in good])
    plot = Plot(
        linear(planned for planned, *_ in rows),
        y,
        x_label="planned at, seconds from the start",
        y_label="TTFT from planned",
        title="Time to first token over the run",
    )
    plot.dots(((planned, ms, milliseconds(round(ms, 2))) for planned, ms in good), COLOURS[0])
    plot.key("answered", COLOURS[0])
    if failed := [(planned, y.high, error) for planned, _, _, error in rows if error]:
        plot.dots(failed, COLOURS[1], 3.5)
        plot.key("failed", COLOURS[1])
    return plot.svg()


def gantt(result: Result) -> str:
    """The first streams of a run, each a line: waiting, then its frames; needs a detailed result."""
    if not result.get("frame_gaps"):
        return ""
    names = ("planned_times", "start_times", "ttfts", "end_times", "frame_gaps", "errors")
    rows = list(zip(*(result[name] for name in names), strict=True))[:_MOST_STREAMS]
    plot = Plot(
        linear([row[3] for row in rows]),
        Scale(low=-0.5, high=len(rows) - 0.5, text=lambda _: ""),
        x_label="seconds from the start",
        y_label=f"the first {len(rows)} requests, from below",
        title="Streams",
        height=max(160, 60 + 6 * len(rows)),
    )
    colours = {
        "late": COLOURS[1],
        "waiting": "#c8c8c8",
        "streaming": COLOURS[5],
        "frame": COLOURS[0],
        "failed": "#b00020",
    }
    for number, (planned, sent, ttft, end, gaps, error) in enumerate(rows):
        plot.bar(planned, sent, number, 4, colours["late"])
        if error:
            plot.bar(sent, end, number, 4, colours["failed"], error)
            continue
        first = sent + ttft
        plot.bar(sent, first, number, 4, colours["waiting"], f"TTFT {milliseconds(round(ttft * 1000, 2))}")
        plot.bar(first, end, number, 2, colours["streaming"])
        _frame_dots(plot, number, first, gaps, colours["frame"])
    for name, colour in colours.items():
        plot.key(name, colour)
    return plot.svg()


def _frame_dots(plot: Plot, number: int, first: float, gaps: list[float], colour: str) -> None:
    at = drawn = first
    plot.bar(at, at, number, 4, colour)
    for gap in gaps:
        at += gap
        if plot.x(at) - plot.x(drawn) >= 1.2:  # closer ones are one stroke
            plot.bar(at, at, number, 4, colour)
            drawn = at


def sweep(result: Result) -> list[str]:
    """Throughput and times over load, the knee and the best load marked."""
    unit = "requests/s" if result["over"] == "rate" else "requests at once"
    pairs = sorted(zip(result["points"], result["runs"], strict=True), key=lambda pair: float(pair[0]["load"]))
    loads = [point["load"] for point, _ in pairs]
    throughput = Plot(
        linear(loads),
        linear(point["throughput"] for point, _ in pairs),
        x_label=f"load, {unit}",
        y_label="completed/s",
        title="Throughput over load",
    )
    throughput.path([(point["load"], point["throughput"]) for point, _ in pairs], COLOURS[0])
    throughput.dots(
        ((p["load"], p["throughput"], f"{p['throughput']:.2f}/s at {p['load']:g}") for p, _ in pairs), COLOURS[0], 3.5
    )
    times = [_quantiles(run, "ttft_planned", (0.5, 0.99)) for _, run in pairs]
    known = [ms for pair in times for ms in pair if ms is not None]
    if not known:
        return [throughput.svg()]
    ttft = Plot(
        linear(loads),
        logarithmic(known),
        x_label=f"load, {unit}",
        y_label="TTFT from planned",
        title="Time to first token over load",
    )
    for at, (name, colour) in enumerate(zip(("p50", "p99"), COLOURS, strict=False)):
        points = [(load, ms) for load, pair in zip(loads, times, strict=True) if (ms := pair[at]) is not None]
        ttft.path(points, colour)
        ttft.dots(((load, ms, f"{name} {milliseconds(round(ms, 2))} at {load:g}") for load, ms in points), colour, 3.5)
        ttft.key(name, colour)
    for plot in (throughput, ttft):
        if result["knee"] is not None:
            plot.mark(result["knee"], f"knee {result['knee']:g}")
        if result["best"] is not None:
            plot.mark(result["best"], f"meets objectives up to {result['best']:g}")
    return [throughput.svg(), ttft.svg()]


def _quantiles(run: Result, metric: str, qs: tuple[float, ...]) -> list[float | None]:
    histogram = histogram_from(run, metric)
    return [None if (ns := histogram.quantile_ns(q)) is None else ns / 1e6 for q in qs]


def differences(result: Result) -> list[str]:
    """Paired differences with their intervals: a plot for each metric, a row for each proxy."""
    rows = msgspec.convert(result["differences"], list[Difference])
    found = []
    for metric, title in COMPARED.items():
        of_metric = [row for row in rows if row.metric == metric]
        if of_metric:
            found.append(_whiskers(title, of_metric))
    return found


def _whiskers(title: str, rows: list[Difference]) -> str:
    values = [bound for row in rows for bound in (row.added.low, row.added.high)]
    plot = Plot(
        linear(values, text=lambda ms: f"{ms:g} ms"),
        Scale(low=-0.6, high=len(rows) - 0.4, text=lambda _: ""),
        x_label="added by the proxy (median of paired differences, 95 % interval)",
        y_label="",
        title=f"{title}: what each proxy adds",
        height=80 + 34 * len(rows),
    )
    plot.mark(0.0, "")
    for number, row in enumerate(reversed(rows)):
        colour = COLOURS[(len(rows) - 1 - number) % len(COLOURS)]
        added = row.added
        text = f"{row.name}: {added.estimate:+.3f} ms ({added.low:+.3f} to {added.high:+.3f}), {row.pairs:,} pairs"
        plot.bar(added.low, added.high, number, 3, colour, text)
        plot.dots([(added.estimate, number, text)], colour, 5)
        plot.note(max(added.high, 0.0), number + 0.32, f"{row.name} {added.estimate:+.3f} ms", anchor="end")
    return plot.svg()


def compared_distributions(result: Result) -> list[str]:
    """The distributions behind a comparison, all rounds together."""
    runs = result["runs"].items()
    metrics = ("ttft", "frame_gap", "frame_delay")
    found = [cdf(TITLES[metric], [(name, merged(of_one, metric)) for name, of_one in runs]) for metric in metrics]
    return [plot for plot in found if plot]


def gap_summary(result: Result) -> dict[str, Any]:
    """How steady single streams are: the median and worst p99 of gaps over streams; needs a detailed result."""
    per_stream = [percentile(sorted(gaps), 0.99) * 1000 for gaps in result.get("frame_gaps", ()) if gaps]
    if not per_stream:
        return {}
    per_stream.sort()
    return {"median": percentile(per_stream, 0.5), "worst": per_stream[-1]}
