"""What a drill has seen: figures, and promises that were kept or broken."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import msgspec
from rich.console import Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from relay_bench.load.terminal import bar

if TYPE_CHECKING:
    from rich.console import RenderableType

_BAR_WIDTH: Final = 40


class DrillError(Exception):
    """A drill could not be held, so that nothing was seen; the message says why."""


class Promise(msgspec.Struct, frozen=True):
    """One thing that must hold, and what was seen of it."""

    text: str
    is_kept: bool
    seen: str


class Report(msgspec.Struct):
    """One drill's outcome."""

    drill: str
    figures: list[tuple[str, str]] = []
    promises: list[Promise] = []
    picture: list[tuple[str, float, str]] = []  #: bars: name, share of the whole, what stands behind it

    @property
    def is_kept(self) -> bool:
        """Whether all promises were kept."""
        return all(promise.is_kept for promise in self.promises)

    @property
    def broken(self) -> list[str]:
        """The promises that were not."""
        return [promise.text for promise in self.promises if not promise.is_kept]

    def add(self, name: str, figure: object) -> None:
        """Notes a figure."""
        self.figures.append((name, f"{figure:,}" if isinstance(figure, int) else str(figure)))

    def judge(self, text: str, is_kept: bool, seen: object = "") -> None:
        """Notes whether a promise was kept; of one that is judged again, whether it was every time."""
        promise = Promise(text, is_kept, str(seen))
        for at, before in enumerate(self.promises):
            if before.text == text:
                self.promises[at] = promise if before.is_kept else before
                return
        self.promises.append(promise)


def rendered(report: Report) -> RenderableType:
    """The report for people."""
    parts: list[RenderableType] = []
    if report.figures:
        figures = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
        figures.add_column()
        figures.add_column(justify="right")
        for name, figure in report.figures:
            figures.add_row(name, figure)
        parts.append(figures)
    if report.picture:
        parts += [Text(), _bars(report.picture)]
    verdicts = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for promise in report.promises:
        verdict = Text("✓ kept", "green") if promise.is_kept else Text("✗ BROKEN", "bold red")
        verdicts.add_row(verdict, promise.text, Text(promise.seen, "dim" if promise.is_kept else "red"))
    style = "green" if report.is_kept else "red"
    return Panel(Group(*parts, Text(), verdicts), title=f"drill {report.drill}", title_align="left", border_style=style)


def closing(report: Report) -> str:
    """The report in a line, for logs."""
    broken, number = report.broken, len(report.promises)
    if not broken:
        return f"drill {report.drill}: all {number} promises kept"
    return f"drill {report.drill}: {len(broken)} of {number} promises BROKEN: {'; '.join(broken)}"


def _bars(rows: list[tuple[str, float, str]]) -> Table:
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column()
    table.add_column(width=_BAR_WIDTH)
    table.add_column(justify="right")
    table.add_column()
    for name, share, note in rows:
        table.add_row(name, bar(share, _BAR_WIDTH), f"{share:.1%}", note)
    return table
