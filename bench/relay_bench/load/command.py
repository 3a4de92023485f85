"""``relay-bench load``: the command."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import trio
from rich.console import Console

from relay_bench.groups import leaf
from relay_bench.load import floor, options, progress, results, run, self_check, terminal
from relay_bench.load.target import resolve

if TYPE_CHECKING:
    from collections.abc import Sequence

    from relay_bench.load.options import Plan
    from relay_bench.load.records import Tally
    from relay_bench.load.target import Target


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """All flags of ``load``."""
    options.add_target(parser)
    options.add_arguments(parser)
    add_output(parser)
    out = parser.add_argument_group("results")
    out.add_argument("--no-floor", action="store_true", help="do not measure the harness's own floor first (ours)")
    out.add_argument("--self-check", action="store_true", help="only check the harness, against known times (ours)")
    out.add_argument("--save-requests", default="", metavar="FILE", help="a JSON line of marks for each request (ours)")


def add_output(parser: argparse.ArgumentParser) -> None:
    """The flags for result files."""
    out = parser.add_argument_group("results")
    out.add_argument("--save-result", action="store_true", help="write a JSON file")
    out.add_argument("--save-detailed", action="store_true", help="with arrays by request in it")
    out.add_argument("--append-result", action="store_true", help="to the file, as a line, instead of replacing it")
    out.add_argument("--result-dir", default=".", metavar="DIR")
    out.add_argument("--result-filename", default="", metavar="NAME", help="default: as vLLM names them")
    out.add_argument("--metadata", nargs="*", default=[], metavar="KEY=VALUE", help="kept in the result")
    out.add_argument("--label", default="", help="what the result is called")
    out.add_argument("--metric-percentiles", default="50,90,99", metavar="P,P,…")


def main(argv: Sequence[str]) -> int:
    """Run ``relay-bench load``; the exit status: 1 if a request failed or the run is degraded."""
    parser = argparse.ArgumentParser(prog="relay-bench load", description="Load a server, and time every frame.")
    add_arguments(parser)
    chosen = parser.parse_args(argv)
    return guarded("load", _load, chosen)


def guarded(verb: str, work: Any, *arguments: Any) -> int:
    """Run `work` in trio; errors a user can mend end it with one line."""
    status = 2
    closed: BrokenPipeError | None = None
    try:
        status = int(trio.run(work, *arguments))
    except* (run.LoadError, ValueError, OSError) as errors:
        first = leaf(errors)
        if isinstance(first, BrokenPipeError):
            closed = first
        else:
            print(f"relay-bench {verb}: {first}", file=sys.stderr)
    except* KeyboardInterrupt:
        print(f"relay-bench {verb}: interrupted", file=sys.stderr)
        status = 130
    if closed is not None:  # standard output's reader has left; `except*` would wrap what is raised in it
        raise closed
    return status


async def _load(chosen: argparse.Namespace) -> int:
    if chosen.self_check:
        checks = await self_check.checked()
        Console().print(self_check.table_of(checks))
        return 0 if all(check.is_good for check in checks) else 1
    metadata, percentiles = metadata_of(chosen.metadata), percentiles_of(chosen.metric_percentiles)
    target = resolve(options.url_of(chosen))
    plan = await planned(chosen, target)
    found = None if chosen.no_floor else await measured_floor()
    tally = await carried_out(plan, target, "load")
    result = results.result_of(plan, tally, url=target.url, label=chosen.label, percentiles=percentiles)
    add_floor(result, found)
    Console().print(terminal.rendered(metadata | result))
    save(chosen, plan, metadata | result, tally)
    return 1 if result["failed"] or result["harness"]["degraded"] else 0


async def planned(chosen: argparse.Namespace, target: Target, *, is_detailed: bool = False) -> Plan:
    """The plan the flags make for a server. Raises `ValueError` and `LoadError`."""
    route, headers = options.route_of(chosen), dict(options.headers_of(chosen))
    model = await run.model_of(chosen, target, route, headers)
    is_detailed = is_detailed or getattr(chosen, "save_detailed", False) or bool(getattr(chosen, "save_requests", ""))
    return options.plan_of(chosen, model=model, is_detailed=is_detailed)


async def carried_out(plan: Plan, target: Target, title: str) -> Tally:
    """A run with its progress shown."""
    total = None if plan.manner.is_closed_loop and plan.duration_s else len(plan.items)
    with progress.shown(title, total) as take:
        return await run.run_plan(plan, target, take)


async def measured_floor() -> floor.Floor:
    """The harness's floor, said as soon as it is known."""
    with progress.console.status("harness floor"):
        found = await floor.measure()
    progress.console.print(f"harness floor: {found}", style="dim")
    return found


def add_floor(result: results.Result, found: floor.Floor | None) -> None:
    """Keeps the floor in a result."""
    if found is not None:
        result["harness"] |= {"floor": msgspec.structs.asdict(found), "floor_text": str(found)}


def save(chosen: argparse.Namespace, plan: Plan, result: results.Result, tally: Tally) -> None:
    """Writes the files asked for."""
    if chosen.save_requests:
        lines = b"".join(msgspec.json.encode(record) + b"\n" for record in tally.records)
        Path(chosen.save_requests).write_bytes(lines)
    if chosen.save_result or chosen.save_detailed or chosen.append_result:
        write(chosen, result, results.file_name(plan, chosen.label))


def write(chosen: argparse.Namespace, result: results.Result, name: str) -> None:
    """Writes a result where the flags say, and says where."""
    path = Path(chosen.result_dir, chosen.result_filename or name)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab" if chosen.append_result else "wb") as file:
        file.write(msgspec.json.encode(result) + b"\n")
    progress.console.print(f"result: {path}")


def metadata_of(words: Sequence[str]) -> dict[str, str]:
    """``KEY=VALUE`` words; raises `ValueError`."""
    found = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not key:
            raise ValueError(f"--metadata {word}: wanted KEY=VALUE")
        found[key] = value
    return found


def percentiles_of(text: str) -> list[float]:
    """Percentiles from ``50,90,99.9``; raises `ValueError`."""
    try:
        found = [float(word) for word in text.split(",")]
    except ValueError:
        found = [math.nan]
    if not all(0 <= percent <= 100 for percent in found):
        raise ValueError(f"--metric-percentiles {text}: wanted numbers from 0 to 100")
    return found
