"""Connections that never say a word, as many as are wanted: a process of their own for each lot of them."""

from __future__ import annotations

import errno
import os
import resource
import socket
import subprocess
import sys
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final

import trio

from relay_bench.drill.report import DrillError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable

#: Connections of one process, which are also those of one source address: loopback has many of these, and a process
#: is often allowed no more than 20,000 descriptors.
_LOT: Final = 10_000
#: Connections begun in one turn, and seconds between two turns.
_TURN: Final = 500
_PAUSE_S: Final = 0.01
#: Seconds for a lot to be begun.
_PATIENCE_S: Final = 30.0


@asynccontextmanager
async def silent_connections(address: tuple[str, int], number: int) -> AsyncGenerator[Callable[[], Awaitable[None]]]:
    """Begins them, which goes on beside what is done meanwhile; gives a function that waits for the last one's begin.

    The function raises `DrillError` if they cannot be had. In the end all are closed.
    """
    processes: list[trio.Process] = []

    async def begun() -> None:
        for process in processes:
            assert process.stdout is not None
            with trio.move_on_after(_PATIENCE_S):
                if await process.stdout.receive_some():
                    continue
            raise DrillError(f"{number:,} connections could not be begun; this machine allows fewer")

    try:
        for lot, first in enumerate(range(0, number, _LOT), 1):
            words = *map(str, address), f"127.0.1.{lot}", str(min(_LOT, number - first))
            command = [sys.executable, "-m", "relay_bench.drill.silent", *words]
            pipe = subprocess.PIPE
            processes.append(await trio.lowlevel.open_process(command, stdin=pipe, stdout=pipe))
        yield begun
    finally:
        for process in processes:
            process.kill()
        with trio.CancelScope(shield=True):  # they are killed: this does not last
            for process in processes:
                await process.wait()


def hold(host: str, port: int, source: str, number: int) -> None:
    """Begins connections from one source address, says so, and keeps them until standard input ends."""
    os.nice(19)  # attackers are on other machines: theirs is not the healthy clients' CPU
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    socks = []
    for begun in range(number):
        sock = socket.socket()
        sock.setblocking(False)
        sock.bind((source, 0))
        error = sock.connect_ex((host, port))
        if error not in (0, errno.EINPROGRESS):
            raise OSError(error, os.strerror(error))
        socks.append(sock)
        if begun % _TURN == 0:
            time.sleep(_PAUSE_S)
    print("begun", flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    hold(sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
