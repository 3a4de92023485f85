"""``relay-bench compare --peers``: the command."""

from __future__ import annotations

import argparse
import contextlib
import shlex
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from relay_bench import processes
from relay_bench.compare import DIRECT
from relay_bench.crowd import MeasureError
from relay_bench.load import command, results
from relay_bench.load.progress import console
from relay_bench.peers import machine, picture, running, scenarios, summary
from relay_bench.peers.definition import DEFINITIONS, Absent, Peer, Places, read_peers
from relay_bench.peers.rounds import Campaign
from relay_bench.servers import StartError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from relay_bench.load.results import Result
    from relay_bench.peers.machine import Cores
    from relay_bench.peers.rounds import Gathered
    from relay_bench.peers.running import EngineServer
    from relay_bench.servers import Server

_PERCENTILES = (50, 90, 99)


class Cast(msgspec.Struct):
    """Who takes part."""

    engines: list[EngineServer] = []
    proxies: list[Server] = []
    described: list[dict[str, str]] = []  #: of each proxy: name, version, language, notes
    skipped: dict[str, str] = {}  #: by name: why


def main(argv: Sequence[str]) -> int:
    """Run it; the exit status: 1 if a measurement failed or was disturbed, 2 if there is nothing to compare."""
    chosen = _parser().parse_args(argv)
    for number in (signal.SIGINT, signal.SIGTERM):  # also where the shell has the first ignored: nothing is to stay
        signal.signal(number, signal.default_int_handler)
    try:
        return _compare(chosen, argv)
    except (ValueError, OSError, MeasureError, StartError) as error:
        print(f"relay-bench compare: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("relay-bench compare: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="relay-bench compare", description="The relay beside other proxies, started and stopped here."
    )
    parser.add_argument("--peers", required=True, metavar="NAME,…|all", help="ratios are to the first")
    parser.add_argument("--rounds", type=int, default=3, help="each takes about 17 s for a proxy (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--engines", type=int, default=1, help="processes of the built-in engine (%(default)s)")
    parser.add_argument("--no-pin", action="store_true", help="proxies share all cores with load and engines")
    parser.add_argument(
        "--max-foreign",
        type=float,
        default=0.25,
        metavar="CORES",
        help="others' CPU beyond which a sample is disturbed",
    )
    parser.add_argument(
        "--quiet-wait-s", type=float, default=30.0, metavar="S", help="for that to be so at the start, at most"
    )
    parser.add_argument("--definitions", type=Path, default=DEFINITIONS, metavar="DIR", help="of peers (bench/peers)")
    parser.add_argument("--venvs", type=Path, metavar="DIR", help="peers' environments by name (DEFINITIONS/.venvs)")
    parser.add_argument(
        "--peer-env", action="append", default=[], metavar="NAME=PATH", help="its environment or program; repeatable"
    )
    parser.add_argument(
        "--peer-file", action="append", default=[], metavar="NAME=FILE", help="a script that is the peer; repeatable"
    )
    command.add_output(parser)
    return parser


def _compare(chosen: argparse.Namespace, argv: Sequence[str]) -> int:
    if chosen.rounds < 1 or chosen.engines < 1 or not chosen.max_foreign > 0:
        raise ValueError("--rounds, --engines: wanted 1 or more; --max-foreign: more than 0")
    metadata = command.metadata_of(chosen.metadata)
    peers = read_peers(chosen.definitions)
    names = _names(chosen.peers, peers)
    places = Places(
        definitions=chosen.definitions,
        venvs=chosen.venvs or chosen.definitions / ".venvs",
        programs=_paths("--peer-env", chosen.peer_env, peers),
        files=_paths("--peer-file", chosen.peer_file, peers),
    )
    processes.raise_descriptor_limit()
    environment = results.environment()  # before this process is kept to some of the cores
    with machine.cores(pin=not chosen.no_pin) as cores, _cast(names, peers, places, chosen.engines, cores) as cast:
        for name, why in cast.skipped.items():
            console.print(f"skipped: {name}: {why}", style="yellow", highlight=False)
        if not cast.proxies:
            raise ValueError("--peers: none of them is here")
        foreign = machine.wait_for_quiet(chosen.max_foreign, chosen.quiet_wait_s)
        if foreign > chosen.max_foreign:
            console.print(f"others use {foreign:.2f} cores of this machine: figures will be marked", style="red")
        campaign = Campaign(
            cast.engines, cast.proxies, rounds=chosen.rounds, seed=chosen.seed, max_foreign=chosen.max_foreign
        )
        with _progress(campaign.steps) as on_step:
            gathered = campaign.run(on_step)
        result = result_of(chosen, shlex.join(("relay-bench", "compare", *argv)), cast, gathered, str(cores)) | {
            "environment": environment
        }
    Console().print(picture.rendered(result))
    if chosen.save_result or chosen.save_detailed or chosen.append_result:
        command.write(chosen, metadata | result, f"compare-peers-{time.strftime('%Y%m%d-%H%M%S')}.json")
    return 1 if result["failures"] or result["disturbed"] else 0


