"""The decode loop: every step, one token for all running sequences at once, as inference engines do.

Why one loop and not a task per stream: it is how engines behave (with N streams, N frames leave in one burst, then
nothing until the next step), and it is cheap: one wake-up per step, and for each frame one `send` on a non-blocking
socket, without a turn of trio's scheduler. Only a send that would block, or a shape that asks for pauses between
writes, takes a task of its own until it is through; the sequence rests meanwhile, as uvicorn's flow control makes it.

Sequences of the same step length share a clock and so burst together; a request with its own ``x-sim-step-ms`` has its
own clock, or that of others with the same; one with ``x-sim-clock: own`` shares with nobody.
"""

from __future__ import annotations

import math
import random
import time
from collections import deque
from contextlib import closing
from heapq import heappop, heappush
from itertools import count
from typing import TYPE_CHECKING, Final

import trio

from relay_bench.engine.ledger import Ledger, RequestRecord, State
from relay_bench.engine.wire import Cut, Op
from relay_bench.load.timer import Alarm

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Iterator

#: Without a step length, frames sent before the other tasks get a turn: a few hundred µs of work.
_FRAMES_PER_TURN: Final = 64


class Sequence:
    """One request between its acceptance and its end (all its choices: they advance together)."""

    __slots__ = (
        *("accepted_at", "backlog", "blocks", "cut", "is_decoding", "on_end", "record", "sock", "step_s", "steps"),
        *("own_clock", "ttft_s", "width"),
    )

    def __init__(
        self,
        sock: socket.socket,
        steps: Iterator[list[Op]],
        record: RequestRecord,
        *,
        width: int,
        ttft_s: float,
        step_s: float,
        blocks: int = 0,
        own_clock: bool = False,
    ) -> None:
        self.sock = sock
        self.steps = steps
        self.record = record
        self.width = width  #: tokens per step, one for each choice
        self.ttft_s = ttft_s
        self.step_s = step_s
        self.blocks = blocks  #: of the KV cache, for its prompt
        self.accepted_at = 0.0  #: when it joined the queue
        self.own_clock = own_clock
        self.backlog: deque[Op] = deque()  #: not empty: a task of its own writes, and the loop leaves it alone
        self.cut: Cut | None = None  #: how its answer ended, once it has
        self.is_decoding = False  #: past its first token
        self.on_end: Callable[[], None] = lambda: None

    @property
    def has_ended(self) -> bool:
        """Whether its answer has ended, in whatever way."""
        return self.record.state not in {State.QUEUED, State.RUNNING}


class _Clock:
    """The steps of one length, and the sequences that follow them."""

    __slots__ = ("members", "next_at", "step_s")

    def __init__(self, step_s: float, now: float) -> None:
        self.step_s = step_s
        self.next_at = now + step_s
        self.members: dict[Sequence, None] = {}  # ordered, and left in O(1)


