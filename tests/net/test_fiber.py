"""A coroutine that the pump steps, within a task of trio's: who steps it when, and how it is cancelled."""

from __future__ import annotations

import socket
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager, nullcontext
from typing import Final

import pytest
import trio
import trio.testing

from relay.net import poller
from relay.net.fiber import Fiber, checkpoint_if_cancelled, current, in_task
from relay.net.pump import Pump
from tests.e2e.harness import nothing_unreachable, until

#: Whose step it is, where it is asked.
PUMP: Final = "pump"
TASK: Final = "task"


class Ends:
    """A socket under a pump, and its other end."""

    def __init__(self, pump: Pump) -> None:
        near, self.far = socket.socketpair()
        near.setblocking(False)
        self.pump = pump
        self.source = pump.add(near)

    def close(self) -> None:
        self.far.close()
        self.source.close()

    async def read(self) -> bytes:
        """What comes next, after a sleep."""
        await self.source.wait_readable()
        data = self.source.sock.recv(64)
        self.source.took(len(data), 64)
        return data


@pytest.fixture
def pump() -> Iterator[Pump]:
    pump = Pump(sweep_s=0.01)
    yield pump
    pump.epoll.close()


@pytest.fixture
def ends(pump: Pump) -> Iterator[Ends]:
    ends = Ends(pump)
    yield ends
    ends.close()


@pytest.fixture
def others(pump: Pump) -> Iterator[Ends]:
    ends = Ends(pump)
    yield ends
    ends.close()


def who() -> str:
    """Who steps the caller."""
    fiber = current.fiber
    assert fiber is not None
    if fiber.task is None:
        trio.lowlevel.current_task()
        return TASK
    with pytest.raises(RuntimeError, match="async context"):
        trio.lowlevel.current_task()
    return PUMP


@contextmanager
def driven(pump: Pump, *, nested: bool = True) -> Iterator[None]:
    with poller.install(pump) if nested else nullcontext():
        yield


async def run(pump: Pump, coroutine: Coroutine[object, object, None]) -> None:
    """In a task of its own, with a limit that no test comes near."""
    with trio.fail_after(20):
        await Fiber(coroutine, in_pump=pump.is_nested).run()


async def test_the_pump_steps_it_behind_each_sleep(pump: Pump, ends: Ends) -> None:
    steps: list[str] = []
    read: list[bytes] = []

    async def echo() -> None:
        steps.append(who())
        for _ in range(3):
            read.append(await ends.read())
            steps.append(who())
            ends.source.sock.send(b"!")

    class Steps(trio.abc.Instrument):
        count = 0

        def before_task_step(self, task: trio.lowlevel.Task) -> None:
            self.count += task is fibers_task

    fibers_task: trio.lowlevel.Task | None = None
    counted = Steps()
    with driven(pump):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(run, pump, echo())
            await trio.testing.wait_all_tasks_blocked()
            (fibers_task,) = nursery.child_tasks
            trio.lowlevel.add_instrument(counted)
            for data in (b"1", b"2", b"3"):
                ends.far.send(data)
                await trio.lowlevel.wait_readable(ends.far)
                assert ends.far.recv(64) == b"!"
    trio.lowlevel.remove_instrument(counted)
    assert (steps, read) == ([TASK, PUMP, PUMP, PUMP], [b"1", b"2", b"3"])
    assert counted.count == 1  # to end
    assert current.fiber is None


async def test_where_the_pump_is_a_task_so_is_the_coroutine(pump: Pump, ends: Ends) -> None:
    steps: list[str] = []

    async def twice() -> None:
        for _ in range(2):
            await ends.read()
            steps.append(who())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(pump.run_as_task)
        async with trio.open_nursery() as inner:
            inner.start_soon(run, pump, twice())
            await until(lambda: "waited for" in repr(ends.source))
            ends.far.send(b"1")
            await until(lambda: len(steps) == 1)
            ends.far.send(b"2")
        nursery.cancel_scope.cancel()
    assert steps == [TASK, TASK]


async def test_its_error_is_the_tasks(pump: Pump, ends: Ends) -> None:
    async def fail() -> None:
        await ends.read()
        assert who() == PUMP
        raise KeyError("own")

    ends.far.send(b"1")
    with driven(pump), pytest.raises(KeyError, match="own"):
        await run(pump, fail())
    assert current.fiber is None


async def checkpoint() -> None:
    await trio.lowlevel.checkpoint()


async def scoped() -> None:
    async with in_task():
        with trio.move_on_after(0.001):
            await trio.sleep_forever()
        assert who() == TASK


async def with_child() -> None:
    async with in_task():
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.sleep, 0)
            nursery.start_soon(trio.sleep, 0)
        assert who() == TASK


