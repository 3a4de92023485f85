"""A load process: takes a job on standard input, says it is ready, runs it at the instant it is told, hands in a tally.

    python -m relay_bench.load.worker

Messages are MessagePack, each behind its length in four bytes. The process draws nothing and writes no file: whatever
it does besides sending and receiving would be in its figures.
"""

from __future__ import annotations

import gc
import os
import ssl
import statistics
import sys
import time
from collections import deque
from itertools import pairwise
from typing import TYPE_CHECKING, Final

import msgspec
import trio

from relay.core.request import Route
from relay_bench.load.answer import Answer
from relay_bench.load.client import Client, Exchange
from relay_bench.load.records import Record, Tally, inter_token_ns
from relay_bench.load.stats import Histogram
from relay_bench.load.target import Target
from relay_bench.processes import raise_descriptor_limit, run_delay_ns

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import BinaryIO, Self

#: Between two reports of how it goes.
_REPORT_NS: Final = 250_000_000
#: Seconds a turn may keep trio waiting; nothing but signals wants it meanwhile, and they interrupt the wait.
_BLOCK_S: Final = 0.1


class Item(msgspec.Struct, array_like=True):
    """One request of the schedule."""

    index: int
    planned_ns: int
    body: bytes
    output_len: int | None


class Manner(msgspec.Struct, frozen=True, kw_only=True):
    """How requests are sent and answers read: of a plan, and the same for each of its jobs."""

    route: Route
    request_id_prefix: str = ""  #: empty: none is sent
    is_closed_loop: bool = False  #: instants do not matter: the next request goes when a place is free
    timeout_s: float = 600.0
    keep_alive: bool = True
    verify_tls: bool = True
    continuous_usage: bool = False
    has_stamps: bool = False
    is_exact: bool = False  #: answers must be as long as asked for
    is_detailed: bool = False  #: records keep all content frames' marks


class Job(msgspec.Struct, kw_only=True):
    """What one load process is to do."""

    target: Target
    manner: Manner
    head: bytes  #: request line and fields, but for length and id
    items: list[Item]  #: in the order of their instants
    total: int  #: items of all processes
    max_concurrency: int = 0  #: 0: no limit
    duration_ns: int = 0  #: closed loop: none is sent later; items are used again if they run out. 0: each item once
    measured_from_ns: int = 0
    measured_to_ns: int | None = None
    num_warmups: int = 0  #: requests sent one after the other before the run, in no figure


class Progress(msgspec.Struct, tag="progress"):
    """How it goes: totals so far, and the times to first token since the last report."""

    in_flight: int
    done: int
    failed: dict[str, int]
    content_frames: int
    ttfts_ns: list[int]


class Ready(msgspec.Struct, tag="ready"):
    """The job is prepared; the answer is a `Start`."""


class Start(msgspec.Struct, tag="start"):
    """Begin at this instant of CLOCK_MONOTONIC, which all processes share."""

    at_ns: int


class Done(msgspec.Struct, tag="done"):
    """The end of the run."""

    tally: Tally


Message = Progress | Ready | Done
encode: Final = msgspec.msgpack.Encoder().encode
decode: Final = msgspec.msgpack.Decoder(Message).decode


def framed(message: msgspec.Struct) -> bytes:
    """A message as it is written to a pipe."""
    data = encode(message)
    return len(data).to_bytes(4, "big") + data


