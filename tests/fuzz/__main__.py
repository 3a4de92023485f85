"""``python -m tests.fuzz TARGET [libFuzzer options]``: see the package."""

from __future__ import annotations

import sys

import atheris

with atheris.instrument_imports(include=["relay.core"]):
    from tests.fuzz.checks import CHECKS


def main() -> None:
    """Runs until something is found, or the options say it is enough."""
    program, target, *options = sys.argv
    atheris.Setup([program, *options], CHECKS[target])
    atheris.Fuzz()


main()