@pytest.mark.parametrize("what", [checkpoint, scoped, with_child])
async def test_the_task_takes_over_for_what_is_trios(
    pump: Pump, ends: Ends, what: Callable[[], Awaitable[None]]
) -> None:
    steps: list[str] = []

    async def serve() -> None:
        await ends.read()
        steps.append(who())
        await what()
        steps.append(who())
        await ends.read()
        steps.append(who())

    with driven(pump):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(run, pump, serve())
            await trio.testing.wait_all_tasks_blocked()
            ends.far.send(b"1")
            await until(lambda: len(steps) == 2)
            ends.far.send(b"2")
    assert steps == [PUMP, TASK, PUMP]


async def test_a_sleep_within_a_scope_is_the_tasks(pump: Pump, ends: Ends) -> None:
    """Where a scope is entered it has to be left, in the task."""
    steps: list[str] = []

    async def serve() -> None:
        await ends.read()
        async with in_task():
            with trio.move_on_after(10):
                await ends.read()
            steps.append(who())
            with trio.move_on_after(0.001) as limit:
                await ends.read()
            assert limit.cancelled_caught

    with driven(pump):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(run, pump, serve())
            await trio.testing.wait_all_tasks_blocked()
            ends.far.send(b"1")
            await trio.testing.wait_all_tasks_blocked()
            ends.far.send(b"2")
    assert steps == [TASK]


async def test_in_task_changes_nothing_in_a_task() -> None:
    async with in_task():
        await trio.lowlevel.checkpoint()
    await checkpoint_if_cancelled()
    with trio.CancelScope() as scope:
        scope.cancel()
        await checkpoint_if_cancelled()
    assert scope.cancelled_caught


async def test_who_is_made_runnable_by_the_pumps_step_runs_at_once(pump: Pump, ends: Ends) -> None:
    """Else trio would go on sleeping, as it knew of nobody."""
    event = trio.Event()

    async def serve() -> None:
        await ends.read()
        assert who() == PUMP
        event.set()
        await ends.read()

    with driven(pump):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(run, pump, serve())
            await trio.testing.wait_all_tasks_blocked()
            began = trio.current_time()
            ends.far.send(b"1")
            await event.wait()
            waited = trio.current_time() - began
            ends.far.send(b"2")
    assert waited < 5


async def test_a_deadline_that_is_set_behind_a_step_of_the_pumps_is_kept(pump: Pump, ends: Ends) -> None:
    began = trio.current_time()
    with trio.CancelScope() as scope:

        async def serve() -> None:
            await ends.read()
            assert who() == PUMP
            async with in_task():
                scope.deadline = trio.current_time() + 0.01
            await ends.read()

        with driven(pump):
            ends.far.send(b"1")
            await run(pump, serve())
    assert scope.cancelled_caught
    assert trio.current_time() - began < 5  # and not when trio's own next deadline woke it
    assert "waited for" not in repr(ends.source)


async def test_a_limit_ends_a_sleep_in_the_pump(pump: Pump, ends: Ends) -> None:
    steps: list[str] = []

    async def serve() -> None:
        await ends.read()
        with pytest.raises(trio.TooSlowError):
            await ends.source.wait_readable(time.monotonic_ns() + 1_000_000)
        steps.append(who())

    with driven(pump):
        ends.far.send(b"1")
        await run(pump, serve())
    assert steps == [PUMP]
    assert not pump.limited


async def test_an_error_that_ends_it_leaves_nothing_to_collect(pump: Pump, ends: Ends) -> None:
    async def serve() -> None:
        await ends.read()
        await ends.source.wait_readable(time.monotonic_ns() + 1_000_000)

    with nothing_unreachable(), driven(pump):
        ends.far.send(b"1")
        with pytest.raises(trio.TooSlowError):
            await run(pump, serve())


async def test_limits_end_soon_also_where_sweeps_come_in_between(pump: Pump, ends: Ends, others: Ends) -> None:
    """A sweep for one limit does not put off the next one."""
    pump.sweep_s = 10.0
    late: list[float] = []

    async def wait(end: Ends, limit_s: float) -> None:
        limit_ns = time.monotonic_ns() + int(limit_s * 1e9)
        with pytest.raises(trio.TooSlowError):
            await end.source.wait_readable(limit_ns)
        late.append((time.monotonic_ns() - limit_ns) / 1e9)

    with driven(pump):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(run, pump, wait(ends, 0.02))
            nursery.start_soon(run, pump, wait(others, 0.1))
    assert len(late) == 2
    assert max(late) < 5


# -- cancellation


class Cancelling:
    """A fiber in a scope of its own."""

    def __init__(self, pump: Pump, coroutine: Coroutine[object, object, None]) -> None:
        self.scope = trio.CancelScope()
        self._pump = pump
        self._coroutine = coroutine

    async def run(self) -> None:
        with self.scope:
            await run(self._pump, self._coroutine)


async def test_cancelled_while_it_sleeps(pump: Pump, ends: Ends) -> None:
    steps: list[str] = []

    async def serve() -> None:
        await ends.read()
        try:
            await ends.source.wait_readable(time.monotonic_ns() + 10**12)
        finally:
            steps.append(who())

    cancelling = Cancelling(pump, serve())
    with driven(pump):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(cancelling.run)
            await trio.testing.wait_all_tasks_blocked()
            ends.far.send(b"1")
            await trio.testing.wait_all_tasks_blocked()
            cancelling.scope.cancel()
            ends.far.send(b"2")  # which comes too late
    assert steps == [TASK]
    assert cancelling.scope.cancelled_caught
    assert "waited for" not in repr(ends.source)
    assert not pump.limited


