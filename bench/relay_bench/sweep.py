"""``relay-bench sweep``: load over a range of rates or concurrencies.

Without ``--goodput``: upwards until the server is saturated, and the knee of throughput over load: the point farthest
above the straight line from the first to the last (Satopää et al., "Finding a Kneedle in a Haystack", 2011). With it:
the highest load at which the wanted share of the requests sent meets every objective, found by doubling and then by
halving the bracket, as vLLM's and MLPerf's server scenarios ask.
"""

from __future__ import annotations

import argparse
import copy
import time
from functools import partial
from typing import TYPE_CHECKING, Final

import msgspec
from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from relay_bench.load import command, options, progress, results
from relay_bench.load.target import resolve
from relay_bench.load.terminal import Fitted, bar, number

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from rich.console import RenderableType

    from relay_bench.load.options import Plan
    from relay_bench.load.results import Result
    from relay_bench.load.target import Target

#: A point is saturated if less than this share of the offered rate is served, ...
_SERVED_SHARE: Final = 0.9
#: ... or, of a concurrency, if throughput grew by less than this share since the point before.
_LEAST_GAIN: Final = 0.05
#: A curve whose knee stands out by less, of its height, is a straight line.
_LEAST_KNEE: Final = 0.05
#: Points of a search at most: 2**20 times the first load, or a bracket of a millionth.
_MOST_POINTS: Final = 40


class Point(msgspec.Struct, frozen=True, kw_only=True):
    """One load, and what came of it."""

    load: float  #: requests a second, or requests at once
    throughput: float  #: requests completed a second, from the first to the last of them
    attainment: float | None = None  #: share of the requests sent that met every objective
    failed: int = 0
    is_degraded: bool = False
    is_short: bool = False  #: the run took hardly longer than one answer, so its throughput says nothing of the server

    def meets(self, wanted: float) -> bool:
        """Whether enough requests met the objectives, by a client that was not late itself."""
        return self.attainment is not None and self.attainment >= wanted and not self.is_degraded


# -- what the points say: pure


def knee_of(points: Sequence[Point]) -> Point | None:
    """The knee of throughput over load; None where it is a straight line, or there are too few points."""
    points = sorted((point for point in points if not point.is_short), key=lambda point: point.load)
    if len(points) < 3:
        return None
    first, last = points[0], points[-1]
    width = last.load - first.load
    height = max(point.throughput for point in points) - first.throughput
    if width <= 0 or height <= 0:
        return None

    def above(point: Point) -> float:
        return (point.throughput - first.throughput) / height - (point.load - first.load) / width

    knee = max(points, key=above)
    return knee if above(knee) >= _LEAST_KNEE else None


def is_saturated(points: Sequence[Point], *, by_rate: bool) -> bool:
    """Whether the last point is beyond what the server can do."""
    *before, last = points
    if by_rate:
        return last.throughput < _SERVED_SHARE * last.load
    return bool(before) and last.throughput < before[-1].throughput * (1 + _LEAST_GAIN)


def best_of(points: Sequence[Point], wanted: float) -> Point | None:
    """The highest load that meets the objectives, and so does every lower one."""
    best = None
    for point in sorted(points, key=lambda point: point.load):
        if not point.meets(wanted):
            return best
        best = point
    return best


def next_load(points: Sequence[Point], wanted: float, *, start: float, precision: float, whole: bool) -> float | None:
    """The next load to try in a search; None: the bracket is as narrow as `precision` (a share of the load)."""
    if not points:
        return start
    if len(points) >= _MOST_POINTS:
        return None
    good = best_of(points, wanted)
    low = good.load if good else 0.0
    above = [point.load for point in points if point.load > low]
    if not above:
        return low * 2
    high = min(above)
    if not good:
        middle = high / 2
        is_found = middle < (1 if whole else start / 64)
    else:
        middle = (low + high) / 2
        is_found = high - low <= precision * low
    if whole:
        middle = float(int(middle))
        is_found = is_found or middle <= low
    return None if is_found else middle


# -- the command


def main(argv: Sequence[str]) -> int:
    """Run ``relay-bench sweep``; the exit status: 1 if no load met the objectives."""
    parser = argparse.ArgumentParser(prog="relay-bench sweep", description="Load over rates or concurrencies.")
    options.add_target(parser)
    over = parser.add_argument_group("over what")
    over.add_argument("--request-rates", type=_numbers, metavar="R,R,…", help="these rates")
    over.add_argument("--max-concurrencies", type=_numbers, metavar="N,N,…", help="these numbers at once, closed loop")
    over.add_argument(
        "--over", choices=("rate", "concurrency"), default="rate", help="without a list: doubling from --start"
    )
    over.add_argument("--start", type=float, default=1.0, help="the first load (%(default)s)")
    over.add_argument("--most", type=float, default=4096.0, help="the last load at most (%(default)s)")
    over.add_argument(
        "--attainment", type=float, default=0.99, help="share of requests to meet --goodput (%(default)s)"
    )
    over.add_argument("--precision", type=float, default=0.05, help="of the highest load found (%(default)s)")
    options.add_arguments(parser)
    command.add_output(parser)
    chosen = parser.parse_args(argv)
    return command.guarded("sweep", _sweep, chosen)


