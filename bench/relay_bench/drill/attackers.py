"""Attackers, in a process of their own: each that the relay has closed comes again, until told to stop.

They would be on other machines. Here they get the CPU that others leave, so that gaps are the relay's, not the drill's.
"""

from __future__ import annotations

import itertools
import os
import socket
import subprocess
import sys
import time
from contextlib import asynccontextmanager, contextmanager, suppress
from enum import Enum
from typing import TYPE_CHECKING, Final

import msgspec
import trio

from relay_bench.drill.hangups import RESET
from relay_bench.drill.report import DrillError
from relay_bench.processes import raise_descriptor_limit

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterator

#: Slow readers: their kernel buffer and segment (as of a network, not loopback's 64 KiB), what they read, how often.
_SLOW_BYTES: Final = 2048
_SEGMENT_BYTES: Final = 1000
_SLOW_S: Final = 1.0
#: Seconds for which lookers look: more than the time to be accepted behind a full backlog of those that have left.
_LOOK_S: Final = 0.25
#: Where struct tcp_info (linux/tcp.h) has the milliseconds since data was last sent, and since some last came.
_SINCE_SENT: Final = 44
_SINCE_RECEIVED: Final = 52
#: Seconds until an attacker comes again that could not connect.
_PAUSE_S: Final = 0.05
#: Source addresses: each has some 28,000 ports, and one that was left behind rests for a minute (RFC 9293, TIME-WAIT).
_SOURCES: Final = 200
#: Seconds for the process to begin, and for the last attackers to end beyond their own patience.
_PROCESS_S: Final = 30.0


class Way(Enum):
    """What an attacker does with a connection."""

    ASK = "ask"  #: sends a payload as fast as it is taken, and waits for an answer
    DRIP = "drip"  #: sends the beginning of a payload, then a byte now and then; waits for an answer
    SIP = "sip"  #: sends a payload, and reads a little of what comes now and then
    LEAVE = "leave"  #: leaves at once: in silence, in mid-payload, by reset


class Payload(msgspec.Struct, frozen=True):
    """What is sent, told in few bytes."""

    begin: bytes
    fill: bytes = b""  #: what follows, so many times
    times: int = 0


class Attack(msgspec.Struct, frozen=True, kw_only=True):
    """What attackers do, again and again."""

    way: Way
    address: tuple[str, int]
    clients: int  #: at a time
    lookers: int = 0  #: of them, who say nothing, look for a while whether they are let in, and leave
    payloads: tuple[Payload, ...]  #: in turn
    every_s: float = 0.0  #: between two bytes that drip
    patience_s: float = 30.0  #: after which one gives up that is not connected; and one without an answer


class Tally(msgspec.Struct):
    """What became of them."""

    begun: int = 0  #: connections
    looked: int = 0  #: of these, lookers'
    answers: dict[str, int] = {}  #: by status; ``closed``, ``reset``, ``silence``, or why none was connected
    longest_s: float = 0.0  #: from the beginning sent to the answer come, of what drips
    lull_s: float = 0.0  #: the longest time without any of them, from the word to begin to the word to stop

    @property
    def told(self) -> str:
        """The answers, for people."""
        return ", ".join(f"{answer}: {number:,}" for answer, number in sorted(self.answers.items())) or "nothing"

    def count(self, answer: str) -> None:
        """Notes an answer."""
        self.answers[answer] = self.answers.get(answer, 0) + 1


class Assault:
    """An attack under way. `run` it; once `over` is set, nobody comes again."""

    def __init__(self, attack: Attack) -> None:
        self.attack = attack
        self.tally = Tally()
        self.over = trio.Event()
        self._payloads = itertools.cycle([one.begin + one.fill * one.times for one in attack.payloads])
        self._present = 0
        self._alone_at = trio.current_time()  # since when none has been connected; holds while `_present` is 0

    def __repr__(self) -> str:
        return f"<Assault {self.attack.way.value} {self._present} connected, {self.tally.begun} so far>"

    async def run(self) -> None:
        """Attacks. Those that wait for an answer when it is over still get it."""
        async with trio.open_nursery() as nursery:
            for number in range(self.attack.clients):
                nursery.start_soon(self._come_again, number)
            await self.over.wait()
            self._note_lull()
            if self.attack.way is Way.SIP:  # which has no end of its own
                nursery.cancel_scope.cancel()

    async def _come_again(self, number: int) -> None:
        while not self.over.is_set():
            with trio.socket.socket() as sock:
                if self.attack.way is Way.SIP:  # the peer learns of it when they connect
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _SLOW_BYTES)
                    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, _SEGMENT_BYTES)
                if await self._is_connected(sock):
                    with self._counted():
                        await self._attack(trio.SocketStream(sock), next(self._payloads), number)
                else:
                    await trio.sleep(_PAUSE_S)

    async def _is_connected(self, sock: trio.socket.SocketType) -> bool:
        """Connects; whether it has. Behind a full backlog the kernel would ask again for two minutes."""
        with trio.move_on_after(self.attack.patience_s):
            try:
                await sock.bind((f"127.0.2.{1 + self.tally.begun % _SOURCES}", 0))
                await sock.connect(self.attack.address)
            except OSError as error:
                self.tally.count(error.strerror or str(error))
                return False
            return True
        self.tally.count("not connected")
        return False

    @contextmanager
    def _counted(self) -> Iterator[None]:
        self.tally.begun += 1
        if not self.over.is_set():
            self._note_lull()
        self._present += 1
        try:
            yield
        finally:
            self._present -= 1
            self._alone_at = trio.current_time()

    def _note_lull(self) -> None:
        if not self._present:
            self.tally.lull_s = max(self.tally.lull_s, trio.current_time() - self._alone_at)

    async def _attack(self, stream: trio.SocketStream, payload: bytes, number: int) -> None:
        if number < self.attack.lookers:
            await self._look(stream)
            return
        match self.attack.way:
            case Way.LEAVE:
                await self._leave(stream, payload, self.tally.begun)
            case Way.SIP:
                await self._sip(stream, payload)
            case Way.DRIP:
                await self._drip(stream, payload)
            case Way.ASK:
                await self._wait_for_answer(stream, payload)

    async def _look(self, stream: trio.SocketStream) -> None:
        """Waits for a word that nobody is owed who has said none."""
        with trio.move_on_after(_LOOK_S):
            self.tally.count(await _answer(stream))
        self.tally.looked += 1

    async def _leave(self, stream: trio.SocketStream, payload: bytes, number: int) -> None:
        if number % 3:
            await _send(stream, payload[: number % len(payload)] or payload[:1])
        if number % 2:
            stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)

    async def _sip(self, stream: trio.SocketStream, payload: bytes) -> None:
        await _send(stream, payload)
        answer = await _answer(stream, _SLOW_BYTES)
        if answer != "200":
            self.tally.count(answer)
            return
        try:
            while True:
                await trio.sleep(_SLOW_S)
                if not await stream.receive_some(_SLOW_BYTES):
                    self.tally.count("closed")
                    return
        except trio.BrokenResourceError:
            self.tally.count("reset")

    async def _drip(self, stream: trio.SocketStream, payload: bytes) -> None:
        """Times the answer by the kernel's account: this process may wait long for its turn."""
        await _send(stream, payload)
        began = _last(stream, _SINCE_SENT)
        if await self._wait_for_answer(stream, b""):
            self.tally.longest_s = max(self.tally.longest_s, _last(stream, _SINCE_RECEIVED) - began)

    async def _wait_for_answer(self, stream: trio.SocketStream, payload: bytes) -> bool:
        """Whether there is one."""
        with trio.move_on_after(self.attack.patience_s) as patience:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_send, stream, payload, self.attack.every_s)
                self.tally.count(await _answer(stream))
                nursery.cancel_scope.cancel()
        if patience.cancelled_caught:
            self.tally.count("silence")
        return not patience.cancelled_caught


