"""The workers, as the control process has them: begun, told of changes, asked, replaced when they die, told to end."""

from __future__ import annotations

import itertools
import math
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import Final

import msgspec
import trio

from relay.config import Config
from relay.core.board import total
from relay.core.metrics import IN_FLIGHT
from relay.core.status import ExchangeStatus, Status
from relay.daemon import messages
from relay.daemon.forker import Ended, Forked, Forker, NotForked
from relay.daemon.key_limits import KeyLimits
from relay.daemon.listeners import Listeners
from relay.daemon.membership import Membership, Told
from relay.daemon.messages import Channel, Copy, Done, Message, PoolMembers, Said, parts
from relay.daemon.process import CUT_S, GRACE_S
from relay.daemon.scoreboard import Scoreboard, Slot
from relay.net.notices import Priority, say
from relay.net.service import Service
from relay.net.tls import TlsListener

#: Seconds before a worker that died is replaced, doubled each time until one has lived for `STEADY_S`. The longest is
#: below half of the units' WatchdogSec=: a daemon whose workers cannot live is begun anew.
FIRST_DELAY_S: Final = 0.05
LONGEST_DELAY_S: Final = 4.0
STEADY_S: Final = 10.0
#: Changes of the fleet are told together, so often at most: when a rack goes, its engines go down one after the other.
TELL_S: Final = 0.05
#: How often they are tried to be told where descriptors are short.
RETRY_S: Final = 0.5
#: How long a worker whose channel has ended may take to end, before another begins beside it.
END_S: Final = 0.5
#: How long a worker may take to answer, or to take on a change, before others go on without it.
ANSWER_S: Final = 2.0
#: What may wait for a worker that does not read, beyond what is always told: of decoders' messages.
MOST_UNSENT_BYTES: Final = 67_108_864
#: Questions that a worker may owe answers to; it is asked no more until then.
MOST_OWED: Final = 16

_decode_status: Final = msgspec.msgpack.Decoder(Status).decode
_decode_exchanges: Final = msgspec.msgpack.Decoder(list[ExchangeStatus]).decode


class _Worker:
    """One worker, or the place of one."""

    def __init__(self, number: int, slot: Slot) -> None:
        self.number = number
        self.slot = slot
        self.is_alive = False  #: it has been asked for, and not ended; also False when nobody can tell any more
        self.pid: int | None = None  #: None: not told yet, or it has ended
        self.channel: Channel | None = None  #: None: it is gone, or drains as it cannot be told anything any more
        self.config: Config | None = None  #: what it was told last
        self.limits = Told()  #: likewise
        self.sockets: list[int] = []  #: likewise, listening ones by number
        self.told = 0  #: the last change it was told of
        self.confirmed = 0  #: the last it has taken on
        self.is_leaving = False  #: nobody is to come to its place: there are to be fewer, or another place is filled
        self.answers: dict[int, bytes | None] = {}  #: to what it was asked, None: not yet
        self.owed = 0


