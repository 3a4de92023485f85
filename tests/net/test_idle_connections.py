"""Connections to engines that nobody uses: which are closed, and when."""

from __future__ import annotations

import random
import socket
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from relay.address import parse_upstream
from relay.core.health import Health, HealthRules
from relay.net import pool
from relay.net.pool import Upstream, UpstreamConnection


class Clock:
    """Time, as the test says."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(pool, "time", clock)
    return clock


class Idle:
    """An engine with connections that came back a second apart, the first at 100 s, and their other ends."""

    def __init__(self, stack: ExitStack, clock: Clock, number: int) -> None:
        self.upstream = Upstream(parse_upstream("http://127.0.0.1:1"), "serve", Health(HealthRules(), random.Random(1)))
        self.engines: list[socket.socket] = []
        for at in range(number):
            ours, engine = socket.socketpair()
            self.engines.append(stack.enter_context(engine))
            clock.now = 100.0 + at
            self.upstream.give_back(UpstreamConnection(self.upstream, ours))
        stack.callback(self.upstream.close_idle)

    @property
    def open(self) -> list[int]:
        """Which the relay has not closed."""
        found = []
        for number, engine in enumerate(self.engines):
            engine.setblocking(False)
            try:
                assert engine.recv(1) == b""
            except BlockingIOError:
                found.append(number)
            except ConnectionResetError:  # it had not read all
                continue
        return found


@pytest.fixture
def idle(clock: Clock) -> Iterator[Idle]:
    with ExitStack() as stack:
        yield Idle(stack, clock, 5)


@pytest.mark.parametrize(("now", "left"), [(109.9, [0, 1, 2, 3, 4]), (112.0, [3, 4]), (999.0, [])])
def test_those_that_have_expired(idle: Idle, clock: Clock, now: float, left: list[int]) -> None:
    clock.now = now
    idle.upstream.drop_expired(10.0)
    assert (idle.open, idle.upstream.idle) == (left, len(left))


def test_without_a_limit(idle: Idle, clock: Clock) -> None:
    clock.now = 1e9
    idle.upstream.drop_expired(0.0)
    assert idle.open == [0, 1, 2, 3, 4]


def test_those_that_the_engine_has_ended(idle: Idle) -> None:
    idle.engines[1].shutdown(socket.SHUT_WR)
    idle.engines[3].send(b"bytes nobody asked for")
    idle.upstream.drop_expired(0.0)
    assert (idle.open, idle.upstream.idle) == ([0, 2, 4], 3)


def test_not_more_than_so_many(idle: Idle, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "MOST_IDLE", 5)
    ours, engine = socket.socketpair()
    with engine:
        idle.upstream.give_back(UpstreamConnection(idle.upstream, ours))
        assert (idle.open, idle.upstream.idle) == ([1, 2, 3, 4], 5)
