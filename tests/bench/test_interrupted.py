"""A verb that is told to end leaves no process behind."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from relay_bench.processes import family

LIMIT_S = 20.0


def wait_for(is_so: Callable[[], bool]) -> None:
    end = time.monotonic() + LIMIT_S
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_engines_and_relay_end_with_a_drill(number: signal.Signals) -> None:
    command = [sys.executable, "-m", "relay_bench", "drill", "rolling"]
    # As a shell without job control starts what it has in the background: with SIGINT ignored.
    was = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        drill = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    finally:
        signal.signal(signal.SIGINT, was)
    with drill:
        wait_for(lambda: len(family(drill.pid)) > 3)
        started = family(drill.pid)[1:]
        drill.send_signal(number)
        _, said = drill.communicate(timeout=LIMIT_S)
        assert (drill.returncode, said.splitlines()[-1]) == (130, "relay-bench drill: interrupted")
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in started))