class Scheduler:
    """Admission, prefill and decode of all sequences of an engine."""

    def __init__(self, ledger: Ledger, nursery: trio.Nursery, *, max_seqs: int, jitter: float) -> None:
        self._ledger = ledger
        self._nursery = nursery
        self._max_seqs = max_seqs
        self._jitter = jitter
        self._random = random.Random(0)
        self._queue: dict[Sequence, None] = {}
        self._running = 0
        self._prefill: list[tuple[float, int, Sequence]] = []  # heap by when the first token is due
        self._tie = count()
        self._clocks: dict[float | Sequence, _Clock] = {}
        self._wake = trio.Event()

    def submit(self, sequence: Sequence) -> None:
        """Accept a sequence, whose record is queued; its first operations (a stream's head) leave at once."""
        sequence.accepted_at = trio.current_time()
        self._queue[sequence] = None
        self._emit(sequence, 0)
        self._admit()

    def abort(self, sequence: Sequence) -> None:
        """The client has left: stop generating."""
        if not sequence.has_ended:
            self._end(sequence, State.ABORTED)

    async def run(self) -> None:
        """The loop itself; never returns."""
        with closing(Alarm()) as alarm:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._ring, alarm)
                await self._loop(alarm)

    async def _loop(self, alarm: Alarm) -> None:
        while True:
            now = trio.current_time()
            for key, clock in tuple(self._clocks.items()):
                if not clock.members:
                    del self._clocks[key]
                elif clock.next_at <= now:
                    self._step(clock, now)
            # after the steps, or a newcomer would get its second token with its first
            self._first_tokens(now)
            await self._rest(alarm)

    async def _ring(self, alarm: Alarm) -> None:
        """Wakes the loop on time: trio's own deadlines are kept to whole milliseconds, as epoll's timeouts are."""
        while True:
            await trio.lowlevel.wait_readable(alarm.fileno())
            alarm.take()
            self._wake.set()

    async def _rest(self, alarm: Alarm) -> None:
        """Sleep until the next step, first token or arrival."""
        due = [clock.next_at for clock in self._clocks.values()]
        if self._prefill:
            due.append(self._prefill[0][0])
        left_s = min(due) - trio.current_time() if due else math.inf
        if left_s <= 0:
            await trio.lowlevel.checkpoint()
            return
        self._wake = trio.Event()
        if due:
            alarm.set(time.monotonic_ns() + int(left_s * 1e9))
        with trio.move_on_at(min(due)) if due else trio.CancelScope():
            await self._wake.wait()

    def _admit(self) -> None:
        """Give free places to those that wait, in the order of their arrival."""
        while self._queue and self._running < self._max_seqs:
            sequence = next(iter(self._queue))
            del self._queue[sequence]
            self._running += 1
            self._ledger.blocks_in_use += sequence.blocks
            self._ledger.move(sequence.record, State.RUNNING)
            heappush(self._prefill, (trio.current_time() + sequence.ttft_s, next(self._tie), sequence))
            self._wake.set()

    def _first_tokens(self, now: float) -> None:
        while self._prefill and self._prefill[0][0] <= now:
            sequence = heappop(self._prefill)[2]
            if sequence.has_ended or sequence.cut:
                continue
            sequence.is_decoding = True
            self._ledger.first_tokens.add(now - sequence.accepted_at)
            self._ledger.generation_tokens += sequence.width
            if sequence.backlog:  # not even its head has left; it joins when that is done
                continue
            # it joins before it emits, and whatever ends or blocks it takes it off again
            self._join_clock(sequence, now)
            self._emit(sequence, sequence.width)

    def _join_clock(self, sequence: Sequence, now: float) -> None:
        key = sequence if sequence.own_clock else sequence.step_s
        clock = self._clocks.get(key)
        if clock is None or not clock.members:
            clock = self._clocks[key] = _Clock(sequence.step_s, now)
        clock.members[sequence] = None
        self._wake.set()

    def _leave_clock(self, sequence: Sequence) -> None:
        clock = self._clocks.get(sequence if sequence.own_clock else sequence.step_s)
        if clock is not None:
            clock.members.pop(sequence, None)

    def _step(self, clock: _Clock, now: float) -> None:
        """One step of all sequences on `clock`; without a step length, steps until the turn is full."""
        emitted = tokens = 0
        while clock.members:
            for sequence in tuple(clock.members):
                self._emit(sequence, sequence.width)
                emitted += 1
                tokens += sequence.width
            if clock.step_s or emitted >= _FRAMES_PER_TURN:
                break
        self._ledger.generation_tokens += tokens
        stretch = 1 + self._jitter * self._random.uniform(-1, 1) if self._jitter else 1.0
        # a loop that is late goes on from now: bursts that catch up would be no engine's
        clock.next_at = max(clock.next_at + clock.step_s * stretch, now)

    def _emit(self, sequence: Sequence, tokens: int) -> None:
        """Write what the sequence's next step holds."""
        sequence.record.tokens_sent += tokens
        send = sequence.sock.send
        ops = next(sequence.steps)
        for index, op in enumerate(ops):
            if not isinstance(op, bytes):
                if op is Cut.BREATH:
                    self._write_apart(sequence, ops[index:])
                else:
                    self._cut(sequence, op)
                return
            try:
                sent = send(op)
            except BlockingIOError:
                sent = 0
            except OSError:
                self._end(sequence, State.ABORTED)
                return
            if sent != len(op):
                self._write_apart(sequence, [op[sent:], *ops[index + 1 :]])
                return

    def _write_apart(self, sequence: Sequence, ops: list[Op]) -> None:
        """Let a task of its own write `ops`; the sequence takes no part in steps until that is done."""
        sequence.backlog.extend(ops)
        self._leave_clock(sequence)
        self._nursery.start_soon(self._write_backlog, sequence)

    async def _write_backlog(self, sequence: Sequence) -> None:
        backlog = sequence.backlog
        while backlog and not sequence.has_ended:
            op = backlog[0]
            if isinstance(op, bytes):
                if not await self._send_all(sequence, op):
                    return
            elif op is Cut.BREATH:
                await trio.lowlevel.checkpoint()
            else:
                self._cut(sequence, op)
                return
            backlog.popleft()
        if sequence.is_decoding and not sequence.has_ended:
            self._join_clock(sequence, trio.current_time())

    async def _send_all(self, sequence: Sequence, data: bytes) -> bool:
        """Whether all of `data` has left; false: the sequence has ended meanwhile."""
        while data and not sequence.has_ended:
            try:
                data = data[sequence.sock.send(data) :]
            except BlockingIOError:
                try:
                    await trio.lowlevel.wait_writable(sequence.sock)
                except trio.ClosedResourceError:  # aborted: its connection's task has closed the socket
                    return False
            except OSError:
                self.abort(sequence)
                return False
        return not data

    def _cut(self, sequence: Sequence, op: Cut) -> None:
        """The answer ends here, well or badly."""
        sequence.cut = op
        self._leave_clock(sequence)
        if op is Cut.END:
            self._end(sequence, State.COMPLETED)
        elif op is not Cut.STALL:  # which is silent, but still running until its client leaves
            self._end(sequence, State.FAILED)

    def _end(self, sequence: Sequence, state: State) -> None:
        if sequence.record.state is State.RUNNING:
            self._running -= 1
            self._ledger.blocks_in_use -= sequence.blocks
        self._ledger.move(sequence.record, state)
        self._queue.pop(sequence, None)
        self._leave_clock(sequence)
        sequence.on_end()
        self._admit()
