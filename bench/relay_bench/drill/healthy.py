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

    async def _ask(self, number: int) -> None:
        asks = self._asks(number)
        while not self._over.is_set():
            try:
                async with await trio.open_tcp_stream(*self._address) as stream:
                    while not self._over.is_set() and await self._read(stream, next(asks)):
                        self.whole += 1
            except (OSError, trio.BrokenResourceError) as error:
                self.failures.append(str(error))

    def _asks(self, number: int) -> Iterator[bytes]:
        while True:
            yield b"".join(Ask(id=f"healthy-{number}", tokens=self._tokens).encode())

    async def _read(self, stream: trio.SocketStream, asked: bytes) -> bool:
        """One answer; whether the connection takes another request."""
        answer = Answer(Route.CHAT)
        await stream.send_all(asked)
        last_ns = 0
        while not answer.is_done:
            data = await stream.receive_some(READ_BYTES)
            now_ns = time.monotonic_ns()
            if data and last_ns:
                self._gaps_ms.append((now_ns - last_ns) / 1e6)
            last_ns = now_ns
            answer.feed(data, now_ns)
        label, detail = answer.fault(self._tokens, is_exact=True)
        if label:
            self.failures.append(f"{label} {detail}")
        return answer.may_reuse