class Run:
    """One job being done."""

    def __init__(self, job: Job, emit: Callable[[Progress], None], *, block_s: float = 0.0) -> None:
        self._job = job
        self._manner = manner = job.manner
        self._emit = emit
        self._block_s = block_s
        self._tally = Tally([], Histogram(), Histogram(), Histogram(), Histogram(), cpu_s=0.0, wall_s=0.0)
        self._client = Client(
            job.target,
            self._on_done,
            timeout_s=manner.timeout_s,
            keep_alive=manner.keep_alive,
            tls=_tls_context(manner) if job.target.tls_name else None,
            client_delay=self._tally.client_delay,
        )
        self._pending = deque(job.items)
        self._late: deque[Item] = deque()  # due, and not sent
        self._free: deque[int] = deque()  # with a limit: since when each place that is free has been so
        self._in_flight = 0
        self._progress = Progress(0, 0, {}, 0, [])
        self._next_report_ns = 0
        self._start_ns = 0

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self._client.close()

    async def warm_up(self) -> None:
        """Sends the job's first request again and again, one after the other, which nothing counts.

        Always the same, as vLLM does: prefix caches are to know no more than that one of what is measured.
        """
        job = self._job
        for _ in range(job.num_warmups):
            exchange = self._exchange(job.items[0], 0, 0)
            self._client.start(exchange, time.monotonic_ns())
            while not exchange.answer.is_done:
                await self._client.turn(0, lambda _: 0, block_s=self._block_s)
        self._tally.records.clear()
        self._progress = Progress(0, 0, {}, 0, [])
        for histogram in ("frame_gap", "itl", "client_delay", "frame_delay"):
            getattr(self._tally, histogram).clear()

    async def run(self, start_ns: int) -> Tally:
        """Does the job; instants of its items count from `start_ns`."""
        self._start_ns = start_ns
        self._free = deque([0] * self._job.max_concurrency)
        self._next_report_ns = start_ns + _REPORT_NS
        reads, cpu_s, waited_ns = self._client.reads, time.process_time(), run_delay_ns()
        wake_ns = start_ns
        while self._pending or self._late or self._in_flight:
            await self._client.turn(wake_ns, self._on_due, block_s=self._block_s)
            wake_ns = self._on_due(time.monotonic_ns())
        self._tally.cpu_s = time.process_time() - cpu_s
        self._tally.waited_s = (run_delay_ns() - waited_ns) / 1e9
        self._tally.wall_s = (time.monotonic_ns() - start_ns) / 1e9
        self._tally.reads = self._client.reads - reads
        self._tally.retried = self._client.retried
        return self._tally

    # -- what is due

    def _on_due(self, now_ns: int) -> int:
        """Sends what is due, reports if it is time; the next instant something is."""
        since_ns = now_ns - self._start_ns
        if since_ns < 0:
            return self._start_ns
        if self._manner.is_closed_loop:
            self._fill_places()
        else:
            self._send_due(since_ns)
        if now_ns >= self._next_report_ns:
            self._report(now_ns)
        if self._pending and not self._manner.is_closed_loop:
            return min(self._next_report_ns, self._start_ns + self._pending[0].planned_ns)
        return self._next_report_ns

    def _send_due(self, since_ns: int) -> None:
        pending, late, is_limited = self._pending, self._late, bool(self._job.max_concurrency)
        while pending and pending[0].planned_ns <= since_ns:
            late.append(pending.popleft())
        while late and (self._free or not is_limited):
            item = late.popleft()
            self._send(item, item.planned_ns, max(item.planned_ns, self._free.popleft() if is_limited else 0))

    def _fill_places(self) -> None:
        job = self._job
        while self._pending and self._free:
            if job.duration_ns and time.monotonic_ns() - self._start_ns >= job.duration_ns:
                self._pending.clear()
                return
            item, free_ns = self._pending.popleft(), self._free.popleft()
            if not free_ns:  # the first of its place, which nothing kept from being taken
                free_ns = time.monotonic_ns() - self._start_ns
            self._send(item, free_ns, free_ns)
            if job.duration_ns:
                self._pending.append(Item(item.index + job.total, 0, item.body, item.output_len))

    def _send(self, item: Item, planned_ns: int, due_ns: int) -> None:
        self._client.start(self._exchange(item, planned_ns, due_ns), time.monotonic_ns())

    def _exchange(self, item: Item, planned_ns: int, due_ns: int) -> Exchange:
        manner = self._manner
        fields = f"content-length: {len(item.body)}\r\n"
        if manner.request_id_prefix:
            fields += f"x-request-id: {manner.request_id_prefix}-{item.index}\r\n"
        request = self._job.head + fields.encode("ascii") + b"\r\n" + item.body
        answer = Answer(manner.route, continuous_usage=manner.continuous_usage, has_stamps=manner.has_stamps)
        self._in_flight += 1
        exchange = Exchange(item.index, request, answer, planned_ns, due_ns)
        exchange.expected = item.output_len
        return exchange

    # -- what is done

    def _on_done(self, exchange: Exchange) -> None:
        self._in_flight -= 1
        if self._job.max_concurrency:
            self._free.append(exchange.done_ns - self._start_ns)
            self._client.wake()
        record = self._record(exchange)
        self._tally.records.append(record)
        progress = self._progress
        progress.done += 1
        progress.content_frames += record.content_frames
        if record.label:
            progress.failed[record.label] = progress.failed.get(record.label, 0) + 1
            return
        if (ttft_s := record.metric_s("ttft_planned")) is not None:
            progress.ttfts_ns.append(round(ttft_s * 1e9))
        if record.is_measured:
            self._count_frames(exchange, record)

    def _record(self, exchange: Exchange) -> Record:
        job, answer, start_ns = self._job, exchange.answer, self._start_ns
        label, error = answer.fault(exchange.expected, is_exact=self._manner.is_exact)
        content = answer.content_ns
        usage = answer.usage
        end_ns = job.measured_to_ns

        def since(mark_ns: int) -> int | None:
            return mark_ns - start_ns if mark_ns else None

        return Record(
            index=exchange.index,
            planned_ns=exchange.planned_ns,
            due_ns=exchange.due_ns,
            sent_ns=exchange.sent_ns - start_ns,
            connected_ns=since(exchange.connected_ns),
            written_ns=since(exchange.written_ns),
            head_ns=since(answer.head_ns),
            first_byte_ns=since(answer.first_byte_ns),
            first_content_ns=since(content[0]) if content else None,
            last_content_ns=since(content[-1]) if content else None,
            done_ns=exchange.done_ns - start_ns,
            label=label,
            error=error,
            status=answer.status or None,
            is_reused=exchange.is_reused,
            frames=answer.frames,
            content_frames=len(content),
            bytes_in=answer.bytes_in,
            prompt_tokens=usage.prompt_tokens if usage else None,
            completion_tokens=usage.completion_tokens if usage else None,
            finish_reason=answer.meter.finish_reason,
            is_measured=job.measured_from_ns <= exchange.planned_ns
            and (end_ns is None or exchange.planned_ns < end_ns),
            content_ns=[mark - start_ns for mark in content] if self._manner.is_detailed else None,
        )

    def _count_frames(self, exchange: Exchange, record: Record) -> None:
        """Adds a good request's frames to the histograms."""
        answer, tally = exchange.answer, self._tally
        marks = answer.content_ns.tolist()
        gaps = [later - earlier for earlier, later in pairwise(marks)]
        for gap in gaps:
            tally.frame_gap.add(gap)
        record.gap_max_ns = max(gaps, default=None)
        counts = answer.token_counts
        itls: list[int] = []
        if counts is not None:
            record.itl_source, itls = "continuous", inter_token_ns(marks, counts)
        elif record.completion_tokens == len(marks):
            record.itl_source, itls = "frames", gaps
        for itl in itls:
            tally.itl.add(itl)
        if self._manner.is_detailed and record.itl_source != "none":
            record.itls_ns = itls
        tally.lost_stamps += answer.lost_stamps
        stamps = answer.stamps_us
        if stamps is not None and len(stamps) == len(marks):
            delays = [mark - stamp * 1000 for mark, stamp in zip(marks, stamps, strict=True)]
            for delay in delays:
                tally.frame_delay.add(delay)
            record.frame_delay_ns = round(statistics.median(delays)) if delays else None

    def _report(self, now_ns: int) -> None:
        self._next_report_ns = now_ns + _REPORT_NS
        self._progress.in_flight = self._in_flight
        self._emit(self._progress)
        self._progress.ttfts_ns = []