async def test_cancelled_once_it_is_woken(pump: Pump, ends: Ends, others: Ends) -> None:
    """What it slept for has come, and is not lost; its next sleep is what is cancelled."""
    read: list[bytes] = []
    steps: list[str] = []

    async def serve() -> None:
        read.append(await ends.read())
        steps.append(who())
        try:
            await ends.read()
        finally:
            steps.append(who())

    cancelling = Cancelling(pump, serve())

    async def strike() -> None:
        """In the same turn, and resumed before it."""
        await others.read()
        assert who() == PUMP
        cancelling.scope.cancel()

    with driven(pump):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(run, pump, strike())
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(cancelling.run)
            await trio.testing.wait_all_tasks_blocked()
            others.far.send(b"x")  # reported in this order
            ends.far.send(b"1")
    assert (read, steps) == ([b"1"], [PUMP, TASK])
    assert cancelling.scope.cancelled_caught
    assert "waited for" not in repr(ends.source)


async def test_cancelled_by_itself(pump: Pump, ends: Ends) -> None:
    steps: list[str] = []

    async def serve() -> None:
        await ends.read()
        cancelling.scope.cancel()
        steps.append(who())
        await ends.read()
        steps.append("never")

    cancelling = Cancelling(pump, serve())
    with driven(pump):
        ends.far.send(b"1")
        await cancelling.run()
    assert steps == [PUMP]
    assert cancelling.scope.cancelled_caught
    assert "waited for" not in repr(ends.source)


async def test_cancelled_by_itself_and_done(pump: Pump, ends: Ends) -> None:
    """It has come to its end: nothing is left to be cancelled."""

    async def serve() -> None:
        await ends.read()
        cancelling.scope.cancel()

    cancelling = Cancelling(pump, serve())
    with driven(pump):
        ends.far.send(b"1")
        await cancelling.run()
    assert not cancelling.scope.cancelled_caught


@pytest.mark.parametrize("point", [checkpoint, checkpoint_if_cancelled, scoped])
async def test_cancelled_by_itself_before_a_checkpoint(
    pump: Pump, ends: Ends, point: Callable[[], Awaitable[None]]
) -> None:
    steps: list[str] = []

    async def serve() -> None:
        await ends.read()
        cancelling.scope.cancel()
        try:
            await point()
        finally:
            steps.append(who())

    cancelling = Cancelling(pump, serve())
    with driven(pump):
        ends.far.send(b"1")
        await cancelling.run()
    assert steps == [TASK]
    assert cancelling.scope.cancelled_caught


async def test_a_cancelled_one_may_still_sleep_behind_a_shield(pump: Pump, ends: Ends) -> None:
    read: list[bytes] = []

    async def serve() -> None:
        await ends.read()
        try:
            await ends.read()
        finally:
            async with in_task():  # noqa: ASYNC102 - the scope within is shielded
                with trio.CancelScope(shield=True, deadline=trio.current_time() + 20):
                    read.append(await ends.read())

    cancelling = Cancelling(pump, serve())
    with driven(pump):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(cancelling.run)
            await trio.testing.wait_all_tasks_blocked()
            ends.far.send(b"1")
            await trio.testing.wait_all_tasks_blocked()
            cancelling.scope.cancel()
            await trio.testing.wait_all_tasks_blocked()
            ends.far.send(b"last")
    assert read == [b"last"]
    assert cancelling.scope.cancelled_caught


async def test_a_cancellation_that_came_too_late_is_forgotten_with_its_scope(
    pump: Pump, ends: Ends, others: Ends
) -> None:
    """A scope within is cancelled once its sleep is over, and left: no later sleep is cancelled for it."""
    steps: list[str] = []
    scope = trio.CancelScope()

    async def serve() -> None:
        async with in_task():
            with scope:
                await ends.read()
        for _ in range(2):
            await ends.read()
            steps.append(who())

    async def strike() -> None:
        await others.read()
        scope.cancel()

    with driven(pump):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(run, pump, strike())
            nursery.start_soon(run, pump, serve())
            await trio.testing.wait_all_tasks_blocked()
            others.far.send(b"x")  # reported in this order
            for data in (b"1", b"2", b"3"):
                ends.far.send(data)
                await trio.testing.wait_all_tasks_blocked()
    assert scope.cancel_called
    assert steps == [PUMP, PUMP]


async def test_checkpoint_if_cancelled_leaves_it_to_the_pump(pump: Pump, ends: Ends) -> None:
    steps: list[str] = []

    async def serve() -> None:
        await ends.read()
        await checkpoint_if_cancelled()
        steps.append(who())

    with driven(pump):
        ends.far.send(b"1")
        await run(pump, serve())
    assert steps == [PUMP]
