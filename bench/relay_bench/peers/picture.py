"""A comparison of peers in the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
from rich.console import Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from relay_bench.compare import METRICS, Difference, difference_table, number_signed
from relay_bench.load.terminal import number
from relay_bench.peers.summary import COLUMNS, FULL_SHARE, Row

if TYPE_CHECKING:
    from rich.console import RenderableType

    from relay_bench.load.results import Result
    from relay_bench.peers.summary import Figure

#: What a cell without a figure says.
NOTHING = "-"


def rendered(result: Result) -> RenderableType:
    """All of it."""
    text = Text("\n".join(remarks(result)))
    for line in warnings(result):
        text.append(f"\n{line}", style="bold red")
    parts: list[RenderableType] = [Panel(text, title="compare", title_align="left"), *_tables(result)]
    differences = msgspec.convert(result["differences"], list[Difference])
    parts += [
        difference_table(METRICS[metric], rows)
        for metric in ("ttft", "frame_delay")
        if (rows := [difference for difference in differences if difference.metric == metric])
    ]
    return Group(*parts)


def remarks(result: Result) -> list[str]:
    """Under what the figures were taken."""
    floor = result["floor"]
    versions = ", ".join(f"{peer['name']} {peer['version']}" for peer in result["peers"])
    rounds = f"{result['rounds']} round{'s' if result['rounds'] > 1 else ''}"
    lines = [f"{rounds}, the order drawn anew for each scenario; {result['pinning']}; medians over rounds", versions]
    if saturated := floor.get("saturated"):
        lines.append(
            f"harness floor: {saturated['frames_per_s']:,.0f} frames/s saturated without a proxy, "
            f"{saturated['engine_cpu_us_per_frame']:.1f} µs of the engine's CPU and "
            f"{saturated['client_cpu_us_per_frame']:.1f} of the client's each; "
            f"{floor.get('short', {}).get('answers_per_s', 0):,.0f} short requests/s"
        )
    return lines


def warnings(result: Result) -> list[str]:
    """What speaks against the figures, or against a peer."""
    lines = [f"skipped: {name}: {why}" for name, why in result["skipped"].items()]
    for name, count in result["disturbed"].items():
        lines.append(f"{name}: {count} samples DISTURBED: others used more than {result['max_foreign']:g} cores")
    for name, runs in result["runs"].items():
        reasons = [reason for run in runs for reason in run["harness"]["degraded"]]
        failed = sum(run["failed"] for run in runs)
        if reasons:
            lines.append(f"{name}: latency DEGRADED: {reasons[0]}")
        if failed:
            lines.append(f"{name}: {failed} requests of the latency schedule failed")
    lines += [f"{one['name']}, {one['scenario']}, round {one['round'] + 1}: {one['why']}" for one in result["failures"]]
    lines += [
        f"{name}: the engine still had {left} requests 15 s after their clients had left"
        for name, left in result["lingering"].items()
    ]
    if bound := result["bound_by_harness"]:
        lines.append(
            f"saturated, engine and client were the bottleneck for {', '.join(bound)}: the cost of a frame is "
            "then that of what they supplied"
        )
    return lines


def cells(result: Result) -> list[list[str]]:
    """A row for each proxy: name, the figures of `COLUMNS`, thousands of frames a second, TTFT added, memory."""
    found = []
    for row in msgspec.convert(result["rows"], list[Row]):
        rate = NOTHING if row.saturated_frames_per_s is None else number(row.saturated_frames_per_s / 1000)
        added = [NOTHING if ms is None else number_signed(ms) for ms in (row.ttft_p50_ms, row.ttft_p99_ms)]
        stream = NOTHING if row.bytes_per_stream is None else f"{row.bytes_per_stream / 1024:.1f}"
        memory = NOTHING if row.memory_bytes is None else f"{row.memory_bytes / 2**20:.0f}"
        found.append([row.name, *(figure_text(row.figures.get(key)) for key in COLUMNS), rate, *added, stream, memory])
    return found


def figure_text(figure: Figure | None) -> str:
    """A figure; a star: the proxy's core was full; a dagger: fewer streams, as all were too many for it."""
    if figure is None:
        return NOTHING
    marks = "*" * (figure.core_share >= FULL_SHARE) + "†" * figure.is_reduced
    return f"{number(figure.median)}{marks}"


def ratio_cells(result: Result) -> list[list[str]]:
    """A row for each proxy but the first: how many times its work a unit takes here."""
    rows = msgspec.convert(result["rows"], list[Row])
    return [[row.name, *(ratio_text(row.figures.get(key)) for key in COLUMNS)] for row in rows[1:]]


def ratio_text(figure: Figure | None) -> str:
    """A figure as so many times the first contender's."""
    return NOTHING if figure is None or figure.ratio is None else f"{figure.ratio:.2f}"


def with_ratios(result: Result) -> list[list[str]]:
    """The rows of `cells`; in brackets how a figure stands to the first proxy's."""
    found = cells(result)
    for row, ratios in zip(found[1:], ratio_cells(result), strict=True):
        for at, ratio in enumerate(ratios[1:], 1):
            if ratio != NOTHING:
                row[at] += f" ({ratio})"
    return found


def _tables(result: Result) -> list[RenderableType]:
    """Figures of CPU, and the others: together they would be too wide for a terminal."""
    cpu = Table(
        title="CPU µs by the kernel's accounts (ratio to the first; *: its core was full; †: a tenth of the streams)"
    )
    rest = Table(title="saturated, thousands of frames/s; TTFT added to the same requests direct, ms; memory")
    names = [column.short for column in COLUMNS.values()]
    for table, headings in ((cpu, names), (rest, ["k frames/s", "TTFT p50", "TTFT p99", "KiB/stream", "MiB"])):
        table.title_justify = "left"
        table.add_column("", no_wrap=True)
        for heading in headings:
            table.add_column(heading, justify="right")
    for row in with_ratios(result):
        cpu.add_row(*row[: 1 + len(names)])
        rest.add_row(row[0], *row[1 + len(names) :])
    return [cpu, rest]
