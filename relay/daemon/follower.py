"""A worker under a control process: it carries traffic, and is told all it knows of the fleet."""

from __future__ import annotations

import socket
import ssl
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Final

import msgspec
import trio

from relay.config import Config, LogConfig
from relay.core.status import ExchangeStatus, Status
from relay.core.timeline import Record
from relay.daemon import messages
from relay.daemon.forker import name_process
from relay.daemon.garbage import Garbage
from relay.daemon.key_limits import impose
from relay.daemon.listeners import Listeners
from relay.daemon.messages import Channel, Done, Member, Order, PoolMembers, Said
from relay.daemon.process import record_sink
from relay.daemon.records import RecordWriter
from relay.daemon.scoreboard import Scoreboard, Slot
from relay.daemon.worker import Worker
from relay.net import tls
from relay.net.callbacks import url_of_worker
from relay.net.fleet import Pool
from relay.net.group import Group
from relay.net.guard import Guard
from relay.net.notices import Priority, say
from relay.net.pool import Upstream
from relay.net.report import exchanges_of, status_of
from relay.net.shares import Permits, Shares
from relay.net.tls import TlsListener

_encode: Final = msgspec.msgpack.Encoder().encode


def work(
    config: Config,
    guard: Guard,
    tls_context: ssl.SSLContext | None,
    scoreboard: Scoreboard,
    beat_s: float,
    number: int,
    sock: socket.socket,
) -> int:
    """A worker's process: its exit status. `number` is that of its slot, `sock` leads to the control process."""
    name_process(f"relay worker {number + 1}")
    trio.run(_work, config, guard, tls_context, scoreboard, beat_s, number, sock)
    return 0


async def _work(
    config: Config,
    guard: Guard,
    tls_context: ssl.SSLContext | None,
    scoreboard: Scoreboard,
    beat_s: float,
    number: int,
    sock: socket.socket,
) -> None:
    writer = RecordWriter(sys.stdout.fileno())
    worker = Follower(config, guard, partial(record_sink, writer), scoreboard, number, Channel(sock))
    garbage = Garbage()
    worker.tls_context = tls_context  # until it is told of a configuration
    writer.on_drop = worker.service.tally.records_dropped
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_beat, scoreboard.slot(number), beat_s)
        nursery.start_soon(writer.run)
        await nursery.start(worker.run)
        garbage.settle()
        nursery.start_soon(garbage.watch)
        await worker.stopped.wait()
        nursery.cancel_scope.cancel()


async def _beat(slot: Slot, beat_s: float) -> None:
    """Shows that the event loop turns."""
    while True:
        slot.set_beat(time.monotonic())
        await trio.sleep(beat_s)


