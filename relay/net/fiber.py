"""A client's connection goes on within the pump's turn: what it waited for resumes it, without trio's scheduler.

What an exchange waits for are nearly always sockets, and these are under the pump, which is the first to know that
something has come. To have trio run the task for it costs a turn of its scheduler, at each of an exchange's three to
five waits; a tenth of all that a short request costs. So a connection's coroutine belongs to a task, but is not always
stepped by it. It sleeps as a `Fiber` (`relay.net.source.Source.park`), and the pump resumes that between two waits of
its own, behind the frames that came with what it waited for.

trio's cancellation holds as ever. While the coroutine sleeps, so does its task, in a wait of trio's. Once that is
cancelled, the task throws `trio.Cancelled` into the coroutine, and steps it from there to its next sleep. The task also
takes over, without more ado, where the coroutine comes to a checkpoint of trio's.

But there is no current task while the pump steps it. What needs one, scopes, nurseries, events and all other waits of
trio's, belongs into ``async with in_task()``; elsewhere it is a RuntimeError, "must be called from async context".
"""

from __future__ import annotations

import types
from collections.abc import Awaitable, Callable, Coroutine, Generator, Iterator
from typing import TYPE_CHECKING, Any, Final, cast

import outcome
import trio

if TYPE_CHECKING:
    from relay.net.source import Source

#: What a coroutine yields that goes to sleep in the pump, and one that is to be its task's.
_ASLEEP: Final = object()
_HANDED_BACK: Final = object()


class _Yield:
    """Yields one thing, once. One serves all: a generator for each wait would cost more than the rest of it."""

    def __init__(self, trap: object) -> None:
        self._traps = (trap,)

    def __await__(self) -> Iterator[object]:
        return iter(self._traps)


_SLEEP: Final = cast("Awaitable[None]", _Yield(_ASLEEP))
_HAND_BACK: Final = cast("Awaitable[None]", _Yield(_HANDED_BACK))


class _Awake:
    """An outcome without a value, for any number of times.

    `outcome.Value` can be unwrapped only once: to make one for each wake-up would be a sixth of what that costs.
    """

    def unwrap(self) -> None:
        """All that `trio.lowlevel.wait_task_rescheduled` asks of an outcome."""


#: What a task is woken with.
AWAKE: Final = cast("outcome.Outcome[None]", _Awake())


class Current:
    """Whose coroutine is being stepped."""

    __slots__ = ("fiber",)

    def __init__(self) -> None:
        self.fiber: Fiber | None = None


current: Final = Current()


