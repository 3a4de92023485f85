"""``relay-bench``: the command line of the harness. Each verb's module is imported when it is used."""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

#: Verbs, the module whose ``main`` reads their arguments, and what they do.
VERBS: Final = {
    "engine": ("relay_bench.engine.command", "the built-in engine: a paced stand-in for vLLM, with faults on request"),
    "load": ("relay_bench.load.command", "load any OpenAI-compatible server, and time every frame of its answers"),
    "compare": ("relay_bench.compare", "the same requests direct and through proxies, paired"),
    "sweep": ("relay_bench.sweep", "load over rates or concurrencies: the knee, or the highest that meets --goodput"),
    "doctor": ("relay_bench.doctor.command", "is this path fit for streaming? names what is not, and what mends it"),
    "report": ("relay_bench.report.command", "result files as one self-contained HTML page"),
    "drill": ("relay_bench.drill.command", "a relay's promises for bad days, tried: kill, hangups, soak and others"),
    "micro": ("relay_bench.micro.command", "micro-benchmarks of the relay's pure parts"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb; the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="relay-bench", description="Measure and test relays of token streams.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for verb, (_, purpose) in VERBS.items():
        verbs.add_parser(verb, help=purpose, add_help=False)
    if not arguments or arguments[0] not in VERBS:
        parser.parse_args(arguments)  # prints help or what is wrong, and exits
    verb, *rest = arguments
    module = importlib.import_module(VERBS[verb][0])
    if argv is None:
        _end_in_order()
    try:
        status = int(module.main(rest) or 0)
        sys.stdout.flush()
    except BrokenPipeError:  # standard output's reader has left, as `head` does; nothing more is to be flushed to it
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 128 + signal.SIGPIPE  # as the shell reports a process ended by it
    except (KeyboardInterrupt, BaseExceptionGroup) as error:
        if isinstance(error, BaseExceptionGroup) and error.split(KeyboardInterrupt)[1] is not None:
            raise  # something else went wrong, too
        print(f"relay-bench {verb}: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    return status


def _end_in_order() -> None:
    """Has SIGTERM end a verb as SIGINT does, also where the shell has that ignored: no process is to stay behind."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