def _tls_context(manner: Manner) -> ssl.SSLContext:
    context = ssl.create_default_context()
    if not manner.verify_tls:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


# -- the process


def main() -> None:
    """Serve the parent: a job in, figures out."""
    source, sink = sys.stdin.buffer, os.dup(1)
    os.dup2(2, 1)  # whoever prints by mistake must not spoil the messages
    raise_descriptor_limit()

    def emit(message: msgspec.Struct) -> None:
        data = framed(message)
        while data:
            data = data[os.write(sink, data) :]

    try:
        trio.run(_serve, msgspec.msgpack.decode(_read(source), type=Job), source, emit)
    except (KeyboardInterrupt, EOFError, BrokenPipeError):
        sys.exit(130)


async def _serve(job: Job, source: BinaryIO, emit: Callable[[msgspec.Struct], None]) -> None:
    async with Run(job, emit, block_s=_BLOCK_S) as run:
        await run.warm_up()
        gc.collect()
        gc.freeze()  # what the job holds is never looked through again
        emit(Ready())
        start = msgspec.msgpack.decode(_read(source), type=Start)  # nothing else wants this process meanwhile
        tally = await run.run(start.at_ns)
    emit(Done(tally))


def _read(source: BinaryIO) -> bytes:
    size = source.read(4)
    if len(size) < 4:
        raise EOFError
    return source.read(int.from_bytes(size, "big"))


if __name__ == "__main__":
    main()