class Crew:
    """All workers."""

    def __init__(self, service: Service, scoreboard: Scoreboard, forker: Forker, listeners: Listeners) -> None:
        self._service = service
        self._scoreboard = scoreboard
        self._listeners = listeners
        self._forker = forker
        self._membership = Membership(service, scoreboard)
        self._workers: list[_Worker] = []
        self._nursery: trio.Nursery | None = None
        self._count = 0  #: of those there are to be
        self._version = 1  #: of the fleet as the workers know it, or are about to
        self._questions = 0
        self._has_changed = trio.Event()
        self._is_short = False  # of descriptors, to tell of the last change
        self._news = trio.Event()  # set, and made anew, whenever a worker has said something or gone
        self._is_ending = False
        self.ended = trio.Event()  #: all are gone, and no others come

    def __repr__(self) -> str:
        return f"<Crew {sum(worker.channel is not None for worker in self._workers)} of {len(self._workers)}>"

    @property
    def blocks(self) -> list[memoryview[int]]:
        """The workers' boards, also of those that are gone."""
        return [slot.board for slot in self._scoreboard.slots]

    @property
    def pids(self) -> list[int]:
        """All processes of the daemon."""
        return [os.getpid(), self._forker.pid, *(worker.pid for worker in self._workers if worker.pid is not None)]

    @property
    def oldest_beat(self) -> float:
        """When the event loop turned of the worker where that is longest ago (monotonic clock).

        One that has died counts until it is replaced; one that has drained does not.
        """
        expected = (
            worker.slot.beat for worker in self._workers if worker.channel is not None or not self._is_over(worker)
        )
        return min(expected, default=math.inf)

    def count_in_flight(self) -> int:
        """Exchanges of all workers, at most a second ago."""
        return round(sum(cells[0] for key, cells in total(self.blocks).items() if key[0] == IN_FLIGHT.name))

    def _is_over(self, worker: _Worker) -> bool:
        """Whether nobody is to come to a worker's place any more."""
        return self._is_ending or worker.is_leaving

    async def run(self, count: Callable[[], int], on_lost: Callable[[], None]) -> None:
        """Has so many workers work, until told to end they have; `on_lost`: none can be replaced any more."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._membership.run)
            nursery.start_soon(self._tell_changes)
            nursery.start_soon(self._watch_forker, on_lost)
            async with trio.open_nursery() as self._nursery:
                self.resize(count())
            self.ended.set()
            nursery.cancel_scope.cancel()

    async def begun(self) -> None:
        """Waits until each has begun to serve, or is not to."""
        while not self._is_ending and not (self._workers and all(worker.confirmed for worker in self._workers)):
            await self._news.wait()

    def most_workers(self) -> int:
        """As many there can be, beside those that are leaving."""
        return self._scoreboard.room - sum(worker.is_leaving for worker in self._workers)

    @property
    def key_limits(self) -> KeyLimits:
        """Those of all keys, which are settled with the next change of the fleet."""
        return self._membership.key_limits

    def resize(self, count: int) -> None:
        """Has so many workers, at most `most_workers`: others begin, or the last drain and are not replaced."""
        if self._nursery is None or self._is_ending:
            return
        self._count = count
        staying = [worker for worker in self._workers if not worker.is_leaving]
        for worker in staying[count:]:
            worker.is_leaving = True
            self._nursery.start_soon(self._retire, worker)
        taken = {worker.number for worker in self._workers}
        free = (number for number in itertools.count(1) if number not in taken)
        for number in itertools.islice(free, max(0, count - len(staying))):
            worker = _Worker(number, self._scoreboard.slot(number - 1))
            self._workers.append(worker)
            self._nursery.start_soon(self._keep, worker)
        self.fleet_changed()
        self._announce()

    # -- beginning and ending

    async def _keep(self, worker: _Worker) -> None:
        """A worker in this place, and after it another."""
        delay_s = FIRST_DELAY_S
        while not self._is_over(worker):
            began = time.monotonic()
            worker.slot.set_beat(began)
            try:
                sock = self._forker.fork(worker.number - 1)
            except ConnectionError:
                return  # `_watch_forker` knows
            except OSError as exc:
                say(f"relay: cannot begin a worker: {exc.strerror}; trying again", Priority.ERROR)
            else:
                worker.is_alive = True
                with sock:
                    await self._listen_to(worker, Channel(sock))
                await self._replace_if_it_lives_on(worker)
                while worker.is_alive:  # it goes on writing in its slot, where there is no room for two
                    await self._see_off(worker)
                worker.pid = None
                self._membership.give_back(worker.slot.vacate())
            if time.monotonic() - began > STEADY_S:
                delay_s = FIRST_DELAY_S
            with trio.move_on_after(delay_s):
                while not self._is_over(worker):
                    await self._news.wait()
            delay_s = min(2 * delay_s, LONGEST_DELAY_S)
        self._workers.remove(worker)
        self.fleet_changed()

    async def _replace_if_it_lives_on(self, worker: _Worker) -> None:
        """A worker that can be told nothing any more drains: another begins in another place, where there is one."""
        with trio.move_on_after(END_S):
            while worker.is_alive:
                await self._news.wait()
            return
        if not self._is_over(worker) and len(self._workers) < self._scoreboard.room:
            worker.is_leaving = True
            self.resize(self._count)

    async def _retire(self, worker: _Worker) -> None:
        """Has a worker drain."""
        if worker.channel is not None:
            worker.channel.send(messages.Drain())
        await self._see_off(worker)

    async def _see_off(self, worker: _Worker) -> None:
        """Waits until a worker that drains has ended; ends it if it does not end by itself."""
        daemon = self._service.config.daemon
        with trio.move_on_after(daemon.ready_delay_s + daemon.drain_s + CUT_S + GRACE_S):
            while worker.is_alive:
                await self._news.wait()
            return
        _kill(worker)

    async def _listen_to(self, worker: _Worker, channel: Channel) -> None:
        worker.channel, worker.config, worker.limits, worker.sockets = channel, None, Told(), []
        worker.told = worker.confirmed = worker.owed = 0
        async with trio.open_nursery() as nursery:
            nursery.start_soon(channel.deliver)
            self._tell_now([worker])
            if self._is_over(worker):
                channel.send(messages.Drain())
            while (message := await channel.receive()) is not None:
                match message:
                    case Done(serial):
                        worker.confirmed = serial
                        if serial < self._version:
                            self._tell_now([worker])
                    case Said(serial, answer):
                        worker.owed -= 1
                        if serial in worker.answers:
                            worker.answers[serial] = answer
                self._announce()
            nursery.cancel_scope.cancel()
        channel.close()
        worker.channel = None
        self._announce()

    async def _watch_forker(self, on_lost: Callable[[], None]) -> None:
        while (event := await self._forker.next_event()) is not None:
            for worker in self._workers:
                match event:
                    case Forked(slot, pid) if slot == worker.number - 1:
                        worker.pid = pid
                    case NotForked(slot) if slot == worker.number - 1:
                        worker.is_alive = False
                    case Ended(pid, status) if pid == worker.pid:
                        self._on_end(worker, status)
            self._announce()
        for worker in self._workers:
            worker.is_alive = False
        self._announce()
        if not self._is_ending:
            say("relay: the process that workers are forked from is gone; draining", Priority.ERROR)
            on_lost()

    def _on_end(self, worker: _Worker, status: int) -> None:
        if status or not self._is_over(worker):
            how = signal.Signals(-status).name if status < 0 else f"status {status}"
            say(f"relay: worker {worker.pid} ended with {how}", Priority.ERROR)
        worker.is_alive = False
        worker.pid = None  # another may get the number

    def drain(self) -> None:
        """All are to end when what they have open has ended."""
        self._is_ending = True
        self._send_all(messages.Drain())
        self._announce()

    def cut(self) -> None:
        """All are to end now."""
        self._send_all(messages.Cut())
        for worker in self._workers:
            if worker.channel is None:
                _kill(worker)

    def kill(self) -> None:
        """Ends those that do not end."""
        for worker in self._workers:
            _kill(worker)

    # -- telling

    def fleet_changed(self) -> None:
        """Who is in the fleet, or up, has changed: the workers are told."""
        self._has_changed.set()

    def call(self, number: int, key: str, body: bytes) -> bool:
        """A decoder has called a worker back; False: too much waits already for that one to read."""
        channel = next((worker.channel for worker in self._workers if worker.number == number), None)
        if channel is None:
            return True  # who waited for it died with the worker
        if channel.unsent_bytes + len(body) > MOST_UNSENT_BYTES:
            return False
        channel.send(messages.Call(key, body))
        return True

    async def settle(self) -> None:
        """Waits until all workers know of the changes so far. Raises ValueError where one does not answer."""
        wanted = self._version + self._has_changed.is_set()
        with trio.move_on_after(ANSWER_S):
            while late := [worker for worker in self._workers if self._is_late(worker, wanted)]:
                await self._news.wait()
            return
        names = ", ".join(f"{worker.number} ({f'pid {worker.pid}' if worker.pid else 'to begin'})" for worker in late)
        raise ValueError(f"not confirmed within {ANSWER_S:g} s by worker {names}")

    def _is_late(self, worker: _Worker, wanted: int) -> bool:
        """Whether a worker has yet to know of a change, be it one that has yet to begin."""
        is_told = worker.channel is not None or not self._is_over(worker)
        return is_told and worker.confirmed < wanted

    async def _tell_changes(self) -> None:
        while True:
            await self._has_changed.wait()
            self._has_changed = trio.Event()
            self._version += 1
            # Whoever has yet to confirm what it was told before is told when it has.
            self._tell_now(worker for worker in self._workers if worker.confirmed == worker.told)
            await trio.sleep(RETRY_S if self._is_short else TELL_S)

    def _tell_now(self, workers: Iterable[_Worker]) -> None:
        """Tells these; where descriptors are short, `_tell_changes` tries again."""
        shortage: OSError | None = None
        try:
            pools = self._membership.fleet()
        except OSError as exc:
            workers, pools, shortage = (), [], exc
        for worker in workers:
            try:
                if worker.channel is not None:
                    self._tell(worker, pools)
            except OSError as exc:  # another may need no descriptors
                shortage = exc
        if shortage is not None:
            if not self._is_short:
                say(f"relay: cannot tell workers of a change: {shortage.strerror}; trying again", Priority.ERROR)
            self.fleet_changed()
        self._is_short = shortage is not None

    def _tell(self, worker: _Worker, pools: list[PoolMembers]) -> None:
        assert worker.channel is not None
        sockets = self._listeners.numbered
        if not self._is_over(worker) and worker.sockets != [*sockets]:
            added = [(number, Copy(sock)) for number, sock in sockets.items() if number not in worker.sockets]
            for some in [*parts(added)] or [[]]:
                new = [number for number, _ in some]
                secure = [number for number in new if isinstance(sockets[number], TlsListener)]
                worker.channel.send(messages.Listen([*sockets], new, secure), [copy for _, copy in some])
            worker.sockets = [*sockets]
        for semaphores, sources in self._membership.orders(worker.limits):
            worker.channel.send(semaphores, sources)
        config, guard = self._service.config, self._service.guard
        news = None if worker.config is config else (config, guard.credentials)
        workers = [each.number - 1 for each in self._workers]
        worker.channel.send(messages.Fleet(self._version, pools, news, workers))
        worker.config, worker.told = config, self._version

    # -- asking

    async def statuses(self) -> list[Status]:
        """What each worker is doing, and their boards up to date; of one that does not answer in time, nothing."""
        return [_decode_status(answer) for answer in await self._ask(messages.AskStatus)]

    async def exchanges(self) -> list[ExchangeStatus]:
        """All in flight."""
        found = await self._ask(messages.AskExchanges)
        return [exchange for answer in found for exchange in _decode_exchanges(answer)]

    async def _ask(self, question: type[messages.AskStatus | messages.AskExchanges]) -> list[bytes]:
        self._questions += 1
        serial = self._questions
        asked = []
        for worker in self._workers:
            if worker.channel is not None and worker.owed < MOST_OWED:
                worker.channel.send(question(serial))
                worker.answers[serial] = None
                worker.owed += 1
                asked.append(worker)
        try:
            with trio.move_on_after(ANSWER_S):
                while any(worker.channel is not None and worker.answers[serial] is None for worker in asked):
                    await self._news.wait()
        finally:
            answers = [worker.answers.pop(serial) for worker in asked]
        return [answer for answer in answers if answer is not None]

    def _send_all(self, message: Message) -> None:
        for channel in self._channels():
            channel.send(message)

    def _channels(self) -> Iterator[Channel]:
        return (worker.channel for worker in self._workers if worker.channel is not None)

    def _announce(self) -> None:
        """Something has happened that somebody may wait for."""
        self._news.set()
        self._news = trio.Event()


def _kill(worker: _Worker) -> None:
    if worker.pid is not None:
        with suppress(ProcessLookupError):
            os.kill(worker.pid, signal.SIGKILL)