def _numbers(text: str) -> list[float]:
    found = [float(word) for word in text.split(",")]
    if not all(one > 0 for one in found):
        raise argparse.ArgumentTypeError("wanted numbers above 0")
    return found


async def _sweep(chosen: argparse.Namespace) -> int:
    if chosen.request_rates and chosen.max_concurrencies:
        raise ValueError("--request-rates and --max-concurrencies exclude each other")
    if chosen.start <= 0 or not 0 < chosen.attainment <= 1 or chosen.precision <= 0:
        raise ValueError("--start, --precision: wanted more than 0; --attainment: a share")
    metadata = command.metadata_of(chosen.metadata)
    percentiles = command.percentiles_of(chosen.metric_percentiles)
    by_rate = not chosen.max_concurrencies and (bool(chosen.request_rates) or chosen.over == "rate")
    target = resolve(options.url_of(chosen))
    first = await command.planned(_at(chosen, _start(chosen, by_rate), by_rate), target)
    chosen.model = first.model
    progress.console.print(f"{target.url}, {first.model}: {_intention(chosen, first, by_rate)}", highlight=False)
    runs: list[Result] = []

    async def measure(load: float) -> Point:
        result = await _measured(
            _at(chosen, load, by_rate), target, f"{load:g}{'/s' if by_rate else ' at once'}", percentiles
        )
        runs.append(result)
        return point_of(load, result)

    points = await _points(chosen, measure, by_rate=by_rate)
    result = _result(chosen, target, points, runs, by_rate=by_rate)
    Console().print(rendered(result))
    if chosen.save_result or chosen.save_detailed or chosen.append_result:
        command.write(chosen, metadata | result, f"sweep-{chosen.label or 'relay-bench'}-{result['date']}.json")
    return 1 if chosen.goodput and result["best"] is None else 0


async def _points(
    chosen: argparse.Namespace, measure: Callable[[float], Awaitable[Point]], *, by_rate: bool
) -> list[Point]:
    """Measures what the flags ask for: a list, a search, or upwards until saturation."""
    points: list[Point] = []
    listed = chosen.request_rates or chosen.max_concurrencies
    if listed:
        return [await measure(load) for load in listed]
    if chosen.goodput:
        while (load := _next(chosen, points, by_rate)) is not None:
            points.append(await measure(load))
        return points
    load = _start(chosen, by_rate)
    while load <= chosen.most:
        points.append(await measure(load))
        if points[-1].is_short:
            break
        # one point more shows the plateau
        if len(points) > 2 and is_saturated(points, by_rate=by_rate) and is_saturated(points[:-1], by_rate=by_rate):
            break
        load *= 2
    return points


def _start(chosen: argparse.Namespace, by_rate: bool) -> float:
    """The first load."""
    if listed := chosen.request_rates or chosen.max_concurrencies:
        return float(listed[0])
    return float(chosen.start) if by_rate else float(max(1, int(chosen.start)))


def _intention(chosen: argparse.Namespace, first: Plan, by_rate: bool) -> str:
    """What a sweep is going to do, and how long the first run of it takes where that is known."""
    unit = "requests/s" if by_rate else "at once"
    start = _start(chosen, by_rate)
    if listed := chosen.request_rates or chosen.max_concurrencies:
        loads = f"{', '.join(f'{load:g}' for load in listed)} {unit}"
    else:
        until = "--goodput is missed, then halving" if chosen.goodput else "throughput no longer follows"
        loads = f"{start:g}, {start * 2:g}, {start * 4:g} … {unit} until {until} (at most {chosen.most:g}, --most)"
    if not first.duration_s:
        return f"{loads}; {len(first.items):,} requests each (--num-prompts, --duration)"
    each = f"{chosen.duration:g} s" if chosen.duration else f"{len(first.items):,} requests"
    return f"{loads}; {each} each, the first takes about {first.duration_s:,.0f} s (--num-prompts, --duration)"


def _next(chosen: argparse.Namespace, points: list[Point], by_rate: bool) -> float | None:
    start = _start(chosen, by_rate)
    load = next_load(points, chosen.attainment, start=start, precision=chosen.precision, whole=not by_rate)
    return None if load is None or load > chosen.most else load


def _at(chosen: argparse.Namespace, load: float, by_rate: bool) -> argparse.Namespace:
    """The flags of one point's run; what prefix caches have seen at the last point is asked in other words."""
    at = copy.copy(chosen)
    if by_rate:
        at.request_rate = load
    else:
        at.max_concurrency = int(load)
    return at


