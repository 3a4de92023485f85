"""The process that workers are forked from.

A worker must not be forked from a process that runs trio: it would share the epoll, the wake-up sockets and the signal
handlers of a loop that goes on without it. But one that dies is to be replaced while the control process runs. So
before that has any of it, it forks a helper, which does nothing but fork workers when it is told to, and say how they
ended (Chrome's zygote is the same idea). Beside a new interpreter, a fork takes milliseconds instead of half a second,
shares its memory, and needs no passing on of sockets and shared memory.
"""

from __future__ import annotations

import errno
import gc
import os
import select
import signal
import socket
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Final

import msgspec
import trio

from relay.net.notices import Priority, say

_BYTES: Final = 256
#: Signals that a terminal sends to all processes: the control process alone decides what they mean.
_IGNORED: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Forked(msgspec.Struct, frozen=True, tag=True):
    """A worker has begun."""

    slot: int
    pid: int


class NotForked(msgspec.Struct, frozen=True, tag=True):
    """A worker that was asked for does not begin."""

    slot: int


class Ended(msgspec.Struct, frozen=True, tag=True):
    """A worker has ended: its exit status, less than 0 for a signal."""

    pid: int
    status: int


#: After each `Forker.fork` comes one of the first two, after each `Forked` an `Ended`.
Event = Forked | NotForked | Ended

_decode: Final = msgspec.msgpack.Decoder(Event).decode
_encode: Final = msgspec.msgpack.Encoder().encode


class Forker:
    """The control process's handle on it. Make it before trio runs.

    `work` is a worker: it gets the number of its slot and its end of a socket pair, and answers its exit status.
    Neither it nor the helper has the sockets `not_inherited`: what a worker listens on it is told.
    """

    def __init__(
        self,
        work: Callable[[int, socket.socket], int],
        not_inherited: Iterable[socket.socket] = (),
    ) -> None:
        self._sock, helper = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # What is there now is there for good; moving it around would only unshare its pages.
        gc.collect()
        gc.freeze()
        self.pid = os.fork()
        if not self.pid:
            self._sock.close()
            for sock in not_inherited:
                sock.close()
            _leave(lambda: _serve(helper, work))
        helper.close()
        self._sock.setblocking(False)

    def __repr__(self) -> str:
        return f"<Forker pid={self.pid}>"

    def fork(self, slot: int) -> socket.socket:
        """Has a worker begin; answers the other end of its socket pair.

        Raises ConnectionError if the helper is gone, OSError if it cannot be asked now.
        """
        mine, its = socket.socketpair()
        with its:
            socket.send_fds(self._sock, [slot.to_bytes(2, "big")], [its.fileno()])
        return mine

    async def next_event(self) -> Event | None:
        """What has happened; None if the helper itself is gone."""
        while True:
            try:
                data = self._sock.recv(_BYTES)
            except BlockingIOError:
                await trio.lowlevel.wait_readable(self._sock)
                continue
            except OSError:
                return None
            return _decode(data) if data else None

    def close(self) -> None:
        """Ends the helper; comes back when it and all workers are gone."""
        self._sock.close()
        with suppress(ChildProcessError):
            os.waitpid(self.pid, 0)


def name_process(name: str) -> None:
    """What ps and top call this process; at most 15 characters (proc(5))."""
    with suppress(OSError), open("/proc/self/comm", "w") as comm:
        comm.write(name)


def _leave(work: Callable[[], int]) -> None:
    """Ends a forked process with what `work` answers, whatever happens: it must not go on as its parent would."""
    status = 1
    try:
        status = work()
    except Exception as exc:
        sys.excepthook(type(exc), exc, exc.__traceback__)
    finally:
        with suppress(OSError):
            sys.stderr.flush()
        os._exit(status)


def _serve(sock: socket.socket, work: Callable[[int, socket.socket], int]) -> int:
    """The helper: forks and reaps until the control process is gone, and the last worker after it."""
    name_process("relay forker")
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)
    woken, wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake)
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    poll.register(woken, select.POLLIN)
    while True:
        for fd, _ in poll.poll():
            if fd == woken:
                os.read(woken, _BYTES)
                _reap(sock)
                continue
            try:
                data, fds, _, _ = socket.recv_fds(sock, _BYTES, 1)
            except ConnectionResetError:  # it has not read all it was told
                data = b""
            if not data:
                return _wait_for_all()
            slot = int.from_bytes(data, "big")
            try:
                if not fds:  # there was no room for it
                    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
                pid = os.fork()
            except OSError as exc:
                say(f"relay: cannot fork a worker: {exc.strerror}; trying again", Priority.ERROR)
                for fd in fds:
                    os.close(fd)
                _tell(sock, NotForked(slot))
                continue
            if not pid:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                for inherited in (woken, wake, sock.detach()):
                    os.close(inherited)
                _leave(lambda slot=slot, fd=fds[0]: work(slot, socket.socket(fileno=fd)))  # type: ignore[misc]
            os.close(fds[0])
            _tell(sock, Forked(slot, pid))


def _wait_for_all() -> int:
    """The control process is gone, and the workers know: they end when they have drained."""
    with suppress(ChildProcessError):
        while True:
            os.wait()
    return 0


def _reap(sock: socket.socket) -> None:
    with suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                return
            _tell(sock, Ended(pid, os.waitstatus_to_exitcode(status)))


def _tell(sock: socket.socket, event: Event) -> None:
    with suppress(OSError):  # the control process is gone: the next read tells
        sock.send(_encode(event))