class Follower(Worker):
    """Serves as a worker does, with a fleet that is told."""

    def __init__(
        self,
        config: Config,
        guard: Guard,
        record_sink: Callable[[LogConfig], Callable[[Record], None] | None],
        scoreboard: Scoreboard,
        number: int,
        channel: Channel,
    ) -> None:
        slot = scoreboard.slot(number)
        super().__init__(config, Listeners(), record_sink, board=slot.board, guard=guard)
        self._scoreboard = scoreboard
        self._number = number
        self._shares = Shares(slot.loads, slot.held)
        self._sockets: dict[int, socket.socket] = {}  # those to accept at, by number
        self._channel = channel
        self._permits: dict[int, Permits] = {}
        self._background: trio.Nursery | None = None

    async def open_callbacks(self) -> None:
        """The control process listens for decoders."""

    async def look_after_fleet(self, background: trio.Nursery) -> None:
        """Begins to listen to the control process; comes back when it has told of the fleet."""
        self._background = background
        background.start_soon(self._channel.deliver)
        await background.start(self._run)

    async def _run(self, *, task_status: trio.TaskStatus[None]) -> None:
        """Does what it is told; drains when nobody is there to tell any more."""
        is_begun = False
        while (order := await self._channel.receive()) is not None:
            self._obey(order)  # type: ignore[arg-type]  # the control process sends orders only
            if isinstance(order, messages.Fleet) and not is_begun:
                is_begun = True
                task_status.started()
        if not is_begun:
            task_status.started()
        self.stop()

    def _obey(self, order: Order) -> None:
        match order:
            case messages.Fleet():
                self._take_on(order)
                self._channel.send(Done(order.serial))
            case messages.Listen(numbers, new, secure):
                fds = self._channel.fds
                known = self._sockets | {
                    each: (TlsListener if each in secure else socket.socket)(fileno=fds.popleft()) for each in new
                }
                for each in known.keys() - {*numbers}:
                    if known[each] not in self._accepts:
                        known[each].close()
                self._sockets = {each: known[each] for each in numbers if each in known}
                self.listeners = Listeners(self._sockets.values())
            case messages.Semaphores(numbers, are_gone):
                for number in numbers:
                    self._unlimit(number)
                    if not are_gone:
                        self._limit(number, self._channel.fds.popleft())
            case messages.KeySemaphores(limits, are_gone):
                for limit in limits:
                    fd = None if are_gone else self._channel.fds.popleft()
                    impose(self.service.keys, limit, fd, self._shares.held)
            case messages.AskStatus(serial):
                self.service.tally.take_in(self.service)
                answer: Status | list[ExchangeStatus] = status_of(self.service)
                self._channel.send(Said(serial, _encode(answer)))
            case messages.AskExchanges(serial):
                self._channel.send(Said(serial, _encode(exchanges_of(self.service))))
            case messages.Call(key, body):
                if key in self.service.callbacks:
                    self.service.callbacks[key](body)
            case messages.Drain():
                self.stop()
            case messages.Cut():
                self.cut()

    # -- the fleet

    def _limit(self, number: int, fd: int) -> None:
        assert self._background is not None
        permits = self._permits[number] = Permits(fd, number, self._shares.held)
        self._background.start_soon(permits.watch)

    def _unlimit(self, number: int) -> None:
        """Lets go of a limit; places that are held of it keep it until they are given back."""
        permits = self._permits.pop(number, None)
        if permits is not None:
            permits.retire()
            permits.on_free = lambda: None  # else it and its engine would keep each other

    def _take_on(self, order: messages.Fleet) -> None:
        """Makes the fleet what the control process says it is; what is under way goes on."""
        if order.config is not None:
            config, credentials = order.config
            self.take_on(config)
            self.service.reconfigure(config, Guard(config.auth, credentials))
            self.service.fleet.reconfigure(config)
            try:
                self.take_on_tls(tls.read(config))
            except tls.TlsError as problem:  # the control process could use it a moment ago
                say(f"relay: {problem}; what was read before stays in force", Priority.ERROR)
        self._shares.others = [self._scoreboard.slot(each).loads for each in order.workers if each != self._number]
        told = {pool.name: pool for pool in order.pools}
        for pool in self.service.fleet.pools:
            self._settle_pool(pool, told[pool.name])
        self.accept_anew()

    def _settle_pool(self, pool: Pool, told: PoolMembers) -> None:
        pool.callback_url = url_of_worker(told.callback_url, self._number + 1)
        pool.number = told.number or 0
        pool.shares = None if told.number is None else self._shares
        pool.permits = self._permits_for(told.number, told.is_limited, pool.advance)
        for role, group in pool.groups.items():
            wanted = {member.config.url: member for member in told.members if member.role == role}
            for url, upstream in list(group.upstreams.items()):
                if url not in wanted or wanted[url].config != upstream.config:
                    group.remove(url)
            group.shares = self._shares
            for url, member in wanted.items():
                self._settle(pool, group, group.upstreams.get(url) or group.add(member.config), member)
        pool.advance()

    def _settle(self, pool: Pool, group: Group, upstream: Upstream, member: Member) -> None:
        def on_free() -> None:
            group.refresh(upstream)
            pool.advance()

        upstream.number = member.number or 0
        upstream.shares = None if member.number is None else self._shares
        upstream.permits = self._permits_for(member.number, member.is_limited, on_free)
        upstream.is_resolved = member.is_resolved
        upstream.health.has_been_up = member.has_been_up
        if member.is_probed and member.is_up != upstream.health.is_up:
            upstream.health.on_verdict(member.is_up, time.monotonic())
            if not member.is_up and member.error is not None:
                upstream.note_error(member.error, member.error_at)
        upstream.probe_s = member.probe_s
        if member.models is not None:
            upstream.models = {name: msgspec.Raw(entry) for name, entry in member.models.items()}
        upstream.show_load()
        group.refresh(upstream)

    def _permits_for(self, number: int | None, is_limited: bool, on_free: Callable[[], None]) -> Permits | None:
        if number is None or not is_limited:
            return None
        permits = self._permits[number]
        permits.on_free = on_free
        return permits
