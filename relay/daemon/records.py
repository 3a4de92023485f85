"""The records' way out: one line per exchange on standard output, which must never hold up a stream.

Standard output may be a pipe nobody reads, a terminal on hold, or the journal's socket. Lines go through a bounded
buffer, written without blocking; what does not fit, or cannot be written, is dropped and counted. Standard output's own
file description is shared with whoever started the relay, so it is not switched to non-blocking: it is opened again
where that is possible (pipe, terminal), or written with MSG_DONTWAIT (socket). A regular file is simply written.
"""

from __future__ import annotations

import os
import select
import socket
import stat
import time
from collections import deque
from collections.abc import Callable
from typing import Final

import trio

from relay.net.notices import Priority, say

#: Bytes of lines waiting to be written; a stalled reader costs this much memory.
MAX_WAITING_BYTES: Final = 4_194_304
#: Joined into one write at most: PIPE_BUF (pipe(7)). Workers share standard output, and only such writes are not torn.
#: On a stream socket of the journal it is one buffer, so neither is it there.
_WRITE_BYTES: Final = select.PIPE_BUF
#: How long the last lines may take at the end of the process.
FLUSH_S: Final = 1.0
#: Seconds between two complaints that lines cannot be written.
COMPLAINT_S: Final = 60.0


class RecordWriter:
    """Takes lines at any time; `run` writes them."""

    def __init__(self, fileno: int) -> None:
        self.on_drop: Callable[[int], None] = lambda number: None  #: told of lines that are lost
        self._lines: deque[bytes] = deque()
        self._waiting_bytes = 0
        self._writing = b""  # taken from the lines, and not yet written: survives a cancelled wait
        self._is_torn = False  # a line was written in part, and its rest is lost unless it is still in `_writing`
        self._complained_at = float("-inf")
        self._wake = trio.Event()
        self._fileno, self._write, self._can_wait = _open_write(fileno)

    def __repr__(self) -> str:
        return f"<RecordWriter waiting={self._waiting_bytes}>"

    def put(self, line: bytes) -> None:
        """Queues one line, which ends in a newline."""
        if self._waiting_bytes + len(line) > MAX_WAITING_BYTES:
            self.on_drop(1)
            return
        self._lines.append(line)
        self._waiting_bytes += len(line)
        self._wake.set()

    async def run(self) -> None:
        """Writes lines as they come; when cancelled, first what is waiting, within `FLUSH_S`."""
        try:
            while True:
                await self._wake.wait()
                self._wake = trio.Event()
                await self._drain()
        finally:
            with trio.move_on_after(FLUSH_S, shield=True):
                await self._drain()

    async def _drain(self) -> None:
        while self._writing or self._lines:
            self._writing = self._writing or self._take()
            is_full = False
            try:
                written = self._write(self._writing)
                self._is_torn = self._writing[written - 1 : written] != b"\n"
                self._writing = self._writing[written:]
            except BlockingIOError:
                is_full = True
            except OSError as exc:  # the reader is gone, or the disk full
                self._complain(exc)
                self.on_drop(self._writing.count(b"\n") - self._writing.startswith(b"\n"))
                self._writing = b""
            if is_full:
                if not self._can_wait:
                    return
                await trio.lowlevel.wait_writable(self._fileno)

    def _complain(self, exc: OSError) -> None:
        """One line a minute, however often it happens. The metric counts them, and those of a slow reader, too."""
        now = time.monotonic()
        if now - self._complained_at >= COMPLAINT_S:
            self._complained_at = now
            say(f"relay: cannot write records to standard output: {exc.strerror}; dropping them", Priority.WARNING)

    def _take(self) -> bytes:
        """The next lines, as many as one write takes; behind half a line they begin a new one."""
        taken = [self._lines.popleft()]
        size = len(taken[0])
        while self._lines and size + len(self._lines[0]) <= _WRITE_BYTES:
            taken.append(self._lines.popleft())
            size += len(taken[-1])
        self._waiting_bytes -= size
        return b"\n" * self._is_torn + b"".join(taken)


def _open_write(fileno: int) -> tuple[int, Callable[[bytes], int], bool]:
    """A descriptor for non-blocking writes, how to write to it, and whether its readiness can be waited for."""
    mode = os.fstat(fileno).st_mode
    if stat.S_ISSOCK(mode):
        sock = socket.socket(fileno=os.dup(fileno))
        return sock.fileno(), lambda data: sock.send(data, socket.MSG_DONTWAIT), True
    if stat.S_ISREG(mode):
        return fileno, lambda data: os.write(fileno, data), False
    try:
        own = os.open(f"/proc/self/fd/{fileno}", os.O_WRONLY | os.O_NONBLOCK)
    except OSError:
        # Not ours to open (a terminal after su): written as it is, blocking.
        return fileno, lambda data: os.write(fileno, data), False
    is_null = stat.S_ISCHR(mode) and not os.isatty(fileno)
    return own, lambda data: os.write(own, data), not is_null
