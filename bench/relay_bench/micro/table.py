"""The tables of micro benchmarks."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Sequence


def print_table(title: str, names: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on standard output: texts left, figures right."""
    table = Table(title=title, title_justify="left")
    for at, name in enumerate(names):
        table.add_column(name, justify="right" if at else "left")
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 120).print(table)
