"""Clients at their worst, beside healthy ones: those notice nothing, memory stays bounded, and all is given back."""

from __future__ import annotations

import resource
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any, Final

import msgspec
import trio

from relay_bench.drill.attackers import Attack, Payload, Tally, Way, attackers
from relay_bench.drill.client import Ask
from relay_bench.drill.healthy import Healthy
from relay_bench.drill.report import Report
from relay_bench.drill.rest import judge_rest, records_of
from relay_bench.drill.siege import MIB, Plan, Site
from relay_bench.drill.silent import silent_connections
from relay_bench.drill.stage import Scene, holds, pace, stage

#: Descriptors kept back for other things.
_SPARE: Final = 2_000
_HEAD: Final = b"POST /v1/chat/completions HTTP/1.1\r\nhost: drill\r\ncontent-type: application/json\r\n"
_SLOW_READERS: Final = "slow readers"
#: What they call their requests.
_SLOW: Final = "slow"
#: What is added to a limit for the time until it is looked at, on a busy machine.
_OVERRUN_S: Final = 2.0
#: Seconds for a newcomer to be answered where others keep all places.
_NEWCOMER_S: Final = 5.0
#: Seconds for the relay to have let in as many as it may, once as many have come.
_FULL_S: Final = 10.0


FULL = Plan()
QUICK = Plan(healthy=10, tokens=20, step_ms=20.0, window_s=0.5, slow_readers=20, slowloris=20, bombs=10, idle=1_000,
             max_connections=500, churn=4, limit_s=0.2, niceness=0)  # fmt: skip


async def drill(scene: Scene, plan: Plan = FULL) -> Report:
    """Holds the drill. Raises `DrillError`."""
    report = Report("abuse")
    plan = _within_descriptors(report, plan)
    async with stage(scene) as here, attackers(plan.niceness) as they:
        flags = (*pace(10.0, plan.step_ms), "--max-seqs", "100000")
        engines = await here.engines(2, *flags)
        own = {
            "daemon.workers": "1",
            "timeouts.client_head_s": str(plan.limit_s),
            "timeouts.client_body_s": str(plan.limit_s),
            "timeouts.client_idle_s": str(plan.idle_s),
            "limits.max_connections": str(plan.max_connections),
            "limits.max_buffered_bytes": str(plan.buffered_bytes),
            "limits.max_head_bytes": str(plan.head_bytes),
            "limits.max_body_bytes": str(plan.body_bytes),
        }
        relay = await here.relay(engines, own)
        descriptors = await relay.descriptors_at_rest()
        healthy = Healthy(relay.address, plan.tokens)
        site = Site(report, relay, engines, healthy, they, plan, descriptors)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(healthy.run, plan.healthy)
            await trio.sleep(1)
            healthy.largest_ms()  # beginning together is the harness's doing
            async with site.memory_watched():  # as beside each attack
                site.p99_ms, site.largest_ms = await healthy.p99_ms(plan.window_s), healthy.largest_ms()
            for attack in ATTACKS:
                await attack(site)
            healthy.stop()
        await judge_rest(report, relay, engines, descriptors, scene.settle_s)
        _judge_slow_readers(report, await records_of(report, relay), plan.slow_readers, site.tallies[_SLOW_READERS])
    failures = healthy.failures
    report.judge("nor does a healthy client fail between two attacks", not failures, f"{len(failures)}: {failures[:1]}")
    report.add("healthy streams", f"{healthy.whole:,} whole, {len(failures)} failed")
    return report


def _judge_slow_readers(report: Report, records: list[dict[str, Any]], wanted: int, tally: Tally) -> None:
    """What their records say: they themselves see the end of a stream only behind all that the kernel has kept.

    Each of those that are wanted has one, and no reader has seen an end, or another answer than a stream.
    """
    outcomes = Counter(record["outcome"] for record in records if record["id"] == _SLOW)
    have_left = all(outcome.startswith("C") for outcome in outcomes)  # they themselves
    is_kept = have_left and outcomes.total() >= wanted and not tally.answers
    ends = ", ".join(f"{outcome}: {number:,}" for outcome, number in outcomes.items())
    report.judge(f"{_SLOW_READERS}: none is cut off", is_kept, f"{ends or 'none'}; told {tally.told}")


def _within_descriptors(report: Report, plan: Plan) -> Plan:
    """As many connections as a relay may have here: two descriptors each, and its limit is inherited."""
    wanted = 2 * plan.max_connections + _SPARE
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), max(hard, wanted)))
    except (ValueError, OSError):  # not root, or not allowed even so
        most = (hard - _SPARE) // 2
        report.add("max_connections", f"{most:,}, as no more than {hard:,} descriptors are allowed (ulimit -Hn)")
        return msgspec.structs.replace(plan, max_connections=most)
    return plan


