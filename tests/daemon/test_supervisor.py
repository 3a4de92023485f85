"""The parts of the control process: what is shared, what is limited, what is told, and who is forked."""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing

from relay.address import parse_upstream
from relay.config import Config, DaemonConfig, KeyLimitsConfig, PoolConfig, PriceConfig
from relay.core import metrics
from relay.core.board import Board, total
from relay.daemon import messages
from relay.daemon.crew import MOST_UNSENT_BYTES, TELL_S, Crew
from relay.daemon.forker import Ended, Event, Forked, Forker, NotForked
from relay.daemon.key_limits import KeyLimits
from relay.daemon.limits import Limits
from relay.daemon.listeners import Listeners
from relay.daemon.messages import Channel, Done, Said
from relay.daemon.process import count_of
from relay.daemon.scoreboard import MOST_NUMBERS, Numbers, Scoreboard
from relay.net.guard import Credentials
from relay.net.pump import Pump
from relay.net.service import Service
from relay.net.shares import Permits, Shares
from tests.daemon.shortage import descriptors
from tests.e2e.harness import until

# -- how many


def test_auto_is_one_for_each_core_the_daemon_may_use() -> None:
    script = (
        "import os; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])\n"
        "from relay.config import Config; from relay.daemon.process import count_of; print(count_of(Config()))"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert result.stdout == "1\n"
    assert count_of(Config(daemon=DaemonConfig(workers=3))) == 3


# -- what is shared


def scoreboard_of(workers: int) -> Scoreboard:
    scoreboard = Scoreboard(workers)
    scoreboard.slot(workers - 1)
    return scoreboard


def test_a_child_writes_what_its_parent_reads() -> None:
    scoreboard = scoreboard_of(2)
    pid = os.fork()
    if not pid:
        Board(scoreboard.slots[1].board).counter(metrics.FRAMES).add(7)
        scoreboard.slots[1].loads[5] = 2.5
        os._exit(0)
    os.waitpid(pid, 0)
    assert total(slot.board for slot in scoreboard.slots)[("relay_frames_total",)] == [7]
    assert [slot.loads[5] for slot in scoreboard.slots] == [0, 2.5]


def test_a_worker_that_is_gone_leaves_its_counts_and_nothing_else() -> None:
    slot = scoreboard_of(1).slots[0]
    board = Board(slot.board)
    board.counter(metrics.FRAMES).add(7)
    board.gauge(metrics.IN_FLIGHT, "default").set(3)
    slot.loads[1], slot.held[0], slot.held[2], slot.held[4] = 3.5, 3, 1, -2
    assert slot.vacate() == {0: 3, 2: 1, 4: 0}  # it can give back no less than nothing
    assert not any(slot.loads)
    assert not any(slot.held)
    left = total([slot.board])
    assert left[("relay_frames_total",)] == [7]
    assert ("relay_in_flight", "default") not in left


def test_loads_of_others_are_added_up() -> None:
    slots = scoreboard_of(3).slots
    shares = [Shares(slot.loads, slot.held, [each.loads for each in slots if each is not slot]) for slot in slots]
    for share, load in zip(shares, (1.0, 2.0, 4.0), strict=True):
        share.set_load(1, load)
    assert [share.loads_of_others() for share in shares] == [[0, 6], [0, 5], [0, 3]]
    assert shares[0].load_of_others(1) == 6


def test_a_number_is_given_anew_when_nobody_uses_it() -> None:
    scoreboard = scoreboard_of(2)
    numbers = Numbers(scoreboard)
    first, second = numbers.of(("a", "", "")), numbers.of(("b", "", ""))
    assert (first, second, numbers.of(("a", "", ""))) == (0, 1, 0)
    scoreboard.slots[1].loads[0] = 1.0  # a stream goes on at what has left
    assert numbers.keep({("b", "", "")}) == [0]
    assert numbers.of(("c", "", "")) == 2
    scoreboard.slots[1].loads[0] = 0.0
    assert numbers.of(("d", "", "")) == 0


def test_numbers_run_out() -> None:
    numbers = Numbers(scoreboard_of(1))
    assert None not in [numbers.of((str(at), "", "")) for at in range(MOST_NUMBERS)]
    assert numbers.of(("one more", "", "")) is None


# -- what is limited


class Limited:
    """A limit, and two workers that are bound by it."""

    def __init__(self, most: int) -> None:
        self.scoreboard = scoreboard_of(2)
        self.limits = Limits()
        self.limits.set(0, most)
        self.workers = [Permits(os.dup(self.limits.by_number[0].fd), 0, slot.held) for slot in self.scoreboard.slots]

    def take(self, *workers: int) -> list[bool]:
        """Which of these workers, in this order, get a permit."""
        return [self.workers[at].take() for at in workers]


@pytest.fixture
def limited() -> Iterator[Limited]:
    found = Limited(3)
    yield found
    found.limits.drop(0)


def test_no_more_permits_than_there_are(limited: Limited) -> None:
    assert limited.take(0, 1, 0, 1, 0) == [True, True, True, False, False]
    assert [slot.held[0] for slot in limited.scoreboard.slots] == [2, 1]


async def test_one_that_becomes_free_is_found_by_who_waits_elsewhere(limited: Limited, nursery: trio.Nursery) -> None:
    assert limited.take(0, 0, 0, 1) == [True, True, True, False]
    is_free = trio.Event()
    limited.workers[1].on_free = is_free.set
    nursery.start_soon(limited.workers[1].watch)
    await trio.testing.wait_all_tasks_blocked()
    assert not is_free.is_set()
    limited.workers[0].give_back()
    with trio.fail_after(5):
        await is_free.wait()
    assert limited.take(1) == [True]
    limited.workers[1].retire()


def test_who_has_found_none_asks_again_when_others_may(limited: Limited) -> None:
    """A worker that gives a permit back has no head start over those who wait."""
    assert limited.take(0, 0, 0, 0) == [True, True, True, False]
    limited.workers[0].give_back()
    assert limited.take(0, 1) == [False, True]


def test_what_a_dead_worker_held_is_free_again(limited: Limited) -> None:
    assert limited.take(0, 0, 0, 1) == [True, True, True, False]
    limited.workers[1].is_exhausted = False
    limited.limits.give_back(limited.scoreboard.slots[0].vacate())
    assert limited.take(1, 1, 1, 1) == [True, True, True, False]


async def test_a_limit_grows_at_once_and_shrinks_as_permits_come_back(limited: Limited, nursery: trio.Nursery) -> None:
    limited.limits.nursery = nursery
    limited.limits.set(0, 4)
    assert limited.take(0, 0, 0, 0) == [True] * 4
    limited.limits.set(0, 1)
    for _ in range(3):
        limited.workers[0].give_back()
        await trio.testing.wait_all_tasks_blocked(0.01)
    assert limited.take(1) == [False]  # one is held, and that is all there is
    limited.workers[0].give_back()
    limited.workers[1].is_exhausted = False
    assert limited.take(1, 1) == [True, False]
    nursery.cancel_scope.cancel()


async def test_a_limit_that_goes_while_it_shrinks_leaves_no_descriptor(nursery: trio.Nursery) -> None:
    before = descriptors()
    limited = Limited(3)
    limited.limits.nursery = nursery
    assert limited.take(0, 0, 1) == [True] * 3
    limited.limits.set(0, 1)
    await trio.testing.wait_all_tasks_blocked()
    limited.limits.drop(0)
    limited.workers.pop().give_back()
    await trio.testing.wait_all_tasks_blocked()
    assert len(nursery.child_tasks) == 0
    limited.workers.clear()
    assert descriptors() == before


# -- what is told


async def test_what_waits_to_be_sent_takes_no_descriptors_and_is_closed_with_its_worker() -> None:
    before = descriptors()
    scoreboard = Scoreboard(1)
    limits = KeyLimits(scoreboard)
    limits.settle({str(at): KeyLimitsConfig(max_in_flight=1, requests_per_minute=1) for at in range(100)})
    one, other = socket.socketpair()
    with one:
        channels = [Channel(one) for _ in range(20)]  # as many workers
        settled = descriptors()
        for channel in channels:
            for order in limits.orders({}):
                channel.send(*order)
        del order
        assert descriptors() == settled
        limits.settle({})
        other.close()
        await channels[0].deliver()
        for channel in channels:
            channel.close()
    assert descriptors() == before


@asynccontextmanager
async def channels() -> AsyncIterator[tuple[Channel, Channel]]:
    one, other = socket.socketpair()
    with one, other:
        ends = Channel(one), Channel(other)
        async with trio.open_nursery() as nursery:
            for end in ends:
                nursery.start_soon(end.deliver)
            yield ends
            nursery.cancel_scope.cancel()


async def test_messages_arrive_whole_and_in_order() -> None:
    config = Config(
        pools=(PoolConfig(upstreams=(parse_upstream("http://a:1"), parse_upstream("unix:/b"))),),
        prices={"m": PriceConfig(prompt=0.1)},
    )
    sent: list[messages.Message] = [
        Done(1),
        Said(2, b"x" * 3_000_000),
        messages.Fleet(
            3,
            [messages.PoolMembers("default", 0, True, "", [])],
            (config, Credentials({b"\0" * 32: "alice"}, b"key")),
            [0],
        ),
        messages.Drain(),
    ]
    async with channels() as (one, other):
        for message in sent:
            one.send(message)
        for message in sent:
            with trio.fail_after(5):
                assert await other.receive() == message


async def test_descriptors_are_there_when_their_message_is() -> None:
    reading, writing = socket.socketpair()
    async with channels() as (one, other):
        one.send(Said(1, b"x" * 300_000))
        one.send(messages.Semaphores([7], are_gone=False), [messages.Copy(writing)])
        writing.close()
        assert isinstance(await other.receive(), Said)
        assert await other.receive() == messages.Semaphores([7], are_gone=False)
        (fd,) = other.fds
        os.write(fd, b"same")
        os.close(fd)
    with reading:
        assert reading.recv(10) == b"same"


async def test_the_end_is_told() -> None:
    async with channels() as (one, other):
        one.send(Done(1))
        await trio.testing.wait_all_tasks_blocked()
        one.sock.shutdown(socket.SHUT_RDWR)
        assert await other.receive() == Done(1)
        assert await other.receive() is None


# -- who is forked


async def test_workers_are_forked_reaped_and_forked_again() -> None:
    def work(slot: int, sock: socket.socket) -> int:
        sock.send(b"%d" % slot)
        return len(sock.recv(10))

    forker = Forker(work)
    try:
        with trio.fail_after(10):
            first = forker.fork(3)
            begun = await forker.next_event()
            assert isinstance(begun, Forked)
            assert begun.slot == 3
            assert first.recv(10) == b"3"
            first.send(b"five!")
            assert await forker.next_event() == Ended(begun.pid, 5)
            assert first.recv(10) == b""
            first.close()
            with forker.fork(0):
                second = await forker.next_event()
                assert isinstance(second, Forked)
                os.kill(second.pid, signal.SIGTERM)  # a terminal's, and everybody's: the control process decides
                os.kill(second.pid, signal.SIGKILL)
                assert await forker.next_event() == Ended(second.pid, -signal.SIGKILL)
    finally:
        forker.close()


async def test_a_helper_that_cannot_fork_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    outcomes = iter([os.fork, None, os.fork])  # the helper itself, and two workers

    def fork() -> int:
        outcome = next(outcomes)
        if outcome is None:
            raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")
        return outcome()

    monkeypatch.setattr(os, "fork", fork)
    forker = Forker(lambda slot, sock: len(sock.recv(10)))
    try:
        with trio.fail_after(10):
            with forker.fork(0) as sock:
                assert sock.recv(10) == b""
                assert await forker.next_event() == NotForked(0)
            with forker.fork(0) as sock:
                assert isinstance(await forker.next_event(), Forked)
    finally:
        forker.close()


# -- all together


class Unforked:
    """In a forker's place: workers that exist as the ends of their channels only."""

    pid = 0

    def __init__(self, *errors: OSError) -> None:
        self.ends: dict[int, socket.socket] = {}  #: of the last in each slot
        self.errors = [*errors]  #: what the next are not forked for
        self.events, self.next_events = trio.open_memory_channel[Event](10)

    def fork(self, slot: int) -> socket.socket:
        if self.errors:
            raise self.errors.pop(0)
        mine, self.ends[slot] = socket.socketpair()
        return mine

    async def next_event(self) -> Event | None:
        async for event in self.next_events:
            return event
        return None


async def test_a_worker_that_cannot_be_begun_is_begun_later(
    nursery: trio.Nursery, capsys: pytest.CaptureFixture[str]
) -> None:
    forker = Unforked(OSError(errno.EMFILE, "Too many open files"))
    config = Config(pools=(PoolConfig(upstreams=(parse_upstream("http://a:1"),)),))
    crew = Crew(Service(config, Pump(), None), Scoreboard(1), forker, Listeners())  # type: ignore[arg-type]
    nursery.start_soon(crew.run, lambda: 1, lambda: None)
    await until(lambda: bool(forker.ends))
    with forker.ends[0]:
        channel = Channel(forker.ends[0])
        nursery.start_soon(channel.deliver)
        assert isinstance(await channel.receive(), messages.Fleet)
        channel.send(Done(1))
        with trio.fail_after(5):
            await crew.begun()
        nursery.cancel_scope.cancel()
    assert capsys.readouterr().err == "relay: cannot begin a worker: Too many open files; trying again\n"


async def test_a_pid_that_comes_again_is_told_of(nursery: trio.Nursery, capsys: pytest.CaptureFixture[str]) -> None:
    """A worker that there are to be fewer for may end; who has its pid later may not."""
    forker = Unforked()
    config = Config(pools=(PoolConfig(upstreams=(parse_upstream("http://a:1"),)),))
    crew = Crew(Service(config, Pump(), None), Scoreboard(2), forker, Listeners())  # type: ignore[arg-type]
    nursery.start_soon(crew.run, lambda: 2, lambda: None)
    await trio.testing.wait_all_tasks_blocked()
    crew.resize(1)
    pid = 2**30  # nobody's
    for slot in (1, 0):
        for event in (Forked(slot, pid), Ended(pid, 0)):
            await forker.events.send(event)
        await trio.testing.wait_all_tasks_blocked()
    assert capsys.readouterr().err == f"relay: worker {pid} ended with status 0\n"
    for end in forker.ends.values():
        end.close()
    nursery.cancel_scope.cancel()


async def test_what_waits_for_a_worker_that_does_not_read_is_bounded(nursery: trio.Nursery) -> None:
    forker = Unforked()
    config = Config(pools=(PoolConfig(upstreams=(parse_upstream("http://a:1"),)),))
    crew = Crew(Service(config, Pump(), None), Scoreboard(2), forker, Listeners())  # type: ignore[arg-type]
    nursery.start_soon(crew.run, lambda: 2, lambda: None)
    await trio.testing.wait_all_tasks_blocked()
    with forker.ends[0], forker.ends[1]:
        reader = Channel(forker.ends[1])
        assert isinstance(await reader.receive(), messages.Fleet)
        body = bytes(1_000_000)
        taken = 0
        while crew.call(1, "key", body):
            taken += 1
        assert MOST_UNSENT_BYTES - 2 * len(body) < taken * len(body) <= MOST_UNSENT_BYTES
        assert crew.call(2, "key", body)  # one that does not read is no other's affair
        assert await reader.receive() == messages.Call("key", body)
        assert crew.call(3, "key", body)  # gone, and with it who waited
        nursery.cancel_scope.cancel()


async def test_changes_are_told_one_at_a_time(nursery: trio.Nursery) -> None:
    forker = Unforked()
    config = Config(pools=(PoolConfig(upstreams=(parse_upstream("http://a:1"),)),))
    crew = Crew(Service(config, Pump(), None), Scoreboard(1), forker, Listeners())  # type: ignore[arg-type]
    nursery.start_soon(crew.run, lambda: 1, lambda: None)
    await trio.testing.wait_all_tasks_blocked()
    with forker.ends[0]:
        worker = Channel(forker.ends[0])
        nursery.start_soon(worker.deliver)
        first = await worker.receive()
        assert isinstance(first, messages.Fleet)
        for _ in range(3):
            crew.fleet_changed()
            await trio.testing.wait_all_tasks_blocked(2 * TELL_S)
        worker.send(Done(first.serial))
        last = await worker.receive()
        assert isinstance(last, messages.Fleet)
        assert last.serial > first.serial + 2  # those between are nobody's concern any more
        worker.send(Done(last.serial))
        await crew.settle()
        nursery.cancel_scope.cancel()
