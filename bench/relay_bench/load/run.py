"""A plan carried out: load processes started, told when to begin, listened to, their tallies added up."""

from __future__ import annotations

import subprocess
import sys
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final

import msgspec
import trio

from relay_bench.load import worker
from relay_bench.load.answer import Answer
from relay_bench.load.client import Client, Exchange
from relay_bench.load.options import head_of
from relay_bench.load.worker import Done, Job, Progress, Ready, Start, framed

if TYPE_CHECKING:
    import argparse
    from collections.abc import AsyncGenerator, Callable

    from relay.core.request import Route
    from relay_bench.load.options import Plan
    from relay_bench.load.records import Tally
    from relay_bench.load.target import Target

#: From the moment all processes are ready to the start of the run: they need to hear of it.
_LEAD_NS: Final = 50_000_000
#: Seconds for a question before the run, such as which models there are.
_QUESTION_S: Final = 10.0
_NS: Final = 1_000_000_000


class LoadError(Exception):
    """There is nothing to measure; the message says why."""


def jobs_of(plan: Plan, target: Target) -> list[Job]:
    """The plan in shares, one for each load process: every n-th request, and its part of the places."""
    processes = plan.load_processes
    end_ns = round((plan.duration_s - plan.cooldown_s) * _NS) if plan.cooldown_s else None
    places, more = divmod(plan.max_concurrency, processes)
    return [
        Job(
            target=target,
            manner=plan.manner,
            head=head_of(plan, target),
            items=list(plan.items[share::processes]),
            total=len(plan.items),
            max_concurrency=places + (share < more),
            duration_ns=round(plan.duration_s * _NS) if plan.manner.is_closed_loop else 0,
            measured_from_ns=round(plan.warmup_s * _NS),
            measured_to_ns=end_ns,
            num_warmups=-(-plan.num_warmups // processes),
        )
        for share in range(processes)
    ]


async def run_plan(plan: Plan, target: Target, on_progress: Callable[[int, Progress], None]) -> Tally:
    """Carries out a plan; `on_progress` gets a process's number and its report.

    Raises `LoadError` in a group, as nurseries do.
    """
    jobs = jobs_of(plan, target)
    tallies: list[Tally] = []
    async with trio.open_nursery() as nursery:
        ready = _Gate(len(jobs))
        for number, job in enumerate(jobs):
            nursery.start_soon(_run_one, number, job, ready, on_progress, tallies)
    whole, *others = tallies
    for other in others:
        whole.merge(other)
    whole.records.sort(key=lambda record: record.index)
    return whole


class _Gate:
    """Opens when so many have come; then says when the run begins."""

    def __init__(self, missing: int) -> None:
        self._missing = missing
        self._opened = trio.Event()
        self._start_ns = 0

    async def passed(self) -> int:
        """Comes, waits for the others, and answers the start of the run."""
        self._missing -= 1
        if not self._missing:
            self._start_ns = time.monotonic_ns() + _LEAD_NS
            self._opened.set()
        await self._opened.wait()
        return self._start_ns


async def _run_one(
    number: int, job: Job, ready: _Gate, on_progress: Callable[[int, Progress], None], tallies: list[Tally]
) -> None:
    async with _started() as process:
        assert process.stdin is not None
        assert process.stdout is not None
        pipe = _Pipe(process.stdout)
        try:
            await process.stdin.send_all(framed(job))
            while True:
                message = await pipe.next()
                if isinstance(message, Ready):
                    await process.stdin.send_all(framed(Start(await ready.passed())))
                elif isinstance(message, Progress):
                    on_progress(number, message)
                elif isinstance(message, Done):
                    tallies.append(message.tally)
                    return
        except trio.BrokenResourceError:
            raise LoadError("a load process has died") from None


class _Pipe:
    """Messages from a load process."""

    def __init__(self, stream: trio.abc.ReceiveStream) -> None:
        self._stream = stream
        self._received = bytearray()

    async def next(self) -> worker.Message:
        """The next message; raises `LoadError` at the end."""
        size = int.from_bytes(await self._take(4), "big")
        message: worker.Message = worker.decode(await self._take(size))
        return message

    async def _take(self, size: int) -> bytes:
        while len(self._received) < size:
            data = await self._stream.receive_some(1 << 20)
            if not data:
                raise LoadError("a load process has died")
            self._received += data
        taken = bytes(self._received[:size])
        del self._received[:size]
        return taken


@asynccontextmanager
async def _started() -> AsyncGenerator[trio.Process, None]:
    command = [sys.executable, "-m", "relay_bench.load.worker"]
    process = await trio.lowlevel.open_process(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        yield process
    finally:
        with trio.CancelScope(shield=True, deadline=trio.current_time() + _QUESTION_S):
            process.kill()  # it has handed in its tally, or is of no use
            await process.wait()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                await stream.aclose()


# -- single requests


async def ask(target: Target, request: bytes, route: Route, *, timeout_s: float = _QUESTION_S) -> Exchange:
    """Sends one request and answers it with all that was seen of the answer."""
    done: list[Exchange] = []
    client = Client(target, done.append, timeout_s=timeout_s, keep_alive=False)
    try:
        exchange = Exchange(0, request, Answer(route), 0, 0)
        client.start(exchange, time.monotonic_ns())
        while not done:
            await client.turn(0, lambda _: 0)
        return exchange
    finally:
        client.close()


class _Model(msgspec.Struct):
    id: str


class _Models(msgspec.Struct):
    data: list[_Model]


async def model_of(options: argparse.Namespace, target: Target, route: Route, headers: dict[str, str]) -> str:
    """The model to ask for: the one named, or the first the server lists. Raises `LoadError`."""
    if options.model or options.dataset_name == "bodies":
        return str(options.model)
    fields = {"host": target.host, "connection": "close", "user-agent": "relay-bench", **headers}
    lines = [f"GET {target.path('/v1/models')} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items())]
    exchange = await ask(target, "".join(f"{line}\r\n" for line in [*lines, ""]).encode(), route)
    answer = exchange.answer
    try:
        return msgspec.json.decode(answer.body, type=_Models).data[0].id
    except (msgspec.DecodeError, IndexError):
        asked = f"{target.url.removesuffix('/v1')}/v1/models"
        if answer.problem:
            raise LoadError(f"{asked} does not answer ({': '.join(answer.problem)})") from None
        said = f"{answer.status} {answer.body[:100].decode('utf-8', 'replace')}"
        wanted = "--api-key" if answer.status in (401, 403) else "--model"
        raise LoadError(f"{asked} names no model ({said}); use {wanted}") from None