async def _answer(stream: trio.SocketStream, most: int = 65536) -> str:
    """The status of what comes, of which no more than so many bytes are read; or how nothing came."""
    try:
        return bytes(await stream.receive_some(most))[9:12].decode("latin-1") or "closed"
    except trio.BrokenResourceError:
        return "reset"


async def _send(stream: trio.SocketStream, data: bytes, every_s: float = 0.0) -> None:
    with suppress(trio.BrokenResourceError):
        await stream.send_all(data)
        while every_s:
            await trio.sleep(every_s)
            await stream.send_all(b"x")


def _last(stream: trio.SocketStream, since: int) -> float:
    """When data was last sent, or came; monotonic, seconds."""
    info = stream.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, since + 4)
    assert isinstance(info, bytes)
    return time.monotonic() - int.from_bytes(info[since:], sys.byteorder) / 1e3


class Lines:
    """Lines of a stream."""

    def __init__(self, stream: trio.abc.ReceiveStream) -> None:
        self._stream = stream
        self._buffer = b""

    def __repr__(self) -> str:
        return f"<Lines of {self._stream!r}>"

    async def next(self) -> bytes:
        """With what ends it; empty at the end of all."""
        while b"\n" not in self._buffer:
            if not (data := await self._stream.receive_some()):
                return b""
            self._buffer += data
        line, end, self._buffer = self._buffer.partition(b"\n")
        return line + end


class Attackers:
    """The process. One attack at a time: `begin` it, and `end` it."""

    def __init__(self, process: trio.Process) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._stdin = process.stdin
        self._lines = Lines(process.stdout)

    def __repr__(self) -> str:
        return "<Attackers>"

    async def begin(self, attack: Attack) -> None:
        """Has them attack."""
        await self._stdin.send_all(msgspec.json.encode(attack) + b"\n")

    async def end(self, patience_s: float) -> Tally:
        """Has them stop, and those get their answer that wait for one. Raises `DrillError`."""
        await self._stdin.send_all(b"\n")
        return msgspec.json.decode(await self.said(2 * patience_s), type=Tally)  # to connect, and for an answer

    async def said(self, patience_s: float) -> bytes:
        """Their next line. Raises `DrillError`."""
        with trio.move_on_after(patience_s + _PROCESS_S):
            if line := await self._lines.next():
                return line
        raise DrillError("the attackers' process does not do as it is told")


@asynccontextmanager
async def attackers(niceness: int) -> AsyncGenerator[Attackers]:
    """Starts their process, which runs with so much less priority. Raises `DrillError`."""
    command = [sys.executable, "-m", "relay_bench.drill.attackers", str(niceness)]
    process = await trio.lowlevel.open_process(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        them = Attackers(process)
        await them.said(0)
        yield them
    finally:
        process.kill()
        with trio.CancelScope(shield=True):  # it is killed: this does not last
            await process.wait()


async def main(niceness: int) -> None:
    """Attacks as standard input says, until that ends."""
    os.nice(niceness)
    raise_descriptor_limit()
    orders = Lines(trio.lowlevel.FdStream(os.dup(0)))
    print("ready", flush=True)
    while order := await orders.next():
        assault = Assault(msgspec.json.decode(order, type=Attack))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(assault.run)
            if not await orders.next():
                nursery.cancel_scope.cancel()
            assault.over.set()
        print(msgspec.json.encode(assault.tally).decode(), flush=True)


if __name__ == "__main__":
    trio.run(main, int(sys.argv[1]))
