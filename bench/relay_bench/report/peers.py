"""The section of a page about a comparison of peers."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

import msgspec

from relay_bench.compare import DIRECT, Difference
from relay_bench.load.terminal import number
from relay_bench.peers import picture
from relay_bench.peers.summary import COLUMNS, Figure, Row
from relay_bench.report import plots
from relay_bench.report.scale import Scale, logarithmic, plain
from relay_bench.report.svg import COLOURS, Plot

if TYPE_CHECKING:
    from relay_bench.load.results import Result

#: Differences more than so many times the middle one would squeeze all others into a line.
_FAR = 12.0


def headings() -> list[str]:
    """Of the table of figures."""
    names = [f"{column.title}, µs" for column in COLUMNS.values()]
    rest = ["TTFT added, p50 ms", "TTFT added, p99 ms", "memory per stream, KiB", "memory, MiB"]
    return ["", *names, "saturated, thousands of frames/s", *rest]


def prose(result: Result) -> str:
    """What was compared, how, and what speaks against the figures."""
    parts = [f"<p>{escape('; '.join(picture.remarks(result)))}.</p>"]
    parts += [f'<p class="bad">{escape(line)}</p>' for line in picture.warnings(result)]
    scenarios = "; ".join(f"{name.replace('_', ' ')}: {title}" for name, title in result["scenarios"].items())
    latency = f"latency: {result['load']}, {result['requests_per_round']:,} requests a round, paired with direct ones"
    parts.append(f'<p class="dim">{escape(f"{scenarios}; {latency}. {_KEY}")}</p>')
    parts.append(f'<p class="dim"><code>{escape(result["command"])}</code></p>')
    return "".join(parts)


_KEY = (
    "CPU is the kernel's account of the proxy's process tree; in brackets, how many times the first proxy's, median "
    "over rounds; *: the proxy's core was full; †: with a tenth of the streams, as it could not begin all within 10 s."
)


def described(result: Result) -> list[list[str]]:
    """Name, version, language and settings of each proxy."""
    return [[peer["name"], peer["version"], peer["language"], peer["notes"]] for peer in result["peers"]]


def costs(result: Result) -> list[str]:
    """A plot for each figure: a proxy a row."""
    table = msgspec.convert(result["rows"], list[Row])
    found = []
    for key, column in COLUMNS.items():
        figures = [(row.name, row.figures[key]) for row in table if key in row.figures]
        if figures:
            found.append(_lollipops(column.title, "µs, log scale; less is better", figures))
    streams = [(row.name, row.bytes_per_stream / 1024) for row in table if row.bytes_per_stream]
    if streams:
        flat = [(name, Figure(median=kib, low=kib, high=kib)) for name, kib in streams if kib > 0]
        found.append(_lollipops("memory per open stream", "KiB, log scale; less is better", flat))
    return found


def _lollipops(title: str, unit: str, figures: list[tuple[str, Figure]]) -> str:
    """Medians as dots on stalks, the range over rounds as a bar; the name above, in the colour of its proxy."""
    # a third of a decade of room, so that the least is no dot on the axis
    ends = [value for _, figure in figures for value in (figure.low / 2, figure.high) if value > 0]
    x = logarithmic(ends, text=plain)
    plot = Plot(
        x,
        Scale(low=-0.6, high=len(figures) - 0.4, text=lambda _: ""),
        x_label=unit,
        y_label="",
        title=title,
        height=70 + 34 * len(figures),
    )
    for at, (name, figure) in enumerate(figures):
        row, colour = len(figures) - 1 - at, COLOURS[at % len(COLOURS)]
        text = f"{name} {number(figure.median)} ({number(figure.low)} to {number(figure.high)})"
        plot.bar(x.low, figure.median, row, 1.5, "#c8c8c8")
        plot.bar(figure.low, figure.high, row, 5, colour, text)
        plot.dots([(figure.median, row, text)], colour, 5)
        plot.note(x.low, row + 0.32, f"{name}  {number(figure.median)}", dx=6)
    return plot.svg()


def distributions(result: Result) -> list[str]:
    """Those of latency; the direct one last, so that colours are as in the other plots."""
    runs = sorted(result["runs"].items(), key=lambda item: item[0] == DIRECT)
    return plots.compared_distributions({"runs": dict(runs)})


def differences(result: Result) -> tuple[list[str], str]:
    """Plots of paired differences, and a remark on what is too far out to be drawn with the others."""
    drawn: list[Difference] = []
    far: list[Difference] = []
    everything = msgspec.convert(result["differences"], list[Difference])
    middle: dict[str, float] = {}
    for metric in dict.fromkeys(one.metric for one in everything):
        sizes = sorted(abs(one.added.high) for one in everything if one.metric == metric)
        middle[metric] = sizes[len(sizes) // 2]
    for one in everything:
        (far if abs(one.added.estimate) > _FAR * middle[one.metric] else drawn).append(one)
    words = [f"{one.name}, {one.metric} {one.added.estimate:+.2f} ms" for one in far]
    remark = f"Too far out to be drawn: {'; '.join(words)}." if words else ""
    return plots.differences({"differences": msgspec.to_builtins(drawn)}), remark
