"""Connections that never say a word, as many as are wanted: a process of their own for each lot of them."""

from __future__ import annotations

import errno
import os
import resource
import select
import socket
import subprocess
import sys
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final

import msgspec
import trio

from relay_bench.drill.attackers import Lines
from relay_bench.drill.report import DrillError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

#: Connections of one process, which are also those of one source address: loopback has many of these, and a process
#: is often allowed no more than 20,000 descriptors.
_LOT: Final = 10_000
#: Connections begun in one turn, and seconds until the next, unless one is closed meanwhile.
_TURN: Final = 500
_PAUSE_S: Final = 0.01
#: Of those that are wanted, the share that may come again in a second. More would only fill the kernel's queue, and in
#: front of that it is chance who gets in.
_AGAIN: Final = 0.04
#: Seconds for a lot to be begun, and for a process to say how its own fared.
_PATIENCE_S: Final = 30.0


class Fared(msgspec.Struct):
    """What became of silent connections."""

    begun: int = 0
    left: int = 0  #: closed by the other side, as it should be done; each has been begun again
    broken: dict[str, int] = {}  #: refused, reset, and so on, by what the kernel says

    def add(self, other: Fared) -> None:
        """Takes in those of another process."""
        self.begun += other.begun
        self.left += other.left
        for error, number in other.broken.items():
            self.broken[error] = self.broken.get(error, 0) + number


class SilentCrowd:
    """Silent connections. Wait until they are `begun`; at last see how they `fared`."""

    def __init__(self, number: int) -> None:
        self.number = number
        self._processes: list[trio.Process] = []
        self._lines: list[Lines] = []

    def __repr__(self) -> str:
        return f"<SilentCrowd {self.number:,} in {len(self._processes)} processes>"

    async def start(self, *words: str) -> None:
        """Starts another process, for connections of its own."""
        command = [sys.executable, "-m", "relay_bench.drill.silent", *words]
        process = await trio.lowlevel.open_process(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert process.stdout is not None
        self._processes.append(process)
        self._lines.append(Lines(process.stdout))

    async def begun(self) -> None:
        """Waits for the last one's begin. Raises `DrillError` if they cannot be had."""
        for lines in self._lines:
            if not await _next(lines):
                raise DrillError(f"{self.number:,} connections could not be begun; this machine allows fewer")

    async def fared(self) -> Fared:
        """What has become of them, up to now; no more begin. Raises `DrillError`."""
        fared = Fared()
        for process in self._processes:
            assert process.stdin is not None
            await process.stdin.aclose()
        for lines in self._lines:
            if not (line := await _next(lines)):
                raise DrillError("a process of silent connections has not said how they fared")
            fared.add(msgspec.json.decode(line, type=Fared))
        return fared

    def kill(self) -> None:
        """Closes all."""
        for process in self._processes:
            process.kill()

    async def ended(self) -> None:
        """Waits for the processes."""
        for process in self._processes:
            await process.wait()


@asynccontextmanager
async def silent_connections(address: tuple[str, int], number: int, niceness: int) -> AsyncGenerator[SilentCrowd]:
    """Begins them, which goes on beside what is done meanwhile, with so much less priority. In the end all are closed.

    One that is closed before is begun again.
    """
    crowd = SilentCrowd(number)
    try:
        for lot, first in enumerate(range(0, number, _LOT), 1):
            await crowd.start(*map(str, address), f"127.0.1.{lot}", str(min(_LOT, number - first)), str(niceness))
        yield crowd
    finally:
        crowd.kill()
        with trio.CancelScope(shield=True):  # they are killed: this does not last
            await crowd.ended()


async def _next(lines: Lines) -> bytes:
    """The next of them; empty: there is none."""
    with trio.move_on_after(_PATIENCE_S):
        return await lines.next()
    return b""


def hold(host: str, port: int, source: str, number: int) -> Fared:
    """Holds connections from one source address until standard input ends, and says when all have been begun."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    held: dict[int, socket.socket] = {}
    fared = Fared()
    since = time.monotonic()
    with select.epoll() as epoll:
        epoll.register(sys.stdin, select.EPOLLIN)
        while True:
            allowed = number + int(_AGAIN * number * (time.monotonic() - since))
            for _ in range(min(_TURN, number - len(held), allowed - fared.begun)):
                sock = _begin(host, port, source)
                held[sock.fileno()] = sock
                fared.begun += 1
                epoll.register(sock, select.EPOLLRDHUP)
                if fared.begun == number:
                    print("begun", flush=True)
            for fd, _ in epoll.poll(_PAUSE_S):
                if fd == sys.stdin.fileno():
                    return fared
                with held.pop(fd) as sock:
                    if error := sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                        name = os.strerror(error)
                        fared.broken[name] = fared.broken.get(name, 0) + 1
                    else:
                        fared.left += 1


def _begin(host: str, port: int, source: str) -> socket.socket:
    sock = socket.socket()
    sock.setblocking(False)
    sock.bind((source, 0))
    error = sock.connect_ex((host, port))
    if error not in (0, errno.EINPROGRESS):
        raise OSError(error, os.strerror(error))
    return sock


if __name__ == "__main__":
    os.nice(int(sys.argv[5]))
    print(msgspec.json.encode(hold(sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4]))).decode(), flush=True)
