"""A result in the terminal: verdicts, a table of percentiles, and how the times are distributed, on a log scale."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from rich.console import Group
from rich.measure import Measurement
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from relay_bench.load.results import METRICS, histogram_from

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import Console, ConsoleOptions, RenderableType, RenderResult

    from relay_bench.load.results import Result
    from relay_bench.load.stats import Histogram

TITLES: Final = {
    "ttft_planned": "TTFT from planned",
    "ttft": "TTFT from sent",
    "tpot": "time per output token",
    "itl": "inter-token latency",
    "frame_gap": "inter-frame gap",
    "e2el_planned": "whole answer from planned",
    "e2el": "whole answer from sent",
    "frame_delay": "frame delay (stamps)",
    "send_lag": "send lag",
    "client_delay": "client delay",
}
_BARS: Final = " ▁▂▃▄▅▆▇█"
_SPARK_BINS: Final = 24
_LEAST_SPARK_BINS: Final = 8
_CHART_BINS: Final = 14
_CHART_WIDTH: Final = 40
#: What is less is drawn as this much: frames that came in one read have no gap at all.
_LEAST_NS: Final = 1000
#: Logarithm of the narrowest bin: two of the histogram's own, or bars would show where its edges are.
_LEAST_WIDTH: Final = 1 / 128


def rendered(result: Result) -> RenderableType:
    """All of a result that a person wants to see first."""
    parts: list[RenderableType] = [_verdict(result), _table(result)]
    parts += [
        _chart(TITLES[metric], histogram)
        for metric in ("ttft_planned", "frame_gap")
        if (histogram := histogram_from(result, metric)).count > 1
    ]
    return Group(*parts)


def _verdict(result: Result) -> RenderableType:
    lines = [
        f"{result['load']}; {result['sent']:,} requests measured of {result['num_prompts']:,}, in "
        f"{result['duration']:.1f} s",
        f"{result['request_throughput']:,.2f} requests/s, {result['output_throughput']:,.1f} output tokens/s, at most "
        f"{result['max_concurrent_requests']:,} at once",
    ]
    if result["request_goodput"] is not None:
        limits = ", ".join(f"{name} ≤ {limit:g} ms" for name, limit in result["goodput_config"].items())
        met = f"{result['slo_attainment']:.1%} of those sent"
        lines.append(f"goodput {result['request_goodput']:,.2f} requests/s, {met} ({limits})")
    text = Text("\n".join(lines))
    for label, failure in result["failures"].items():
        text.append(f"\n{failure['count']:,} failed: {label} ({failure['example'][:120]})", style="bold red")
    if not result["completed"]:
        text.append("\nno request succeeded: there are no latencies", style="bold red")
    harness = result["harness"]
    for reason in harness["degraded"]:
        text.append(f"\nDEGRADED, do not trust these figures: {reason}", style="bold white on red")
    if floor := harness.get("floor_text"):
        text.append(f"\nharness floor: {floor}", style="dim")
    style = "red" if harness["degraded"] or result["failed"] else "green"
    return Panel(text, title=f"{result['url']}  {result['model_id']}", border_style=style, title_align="left")


def _table(result: Result) -> Table:
    names = [name.removesuffix("_ttft_ms") for name in result if name.startswith("p") and name.endswith("_ttft_ms")]
    table = Table(box=None, padding=(0, 1))
    table.add_column("milliseconds", no_wrap=True, header_style="dim")
    for name in ("mean", *names, "max"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("log scale")
    for metric in TITLES:
        histogram = histogram_from(result, metric)
        if not histogram.count:
            if metric in ("itl", "tpot") and result["completed"]:
                table.add_row(TITLES[metric], *["-"] * (len(names) + 2), "no token counts")
            continue
        cells = [number(result[f"{name}_{metric}_ms"]) for name in ("mean", *names)]
        spark = Fitted(partial(sparkline, histogram), _LEAST_SPARK_BINS, _SPARK_BINS)
        table.add_row(TITLES[metric], *cells, number(histogram.max_ns / 1e6), spark)
    return table


def number(ms: float | None) -> str:
    """Milliseconds with three significant digits, or more in front of the point."""
    if ms is None:
        return "-"
    digits = 0 if ms >= 100 else 1 if ms >= 10 else 2 if ms >= 1 else 3
    return f"{ms:,.{digits}f}"


class Fitted:
    """A line of a picture in a table's cell, drawn as wide as there is room for."""

    def __init__(self, draw: Callable[[int], Text], least: int, most: int) -> None:
        self._draw = draw
        self._least = least
        self._most = most

    def __repr__(self) -> str:
        return f"<Fitted {self._least} to {self._most}>"

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(self._least, self._most).clamp(0, options.max_width)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self._draw(min(self._most, options.max_width))


def sparkline(histogram: Histogram, width: int) -> Text:
    """The distribution in one line, from the least value to the most."""
    bins = log_bins(histogram, width)
    most = max(share for _, _, share in bins)
    return Text("".join(_BARS[math.ceil(share / most * (len(_BARS) - 1))] for _, _, share in bins))


def log_bins(histogram: Histogram, most: int) -> list[tuple[float, float, float]]:
    """``(from ms, to ms, share)`` for bins of the same width on a log scale, over all values; fewer for narrow ones."""
    low = max(histogram.min_ns, _LEAST_NS)
    high = max(histogram.max_ns, low * 1.001)
    number_of_bins = max(1, min(most, int(math.log(high / low) / _LEAST_WIDTH)))
    width = math.log(high / low) / number_of_bins
    shares = [0.0] * number_of_bins
    before = 0.0
    for ns, up_to in histogram.steps():
        at = int(math.log(max(ns, low) / low) / width)
        shares[min(at, number_of_bins - 1)] += up_to - before
        before = up_to
    edges = [low * math.exp(width * at) / 1e6 for at in range(number_of_bins + 1)]
    return list(zip(edges, edges[1:], shares, strict=False))


def _chart(title: str, histogram: Histogram) -> Table:
    table = Table(title=f"{title}, {histogram.count:,} values", title_justify="left", box=None, padding=(0, 1))
    table.add_column("ms", justify="right")
    table.add_column("share", justify="right")
    table.add_column("")
    table.add_column("up to here", justify="right")
    bins = log_bins(histogram, _CHART_BINS)
    most = max(share for _, _, share in bins)
    total = 0.0
    for low, high, share in bins:
        total += share
        cells: list[Any] = [
            f"{number(low)} – {number(high)}",
            f"{share:.1%}",
            bar(share / most, _CHART_WIDTH),
            f"{total:.1%}",
        ]
        table.add_row(*cells)
    return table


def bar(share: float, width: int) -> Text:
    """A bar of so much of the width, to an eighth of a character."""
    whole, part = divmod(round(share * width * 8), 8)
    return Text("█" * whole + (" ▏▎▍▌▋▊▉"[part] if part else ""), style="cyan")


assert set(TITLES) == set(METRICS)
