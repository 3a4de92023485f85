"""The daemon of one worker: no control process, and nothing to be told to anybody, shared or added up."""

from __future__ import annotations

import signal
import ssl
import sys
from collections.abc import AsyncIterator, Callable
from functools import partial

import trio

from relay.config import Config
from relay.daemon import systemd
from relay.daemon.garbage import Garbage
from relay.daemon.listeners import Listeners, announce, announce_admin
from relay.daemon.process import receive_signals, record_sink, tell_of_drain
from relay.daemon.records import RecordWriter
from relay.daemon.reload import ReloadBySignal
from relay.daemon.worker import Worker
from relay.net.callbacks import ListenError
from relay.net.guard import Guard
from relay.net.notices import Priority, say


async def serve(
    config: Config,
    guard: Guard,
    tls_context: ssl.SSLContext | None,
    listeners: Listeners,
    admin: Listeners,
    load_config: Callable[[], Config] | None,
) -> int:
    """A worker with what a process has around it: signals, and records on standard output. The exit status."""
    status = 0
    writer = RecordWriter(sys.stdout.fileno())
    sink = partial(record_sink, writer)
    garbage = Garbage()
    worker = Worker(config, listeners, sink, admin, load_config, guard=guard, tls_context=tls_context)
    writer.on_drop = worker.service.tally.records_dropped
    with receive_signals() as signals:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(writer.run)
            nursery.start_soon(obey, worker, signals, nursery)
            try:
                await nursery.start(worker.run)
            except ListenError as exc:
                say(f"relay: {exc}", Priority.ERROR)
                status = 1
            else:
                garbage.settle()
                nursery.start_soon(garbage.watch)
                if worker.service.is_ready:
                    announce(listeners.urls)
                    announce_admin(admin.urls, config.admin.address)
                    systemd.ready(f"serving on {', '.join(listeners.urls)}")
                    worker.is_announced = True
                if (limit_s := systemd.watchdog_s()) is not None:
                    nursery.start_soon(_feed_watchdog, limit_s / 2)
            await worker.stopped.wait()
            nursery.cancel_scope.cancel()
    return status


async def obey(worker: Worker, signals: AsyncIterator[int], nursery: trio.Nursery) -> None:
    """SIGHUP reloads, in the background; the first signal to stop drains, the second cuts."""
    by_signal = ReloadBySignal(worker.reload, lambda: worker.is_serving)
    async for number in signals:
        if number == signal.SIGHUP:
            nursery.start_soon(by_signal.run)
        elif not worker.service.is_ready:
            worker.cut()
        else:
            systemd.stopping("draining")
            worker.stop()
            nursery.start_soon(tell_of_drain, lambda: len(worker.service.active), worker.service.config.daemon)


async def _feed_watchdog(interval_s: float) -> None:
    """A sign of life from the event loop that carries the traffic: where it hangs, systemd is to begin anew."""
    while True:
        systemd.feed_watchdog()
        await trio.sleep(interval_s)
