"""Thousands of requests, many of them hung up on at any moment: nothing stays behind in relay or engines."""

from __future__ import annotations

import random
import socket
import struct
import time
from collections import Counter
from enum import Enum
from typing import TYPE_CHECKING, Any, Final

import msgspec
import trio

from relay_bench.drill.client import PATIENCE_S, READ_BYTES, Ask, Client, End, Outcome, Reading, examples
from relay_bench.drill.report import Report
from relay_bench.drill.rest import judge_rest, records_of
from relay_bench.drill.stage import Scene, pace, stage

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

#: What makes a close a reset: SO_LINGER, on, 0 s.
RESET: Final = struct.pack("ii", 1, 0)


class Moment(Enum):
    """When a client hangs up."""

    HEAD = "while sending the head"
    BODY = "while sending the body"
    SENT = "soon after all is sent"  #: in the queue, before the head, or later
    STREAM = "in mid-stream"
    END = "at the end mark"


class HangUp(msgspec.Struct, frozen=True):
    """A hang-up that is planned."""

    moment: Moment
    share: float  #: of what is sent then, waited, or streamed
    #: ``close``; ``rst``; or ``fin``: no more is sent, and what comes is read until the relay closes, as it should.
    #: A reset makes the kernel drop what the relay has not read, so that it is for those who have had an answer.
    how: str


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """How large, and how long."""

    engines: int = 3
    requests: int = 10_000
    hang_ups: float = 0.3
    clients: int = 128
    places: int = 64  #: in the pool; the other clients are in its queue
    tokens: range = range(2, 40)
    paddings: tuple[int, ...] = (0, 1000, 50_000)  #: bytes by which bodies are longer
    ttft_ms: float = 60.0
    step_ms: float = 10.0
    wait_s: float = 0.6  #: longest wait behind a request before its client hangs up
    seed: int = 0


FULL = Plan()
QUICK = Plan(requests=400, clients=64, places=32, ttft_ms=100.0, step_ms=5.0)


async def drill(scene: Scene, plan: Plan = FULL) -> Report:
    """Holds the drill. Raises `DrillError`."""
    report = Report("hangups")
    flags = pace(plan.ttft_ms, plan.step_ms)
    asks = draw(plan)
    outcomes: list[Outcome] = []
    async with stage(scene) as here:
        engines = await here.engines(plan.engines, *flags)
        limits = {"pool.max_in_flight": str(plan.places), "pool.max_queue": str(plan.clients)}
        relay = await here.relay(engines, limits)
        descriptors = await relay.descriptors_at_rest()
        began = time.monotonic()
        left = iter(asks)
        async with trio.open_nursery() as nursery:
            for _ in range(plan.clients):
                nursery.start_soon(ask_in_turn, relay.address, left, plan.wait_s, outcomes)
        took_s = time.monotonic() - began
        await judge_rest(report, relay, engines, descriptors, scene.settle_s)
        counts: Counter[str] = Counter()
        for engine in engines:
            counts.update(await engine.counts())
        records = await records_of(report, relay)
    report.add("requests", f"{len(outcomes):,} in {took_s:.1f} s, {plan.clients} clients for {plan.places} places")
    met = Counter(hang_up.moment for _, hang_up in asks if hang_up is not None)
    for moment in Moment:
        report.add(f"hung up {moment.value}", met[moment])
    report.add("of the engines' requests", f"{counts['completed']:,} completed, {counts['aborted']:,} aborted")
    _judge(report, asks, outcomes, records)
    return report


def draw(plan: Plan) -> list[tuple[Ask, HangUp | None]]:
    """The requests, and which of them are hung up on when."""
    rng = random.Random(plan.seed)
    hung_up = set(rng.sample(range(plan.requests), round(plan.requests * plan.hang_ups)))
    asks = []
    for number in range(plan.requests):
        ask = Ask(id=f"drill-{number}", tokens=rng.choice(plan.tokens), padding=rng.choice(plan.paddings))
        asks.append((ask, draw_hang_up(rng) if number in hung_up else None))
    return asks


def draw_hang_up(rng: random.Random) -> HangUp:
    """A moment, and a way."""
    moment = rng.choice((*Moment, Moment.SENT, Moment.SENT))  # that is three phases
    how = rng.choice(("close", "rst", "fin")) if moment in (Moment.STREAM, Moment.END) else "close"
    return HangUp(moment, rng.random(), how)


