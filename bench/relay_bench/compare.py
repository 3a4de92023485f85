"""``relay-bench compare``: the same requests direct and through proxies, and what the difference is.

The runs are interleaved: each round does the same schedule once on every server, in an order drawn anew, so that what
drifts (a warm cache, another process, the governor) falls on all alike. Within a round, request n through a proxy is
paired with request n direct: same instant, same lengths, other words, since a prompt that a prefix cache has just seen
is another request. The figure is the median of the paired differences; its interval comes from a bootstrap over rounds
and requests (`relay_bench.load.stats.paired_interval`).
"""

from __future__ import annotations

import argparse
import copy
import os
import random
import time
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import msgspec
import trio
from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from relay_bench import processes
from relay_bench.load import command, options, results, run
from relay_bench.load.stats import Interval, paired_interval, percentile
from relay_bench.load.target import Target, resolve
from relay_bench.load.terminal import Fitted, number

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import RenderableType

    from relay_bench.load.options import Plan
    from relay_bench.load.records import Record, Tally
    from relay_bench.load.results import Result

#: What is compared, by request.
METRICS: Final = {
    "ttft": "TTFT",
    "frame_gap_mean": "mean inter-frame gap",
    "frame_gap_max": "longest inter-frame gap",
    "frame_delay": "frame delay (stamps)",
    "e2el": "whole answer",
}
DIRECT: Final = "direct"
#: Seconds for a proxy to take a connection, before the first round.
_MEET_S: Final = 5.0


class Contender(msgspec.Struct, frozen=True):
    """A server under comparison."""

    name: str
    target: Target
    pid: int | None = None  #: of the proxy, for the kernel's accounts


class Difference(msgspec.Struct, frozen=True, kw_only=True):
    """One metric through one proxy beside the same requests direct; milliseconds."""

    name: str
    metric: str
    pairs: int
    direct_ms: float  #: medians of the paired requests
    through_ms: float
    added: Interval  #: of the median paired difference


class Cost(msgspec.Struct, frozen=True, kw_only=True):
    """What a proxy took from the machine for it."""

    name: str
    cpu_us_per_frame: float
    cpu_us_per_request: float
    memory_bytes: int  #: proportional, at the end


class Rounds(msgspec.Struct):
    """All runs of a comparison: by contender, the tally of each round."""

    tallies: dict[str, list[Tally]]
    cpu_ns: dict[str, int]


# -- pairing: pure


def paired_differences(direct: Sequence[Record], through: Sequence[Record], metric: str) -> list[tuple[float, float]]:
    """``(direct, through)`` in ms for each request that is measured, succeeded and has the metric on both sides."""
    by_index = {record.index: record for record in direct if not record.label and record.is_measured}
    pairs = []
    for record in through:
        twin = by_index.get(record.index)
        if twin is None or record.label or not record.is_measured:
            continue
        mine, other = twin.metric_s(metric), record.metric_s(metric)
        if mine is not None and other is not None:
            pairs.append((mine * 1000, other * 1000))
    return pairs


def difference_of(
    name: str, metric: str, direct: Sequence[Sequence[Record]], through: Sequence[Sequence[Record]], seed: int
) -> Difference | None:
    """The difference in one metric over all rounds; None where no pair has it."""
    rounds = [paired_differences(*both, metric) for both in zip(direct, through, strict=True)]
    pairs = [pair for pairs in rounds for pair in pairs]
    if not pairs:
        return None
    added = paired_interval(
        [[other - mine for mine, other in pairs] for pairs in rounds], random.Random(f"{seed} {name} {metric}")
    )
    return Difference(
        name=name,
        metric=metric,
        pairs=len(pairs),
        direct_ms=percentile(sorted(mine for mine, _ in pairs), 0.5),
        through_ms=percentile(sorted(other for _, other in pairs), 0.5),
        added=added,
    )


# -- the command


def main(argv: Sequence[str]) -> int:
    """Run ``relay-bench compare``; the exit status: 1 if a request failed or a run is degraded."""
    if any(word.partition("=")[0] == "--peers" for word in argv):  # another command line altogether
        from relay_bench.peers import command as peers

        return peers.main(argv)
    parser = argparse.ArgumentParser(
        prog="relay-bench compare",
        description="The same load direct and through proxies that run. With --peers: through proxies started here, "
        "and what they cost; see relay-bench compare --peers all --help.",
    )
    parser.add_argument("--direct", required=True, metavar="URL", help="the engine itself")
    parser.add_argument(
        "--through", required=True, action="append", metavar="NAME=URL", help="a proxy before it; repeatable"
    )
    parser.add_argument(
        "--pid", action="append", default=[], metavar="NAME=PID", help="a proxy's process, for its CPU time"
    )
    parser.add_argument("--rounds", type=int, default=5)
    options.add_arguments(parser)
    command.add_output(parser)
    chosen = parser.parse_args(argv)
    return command.guarded("compare", _compare, chosen)


