"""``relay-bench``: the command line of the harness. Each verb's module is imported when it is used."""

from __future__ import annotations

import argparse
import importlib
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb; the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="relay-bench", description="Measure and test relays of token streams.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    engine = verbs.add_parser("engine", help="the built-in engine: a paced stand-in for vLLM, with faults on request")
    verbs.add_parser("micro", help="micro-benchmarks of the relay's pure parts", add_help=False)
    if arguments[:1] == ["micro"]:  # reads its own arguments
        return _micro(arguments[1:])

    from relay_bench.engine import command

    command.add_arguments(engine)
    return command.run(parser.parse_args(arguments))


def _micro(arguments: list[str]) -> int:
    try:
        micro = importlib.import_module("relay_bench.micro")
    except ModuleNotFoundError as error:
        print(f"relay-bench micro: not part of this installation ({error.name} is missing)", file=sys.stderr)
        return 2
    return int(micro.main(arguments) or 0)
