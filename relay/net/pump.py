"""The pump: every token stream of a worker, served by plain calls while trio sleeps.

Per frame a proxy cannot save the kernel's part: readiness, receive, send. Everything around it is here kept to one
dictionary look-up, one receive into a buffer shared by all pairs, one pass of `FrameRelay`, one send. A pair of sockets
(engine, client) belongs to the task of its exchange; the task attaches the engine's socket, waits for it through the
pump, then hands the streaming to the pump and sleeps until `Pair.stream` says why it came back. What is decided per
request stays in that task; what passes per frame never leaves this module.

The client's side is watched for hang-up only, and for as long as the pair exists, so a client that leaves ends its
exchange in every phase: the pump calls `on_gone`, which cancels the task's scope.

While nothing flows to a client, the sweep sends it comments (`Pair.comment_every`): between two frames by itself, and
before there is a stream by asking the exchange, whose task sleeps and cannot be in the middle of a write.
"""

from __future__ import annotations

import select
import socket
import time
import traceback
from collections.abc import Callable
from enum import Enum
from typing import Final

import trio

from relay.core.frames import FrameRelay, Pieces
from relay.core.histogram import Histogram

#: Bytes taken off an engine's socket at once; the most that one pair can hold up the others with.
RECEIVE_BYTES: Final = 65536
#: Events served before the pump looks at trio again: bounds how late accepts and cancellations can be.
EVENTS_PER_TURN: Final = 128
#: How often idle streams are looked for, seconds; limits and comments can be late by up to twice as much.
SWEEP_S: Final = 0.25
#: Pieces beyond which one write is joined rather than gathered (the kernel's limit is 1,024).
_MOST_PIECES: Final = 64


class Stop(Enum):
    """Why the pump gave a pair back to its task."""

    DONE = "the engine's body ended as its framing says, and everything has been sent"
    CLIENT_BLOCKED = "the client's socket is full; `Pair.unsent` holds what is left of the last read"
    CLIENT_GONE = "sending failed: the client has closed its connection"
    UPSTREAM_CLOSED = "the engine closed its connection before the end of its body"
    UPSTREAM_RESET = "the engine's connection broke"
    UPSTREAM_MALFORMED = "the engine's body breaks its framing (`FrameRelay.decoder.error`)"
    FAULT = "the relay itself failed; what of the last read went out is not known"
    UPSTREAM_IDLE = "nothing came from the engine for `between_tokens_s`"