async def _compare(chosen: argparse.Namespace) -> int:
    if chosen.rounds < 1:
        raise ValueError("--rounds: wanted 1 or more")
    metadata = command.metadata_of(chosen.metadata)
    percentiles = command.percentiles_of(chosen.metric_percentiles)
    contenders = contenders_of(chosen)
    first = await command.planned(chosen, contenders[0].target)
    for one in contenders[1:]:
        await _meet(one)
    rounds = await _run_rounds(chosen, contenders, first.model)
    result = _result(chosen, contenders, first, rounds, percentiles)
    Console().print(rendered(result))
    if chosen.save_result or chosen.save_detailed or chosen.append_result:
        command.write(chosen, metadata | result, f"compare-{results.file_name(first, chosen.label)}")
    is_bad = any(one["failed"] or one["harness"]["degraded"] for runs in result["runs"].values() for one in runs)
    return 1 if is_bad else 0


async def _meet(one: Contender) -> None:
    """Raises `LoadError` where nobody listens, before anything has been measured."""
    target = one.target
    try:
        with trio.fail_after(_MEET_S), trio.socket.socket(target.family) as sock:
            await sock.connect(target.address)
    except trio.TooSlowError:
        raise run.LoadError(f"{one.name} ({target.url}): no answer; is it running?") from None
    except OSError as error:
        why = os.strerror(error.errno) if error.errno else str(error)  # strerror has the address again
        raise run.LoadError(f"{one.name} ({target.url}): {why}; is it running?") from None


def contenders_of(chosen: argparse.Namespace) -> list[Contender]:
    """The servers, the direct one first. Raises `ValueError`."""
    pids = dict(_named("--pid", word) for word in chosen.pid)
    proxies = dict(_named("--through", word) for word in chosen.through)
    if DIRECT in proxies or len(proxies) < len(chosen.through):
        raise ValueError(f"--through: names must differ, and none be {DIRECT!r}")
    if unknown := pids.keys() - proxies.keys():
        raise ValueError(f"--pid: no --through is called {min(unknown)!r}")
    for pid in pids.values():
        if not pid.isdecimal() or not processes.memory_bytes(int(pid)):
            raise ValueError(f"--pid: there is no process {pid}")
    found = [Contender(DIRECT, resolve(chosen.direct))]
    return found + [
        Contender(name, resolve(url), int(pids[name]) if name in pids else None) for name, url in proxies.items()
    ]


def _named(flag: str, word: str) -> tuple[str, str]:
    name, equals, value = word.partition("=")
    if not equals or not name or not value:
        raise ValueError(f"{flag} {word}: wanted NAME=…")
    return name, value


async def _run_rounds(chosen: argparse.Namespace, contenders: list[Contender], model: str) -> Rounds:
    rounds = Rounds({one.name: [] for one in contenders}, {one.name: 0 for one in contenders})
    order = random.Random(f"order {chosen.seed}")
    for number_ in range(chosen.rounds):
        of_round = copy.copy(chosen)
        of_round.seed = f"{chosen.seed} {number_}"
        for one in order.sample(contenders, k=len(contenders)):
            plan = options.plan_of(of_round, model=model, variant=one.name, is_detailed=chosen.save_detailed)
            before = processes.cpu_ns(one.pid) if one.pid else 0
            title = f"round {number_ + 1} of {chosen.rounds}: {one.name}"
            rounds.tallies[one.name].append(await command.carried_out(plan, one.target, title))
            if one.pid:
                rounds.cpu_ns[one.name] += processes.cpu_ns(one.pid) - before
    return rounds


def _result(
    chosen: argparse.Namespace, contenders: list[Contender], plan: Plan, rounds: Rounds, percentiles: list[float]
) -> Result:
    records = {name: [tally.records for tally in tallies] for name, tallies in rounds.tallies.items()}
    proxies = contenders[1:]
    differences = [
        difference
        for metric in METRICS
        for one in proxies
        if (difference := difference_of(one.name, metric, records[DIRECT], records[one.name], chosen.seed))
    ]
    if not differences:
        failures = results.failures_of([record for runs in records.values() for run_ in runs for record in run_])
        raise run.LoadError(f"no request succeeded both direct and through a proxy: {failures}")
    return {
        "kind": "compare",
        "date": time.strftime("%Y%m%d-%H%M%S"),
        "label": chosen.label or None,
        "model_id": plan.model,
        "load": plan.rate_text,
        "rounds": chosen.rounds,
        "requests_per_round": len(plan.items),
        "differences": msgspec.to_builtins(differences),
        "costs": msgspec.to_builtins([cost for one in proxies if (cost := _cost_of(one, rounds))]),
        "environment": results.environment(),
        "runs": {
            one.name: [
                results.result_of(plan, tally, url=one.target.url, label=one.name, percentiles=percentiles)
                for tally in rounds.tallies[one.name]
            ]
            for one in contenders
        },
    }