async def _measured(chosen: argparse.Namespace, target: Target, title: str, percentiles: Sequence[float]) -> Result:
    plan = options.plan_of(chosen, model=chosen.model, is_detailed=chosen.save_detailed, variant=title)
    tally = await command.carried_out(plan, target, title)
    result = results.result_of(plan, tally, url=target.url, label=title, percentiles=percentiles)
    progress.console.print(f"{title}: {_rate(result)[0]:,.2f} done/s, {result['failed']} failed", style="dim")
    return result


def _rate(result: Result) -> tuple[float, bool]:
    """Requests completed a second, from the first to the last, which a run's beginning and end do not thin out.

    Of a run whose first answer took longer than that, over all of it; True: it is one.
    """
    rate, completed = result["completion_rate"], result["completed"]
    if rate and completed - 1 >= rate * result["duration"] / 2:
        return rate, False
    return result["request_throughput"], completed > 0


def point_of(load: float, result: Result) -> Point:
    """The point a run makes."""
    throughput, is_short = _rate(result)
    return Point(
        load=load,
        throughput=throughput,
        is_short=is_short,
        attainment=result.get("slo_attainment"),
        failed=result["failed"],
        is_degraded=bool(result["harness"]["degraded"]),
    )


def _result(
    chosen: argparse.Namespace, target: Target, points: list[Point], runs: list[Result], *, by_rate: bool
) -> Result:
    best = best_of(points, chosen.attainment) if chosen.goodput else None
    knee = knee_of(points)
    return {
        "kind": "sweep",
        "date": time.strftime("%Y%m%d-%H%M%S"),
        "label": chosen.label or None,
        "url": target.url,
        "model_id": chosen.model,
        "over": "rate" if by_rate else "concurrency",
        "goodput": list(chosen.goodput),
        "attainment": chosen.attainment,
        "points": msgspec.to_builtins(points),
        "best": best.load if best else None,
        "knee": knee.load if knee else None,
        "environment": results.environment(),
        "runs": runs,
    }


# -- the picture

#: Widths of a bar with what is said behind it.
_BAR: Final = 40
_LEAST_BAR: Final = 14


def rendered(result: Result) -> RenderableType:
    """The sweep for the terminal."""
    unit = "requests/s" if result["over"] == "rate" else "at once"
    lines = Text()
    if result["goodput"]:
        objectives = f"{result['attainment']:.0%} of requests with {' '.join(result['goodput'])}"
        if result["best"] is None:
            lines.append(f"no load tried meets {objectives}", style="bold red")
        else:
            lines.append(f"highest load that meets {objectives}: {result['best']:g} {unit}", style="bold green")
        lines.append("\n")
    knee = "none: throughput is a straight line" if result["knee"] is None else f"{result['knee']:g} {unit}"
    lines.append(f"knee of throughput over load: {knee}")
    for point in result["points"]:
        if point["is_degraded"]:
            lines.append(f"\n{point['load']:g} {unit}: DEGRADED, the client itself was late", style="bold white on red")
        if point["is_short"]:
            message = "the run took hardly longer than one answer; give more --num-prompts, or a longer --duration"
            lines.append(f"\n{point['load']:g} {unit}: TOO SHORT, {message}", style="yellow")
    pairs = sorted(zip(result["points"], result["runs"], strict=True), key=lambda pair: float(pair[0]["load"]))
    return Group(Panel(lines, title=f"sweep {result['url']}", title_align="left"), _table(result, pairs, unit))


def _table(result: Result, pairs: list[tuple[Result, Result]], unit: str) -> Table:
    table = Table(box=None)
    for name in (unit, "done/s", "TTFT\np50", "TTFT\np99", "TPOT\np50", "gap\np99", "met", "failed"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("")
    most = max(point["throughput"] for point, _ in pairs) or 1.0
    for point, run in pairs:
        cells = [f"{point['load']:g}", f"{point['throughput']:,.2f}"]
        cells += [number(_at_percent(run, "ttft_planned", percent)) for percent in (0.5, 0.99)]
        cells += [number(run["median_tpot_ms"]), number(_at_percent(run, "frame_gap", 0.99))]
        cells += ["-" if point["attainment"] is None else f"{point['attainment']:.1%}", str(point["failed"])]
        marks = " knee" * (point["load"] == result["knee"]) + " best" * (point["load"] == result["best"])
        table.add_row(*cells, Fitted(partial(_bar, point["throughput"] / most, marks), _LEAST_BAR, _BAR))
    return table


def _bar(share: float, marks: str, width: int) -> Text:
    return bar(share, width - len(" knee best")) + Text(marks)


def _at_percent(run: Result, metric: str, q: float) -> float | None:
    ns = results.histogram_from(run, metric).quantile_ns(q)
    return None if ns is None else ns / 1e6
