"""Clients at their worst, beside healthy ones: those notice nothing, memory stays bounded, and all is given back."""

from __future__ import annotations

import itertools
import resource
import socket
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Final

import msgspec
import trio

from relay_bench.drill.client import Ask
from relay_bench.drill.hangups import RESET
from relay_bench.drill.healthy import Healthy
from relay_bench.drill.report import Report
from relay_bench.drill.rest import judge_rest, records_of
from relay_bench.drill.silent import silent_connections
from relay_bench.drill.stage import RelayChild, Scene, pace, stage
from relay_bench.processes import memory_bytes

_MIB: Final = 1 << 20
#: Descriptors kept back for other things.
_SPARE: Final = 2_000
_HEAD: Final = b"POST /v1/chat/completions HTTP/1.1\r\nhost: drill\r\ncontent-type: application/json\r\n"
#: Slow readers: their kernel buffer and segment (as of a network, not loopback's 64 KiB), what they read, how often.
_SLOW_BYTES: Final = 2048
_SEGMENT_BYTES: Final = 1000
_SLOW_S: Final = 1.0
#: What is added to a limit for the time until it is looked at, on a busy machine.
_LATE_S: Final = 2.0
#: What is added for bombs, which are megabytes each.
_BOMB_S: Final = 10.0


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """How large, and how long."""

    healthy: int = 100
    tokens: int = 100  #: of a healthy stream
    step_ms: float = 50.0
    window_s: float = 8.0  #: in which gaps are measured
    slow_readers: int = 1_000
    frame_bytes: int = 262_144  #: in each slow reader's stream, so that its buffers are full at once
    slowloris: int = 500
    bombs: int = 200
    body_bytes: int = 4 * _MIB
    idle: int = 50_000
    max_connections: int = 20_000
    churn: int = 10_000
    limit_s: float = 2.0  #: client_head_s and client_body_s
    idle_s: float = 30.0  #: client_idle_s: of thousands of silent clients, the kernel loses a few last words
    #: By which the healthy clients' p99 gap may grow, times what it is without.
    slower: float = 2.0
    seed: int = 0


FULL = Plan()
QUICK = Plan(healthy=10, tokens=20, step_ms=20.0, window_s=0.5, slow_readers=20, slowloris=20, bombs=10, idle=60,
             max_connections=40, churn=100, limit_s=0.5)  # fmt: skip


class Site:
    """The relay under attack, and the healthy clients."""

    def __init__(self, report: Report, relay: RelayChild, healthy: Healthy, plan: Plan, at_rest: int = 0) -> None:
        self.report = report
        self.relay = relay
        self.at_rest = at_rest  #: the relay's descriptors when nobody is there
        self.healthy = healthy
        self.plan = plan
        self.p99_ms = 0.0  #: of the healthy without any attack

    def __repr__(self) -> str:
        return f"<Site {self.relay!r} {self.healthy!r}>"

    @property
    def pss(self) -> int:
        """Bytes of the relay's memory."""
        return memory_bytes(self.relay.process.pid)

    def judge(self, attack: str, criterion: str, is_kept: bool, seen: str) -> None:
        """One row of the table."""
        self.report.judge(f"{attack}: {criterion}", is_kept, seen)

    async def judge_healthy(self, attack: str) -> None:
        """While the attack lasts: the healthy clients' gaps."""
        failed = len(self.healthy.failures)
        p99_ms = await self.healthy.p99_ms(self.plan.window_s)
        slower = self.plan.slower
        seen = f"{p99_ms:.1f} ms, without {self.p99_ms:.1f} ms"
        is_kept = 0 < p99_ms <= slower * self.p99_ms
        self.judge(attack, f"healthy p99 gap within {slower:g} × of without", is_kept, seen)
        failures = self.healthy.failures[failed:]
        self.judge(attack, "no healthy client fails", not failures, f"{len(failures)}: {failures[:1]}")

    def judge_memory(self, attack: str, before: int, bound: float, why: str) -> None:
        """The relay's memory beside what the configuration lets it hold."""
        grown = self.pss - before
        self.judge(attack, f"memory grows by no more than {bound / _MIB:,.1f} MiB ({why})", grown <= bound,
                   f"{grown / _MIB:+,.1f} MiB")  # fmt: skip


