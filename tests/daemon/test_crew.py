"""The control process and its workers where one lives on, does not begin, or cannot be told."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.testing

from relay.address import parse_address, parse_upstream
from relay.config import Config, PoolConfig
from relay.daemon import crew as crew_module
from relay.daemon.crew import FIRST_DELAY_S, Crew
from relay.daemon.forker import Ended, Forked, NotForked
from relay.daemon.listeners import Listeners
from relay.daemon.messages import Channel, Done, Fleet, Listen, Message, Semaphores
from relay.daemon.scoreboard import Scoreboard
from relay.net.pump import Pump
from relay.net.service import Service
from tests.daemon.shortage import descriptors_left
from tests.daemon.test_supervisor import Unforked
from tests.e2e.harness import until

PID = 2**30  #: nobody's
#: With a limit over all workers.
CONFIG = Config(pools=(PoolConfig(upstreams=(parse_upstream("http://a:1"),), max_in_flight=5),))


class Place:
    """A crew of one, whose worker is the test."""

    def __init__(self, room: int = 1) -> None:
        self.forker = Unforked()
        self.scoreboard = Scoreboard(room)
        self.listeners = Listeners()
        service = Service(CONFIG, Pump(), None)
        self.crew = Crew(service, self.scoreboard, self.forker, self.listeners)  # type: ignore[arg-type]

    @property
    def held(self) -> float:
        """Places that the worker has of the limit."""
        return self.scoreboard.slots[0].held[0]

    @asynccontextmanager
    async def begun(self, slot: int = 0) -> AsyncIterator[Channel]:
        """The next worker's end of its channel."""
        await until(lambda: slot in self.forker.ends)
        with self.forker.ends.pop(slot) as sock:
            channel = Channel(sock)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(channel.deliver)
                yield channel
                nursery.cancel_scope.cancel()
            channel.close()


@pytest.fixture
def place(nursery: trio.Nursery) -> Place:
    found = Place()
    nursery.start_soon(found.crew.run, lambda: 1, lambda: None)
    return found


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    """One that ends when its input does."""
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as found:
        yield found


async def told(channel: Channel, count: int) -> list[Message | None]:
    """What a worker is told next."""
    found = []
    for _ in range(count):
        with trio.fail_after(5):
            found.append(await channel.receive())
    return found


async def test_a_slot_has_one_writer(nursery: trio.Nursery, place: Place) -> None:
    """A worker whose channel is gone may drain yet: until it has ended its places are its own, and no other comes."""
    async with place.begun() as worker:
        await place.forker.events.send(Forked(0, PID))
        await told(worker, 2)
        place.scoreboard.slots[0].held[0] = 2
    await trio.testing.wait_all_tasks_blocked(2 * FIRST_DELAY_S)
    assert place.forker.ends == {}
    assert (place.held, PID in place.crew.pids) == (2, True)
    await place.forker.events.send(Ended(PID, 0))
    async with place.begun() as worker:
        assert (place.held, PID in place.crew.pids) == (0, False)
        assert [type(order) for order in await told(worker, 2)] == [Semaphores, Fleet]
    nursery.cancel_scope.cancel()


async def test_a_worker_that_cannot_be_told_is_replaced_while_it_drains(
    nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(crew_module, "END_S", 0.001)
    place = Place(room=2)
    nursery.start_soon(place.crew.run, lambda: 1, lambda: None)
    async with place.begun():
        await place.forker.events.send(Forked(0, PID))
        await until(lambda: PID in place.crew.pids)
        place.scoreboard.slots[0].held[0] = 2
    place.crew.fleet_changed()
    async with place.begun(1) as other, trio.open_nursery() as settling:
        settling.start_soon(place.crew.settle)
        await place.forker.events.send(Forked(1, PID + 1))
        await trio.testing.wait_all_tasks_blocked()
        assert len(settling.child_tasks) == 1  # it waits for the other
        while settling.child_tasks:
            with trio.move_on_after(0.01):
                order = await other.receive()
                if isinstance(order, Fleet):
                    other.send(Done(order.serial))
        assert place.held == 2
        await place.forker.events.send(Ended(PID, 0))
        await until(lambda: place.held == 0)
        assert PID not in place.crew.pids
        assert place.forker.ends == {}
    nursery.cancel_scope.cancel()


async def test_a_worker_that_ends_before_its_channel_does_keeps_no_pid(
    nursery: trio.Nursery, place: Place, process: subprocess.Popen[bytes]
) -> None:
    """Another process may have got it, which is not to be ended for it."""
    async with place.begun():
        await place.forker.events.send(Forked(0, process.pid))
        await place.forker.events.send(Ended(process.pid, 0))
        await trio.testing.wait_all_tasks_blocked()
        place.crew.kill()
        assert process.pid not in place.crew.pids
    process.communicate()
    assert process.returncode == 0
    nursery.cancel_scope.cancel()


async def test_who_does_not_begin_is_asked_for_again(nursery: trio.Nursery, place: Place) -> None:
    async with place.begun():
        pass  # who was asked to fork has closed it
    await place.forker.events.send(NotForked(0))
    async with place.begun() as worker:
        assert isinstance((await told(worker, 2))[1], Fleet)
    nursery.cancel_scope.cancel()


async def test_when_nobody_can_tell_of_ends_none_is_waited_for(nursery: trio.Nursery, place: Place) -> None:
    async with place.begun():
        await place.forker.events.send(Forked(0, PID))
        await place.forker.events.aclose()
        place.crew.drain()
    with trio.fail_after(5):
        await place.crew.ended.wait()
    nursery.cancel_scope.cancel()


async def test_a_cut_reaches_who_cannot_be_told(
    nursery: trio.Nursery, place: Place, process: subprocess.Popen[bytes]
) -> None:
    async with place.begun():
        await place.forker.events.send(Forked(0, process.pid))
    await trio.testing.wait_all_tasks_blocked()
    place.crew.cut()
    assert process.wait(5) == -signal.SIGKILL
    nursery.cancel_scope.cancel()


@pytest.mark.parametrize("left", [0, 1])
async def test_descriptors_that_are_short_hold_up_what_is_told(
    nursery: trio.Nursery,
    tmp_path: Path,
    left: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """To tell a worker takes one for the pool's limit, and one for each listener."""
    monkeypatch.setattr(crew_module, "RETRY_S", 0.001)
    short = "relay: cannot tell workers of a change: Too many open files; trying again\n"
    place = Place()
    place.listeners.change([parse_address(f"unix:{tmp_path}/a")])
    nursery.start_soon(place.crew.run, lambda: 1, lambda: None)
    with descriptors_left(2 + left):  # two are the channel
        await until(lambda: capsys.readouterr().err == short)
    async with place.begun() as worker:
        *rest, fleet = await told(worker, 3)
        assert isinstance(fleet, Fleet)
        assert [type(order) for order in rest] == [Listen, Semaphores]
        worker.send(Done(fleet.serial))
        await place.crew.settle()
        place.listeners.change([parse_address(f"unix:{tmp_path}/a"), parse_address(f"unix:{tmp_path}/b")])
        with descriptors_left(0):
            place.crew.fleet_changed()
            await until(lambda: capsys.readouterr().err == short)
        assert [type(order) for order in await told(worker, 2)] == [Listen, Fleet]
    place.listeners.close()
    assert capsys.readouterr().err == ""
    nursery.cancel_scope.cancel()
