"""How a task waits for a socket under the pump: a limit that is over ends the wait, whatever the socket has."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator

import pytest
import trio
import trio.testing

from relay.net.pump import Pump
from relay.net.source import ARRIVALS, Source


@pytest.fixture
def ends() -> Iterator[tuple[Pump, Source, socket.socket]]:
    near, far = socket.socketpair()
    near.setblocking(False)
    pump = Pump()
    source = pump.add(near)
    with far:
        yield pump, source, far
        source.close()
    pump.epoll.close()


async def test_reading_ends_past_its_limit_also_where_something_has_come(
    ends: tuple[Pump, Source, socket.socket],
) -> None:
    pump, source, far = ends
    far.send(b"x")
    pump.turn(0)
    assert source.has_news
    with pytest.raises(trio.TooSlowError):
        await source.wait_readable(time.monotonic_ns() - 1)


async def test_writing_ends_past_its_limit_also_where_there_is_room(ends: tuple[Pump, Source, socket.socket]) -> None:
    """A peer that takes a little each time ends each wait before the sweep comes."""
    pump, source, _ = ends
    with trio.move_on_after(1) as patience, pytest.raises(trio.TooSlowError):
        await source.wait_writable(time.monotonic_ns() - 1)
    assert not patience.cancelled_caught
    pump.epoll.modify(source.fileno, ARRIVALS)  # reports anew what is watched for
    assert not pump.epoll.poll(0)  # and that is no longer room to write


async def test_a_wait_that_the_sweep_ends_is_over(ends: tuple[Pump, Source, socket.socket]) -> None:
    pump, source, _ = ends
    outcome: list[str] = []

    async def wait(limit_at_ns: int) -> None:
        with pytest.raises(trio.TooSlowError):
            await source.wait_writable(limit_at_ns)
        outcome.append("late")

    limit_at_ns = time.monotonic_ns() + 3_600_000_000_000
    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait, limit_at_ns)
        await trio.testing.wait_all_tasks_blocked()
        assert source in pump.limited
        pump.sweep(limit_at_ns)
        assert not outcome
        pump.sweep(limit_at_ns + 1)
    assert outcome == ["late"]
    assert not pump.limited
    assert "waited for" not in repr(source)