async def drill(scene: Scene, plan: Plan = FULL) -> Report:
    """Holds the drill. Raises `DrillError`."""
    report = Report("abuse")
    plan = _within_descriptors(report, plan)
    async with stage(scene) as here:
        flags = (*pace(10.0, plan.step_ms), "--max-seqs", "100000")
        engines = await here.engines(2, *flags)
        own = {
            "daemon.workers": "1",
            "timeouts.client_head_s": str(plan.limit_s),
            "timeouts.client_body_s": str(plan.limit_s),
            "timeouts.client_idle_s": str(plan.idle_s),
            "limits.max_connections": str(plan.max_connections),
            "limits.max_buffered_bytes": str(plan.bombs * plan.body_bytes // 4),
            "limits.max_body_bytes": str(plan.body_bytes),
        }
        relay = await here.relay(engines, own)
        descriptors = await relay.descriptors_at_rest()
        healthy = Healthy(relay.address, plan.tokens)
        site = Site(report, relay, healthy, plan, descriptors)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(healthy.run, plan.healthy)
            await trio.sleep(1)
            site.p99_ms = await healthy.p99_ms(plan.window_s)
            for attack in ATTACKS:
                await attack(site)
            healthy.stop()
        await judge_rest(report, relay, engines, descriptors, scene.settle_s)
        await records_of(report, relay)
    report.add("healthy streams", f"{healthy.whole:,} whole, {len(healthy.failures)} failed")
    return report


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
    await _slowloris(site, "slowloris on the head", _HEAD, "client_head_s")


async def slow_bodies(site: Site) -> None:
    """The head at once, and a byte of the body now and then."""
    await _slowloris(site, "slowloris on the body", _HEAD + b"content-length: 1000000\r\n\r\n", "client_body_s")


async def _slowloris(site: Site, attack: str, begin: bytes, limit: str) -> None:
    plan = site.plan
    lasted: list[float] = []
    answers: set[bytes] = set()
    before = site.pss

    async def drip() -> None:
        async with await trio.open_tcp_stream(*site.relay.address) as stream:
            await stream.send_all(begin)
            began = time.monotonic()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_send_slowly, stream, plan.limit_s / 5)
                try:
                    answers.add((await stream.receive_some(65536))[9:12])
                except trio.BrokenResourceError:
                    answers.add(b"reset")
                lasted.append(time.monotonic() - began)
                nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        for _ in range(plan.slowloris):
            nursery.start_soon(drip)
        await site.judge_healthy(attack)
    longest = max(lasted)
    site.judge(attack, f"all are told 408 within {limit} = {plan.limit_s:g} s and {_LATE_S:g} s",
               longest <= plan.limit_s + _LATE_S and answers == {b"408"},
               f"{len(lasted)}, the last after {longest:.2f} s, told {b', '.join(answers).decode()}")  # fmt: skip
    site.judge_memory(attack, before, plan.slowloris * 65_536 + 4 * _MIB, "64 KiB each")


async def _send_slowly(stream: trio.SocketStream, every_s: float) -> None:
    try:
        while True:
            await trio.sleep(every_s)
            await stream.send_all(b"x")
    except trio.BrokenResourceError:
        pass


async def slow_readers(site: Site) -> None:
    """Streams of large frames, of which a little is read now and then."""
    plan, before = site.plan, site.pss
    kernel = _socket_bytes()

    async def sip() -> None:
        sock = trio.socket.socket()
        with sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _SLOW_BYTES)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, _SEGMENT_BYTES)
            await sock.connect(site.relay.address)
            head, body = Ask(id="slow", tokens=100_000).encode()
            fault = b"\r\nx-sim-fault: huge-frame:%d" % plan.frame_bytes
            await sock.send(head.replace(b"\r\nhost", fault + b"\r\nhost", 1) + body)
            while await sock.recv(_SLOW_BYTES):  # noqa: ASYNC110 — it is slow on purpose
                await trio.sleep(_SLOW_S)

    async with trio.open_nursery() as nursery:
        for _ in range(plan.slow_readers):
            nursery.start_soon(sip)
        await trio.sleep(plan.window_s / 2)
        await site.judge_healthy("slow readers")
        each = 2 * plan.frame_bytes + 65_536
        site.judge_memory("slow readers", before, plan.slow_readers * each + 4 * _MIB, "two frames and a read each")
        held = (_socket_bytes() - kernel) / _MIB
        site.report.add("the kernel's socket buffers beside slow readers", f"{held:,.0f} MiB")
        nursery.cancel_scope.cancel()


async def head_bombs(site: Site) -> None:
    """Heads without end: one long field, and many short ones."""
    fields = b"a: " + b"x" * 4_000_000, b"a: b\r\n" * 600_000
    await _bombs(site, "head bombs", itertools.cycle(_HEAD + field for field in fields), {b"431"},
                 site.plan.bombs * 2 * 65_536, "max_head_bytes, twice, each")  # fmt: skip


async def announced_bodies(site: Site) -> None:
    """Bodies beyond ``max_body_bytes`` by their own word: none of it is read."""
    size = site.plan.body_bytes + 1
    bombs = itertools.cycle([_HEAD + b"content-length: %d\r\n\r\n" % size + b"x" * size])
    await _bombs(site, "bodies announced too large", bombs, {b"413"}, site.plan.bombs * 65_536, "64 KiB each")


async def chunked_bodies(site: Site) -> None:
    """Bodies beyond ``max_body_bytes``, which only shows in the end, unless memory or time have run out before."""
    size = site.plan.body_bytes + 1
    bombs = itertools.cycle([_HEAD + b"transfer-encoding: chunked\r\n\r\n%x\r\n%b" % (size, b"x" * size)])
    bound = 2 * site.plan.bombs * site.plan.body_bytes // 4
    await _bombs(site, "bodies too large", bombs, {b"408", b"413", b"503"}, bound, "max_buffered_bytes, twice")