# -- attacks


async def slow_heads(site: Site) -> None:
    """A byte of the head now and then."""
    why = f"{site.plan.slowloris:,} × max_head_bytes, and 4 MiB"
    await _slowloris(site, "slowloris on the head", _HEAD, "client_head_s", why)


async def slow_bodies(site: Site) -> None:
    """The head at once, and a byte of the body now and then."""
    why = f"{site.plan.slowloris:,} × a read of 64 KiB, and 4 MiB"
    begin = _HEAD + b"content-length: 1000000\r\n\r\n"
    await _slowloris(site, "slowloris on the body", begin, "client_body_s", why)


async def _slowloris(site: Site, name: str, begin: bytes, limit: str, why: str) -> None:
    plan = site.plan
    attack = Attack(
        way=Way.DRIP, address=site.relay.address, clients=plan.slowloris, payloads=(Payload(begin),),
        every_s=plan.limit_s / 5, patience_s=plan.limit_s + plan.patience_s,
    )  # fmt: skip
    async with site.under(name, attack) as siege:
        await site.judge_healthy(name)
    site.judge_told(name, siege.tally, "408")
    longest_s = siege.tally.longest_s
    site.judge(name, f"each within {limit} = {plan.limit_s:g} s and {_OVERRUN_S:g} s",
               longest_s <= plan.limit_s + _OVERRUN_S, f"the slowest after {longest_s:.2f} s")  # fmt: skip
    site.judge_memory(name, siege.grown, plan.slowloris * plan.head_bytes + 4 * MIB, why)


async def slow_readers(site: Site) -> None:
    """Streams of large frames, of which a little is read now and then."""
    name, plan, kernel = _SLOW_READERS, site.plan, _socket_bytes()
    head, body = Ask(id=_SLOW, tokens=100_000).encode()
    fault = b"\r\nx-sim-fault: huge-frame:%d" % plan.frame_bytes
    payload = Payload(head.replace(b"\r\nhost", fault + b"\r\nhost", 1) + body)
    attack = Attack(way=Way.SIP, address=site.relay.address, clients=plan.slow_readers, payloads=(payload,))

    async def are_in() -> bool:
        return len([True for one in await site.relay.exchanges() if one["id"] == _SLOW]) >= plan.slow_readers

    async with site.under(name, attack) as siege:
        await trio.sleep(plan.window_s / 2)
        await holds(are_in, _FULL_S)  # or their records tell
        await site.judge_healthy(name)
        held = (_socket_bytes() - kernel) / MIB
    site.report.add("the kernel's socket buffers beside slow readers", f"{held:,.0f} MiB")
    each = 2 * plan.frame_bytes + 65_536
    why = f"{plan.slow_readers:,} × two frames and a read of 64 KiB, and 4 MiB"
    site.judge_memory(name, siege.grown, plan.slow_readers * each + 4 * MIB, why)


async def head_bombs(site: Site) -> None:
    """Heads without end: one long field, and many short ones."""
    plan = site.plan
    payloads = Payload(_HEAD + b"a: ", b"x", 4_000_000), Payload(_HEAD, b"a: b\r\n", 600_000)
    why = f"{plan.bombs:,} × max_head_bytes, twice, and 8 MiB"
    await _bombs(site, "head bombs", payloads, ("431",), plan.bombs * 2 * plan.head_bytes, why)


async def announced_bodies(site: Site) -> None:
    """Bodies beyond ``max_body_bytes`` by their own word: none of it is read."""
    plan, size = site.plan, site.plan.body_bytes + 1
    payload = Payload(_HEAD + b"content-length: %d\r\n\r\n" % size, b"x", size)
    why = f"{plan.bombs:,} × a read of 64 KiB, and 8 MiB"
    await _bombs(site, "bodies announced too large", (payload,), ("413",), plan.bombs * 65_536, why)


async def chunked_bodies(site: Site) -> None:
    """Bodies beyond ``max_body_bytes``, which only shows in the end, unless memory or time have run out before."""
    size = site.plan.body_bytes + 1
    payload = Payload(_HEAD + b"transfer-encoding: chunked\r\n\r\n%x\r\n" % size, b"x", size)
    await _many_bodies(site, "bodies too large", payload, "408", "413", "503")


async def many_bodies(site: Site) -> None:
    """Bodies just allowed, more than may be held at once, nested deeply, and without their last byte."""
    size, begin = site.plan.body_bytes, b'{"model": '
    payload = Payload(_HEAD + b"content-length: %d\r\n\r\n" % size + begin, b"[", size - len(begin) - 1)
    await _many_bodies(site, "bodies held", payload, "408", "503")


