"""``relay-bench report``: the command."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from relay_bench.report.excerpt import excerpt
from relay_bench.report.page import page

if TYPE_CHECKING:
    from collections.abc import Sequence

    from relay_bench.load.results import Result


def main(argv: Sequence[str]) -> int:
    """Run ``relay-bench report``; the exit status."""
    parser = argparse.ArgumentParser(prog="relay-bench report", description="Result files as one HTML page.")
    parser.add_argument(
        "results", nargs="+", metavar="RESULT", help="of load, compare or sweep; also several in a file"
    )
    parser.add_argument(
        "--output", "-o", default="relay-bench.html", metavar="FILE", help="%(default)s; -: standard output"
    )
    parser.add_argument("--title", default="relay-bench")
    parser.add_argument(
        "--plot", action="append", metavar="TITLE", help="an SVG file of this plot alone instead; repeatable"
    )
    chosen = parser.parse_args(argv)
    try:
        named = [result for file in chosen.results for result in read_results(file)]
        document = page(named, chosen.title)
        if chosen.plot:
            document = excerpt(document, chosen.plot)
    except (OSError, ValueError) as error:
        print(f"relay-bench report: {error}", file=sys.stderr)
        return 2
    except (KeyError, TypeError) as error:
        print(f"relay-bench report: a result lacks what the page needs: {error!r}", file=sys.stderr)
        return 2
    if chosen.output == "-":
        sys.stdout.write(document)
        return 0
    Path(chosen.output).write_text(document, "utf-8")
    print(f"report: {chosen.output}", file=sys.stderr)
    return 0


def read_results(file: str) -> list[tuple[str, Result]]:
    """The results of a file, each with a name: its label, or the file's. Raises `ValueError`."""
    found: list[tuple[str, Result]] = []
    text = Path(file).read_text("utf-8")
    try:
        whole = [json.loads(text)]
    except ValueError:
        try:
            whole = [json.loads(line) for line in text.splitlines() if line.strip()]
        except ValueError as error:
            raise ValueError(f"{file}: not a result: {error}") from None
    if not whole:
        raise ValueError(f"{file}: empty")
    for number, result in enumerate(whole, 1):
        if not isinstance(result, dict) or "environment" not in result:
            raise ValueError(f"{file}: not a result of relay-bench")
        name = result.get("label") or Path(file).stem
        found.append((f"{name} {number}" if len(whole) > 1 and not result.get("label") else str(name), result))
    return found
