"""A socket under the pump: what is known of it, and how a task, or a fiber in one, waits for it.

It is under the pump for as long as it is open, and is reported once for each arrival (EPOLLET), so neither a request
nor a frame costs an `epoll_ctl`. In turn whoever reads must read until a read comes back short, or remember that there
is more (`Source.took`). What arrives while nobody waits is remembered as well: at an idle engine's connection that is
its end, or bytes nobody asked for.
"""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Final

import outcome
import trio

from relay.net.fiber import AWAKE, Fiber, current

if TYPE_CHECKING:
    from relay.net.pair import Pair
    from relay.net.pump import Pump
    from relay.net.tls import TlsSocket

#: What is reported of a socket; writing only where it is waited for (`Source.wait_writable`).
ARRIVALS: Final = select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLET
#: Behind these there is an end or an error to be read, of which nothing more is said.
ENDS: Final = select.EPOLLRDHUP | select.EPOLLHUP | select.EPOLLERR


class Source:
    """A socket under the pump, until `close`."""

    __slots__ = (
        "_pump", "_waiter", "fileno", "has_news", "is_ending", "limit_at_ns", "of_client", "sock", "streams",
    )  # fmt: skip

    #: Whether the peer may say that it goes before it does, in what arrives: see `TlsSource`.
    says_goodbye = False

    def __init__(self, pump: Pump, sock: socket.socket) -> None:
        self._pump = pump
        self._waiter: Fiber | trio.lowlevel.Task | None = None
        self.sock = sock
        self.fileno = sock.fileno()
        self.has_news = False  #: there may be something to read, which will not be reported again
        self.is_ending = False  #: the peer has closed its side, or the connection broke: there is an end to be read
        self.limit_at_ns = 0  #: when the present wait ends at the latest; 0: no limit
        self.streams: Pair | None = None  #: whose engine it is, while the pump reads from it
        self.of_client: Pair | None = None  #: whose client it is, while there is an exchange

    def __repr__(self) -> str:
        return f"<Source {self.fileno}{' news' if self.has_news else ''}{' waited for' if self._waiter else ''}>"

    def took(self, size: int, asked: int) -> None:
        """A read of `asked` bytes brought `size`: a short one has emptied the socket, up to what is reported later."""
        self.has_news = size == asked or self.is_ending

    def wait_readable(self, limit_at_ns: int = 0) -> Awaitable[None]:
        """Sleeps until something has come; with news, for one turn of the others. To be awaited at once.

        Raises trio.TooSlowError past `limit_at_ns` of the monotonic clock (0: none), as the pump's sweep finds it: a
        deadline of trio's for each wait would cost more than the wait.
        """
        if limit_at_ns and time.monotonic_ns() > limit_at_ns:  # something comes each time before the sweep does
            raise trio.TooSlowError
        return trio.lowlevel.checkpoint() if self.has_news else self.park(limit_at_ns)  # noqa: ASYNC105 - the caller's

    async def wait_writable(self, limit_at_ns: int = 0) -> None:
        """Sleeps until it can be written to, or something has come; else as `wait_readable`."""
        if limit_at_ns and time.monotonic_ns() > limit_at_ns:  # as there
            raise trio.TooSlowError
        self._pump.epoll.modify(self.fileno, ARRIVALS | select.EPOLLOUT)  # reports anew what there is already
        try:
            await self.park(limit_at_ns)
        finally:
            self._pump.epoll.modify(self.fileno, ARRIVALS)

    def report_anew(self) -> None:
        """Has what there is to read reported as if it came now."""
        self._pump.epoll.modify(self.fileno, ARRIVALS)

    def park(self, limit_at_ns: int = 0) -> Awaitable[None]:
        """Sleeps until woken, or until its limit: trio.TooSlowError. To be awaited at once."""
        if limit_at_ns:
            self._pump.limit(self, limit_at_ns)
        fiber = current.fiber
        if fiber is not None:
            self._waiter = fiber
            return fiber.sleep(self)
        self._waiter = trio.lowlevel.current_task()
        return trio.lowlevel.wait_task_rescheduled(self._abort)  # noqa: ASYNC105 - the caller's

    def _abort(self, _raise_cancel: Callable[[], None]) -> trio.lowlevel.Abort:
        self.forget_waiter()
        return trio.lowlevel.Abort.SUCCEEDED

    def forget_waiter(self) -> None:
        """Nobody waits for it any longer."""
        self._waiter = None
        self._pump.limited.discard(self)
        self.streams = None  # the pump may have a turn before the task does

    def wake(self, error: Exception | None = None) -> None:
        """Ends the wait of who waits for it, if anybody does; with `error`, if there is one."""
        waiter, self._waiter = self._waiter, None
        self._pump.limited.discard(self)
        if isinstance(waiter, Fiber):
            waiter.woken()
            self._pump.woken.append((waiter, error))
        elif waiter is not None:
            trio.lowlevel.reschedule(waiter, AWAKE if error is None else outcome.Error(error))

    def close(self) -> None:
        """Closes the socket, which takes it out of the pump."""
        self._pump.forget(self)
        self.sock.close()


class TlsSource(Source):
    """A `TlsSocket` under the pump: OpenSSL may have what the kernel no longer reports."""

    __slots__ = ()

    says_goodbye = True
    sock: TlsSocket

    def took(self, size: int, asked: int) -> None:
        """As for any other."""
        self.has_news = self.is_ending or self.sock.has_more

    def report_anew(self) -> None:
        """Has something reported, be it only that there is room to write."""
        self._pump.epoll.modify(self.fileno, ARRIVALS | select.EPOLLOUT)