class Pair:
    """The two sockets of one exchange, as the pump sees them. Made by `Pump.open`; always `close` it."""

    __slots__ = (
        "_pump", "_task", "bytes_in", "bytes_out", "client", "comment_every_ns", "content_read_ns", "content_sent_ns",
        "gaps", "idle_limit_ns", "is_gone", "last_comment_ns", "last_frame_ns", "last_read_ns", "limit_at_ns",
        "on_gone", "on_quiet", "relay", "send", "sendmsg", "stop", "unsent", "upstream",
    )  # fmt: skip

    def __init__(self, pump: Pump, client: socket.socket, on_gone: Callable[[], None]) -> None:
        self._pump = pump
        self._task: trio.lowlevel.Task | None = None
        self.client = client
        self.on_gone = on_gone
        self.is_gone = False  #: the client has hung up
        self.upstream: socket.socket | None = None
        self.relay: FrameRelay | None = None
        self.gaps: Histogram | None = None
        self.last_read_ns = 0  #: when bytes last came from the engine (monotonic clock)
        self.last_frame_ns = 0  #: when a frame last became whole
        self.idle_limit_ns = 0  #: longest silence while streaming
        self.limit_at_ns = 0  #: when waiting for the engine ends, before and after streaming
        self.comment_every_ns = 0  #: longest silence towards the client
        self.last_comment_ns = 0  #: when it last got a comment, or asked
        self.on_quiet: Callable[[], bool] | None = None  #: speaks in the pump's place, while that is not streaming
        self.content_read_ns = 0  #: when the first content frame came, and
        self.content_sent_ns = 0  #: when it had been handed to the kernel (monotonic clock)
        self.bytes_in = 0
        self.bytes_out = 0
        self.unsent = b""  #: of the last read, what the client's socket did not take
        self.stop = Stop.DONE  #: why the pump last gave the pair back
        self.send = client.send
        self.sendmsg = client.sendmsg

    def __repr__(self) -> str:
        state = "streaming" if self.relay else "waiting" if self._task else "idle"
        return f"<Pair client={self.client.fileno()} upstream={self.upstream and self.upstream.fileno()} {state}>"

    def attach(self, upstream: socket.socket) -> None:
        """Puts the engine's socket under the pump, silent until it is waited for."""
        self._pump.attach(self, upstream)

    def detach(self) -> None:
        """Takes the engine's socket out again; call before it is closed or parked."""
        self._pump.detach(self)

    def close(self) -> None:
        """Takes both sockets out of the pump, which forgets the pair."""
        self._pump.close(self)

    def limit(self, limit_s: float) -> None:
        """Waits for the engine, from now on, end `limit_s` seconds from now; 0: no limit.

        Looked at by the pump's sweep: a deadline of trio's for each wait would cost more than the wait.
        """
        self.limit_at_ns = time.monotonic_ns() + int(limit_s * 1e9) if limit_s else 0

    def comment_every(self, interval_s: float, since_s: float, on_quiet: Callable[[], bool]) -> None:
        """Has the client hear something every `interval_s` seconds, counted from `since_s` (monotonic clock).

        While frames are streamed, comments go between them; at other times `on_quiet` is called, from the pump, and may
        send what it sees fit but not wait. False: it found that the client is gone.
        """
        self.comment_every_ns = int(interval_s * 1e9)
        self.last_comment_ns = int(since_s * 1e9)
        self.on_quiet = on_quiet
        self._pump.commented.add(self)

    async def wait_upstream(self, *, or_writable: bool = False) -> None:
        """Sleeps until the engine's socket can be read (or also: written). Raises trio.TooSlowError past the limit."""
        assert self.upstream is not None
        flags = select.EPOLLIN | select.EPOLLONESHOT | (select.EPOLLOUT if or_writable else 0)
        self._pump.epoll.modify(self.upstream.fileno(), flags)
        self.stop = Stop.DONE
        await self._park()
        if self.stop is Stop.UPSTREAM_IDLE:
            raise trio.TooSlowError

    async def stream(self, relay: FrameRelay, gaps: Histogram, *, idle_limit_s: float) -> Stop:
        """Hands the streaming to the pump; answers why it stopped. Call again to go on after `CLIENT_BLOCKED`.

        `idle_limit_s`: longest silence of the engine, 0 for none. Cancelling ends the streaming between two frames'
        writes: the client has got everything it was sent whole, unless `unsent` is not empty.
        """
        assert self.upstream is not None
        self.relay = relay
        self.limit_at_ns = 0  # of the waits before; passed by now, it would be taken for the end of this one
        self.gaps = gaps
        self.idle_limit_ns = int(idle_limit_s * 1e9)
        self._pump.epoll.modify(self.upstream.fileno(), select.EPOLLIN)
        try:
            await self._park()
        finally:
            self.relay = None
        return self.stop

    async def _park(self) -> None:
        self._task = trio.lowlevel.current_task()
        await trio.lowlevel.wait_task_rescheduled(self._abort)

    def _abort(self, _raise_cancel: Callable[[], None]) -> trio.lowlevel.Abort:
        self._task = None
        self._pump.silence(self)
        return trio.lowlevel.Abort.SUCCEEDED

    def wake(self) -> bool:
        """Lets the pair's task run; True if it was asleep."""
        task, self._task = self._task, None
        if task is None:
            return False
        trio.lowlevel.reschedule(task)
        return True