async def many_bodies(site: Site) -> None:
    """Bodies just allowed, more than may be held at once, nested deeply, and without their last byte."""
    size = site.plan.body_bytes
    body = b'{"model": ' + b"[" * (size - 11)
    bombs = itertools.cycle([_HEAD + b"content-length: %d\r\n\r\n" % size + body])
    bound = 2 * site.plan.bombs * size // 4
    await _bombs(site, "bodies held", bombs, {b"408", b"503"}, bound, "max_buffered_bytes, twice")


async def _bombs(
    site: Site, attack: str, bombs: itertools.cycle[bytes], told: set[bytes], bound: float, why: str
) -> None:
    before, most = site.pss, 0
    answers: set[bytes] = set()

    async def drop(bomb: bytes) -> None:
        with trio.move_on_after(site.plan.limit_s + _BOMB_S) as patience:
            async with await trio.open_tcp_stream(*site.relay.address) as stream, trio.open_nursery() as nursery:
                nursery.start_soon(_send, stream, bomb)
                try:
                    answers.add(bytes(await stream.receive_some(65536))[9:12])
                except trio.BrokenResourceError:
                    answers.add(b"reset")
                nursery.cancel_scope.cancel()
        if patience.cancelled_caught:
            answers.add(b"silence")

    async def watch() -> None:
        nonlocal most
        while True:
            most = max(most, site.pss - before)
            await trio.sleep(0.05)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch)
        async with trio.open_nursery() as attackers:
            for _ in range(site.plan.bombs):
                attackers.start_soon(drop, next(bombs))
            await site.judge_healthy(attack)
        nursery.cancel_scope.cancel()
    said = b", ".join(sorted(answers)).decode()
    site.judge(attack, f"told {b' or '.join(sorted(told)).decode()}", answers <= told, f"told {said}")
    bound += 8 * _MIB
    site.judge(attack, f"memory grows by no more than {bound / _MIB:,.0f} MiB ({why})", most <= bound,
               f"{most / _MIB:+,.1f} MiB at most")  # fmt: skip


async def _send(stream: trio.SocketStream, data: bytes) -> None:
    with suppress(trio.BrokenResourceError):
        await stream.send_all(data)


async def idle_connections(site: Site) -> None:
    """Far more connections than are allowed, and not a word on any."""
    plan, before = site.plan, site.pss
    async with silent_connections(site.relay.address, plan.idle) as begun:
        await site.judge_healthy("idle connections")
        await begun()
        open_now = site.relay.descriptors() - site.at_rest
        most = plan.max_connections + plan.healthy
        limit = f"max_connections = {plan.max_connections:,}, and {plan.healthy:,} to engines"
        seen = f"{open_now:,}, of {plan.idle:,} silent clients"
        site.judge("idle connections", f"no more are open than {limit}", open_now <= most, seen)
        took_s = await _newcomer(site)
        site.judge("idle connections", "a newcomer is answered within 5 s", took_s < 5, f"{took_s:.2f} s")
        site.judge_memory("idle connections", before, plan.max_connections * 8192 + 8 * _MIB, "8 KiB each")


async def _newcomer(site: Site) -> float:
    began = time.monotonic()
    with trio.move_on_after(30):
        try:
            async with await trio.open_tcp_stream(*site.relay.address) as stream:
                await stream.send_all(b"GET /-/live HTTP/1.1\r\nhost: drill\r\n\r\n")
                if (await stream.receive_some(4096)).startswith(b"HTTP/1.1 200"):
                    return time.monotonic() - began
        except (OSError, trio.BrokenResourceError):
            pass
    return float("inf")


async def churn(site: Site) -> None:
    """Connections begun and left at once: in silence, in mid-head, by reset."""
    before, descriptors = site.pss, site.relay.descriptors()
    done = 0

    async def come_and_go() -> None:
        nonlocal done
        while done < site.plan.churn:
            done += 1
            stream = await trio.open_tcp_stream(*site.relay.address)
            if done % 3:
                await stream.send_all(_HEAD[: done % len(_HEAD)] or b"P")
            if done % 2:
                stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            stream.socket.close()

    async with trio.open_nursery() as nursery:
        for _ in range(20):
            nursery.start_soon(come_and_go)
        await site.judge_healthy("connection churn")
    await trio.sleep(1)
    left = site.relay.descriptors() - descriptors
    site.judge("connection churn", "no descriptor stays", left <= 2 * site.plan.healthy, f"{left:+} of {done:,}")
    site.judge_memory("connection churn", before, 8 * _MIB, "a constant")


def _socket_bytes() -> int:
    """Of TCP's buffers in the kernel, on the whole machine."""
    with open("/proc/net/sockstat", encoding="ascii") as lines:
        line = next(line for line in lines if line.startswith("TCP:"))
    return int(line.split()[-1]) * resource.getpagesize()


ATTACKS: Final[tuple[Callable[[Site], Awaitable[None]], ...]] = (
    churn, slow_heads, slow_bodies, idle_connections, head_bombs, slow_readers, announced_bodies, chunked_bodies,
    many_bodies,
)  # fmt: skip