def _cost_of(one: Contender, rounds: Rounds) -> Cost | None:
    if one.pid is None:
        return None
    records = [record for tally in rounds.tallies[one.name] for record in tally.records]
    cpu_us = rounds.cpu_ns[one.name] / 1000
    frames = sum(record.frames for record in records)
    return Cost(
        name=one.name,
        cpu_us_per_frame=cpu_us / max(frames, 1),
        cpu_us_per_request=cpu_us / max(len(records), 1),
        memory_bytes=processes.memory_bytes(one.pid),
    )


# -- the picture

_WIDTH: Final = 40
_LEAST_WIDTH: Final = 10


def rendered(result: Result) -> RenderableType:
    """The comparison for the terminal."""
    text = Text(
        f"{result['load']}; {result['rounds']} rounds of {result['requests_per_round']:,} requests, "
        "their order drawn anew in each"
    )
    for name, runs in result["runs"].items():
        for label, count in _failures(runs).items():
            text.append(f"\n{name}: {count:,} failed: {label}", style="bold red")
        if late := [one["harness"]["degraded"] for one in runs if one["harness"]["degraded"]]:
            of_runs = f"{len(late)} of {len(runs)} runs DEGRADED"
            text.append(
                f"\n{name}: {of_runs}, do not trust these figures: {'; '.join(late[0])}", style="bold white on red"
            )
    parts: list[RenderableType] = [Panel(text, title="compare", title_align="left")]
    differences = msgspec.convert(result["differences"], list[Difference])
    for metric, title in METRICS.items():
        if rows := [difference for difference in differences if difference.metric == metric]:
            parts.append(difference_table(title, rows))
    if result["costs"]:
        parts.append(_costs(msgspec.convert(result["costs"], list[Cost])))
    return Group(*parts)


def _failures(runs: list[Result]) -> dict[str, int]:
    found: dict[str, int] = {}
    for one in runs:
        for label, failure in one["failures"].items():
            found[label] = found.get(label, 0) + failure["count"]
    return found


def difference_table(title: str, rows: list[Difference]) -> Table:
    """One metric's differences, their intervals drawn."""
    low = min(0.0, *(row.added.low for row in rows))
    high = max(0.0, *(row.added.high for row in rows))
    scale = f"drawn from {number_signed(low)} to {number_signed(high)}"
    table = Table(title=f"{title}, ms (medians over paired requests; 95 % intervals, {scale})", box=None)
    table.title_justify = "left"
    for name in ("through", "pairs", "direct", "through it", "added", "interval"):
        table.add_column(name, justify="left" if name == "through" else "right", no_wrap=True)
    table.add_column()
    for row in rows:
        added = row.added
        cells: list[Any] = [row.name, f"{row.pairs:,}", number(row.direct_ms), number(row.through_ms)]
        cells += [number_signed(added.estimate), f"{number_signed(added.low)} … {number_signed(added.high)}"]
        table.add_row(*cells, Fitted(partial(whiskers, added, low, high), _LEAST_WIDTH, _WIDTH))
    return table


def number_signed(ms: float) -> str:
    """Milliseconds with their sign, where there is one."""
    return f"{'+' if ms > 0 else '-' if ms < 0 else ''}{number(abs(ms))}"


def whiskers(interval: Interval, low: float, high: float, width: int) -> Text:
    """An interval drawn to scale between `low` and `high`, with a line at zero."""

    def column(value: float) -> int:
        return round((value - low) / (high - low) * (width - 1)) if high > low else 0

    line = [" "] * width
    line[column(0.0)] = "│"
    for at in range(column(interval.low), column(interval.high) + 1):
        line[at] = "─"
    line[column(interval.low)], line[column(interval.high)] = "├", "┤"
    line[column(interval.estimate)] = "●"
    style = "" if not interval.excludes_zero else "red" if interval.low > 0 else "green"
    return Text("".join(line), style=style)


def _costs(costs: list[Cost]) -> Table:
    table = Table(title="what it took (CPU time and memory of the process and its descendants)", title_justify="left")
    for name in ("through", "CPU µs/frame", "CPU µs/request", "memory MiB"):
        table.add_column(name, justify="left" if name == "through" else "right")
    for cost in costs:
        memory = f"{cost.memory_bytes / (1 << 20):.1f}"
        table.add_row(cost.name, f"{cost.cpu_us_per_frame:.1f}", f"{cost.cpu_us_per_request:.0f}", memory)
    return table