def _names(words: str, peers: dict[str, Peer]) -> list[str]:
    names = list(peers) if words == "all" else [word for word in words.split(",") if word]
    if unknown := [name for name in names if name not in peers]:
        raise ValueError(f"--peers: {unknown[0]!r} is none of {', '.join(peers)}")
    if not names or len(set(names)) < len(names):
        raise ValueError("--peers: wanted each name once, or all")
    return names


def _paths(flag: str, words: Sequence[str], peers: dict[str, Peer]) -> dict[str, Path]:
    found = {}
    for word in words:
        name, _, value = word.partition("=")
        if name not in peers or not value:
            raise ValueError(f"{flag} {word}: wanted NAME=PATH, with one of {', '.join(peers)}")
        if not Path(value).exists():
            raise ValueError(f"{flag} {word}: there is no such file")
        found[name] = Path(value).absolute()
    return found


@contextlib.contextmanager
def _cast(names: list[str], peers: dict[str, Peer], places: Places, engines: int, cores: Cores) -> Iterator[Cast]:
    """Engines, and all peers that are here, running."""
    cast = Cast()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="relay-bench-")))
        cast.engines = [stack.enter_context(running.engine(folder)) for _ in range(engines)]
        for engine in cast.engines:
            scenarios.record_answer(engine, folder)
        addresses = [engine.url.removeprefix("http://") for engine in cast.engines]
        for name in names:
            own = folder / name
            own.mkdir()
            with console.status(f"starting {name}"):
                try:
                    version = running.version_of(name, peers[name], places)
                    server = running.peer_server(name, peers[name], places, addresses, own, cores)
                    cast.proxies.append(stack.enter_context(server))
                except (Absent, StartError, OSError) as error:
                    cast.skipped[name] = str(error).removeprefix(f"{name}: ")
                    continue
            peer = peers[name]
            cast.described.append({"name": name, "version": version, "language": peer.language, "notes": peer.notes})
        yield cast


@contextlib.contextmanager
def _progress(steps: int) -> Iterator[Callable[[str], None]]:
    """Draws how far it is; the context is told of each step as it begins. Without a terminal: a line for each part."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=steps)
        done = -1
        part = ""

        def begin(what: str) -> None:
            nonlocal done, part
            done += 1
            progress.update(task, completed=done, description=what)
            if not console.is_terminal and part != what.partition(":")[0]:
                part = what.partition(":")[0]
                console.print(part, highlight=False)

        yield begin


def result_of(chosen: argparse.Namespace, words: str, cast: Cast, gathered: Gathered, cores: str) -> Result:
    """The comparison as one JSON object."""
    names = [server.name for server in cast.proxies]
    records = {
        name: {round_: tally.records for round_, tally in tallies.items()} for name, tallies in gathered.tallies.items()
    }
    rows = summary.rows_of(names, gathered.samples, gathered.held, records)
    disturbed: dict[str, int] = {}
    for one in gathered.samples:
        if one.foreign_cores > chosen.max_foreign:
            disturbed[one.name] = disturbed.get(one.name, 0) + 1
    plan = gathered.plan
    urls = {server.name: server.url for server in [*cast.engines[:1], *cast.proxies]}
    runs: dict[str, list[dict[str, Any]]] = {}
    if plan is not None:
        runs = {
            name: [
                results.result_of(plan, tally, url=urls[name], label=name, percentiles=_PERCENTILES)
                for tally in gathered.tallies[name].values()
            ]
            for name in (DIRECT, *names)
            if name in gathered.tallies
        }
    return {
        "kind": "peers",
        "date": time.strftime("%Y%m%d-%H%M%S"),
        "label": chosen.label or None,
        "command": words,
        "rounds": chosen.rounds,
        "engines": chosen.engines,
        "pinning": cores,
        "peers": cast.described,
        "skipped": cast.skipped,
        "scenarios": {one.name: one.title for one in (*scenarios.SCENARIOS, scenarios.HOLD)},
        "rows": msgspec.to_builtins(rows),
        "floor": summary.floor_of(gathered.samples),
        "bound_by_harness": summary.bound_by_harness(rows),
        "disturbed": disturbed,
        "max_foreign": chosen.max_foreign,
        "failures": msgspec.to_builtins(gathered.failures),
        "lingering": gathered.lingering,
        "load": plan.rate_text if plan else "",
        "requests_per_round": len(plan.items) if plan else 0,
        "differences": msgspec.to_builtins(summary.differences_of(names, records, chosen.seed)),
        "samples": msgspec.to_builtins(gathered.samples),
        "runs": runs,
    }