async def _many_bodies(site: Site, name: str, payload: Payload, *told: str) -> None:
    bound = 2 * site.plan.buffered_bytes
    await _bombs(site, name, (payload,), told, bound, "max_buffered_bytes, twice, and 8 MiB")


async def _bombs(
    site: Site, name: str, payloads: tuple[Payload, ...], told: tuple[str, ...], bound: int, why: str
) -> None:
    plan = site.plan
    attack = Attack(
        way=Way.ASK, address=site.relay.address, clients=plan.bombs, payloads=payloads,
        patience_s=plan.limit_s + plan.patience_s,
    )  # fmt: skip
    async with site.under(name, attack) as siege:
        await site.judge_healthy(name)
    site.judge_told(name, siege.tally, *told)
    site.judge_memory(name, siege.grown, bound + 8 * MIB, why)


async def idle_connections(site: Site) -> None:
    """Far more connections than are allowed, and not a word on any."""
    name, plan, limit = "idle connections", site.plan, site.plan.max_connections
    most = 0

    async def is_full() -> bool:
        nonlocal most
        most = max(most, await site.clients())
        return most >= limit * 9 // 10  # some have just left to make room

    async with silent_connections(site.relay.address, plan.idle, plan.niceness) as crowd:
        async with site.memory_watched() as peak:
            await site.judge_healthy(name)
            await crowd.begun()
            reached = await holds(is_full, _FULL_S)
            most = max(most, await site.clients())
            took_s = await _newcomer(site)
        fared = await crowd.fared()
    site.judge_largest(name)
    _judge_open(site, name, most)
    site.judge(name, "9 in 10 of max_connections are in use", reached, f"{most:,}")
    broken = "".join(f", {error}: {number:,}" for error, number in fared.broken.items())
    site.judge(name, "who idles longest makes room, others wait, and none is refused", fared.left > 0 and not broken,
               f"{fared.begun:,} came, {fared.left:,} made room{broken}")  # fmt: skip
    site.judge(name, f"a newcomer is answered within {_NEWCOMER_S:g} s", took_s < _NEWCOMER_S, f"{took_s:.2f} s")
    site.judge_memory(name, peak.bytes, limit * 8192 + 8 * MIB, f"{limit:,} × 8 KiB, and 8 MiB")


def _judge_open(site: Site, name: str, most: int) -> None:
    """The most clients that were open at a look. To each engine the relay may have connected since that had counted."""
    limit, late = site.plan.max_connections, len(site.engines)
    site.judge(name, f"no more are open than max_connections = {limit:,}, and {late} just begun to engines",
               most <= limit + late, f"{most:,}, of {site.plan.idle:,} silent clients")  # fmt: skip


async def _newcomer(site: Site) -> float:
    began = time.monotonic()
    with trio.move_on_after(2 * _NEWCOMER_S):
        try:
            async with await trio.open_tcp_stream(*site.relay.address) as stream:
                await stream.send_all(b"GET /-/live HTTP/1.1\r\nhost: drill\r\n\r\n")
                if (await stream.receive_some(4096)).startswith(b"HTTP/1.1 200"):
                    return time.monotonic() - began
        except (OSError, trio.BrokenResourceError):
            pass
    return float("inf")


async def churn(site: Site) -> None:
    """Connections begun and left at once: in silence, in mid-head, by reset. Others look if they are let in."""
    name, plan, descriptors = "connection churn", site.plan, site.relay.descriptors()
    attack = Attack(
        way=Way.LEAVE, address=site.relay.address, clients=plan.lookers + plan.churn, lookers=plan.lookers,
        payloads=(Payload(_HEAD),),
    )  # fmt: skip
    async with site.under(name, attack) as siege:
        await site.judge_healthy(name)
    await _newcomer(site)  # is behind all that have not been accepted yet
    await trio.sleep(1)
    left = site.relay.descriptors() - descriptors
    site.judge(name, "no descriptor stays", left <= 2 * plan.healthy, f"{left:+} of {siege.tally.begun:,}")
    tally = siege.tally
    site.judge(
        name,
        "none is refused",
        tally.looked > 0 and not tally.answers,
        f"told {tally.told}, by {tally.looked:,} that looked",
    )
    site.judge_memory(name, siege.grown, 8 * MIB, "a constant")


def _socket_bytes() -> int:
    """Of TCP's buffers in the kernel, on the whole machine."""
    with open("/proc/net/sockstat", encoding="ascii") as lines:
        line = next(line for line in lines if line.startswith("TCP:"))
    return int(line.split()[-1]) * resource.getpagesize()


ATTACKS: Final[tuple[Callable[[Site], Awaitable[None]], ...]] = (
    churn, slow_heads, slow_bodies, idle_connections, head_bombs, slow_readers, announced_bodies, chunked_bodies,
    many_bodies,
)  # fmt: skip