async def ask_in_turn(
    address: tuple[str, int], left: Iterator[tuple[Ask, HangUp | None]], wait_s: float, outcomes: list[Outcome]
) -> None:
    """One client: a request after the other, from those left to all clients."""
    with Client(address) as client:
        for ask, hang_up in left:
            asked = client.ask(ask) if hang_up is None else _ask_and_leave(client, ask, hang_up, wait_s)
            outcomes.append(await asked)


async def _ask_and_leave(client: Client, ask: Ask, hang_up: HangUp, wait_s: float) -> Outcome:
    """Sends a request as far as its client stays, and reads as much of the answer."""
    moment, share = hang_up.moment, hang_up.share
    head, body = ask.encode()
    end, detail = End.LEFT, ""
    with trio.move_on_after(PATIENCE_S) as patience:
        try:
            stream = await client.connected()
            if moment in (Moment.HEAD, Moment.BODY):
                await stream.send_all(part_of(hang_up, head, body))
            else:
                await stream.send_all(head + body)
                if moment is Moment.SENT:
                    await trio.sleep(share * wait_s)
                else:
                    await _read(stream, Reading(ask.tokens), share * ask.tokens if moment is Moment.STREAM else None)
            await leave(stream, hang_up.how)
        except (OSError, trio.BrokenResourceError) as error:
            end, detail = End.BROKEN, f"hanging up {moment.value} by {hang_up.how}: {error}"
    if patience.cancelled_caught:
        end, detail = End.BROKEN, f"hanging up {moment.value} by {hang_up.how}: nothing within {PATIENCE_S:g} s"
    client.close()
    return Outcome(ask.id, end, detail)


def part_of(hang_up: HangUp, head: bytes, body: bytes) -> bytes:
    """As much of a request as its client sends before it leaves."""
    if hang_up.moment is Moment.HEAD:
        return head[: 1 + int(hang_up.share * (len(head) - 1))]
    return head + body[: int(hang_up.share * len(body))]


async def leave(stream: trio.SocketStream, how: str) -> None:
    """Hangs up by one of `HangUp.how`, as far as that is more than to close. Raises trio's errors of streams."""
    if how == "fin":
        await stream.send_eof()
        while await stream.receive_some(READ_BYTES):
            pass
    elif how == "rst":
        stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)


async def _read(stream: trio.SocketStream, reading: Reading, tokens: float | None) -> None:
    """Reads an answer until it has so many tokens, or (None) its end mark."""
    meter = reading.meter
    while not (reading.answer.is_done or meter.saw_end or (tokens is not None and meter.content_frames >= tokens)):
        reading.feed(await stream.receive_some(READ_BYTES))


def judge_outcomes(
    report: Report, outcomes: Sequence[Outcome], records: Sequence[dict[str, Any]], phases: Sequence[str]
) -> None:
    """What became of the clients that stayed, and of those that left: in all `phases`, as the records have them."""
    letters = Counter(record["outcome"] for record in records)
    report.add("records' outcomes", ", ".join(f"{outcome} {count:,}" for outcome, count in letters.most_common()))
    report.judge("clients have hung up in all phases", all(letters[phase] for phase in phases), ", ".join(phases))
    failed = [outcome for outcome in outcomes if outcome.end not in (End.WHOLE, End.LEFT)]
    report.judge("clients that stay have whole answers", not failed, f"{examples(failed)} have not")
    report.judge(
        "one record for each request begun", len(records) == len(outcomes), f"{len(records):,} of {len(outcomes):,}"
    )


def _judge(
    report: Report,
    asks: Sequence[tuple[Ask, HangUp | None]],
    outcomes: Sequence[Outcome],
    records: Sequence[dict[str, Any]],
) -> None:
    queued = sum(bool(record["queue_ms"]) for record in records)
    report.add("requests that were in the queue", queued)
    judge_outcomes(report, outcomes, records, ("CR", "CQ", "CH", "CD"))
    sent = [ask.id for ask, hang_up in asks if hang_up is None or hang_up.moment not in (Moment.HEAD, Moment.BODY)]
    ids = Counter(record["id"] for record in records)
    found = sum(ids[id_] == 1 for id_ in sent)
    report.judge("each request sent whole has its own", found == len(sent), f"{found:,} of {len(sent):,}")
