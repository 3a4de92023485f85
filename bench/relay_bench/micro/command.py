"""``relay-bench micro``: the command."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

import relay
from relay_bench.crowd import MeasureError
from relay_bench.load import results
from relay_bench.micro import balance, metering, metrics, process, pure
from relay_bench.micro.table import print_table
from relay_bench.servers import StartError

if TYPE_CHECKING:
    from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """``relay-bench micro``; the exit status."""
    chosen = _parser().parse_args(argv)
    result: dict[str, Any] = {"machine": {"relay": relay.__version__, **results.environment()}}
    try:
        result |= _measured(chosen)
    except (MeasureError, StartError) as error:
        print(f"relay-bench micro: {error}", file=sys.stderr)
        return 1
    if chosen.json:
        Path(chosen.json).write_bytes(msgspec.json.format(msgspec.json.encode(result)) + b"\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="relay-bench micro", description="What a frame costs the relay: pure parts, and the running process."
    )
    parser.add_argument(
        "what", nargs="?", choices=("balance", "metering", "metrics"),
        help="instead: what picking an upstream costs; what metering costs a frame; what counting costs",
    )  # fmt: skip
    parser.add_argument("--json", metavar="FILE", help="write all figures there, too")
    parser.add_argument("--only", choices=("pure", "process"), help="one half of what a frame costs (default: both)")
    parser.add_argument("--quick", action="store_true", help="a few of each, to see that it works; no figures")
    parser.add_argument(
        "--nginx", metavar="PATH", default="nginx", help="measured beside; off: not (default: nginx, if on PATH)"
    )
    return parser


def _measured(chosen: argparse.Namespace) -> dict[str, Any]:
    """What was asked for, measured and printed. Raises `MeasureError`, `StartError`."""
    if chosen.what == "balance":
        return balance.shown(quick=chosen.quick)
    if chosen.what == "metering":
        return metering.shown(quick=chosen.quick)
    if chosen.what == "metrics":
        return metrics.shown(quick=chosen.quick)
    result: dict[str, Any] = {"frame_bytes": pure.FRAME_BYTES}
    if chosen.only != "process":
        costs = pure.measure(rounds=3, frames=2_000) if chosen.quick else pure.measure()
        result["pure"] = costs
        print_table(
            f"Pure parts, frames of {pure.FRAME_BYTES} bytes",
            ("part", "ns/frame", "bytes held/frame", "bytes at most"),
            [(cost.part, f"{cost.ns:,.0f}", f"{cost.held_bytes:.3f}", f"{cost.peak_bytes:,}") for cost in costs],
        )
    if chosen.only != "pure":
        result["process"] = process.measure(quick=chosen.quick, nginx=chosen.nginx)
        print_table("The running relay", *process.rows(result["process"]))
    return result
