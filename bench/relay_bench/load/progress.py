"""How a run goes, live: rate, in flight, failures, times to first token so far."""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from relay_bench.load.stats import Histogram

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from relay_bench.load import worker

#: Progress and remarks go here; results go to standard output.
console = Console(stderr=True)
#: Seconds between two lines, where there is no bar.
_LINE_S: Final = 10.0


class Meter:
    """The reports of all load processes, added up."""

    def __init__(self) -> None:
        self._latest: dict[int, worker.Progress] = {}
        self._ttft = Histogram()
        self._began = time.monotonic()

    def take(self, number: int, report: worker.Progress) -> None:
        """Takes in one process's report."""
        self._latest[number] = report
        for ttft in report.ttfts_ns:
            self._ttft.add(ttft)

    @property
    def done(self) -> int:
        """Requests that have ended."""
        return sum(report.done for report in self._latest.values())

    def __str__(self) -> str:
        reports = self._latest.values()
        elapsed_s = max(time.monotonic() - self._began, 1e-9)
        parts = [
            f"{self.done / elapsed_s:,.1f} req/s",
            f"{sum(report.content_frames for report in reports) / elapsed_s:,.0f} frames/s",
            f"{sum(report.in_flight for report in reports):,} in flight",
        ]
        p50, p99 = self._ttft.quantile_ns(0.5), self._ttft.quantile_ns(0.99)
        if p50 is not None and p99 is not None:
            parts.append(f"TTFT p50 {p50 / 1e6:.1f} p99 {p99 / 1e6:.1f} ms")
        failed = sum(sum(report.failed.values()) for report in reports)
        if failed:
            parts.append(f"[red]{failed:,} failed[/]")
        return ", ".join(parts)


@contextmanager
def shown(title: str, total: int | None) -> Iterator[Callable[[int, worker.Progress], None]]:
    """Draws a run of `total` requests (None: it is not known); the context is what takes the reports.

    Where nobody can be shown a bar, a line each 10 s says the same.
    """
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    meter = Meter()
    with Progress(
        *columns, TextColumn("{task.fields[state]}"), console=console, transient=True, disable=not console.is_terminal
    ) as progress:
        task = progress.add_task(title, total=total, state="")

        next_line_s = time.monotonic() + _LINE_S

        def take(number: int, report: worker.Progress) -> None:
            nonlocal next_line_s
            meter.take(number, report)
            progress.update(task, completed=meter.done, state=str(meter))
            if progress.disable and time.monotonic() >= next_line_s:
                next_line_s += _LINE_S
                of_total = "" if total is None else f" of {total:,}"
                console.print(f"{title}: {meter.done:,}{of_total} requests, {meter}", highlight=False, soft_wrap=True)

        yield take
