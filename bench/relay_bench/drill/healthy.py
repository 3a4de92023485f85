"""Healthy clients beside an attack: streams one after the other, and the gaps between what they receive."""

from __future__ import annotations

import time
from array import array
from typing import TYPE_CHECKING

import trio

from relay.core.request import Route
from relay_bench.drill.client import READ_BYTES, Ask
from relay_bench.load.answer import Answer
from relay_bench.load.stats import percentile

if TYPE_CHECKING:
    from collections.abc import Iterator


class Healthy:
    """Clients that behave. `run` in a nursery."""

    def __init__(self, address: tuple[str, int], tokens: int) -> None:
        self._address = address
        self._tokens = tokens
        self._gaps_ms = array("d")
        self._since: dict[int, float] = {}  # of those that wait, by number: when they began to (trio's clock)
        self._largest_ms = 0.0  # of the waits that have ended since `largest_ms` was asked for
        self.whole = 0
        self.failures: list[str] = []
        self._over = trio.Event()

    def __repr__(self) -> str:
        return f"<Healthy {self.whole} whole, {len(self.failures)} failed>"

    def stop(self) -> None:
        """Each leaves when it has its answer."""
        self._over.set()

    async def run(self, clients: int) -> None:
        """So many clients, until told to stop. A connection each, kept throughout."""
        async with trio.open_nursery() as nursery:
            for number in range(clients):
                nursery.start_soon(self._ask, number)

    async def p99_ms(self, seconds: float) -> float:
        """Of the gaps that end in the coming seconds; 0: there was none."""
        before = len(self._gaps_ms)
        await trio.sleep(seconds)
        gaps_ms = sorted(self._gaps_ms[before:])
        return percentile(gaps_ms, 0.99) if gaps_ms else 0.0

    def largest_ms(self) -> float:
        """The longest wait since it was asked for last: in a stream, before its first bytes, or not over yet."""
        now, largest_ms = trio.current_time(), self._largest_ms
        self._largest_ms = 0.0
        return max([largest_ms, *((now - since) * 1e3 for since in self._since.values())])

    async def _ask(self, number: int) -> None:
        asks = self._asks(number)
        while not self._over.is_set():
            try:
                async with await trio.open_tcp_stream(*self._address) as stream:
                    while not self._over.is_set() and await self._read(stream, number, next(asks)):
                        self.whole += 1
            except (OSError, trio.BrokenResourceError) as error:
                self.failures.append(str(error))

    def _asks(self, number: int) -> Iterator[bytes]:
        while True:
            yield b"".join(Ask(id=f"healthy-{number}", tokens=self._tokens).encode())

    async def _read(self, stream: trio.SocketStream, number: int, asked: bytes) -> bool:
        """One answer; whether the connection takes another request."""
        answer = Answer(Route.CHAT)
        begun = False
        self._since[number] = trio.current_time()
        try:
            await stream.send_all(asked)
            while not answer.is_done:
                data = await stream.receive_some(READ_BYTES)
                now = trio.current_time()
                waited_ms = (now - self._since[number]) * 1e3
                self._largest_ms = max(self._largest_ms, waited_ms)
                if data and begun:
                    self._gaps_ms.append(waited_ms)
                begun = True
                self._since[number] = now
                answer.feed(data, time.monotonic_ns())
        finally:
            del self._since[number]
        label, detail = answer.fault(self._tokens, is_exact=True)
        if label:
            self.failures.append(f"{label} {detail}")
        return answer.may_reuse
