"""Thousands of requests under way in one task: its own epoll, nested in trio's, and an alarm for the next one due.

A task per request would cost a turn of trio's scheduler per frame, more than everything else the client does with it,
and would show up in the very figures it is there to take. So requests are state machines here. One turn serves what is
ready, in the order the kernel has it, and between any two events looks whether a request has become due.
"""

from __future__ import annotations

import errno
import select
import ssl
import time
from typing import TYPE_CHECKING, Final

import trio

from relay_bench.load import transport
from relay_bench.load.answer import Answer
from relay_bench.load.timer import Alarm

if TYPE_CHECKING:
    from collections.abc import Callable

    from relay_bench.load.stats import Histogram
    from relay_bench.load.target import Target
    from relay_bench.load.transport import Transport

_IN: Final = select.EPOLLIN | select.EPOLLRDHUP
_OUT: Final = select.EPOLLOUT
#: Events of a turn.
_EVENTS: Final = 64
#: How often requests that take too long are looked for.
_SWEEP_NS: Final = 250_000_000


class Exchange:
    """One request on its way. Marks are absolute ns, 0 where it has not got there."""

    __slots__ = (
        "answer", "connected_ns", "done_ns", "due_ns", "expected", "index", "is_reused", "out", "planned_ns",
        "request", "sent_ns", "transport", "written_ns",
    )  # fmt: skip

    def __init__(self, index: int, request: bytes, answer: Answer, planned_ns: int, due_ns: int) -> None:
        self.index = index
        self.request = request
        self.answer = answer
        self.planned_ns = planned_ns
        self.due_ns = due_ns
        self.expected: int | None = None  #: tokens asked for
        self.sent_ns = 0
        self.connected_ns = 0
        self.written_ns = 0
        self.done_ns = 0
        self.is_reused = False
        self.transport: Transport | None = None
        self.out = memoryview(request)  # what is still to be sent

    def __repr__(self) -> str:
        return f"<Exchange {self.index} {self.answer!r}>"


