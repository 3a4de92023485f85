"""``relay-bench drill``: the command."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any, Final

import msgspec
import trio
from rich.console import Console

from relay_bench.drill import abuse, affinity, hangups, kill, rolling, soak, split, streams
from relay_bench.drill.report import DrillError, Report, closing, rendered
from relay_bench.drill.stage import Scene
from relay_bench.groups import leaf

if TYPE_CHECKING:
    from collections.abc import Sequence

#: The drills, and what each is.
DRILLS: Final[dict[str, Any]] = {
    "kill": kill, "hangups": hangups, "rolling": rolling, "affinity": affinity, "split": split,
    "soak": soak, "abuse": abuse, "streams": streams,
}  # fmt: skip
_KEPT, _BROKEN, _NOT_HELD = 0, 1, 2


def main(argv: Sequence[str] | None = None) -> int:
    """Holds one drill; the exit status: 0 all promises kept, 1 one is broken, 2 it could not be held."""
    parser = _parser()
    chosen = parser.parse_args(argv)
    module = DRILLS[chosen.name]
    plan = msgspec.structs.replace(module.QUICK if chosen.quick else module.FULL, seed=chosen.seed)
    if chosen.minutes is not None:
        if not hasattr(plan, "minutes") or not chosen.minutes > 0:
            parser.error("--minutes: more than 0, and of soak alone")
        plan = msgspec.structs.replace(plan, minutes=chosen.minutes)
    if chosen.streams is not None:
        if chosen.name != "streams":
            parser.error("--streams is for the drill of that name")
        plan = msgspec.structs.replace(plan, streams=chosen.streams)
    scene = Scene(settings=dict(chosen.set))
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    report: Report | None = None
    try:
        report = trio.run(module.drill, scene, plan)
    except* DrillError as errors:
        print(f"relay-bench drill {chosen.name}: {leaf(errors)}", file=sys.stderr)
    if report is None:
        return _NOT_HELD
    if chosen.json:
        print(msgspec.json.encode(report).decode())
    else:
        console.print(rendered(report))
        print(closing(report))
    return _KEPT if report.is_kept else _BROKEN


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="relay-bench drill",
        description="Try a relay's promises for bad days on real processes.",
        epilog="; ".join(f"{name}: {module.__doc__.strip()}" for name, module in DRILLS.items()),
    )
    parser.add_argument("name", choices=DRILLS, metavar="NAME", help=", ".join(DRILLS))
    parser.add_argument("--quick", action="store_true", help="a small one, to see that it works")
    parser.add_argument("--streams", type=int, metavar="N", help="of the drill streams, at once (10,000)")
    parser.add_argument("--seed", type=int, default=0, help="of all that is drawn (%(default)s)")
    parser.add_argument("--minutes", type=float, help="how long soak takes (60)")
    parser.add_argument(
        "--set", action="append", default=[], type=_setting, metavar="KEY=VALUE",
        help="a setting of the relay, as its file has it; repeatable. To see kill fail: --set failover.attempts=1",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="the report as JSON")
    return parser


def _setting(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise argparse.ArgumentTypeError(f"{text!r}: wanted KEY=VALUE, as failover.attempts=1")
    return key.strip(), value.strip()