class Fiber:
    """A coroutine in a task. `run` it, once."""

    __slots__ = ("_coroutine", "_is_over", "_raise_cancel", "_source", "pins", "task")

    def __init__(self, coroutine: Coroutine[object, object, None], *, in_pump: bool) -> None:
        """`in_pump`: whether the pump may step it, which it may not where it runs in a task of its own."""
        self._coroutine = coroutine
        self._source: Source | None = None  # where the coroutine sleeps; None also once that has woken it
        self._raise_cancel: Callable[[], None] | None = None  # the task was cancelled when the coroutine did not sleep
        self._is_over = False
        #: its task while that sleeps, so that the pump steps the coroutine; None while the task steps it
        self.task: trio.lowlevel.Task | None = None
        self.pins = 0 if in_pump else 1  #: reasons to have the task step it

    def __repr__(self) -> str:
        return f"<Fiber {self._coroutine!r} {self._source or 'awake'}>"

    async def run(self) -> None:
        """Runs the coroutine to its end, in the calling task. Raises what it raises."""
        reply: object = None
        error: BaseException | None = None
        while True:
            try:
                trap = self._step(reply, error)
            except StopIteration:
                return
            finally:
                reply = error = None  # an error's traceback holds this frame
            if trap is _ASLEEP:
                self.task = trio.lowlevel.current_task()
                try:
                    trap = await trio.lowlevel.wait_task_rescheduled(self._abort)
                except BaseException as exc:  # noqa: ASYNC103 - the coroutine gets it
                    if self._is_over:
                        raise  # it is the coroutine's own
                    error = exc
                    continue  # noqa: ASYNC104
                if self._is_over:
                    return
                if trap is None:  # woken by `AWAKE`
                    continue
            reply = await _ask_trio(trap)

    def sleep(self, source: Source) -> Awaitable[None]:
        """Sleeps until `source` wakes it; raises what that wakes it with. For the coroutine, to be awaited at once."""
        self._source = source
        return _SLEEP

    def woken(self) -> None:
        """`resume` will be called in this turn of the pump: a cancellation comes too late for this sleep."""
        self._source = None

    def resume(self, error: Exception | None) -> None:
        """Goes on with the coroutine behind its sleep, which ended, or ended with `error`. Called by the pump alone."""
        if self.pins:
            self._wake_task(AWAKE if error is None else outcome.Error(error))
            return
        try:
            trap = self._step(None, error)
        except StopIteration:
            self._is_over = True
            self._wake_task(AWAKE)
        except BaseException as exc:  # noqa: ASYNC103 - the task gets it
            self._is_over = True
            self._wake_task(outcome.Error(exc))
            del error  # as in `run`
        else:
            if trap is _HANDED_BACK:
                self._wake_task(AWAKE)
            elif trap is not _ASLEEP:
                self._wake_task(outcome.Value(trap))
            elif self._raise_cancel is not None:
                raise_cancel = self._raise_cancel
                self._leave_source()
                self._wake_task(outcome.capture(raise_cancel))

    def _step(self, reply: object, error: BaseException | None) -> object:
        """Runs the coroutine up to where it waits: in the pump, for its task, or for something of trio's."""
        current.fiber = self
        try:
            return self._coroutine.send(reply) if error is None else self._coroutine.throw(error)
        finally:
            current.fiber = None
            del reply, error

    def _wake_task(self, what: outcome.Outcome[Any]) -> None:
        task, self.task = self.task, None
        self._raise_cancel = None  # trio cancels its next wait as well, if the scope is still there
        assert task is not None
        trio.lowlevel.reschedule(task, what)

    def _leave_source(self) -> None:
        assert self._source is not None
        self._source.forget_waiter()
        self._source = None

    def _abort(self, raise_cancel: Callable[[], None]) -> trio.lowlevel.Abort:
        """The task is cancelled: at once where the coroutine sleeps, else where it would sleep next."""
        if self._source is None:
            self._raise_cancel = raise_cancel
            return trio.lowlevel.Abort.FAILED
        self._leave_source()
        self.task = None
        return trio.lowlevel.Abort.SUCCEEDED

    @property
    def is_cancelled(self) -> bool:
        """Whether it will not sleep again, as its task is cancelled; of one that the pump steps."""
        return self._raise_cancel is not None


class InTask:
    """See `in_task`."""

    __slots__ = ("_fiber",)

    def __init__(self) -> None:
        self._fiber: Fiber | None = None

    async def __aenter__(self) -> None:
        self._fiber = fiber = current.fiber
        if fiber is not None:
            fiber.pins += 1
            if fiber.task is not None:
                await _HAND_BACK

    async def __aexit__(self, *_: object) -> None:
        if self._fiber is not None:
            self._fiber.pins -= 1


def in_task() -> InTask:
    """``async with in_task()``: what is within may use all of trio; it is the task that steps it, to its last line.

    In an ordinary task it changes nothing. To enter it is no point of cancellation.
    """
    return InTask()


async def checkpoint_if_cancelled() -> None:
    """`trio.lowlevel.checkpoint_if_cancelled`, also where the pump steps the caller."""
    fiber = current.fiber
    if fiber is None or fiber.task is None or fiber.is_cancelled:
        async with in_task():
            await trio.lowlevel.checkpoint_if_cancelled()


@types.coroutine
def _ask_trio(trap: object) -> Generator[object, Any, object]:
    """Hands on what the coroutine asks of trio's scheduler; answers what that says."""
    return (yield trap)