class Client:
    """Sends exchanges to one server and reads their answers.

    `on_done` is called with each exchange that has ended, synchronously. `client_delay`, if given, counts each read's
    delay behind the kernel's stamp.
    """

    def __init__(
        self,
        target: Target,
        on_done: Callable[[Exchange], None],
        *,
        timeout_s: float = 600.0,
        keep_alive: bool = True,
        tls: ssl.SSLContext | None = None,
        client_delay: Histogram | None = None,
    ) -> None:
        self.retried = 0
        self.reads = 0
        self._target = target
        self._on_done = on_done
        self._timeout_ns = int(timeout_s * 1e9)
        self._keep_alive = keep_alive
        self._tls = tls
        self._client_delay = client_delay
        self._active: dict[int, Exchange] = {}  # by descriptor, oldest first
        self._idle: dict[int, Transport] = {}  # by descriptor, the one used last at the end
        self._stamps = transport.stamps_held()
        self._alarm = Alarm()
        self._epoll = select.epoll()
        self._epoll.register(self._alarm.fileno(), select.EPOLLIN)
        self._next_sweep_ns = time.monotonic_ns() + _SWEEP_NS
        self._wake_ns = 0

    def __repr__(self) -> str:
        return f"<Client {self._target.url} active={len(self._active)} idle={len(self._idle)}>"

    def close(self) -> None:
        """Hangs up on everything; what is in flight is forgotten."""
        for transport_ in (*(exchange.transport for exchange in self._active.values()), *self._idle.values()):
            if transport_ is not None:
                transport_.close()
        self._active.clear()
        self._idle.clear()
        self._epoll.close()
        self._alarm.close()
        self._stamps.close()

    # -- turns

    async def turn(self, wake_ns: int, on_due: Callable[[int], int], *, block_s: float = 0.0) -> None:
        """Waits for something to happen, at most until `wake_ns` (0: no such limit), and sees to it.

        `on_due` is called with the time whenever the instant last named has passed, and names the next (0: none). It
        may `start` exchanges. For `block_s` the wait keeps trio itself waiting: a process that does nothing else
        saves the scheduler's part.
        """
        self._alarm.set(min(wake_ns, self._next_sweep_ns) if wake_ns else self._next_sweep_ns)
        events = self._epoll.poll(block_s, _EVENTS)
        if not events:
            await trio.lowlevel.wait_readable(self._epoll.fileno())
            events = self._epoll.poll(0, _EVENTS)
        else:
            await trio.lowlevel.checkpoint()
        alarm = self._alarm.fileno()
        now_ns = time.monotonic_ns()
        self._wake_ns = wake_ns
        for fileno, mask in events:
            if self._wake_ns and now_ns >= self._wake_ns:
                self._wake_ns = on_due(now_ns)
            if fileno == alarm:
                self._alarm.take()
                now_ns = time.monotonic_ns()
            else:
                now_ns = self._serve(fileno, mask)
        if self._wake_ns and now_ns >= self._wake_ns:
            on_due(now_ns)
        if now_ns >= self._next_sweep_ns:
            self._sweep(now_ns)

    def wake(self) -> None:
        """Has `on_due` called before the next event: a request has become due out of turn."""
        self._wake_ns = 1

    def _sweep(self, now_ns: int) -> None:
        self._next_sweep_ns = now_ns + _SWEEP_NS
        limit_ns = now_ns - self._timeout_ns
        for exchange in tuple(self._active.values()):
            if exchange.sent_ns > limit_ns:
                return
            self._fail(exchange, "timeout", f"after {self._timeout_ns / 1e9:g} s")

    # -- requests

    def start(self, exchange: Exchange, now_ns: int) -> None:
        """Sends a request, on a kept connection or a new one. May call `on_done` before it returns."""
        exchange.sent_ns = now_ns
        if self._idle:
            _, kept = self._idle.popitem()
            exchange.is_reused = True
            exchange.connected_ns = now_ns
            self._take_up(exchange, kept)
            self._send(exchange, kept)
        else:
            self._dial(exchange)

    def _dial(self, exchange: Exchange) -> None:
        try:
            new = transport.connect(self._target, self._tls)
        except OSError as error:
            exchange.answer.break_off("connect", error.strerror or str(error))
            self._finish(exchange)
            return
        self._take_up(exchange, new)
        if new.is_connected:
            exchange.connected_ns = time.monotonic_ns()
            self._epoll.register(new.fileno(), _IN)
            self._send(exchange, new)
        else:
            self._epoll.register(new.fileno(), _OUT)

    def _take_up(self, exchange: Exchange, taken: Transport) -> None:
        exchange.transport = taken
        taken.requests += 1
        self._active[taken.fileno()] = exchange

    def _send(self, exchange: Exchange, over: Transport) -> None:
        try:
            exchange.out = exchange.out[over.send(exchange.out) :]
        except BlockingIOError:
            pass
        except OSError as error:
            if not self._retry(exchange):
                self._fail(exchange, "reset", f"while sending: {error.strerror}")
            return
        if exchange.out:
            self._epoll.modify(over.fileno(), _IN | _OUT)
        else:
            exchange.written_ns = time.monotonic_ns()

    def _retry(self, exchange: Exchange) -> bool:
        """Sends a request again if the server has closed its kept connection just before: nobody's failure."""
        if not exchange.is_reused or exchange.answer.bytes_in:
            return False
        self.retried += 1
        self._let_go(exchange)
        exchange.is_reused = False
        exchange.out = memoryview(exchange.request)
        self._dial(exchange)
        return True

    # -- events

    def _serve(self, fileno: int, mask: int) -> int:
        """One event; the time as of its end."""
        exchange = self._active.get(fileno)
        if exchange is None:
            if (kept := self._idle.pop(fileno, None)) is not None:  # closed, or bytes that nobody asked for
                kept.close()
            return time.monotonic_ns()
        over = exchange.transport
        assert over is not None
        if not over.is_connected:
            self._connect(exchange, over)
            return time.monotonic_ns()
        if mask & _OUT:
            self._epoll.modify(fileno, _IN)
            self._send(exchange, over)
            if exchange.transport is not over:
                return time.monotonic_ns()
        if mask & ~_OUT:
            return self._receive(exchange, over)
        return time.monotonic_ns()

    def _connect(self, exchange: Exchange, over: Transport) -> None:
        try:
            over.finish_connect()
        except BlockingIOError:
            self._epoll.modify(over.fileno(), _IN)
            return
        except ssl.SSLError as error:
            self._fail(exchange, "tls", str(error))
            return
        except OSError as error:
            self._fail(exchange, "connect", error.strerror or str(error))
            return
        exchange.connected_ns = time.monotonic_ns()
        self._epoll.modify(over.fileno(), _IN)
        self._send(exchange, over)

    def _receive(self, exchange: Exchange, over: Transport) -> int:
        answer = exchange.answer
        now_ns = 0
        while True:
            try:
                data = over.receive()
                now_ns = time.monotonic_ns()
            except BlockingIOError:
                return now_ns or time.monotonic_ns()
            except OSError as error:
                if not self._retry(exchange):
                    name = errno.errorcode.get(error.errno or 0, type(error).__name__)
                    self._fail(exchange, "reset", name)
                return time.monotonic_ns()
            self.reads += 1
            if self._client_delay is not None and over.delay_ns >= 0:
                self._client_delay.add(over.delay_ns)
            if not data and self._retry(exchange):
                return now_ns
            answer.feed(data, now_ns)
            if answer.is_done:
                exchange.done_ns = now_ns
                self._finish(exchange)
                return now_ns
            if not over.has_more:
                return now_ns

    # -- ends

    def _fail(self, exchange: Exchange, label: str, detail: str) -> None:
        exchange.answer.break_off(label, detail)
        self._finish(exchange)

    def _finish(self, exchange: Exchange) -> None:
        exchange.done_ns = exchange.done_ns or time.monotonic_ns()
        over = exchange.transport
        if over is not None:
            if self._keep_alive and exchange.answer.may_reuse and not exchange.out:
                del self._active[over.fileno()]
                exchange.transport = None
                self._idle[over.fileno()] = over
            else:
                self._let_go(exchange)
        self._on_done(exchange)

    def _let_go(self, exchange: Exchange) -> None:
        over = exchange.transport
        assert over is not None
        del self._active[over.fileno()]
        exchange.transport = None
        over.close()
