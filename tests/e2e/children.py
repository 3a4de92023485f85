"""Relay and engine as processes of their own, for tests that need the real thing, or its limits to be theirs alone."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Final

#: A Python start-up on a loaded machine; also the longest a test waits for a line or an end.
START_S: Final = 15.0


class Child:
    """A process that says on standard error where it listens."""

    def __init__(self, process: subprocess.Popen[bytes], stdout: Path) -> None:
        self.process = process
        self._stdout = stdout
        line = self.line()
        assert " listening on " in line, line + self.rest()
        self.address = line.rpartition(" listening on ")[2].strip()  #: ``http://…`` or ``unix:/…``

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])

    @property
    def pid(self) -> int:
        return self.process.pid

    def line(self) -> str:
        """The next line of its standard error; empty at the end."""
        assert self.process.stderr is not None
        watchdog = threading.Timer(START_S, self.process.kill)
        watchdog.start()
        try:
            return self.process.stderr.readline().decode()
        finally:
            watchdog.cancel()

    def rest(self) -> str:
        """All that it says on standard error from here to its end, which is waited for."""
        return self.process.communicate(timeout=START_S)[1].decode()

    def stop(self) -> str:
        """Has it end in order; answers the `rest`."""
        self.process.send_signal(signal.SIGTERM)
        rest = self.rest()
        assert self.process.returncode == 0, rest
        return rest

    def records(self) -> list[dict[str, Any]]:
        """A stopped relay's records."""
        return [json.loads(line) for line in self._stdout.read_text().splitlines()]


@contextmanager
def child(directory: Path, module: str, *arguments: str) -> Iterator[Child]:
    """``python -m module arguments``; killed at the latest when the block is left."""
    stdout = directory / f"{module}.out"
    with stdout.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments], stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.PIPE
        )
    with process:
        try:
            yield Child(process, stdout)
        finally:
            process.kill()


def relay_child(directory: Path, upstream: str, *flags: str, listen: str) -> AbstractContextManager[Child]:
    """A relay of one worker before one engine, which it does not probe; its admin side is ``admin`` in `directory`."""
    config = directory / "relay.toml"
    config.write_text("[health]\ninterval_s = 0.0\n")
    where = ("--listen", listen, "--admin", f"unix:{directory}/admin", "--upstream", upstream, "--workers", "1")
    return child(directory, "relay", "serve", "--config", str(config), *where, *flags)
