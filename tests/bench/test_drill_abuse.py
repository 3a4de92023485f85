"""The abuse drill's own judgement: a relay that says nothing, or next to nothing, keeps no promise."""

from __future__ import annotations

import itertools
import os
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import trio

from relay_bench.drill import abuse
from relay_bench.drill.healthy import Healthy
from relay_bench.drill.report import Report

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n"
TOKEN = b'data: {"choices":[{"index":0,"delta":{"content":"a"}}]}\n\n'


@pytest.fixture
def address_of(nursery: trio.Nursery) -> Callable[..., Awaitable[Any]]:
    """Starts a server of one handler; its address."""

    async def start(handler: Callable[[trio.SocketStream], Awaitable[None]]) -> Any:
        listeners = await nursery.start(partial(trio.serve_tcp, handler, 0, host="127.0.0.1"))
        return listeners[0].socket.getsockname()

    return start


async def test_silence_is_no_answer(
    address_of: Callable[..., Awaitable[Any]], autojump_clock: trio.testing.MockClock
) -> None:
    async def say_nothing(stream: trio.SocketStream) -> None:
        async for _ in stream:
            pass

    report = Report("abuse")
    address = await address_of(say_nothing)
    relay: Any = SimpleNamespace(address=address, process=SimpleNamespace(pid=os.getpid()))
    site = abuse.Site(report, relay, Healthy(address, 1), abuse.QUICK)
    await abuse._bombs(site, "bombs", itertools.cycle([b"x"]), {b"431"}, 0, "nothing")
    assert "bombs: told 431" in report.broken
    assert any("told silence" in promise.seen for promise in report.promises)


async def test_one_gap_is_enough_to_know_it(
    address_of: Callable[..., Awaitable[Any]], nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    """A relay that freezes leaves few gaps to judge by."""

    async def freeze(stream: trio.SocketStream) -> None:
        await stream.receive_some()
        await stream.send_all(HEAD + TOKEN)
        await trio.sleep(1)
        await stream.send_all(TOKEN)
        await trio.sleep_forever()

    healthy = Healthy(await address_of(freeze), 5)
    nursery.start_soon(healthy.run, 1)
    assert await healthy.p99_ms(100) > 0
    assert await healthy.p99_ms(100) == 0