class Pump:
    """All pairs of a worker on one epoll; driven by `poller.install`, or else by `run_as_task`."""

    def __init__(self) -> None:
        self.epoll = select.epoll()
        self.frames = 0  #: frames passed on since the start
        self.commented: set[Pair] = set()  #: those whose clients get comments
        self._buffer = bytearray(RECEIVE_BYTES)
        self._view = memoryview(self._buffer)
        self._out: Pieces = []
        self._upstreams: dict[int, Pair] = {}
        self._clients: dict[int, Pair] = {}
        self._woken = False
        self._next_sweep_ns = 0

    def __repr__(self) -> str:
        return f"<Pump pairs={len(self._clients)} upstreams={len(self._upstreams)} frames={self.frames}>"

    # -- which sockets are under the pump

    def open(self, client: socket.socket, on_gone: Callable[[], None]) -> Pair:
        """A pair for one exchange; `on_gone` is called, once and from the pump, when the client hangs up."""
        pair = Pair(self, client, on_gone)
        self._clients[client.fileno()] = pair
        self.epoll.register(client.fileno(), select.EPOLLRDHUP)
        return pair

    def attach(self, pair: Pair, upstream: socket.socket) -> None:
        """See `Pair.attach`."""
        pair.upstream = upstream
        self._upstreams[upstream.fileno()] = pair
        self.epoll.register(upstream.fileno(), select.EPOLLONESHOT)

    def detach(self, pair: Pair) -> None:
        """See `Pair.detach`."""
        if pair.upstream is not None:
            fileno = pair.upstream.fileno()
            if self._upstreams.pop(fileno, None) is not None:
                self.epoll.unregister(fileno)
            pair.upstream = None

    def close(self, pair: Pair) -> None:
        """See `Pair.close`."""
        self.commented.discard(pair)
        pair.on_quiet = None  # which the exchange holds, and it the pair
        self.detach(pair)
        self._forget_client(pair)

    def silence(self, pair: Pair) -> None:
        """Stops reporting the engine's socket, which stays attached."""
        if pair.upstream is not None:
            # An error or hang-up is reported whatever was asked for; one-shot keeps that from spinning.
            self.epoll.modify(pair.upstream.fileno(), select.EPOLLONESHOT)

    def _forget_client(self, pair: Pair) -> None:
        fileno = pair.client.fileno()
        if self._clients.get(fileno) is pair:
            del self._clients[fileno]
            self.epoll.unregister(fileno)

    # -- serving

    def turn(self, timeout: float) -> bool:
        """Serves what comes until trio has to run (True), or for `timeout` seconds (False); 0: what is ready, once."""
        poll, pairs = self.epoll.poll, self._upstreams
        wait = timeout
        wake_at = time.monotonic_ns() + int(timeout * 1e9)
        while True:
            events = poll(SWEEP_S if wait > SWEEP_S and (pairs or self.commented) else wait, EVENTS_PER_TURN)
            now = time.monotonic_ns()
            is_trios_turn = False
            for fd, flags in events:
                pair = pairs.get(fd)
                if pair is None:
                    is_trios_turn |= self._other_event(fd, flags)
                elif pair.relay is None:
                    self._woken |= pair.wake()
                else:
                    try:
                        self._serve(pair, pair.relay, now)
                    except Exception:  # a fault of ours ends this stream, not the others
                        traceback.print_exc()
                        self._out.clear()
                        self._give_back(pair, Stop.FAULT)
            if now >= self._next_sweep_ns:
                self._next_sweep_ns = now + int(SWEEP_S * 1e9)
                self.sweep(now)
            if is_trios_turn or self._woken:
                self._woken = False
                return True
            if now >= wake_at:
                return False
            wait = (wake_at - now) / 1e9

    def _other_event(self, fd: int, flags: int) -> bool:
        """What is not an engine's socket; True if it is trio's own descriptor, and trio has to run."""
        pair = self._clients.get(fd)
        if pair is None:
            return True  # or a descriptor that left in this batch, which costs a turn of trio
        self._client_hung_up(pair, flags)
        return False

    def sweep(self, now: int) -> None:
        """Gives back every pair whose engine has been silent for too long at `now` (ns of the monotonic clock).

        Then comments to every client that has heard nothing for too long.
        """
        for pair in list(self._upstreams.values()):
            if pair.relay is None:
                is_late = pair.limit_at_ns and now > pair.limit_at_ns
            else:
                is_late = pair.idle_limit_ns and now - pair.last_read_ns > pair.idle_limit_ns
            if is_late:
                self._give_back(pair, Stop.UPSTREAM_IDLE)
        for pair in list(self.commented):
            if now - max(pair.last_frame_ns, pair.last_comment_ns) >= pair.comment_every_ns:
                pair.last_comment_ns = now
                self._comment(pair)

    def _comment(self, pair: Pair) -> None:
        if pair.relay is None:
            if pair.on_quiet is not None and not pair.on_quiet():
                self._client_left(pair)
        elif (comment := pair.relay.comment) and (stop := self._flush(pair, [comment])):
            self._give_back(pair, stop)

    async def run_as_task(self) -> None:
        """The pump as an ordinary task, on a nested epoll: a turn of trio's scheduler for each wake-up."""
        while True:
            with trio.move_on_after(SWEEP_S):
                await trio.lowlevel.wait_readable(self.epoll.fileno())
            self.turn(0)

    def _serve(self, pair: Pair, relay: FrameRelay, now: int) -> None:
        """One read of one stream, passed on."""
        assert pair.upstream is not None
        try:
            received = pair.upstream.recv_into(self._buffer)
        except BlockingIOError:
            return
        except OSError:
            self._give_back(pair, Stop.UPSTREAM_RESET)
            return
        finder = relay.finder
        before = finder.frames
        out = self._out
        decoder = relay.decoder
        if received:
            pair.bytes_in += received
            relay.feed(self._buffer, self._view, received, out)
        else:
            decoder.at_close()
        if decoder.is_done:
            relay.finish(out)
        if frames := finder.frames - before:
            self.frames += frames
            if pair.gaps is not None:
                pair.gaps.add(now - pair.last_frame_ns)
                if frames > 1:
                    pair.gaps.add_zeros(frames - 1)
            pair.last_frame_ns = now
        pair.last_read_ns = now
        stop = self._flush(pair, out) if out else None
        out.clear()
        if not pair.content_sent_ns and relay.meter.saw_content:
            pair.content_read_ns, pair.content_sent_ns = now, time.monotonic_ns()
        if stop is None:
            if decoder.is_done:
                stop = Stop.DONE
            elif not received:
                stop = Stop.UPSTREAM_CLOSED
            elif decoder.error is not None:
                stop = Stop.UPSTREAM_MALFORMED
            else:
                return
        self._give_back(pair, stop)

    def _flush(self, pair: Pair, out: Pieces) -> Stop | None:
        """Sends `out` to the client; None when all of it went."""
        if len(out) > _MOST_PIECES:
            out[:] = [b"".join(out)]
        try:
            if len(out) == 1:
                size = len(out[0])
                sent = pair.send(out[0])
            else:
                size = sum(map(len, out))
                sent = pair.sendmsg(out)
        except BlockingIOError:
            sent = 0
        except OSError:
            return Stop.CLIENT_GONE
        pair.bytes_out += sent
        if sent == size:
            return None
        pair.unsent = b"".join(out)[sent:]
        return Stop.CLIENT_BLOCKED

    def _give_back(self, pair: Pair, stop: Stop) -> None:
        self.silence(pair)
        pair.relay = None
        pair.stop = stop
        if pair.wake():
            self._woken = True

    def _client_hung_up(self, pair: Pair, flags: int) -> None:
        self._forget_client(pair)
        if not flags & (select.EPOLLERR | select.EPOLLHUP):
            try:
                if pair.client.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT):
                    return  # it has said more before it closed: no hang-up, but nothing is left to watch
            except BlockingIOError:
                return
            except OSError:
                pass
        self._client_left(pair)

    def _client_left(self, pair: Pair) -> None:
        pair.is_gone = True
        pair.on_gone()
        self._woken = True
