"""The pump: every token stream of a worker, served by plain calls while trio sleeps.

Per frame a proxy cannot save the kernel's part: readiness, receive, send. Everything around it is here kept to one
dictionary look-up, one receive into a buffer shared by all pairs, one pass of `FrameRelay`, one send. A pair of sockets
(engine, client) belongs to an exchange; that attaches the engine's socket, waits for it through the pump, then hands
it the streaming, mostly before the first frame (`Pair.begin`), and sleeps until `Pair.stopped` says why it came back.
What is decided per request stays in the exchange, whose coroutine the pump steps when what it waits for has come
(`relay.net.fiber`); what passes per frame never leaves this module.

The client's side is watched for hang-up during an exchange, so a client that leaves ends it in every phase: the pump
calls `on_gone`, which cancels the scope of the client's connection.

While nothing flows to a client, the sweep sends it comments (`Pair.comment_every`): between two frames by itself, and
before there is a stream by asking the exchange, which may send but not wait.
"""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Callable, Sized
from typing import Final

import trio

from relay.core.frames import Pieces
from relay.net.fiber import Fiber
from relay.net.notices import say_fault
from relay.net.pair import Pair, Stop
from relay.net.sockets import SHORTAGES
from relay.net.source import ARRIVALS, ENDS, Source, TlsSource
from relay.net.tls import TlsSocket, reason_of

#: Bytes taken off an engine's socket at once; the most that one pair can hold up the others with.
RECEIVE_BYTES: Final = 65536
#: Events served before the pump looks at trio again: bounds how late accepts and cancellations can be. Room for so many
#: is what CPython's `epoll.poll` still takes from its own pools (512 bytes), and not from malloc, each time.
EVENTS_PER_TURN: Final = 42
#: How often idle streams, and clients that are due a comment, are looked for, seconds.
SWEEP_S: Final = 0.25
#: And at the least between two looks: so late can limits of waits be. Each look goes through all that is waited for.
SWEEPS_APART_S: Final = 0.05
#: Pieces beyond which one write is joined rather than gathered (the kernel's limit is 1,024).
_MOST_PIECES: Final = 64


class Pump:
    """All sockets of a worker's exchanges on one epoll; driven by `poller.install`, or else by `run_as_task`."""

    def __init__(self, sweep_s: float = SWEEP_S) -> None:
        self.epoll = select.epoll()
        self.sweep_s = sweep_s
        self.frames = 0  #: frames passed on since the start
        self.limited: set[Source] = set()  #: those waited for up to a limit
        self.streaming: set[Pair] = set()
        self.commented: set[Pair] = set()  #: those whose clients get comments
        self._buffer = bytearray(RECEIVE_BYTES)
        self._view = memoryview(self._buffer)
        self._out: Pieces = []
        self._sources: dict[int, Source] = {}
        self.woken: list[tuple[Fiber, Exception | None]] = []  #: in this turn; each to go on, perhaps with an error
        self.run_queue: Sized | None = None  #: trio's, while trio sleeps here (`poller.install`)
        self._next_sweep_ns = 0

    def __repr__(self) -> str:
        pairs = sum(source.of_client is not None for source in self._sources.values())
        return f"<Pump pairs={pairs} streaming={len(self.streaming)} frames={self.frames}>"

    @property
    def is_nested(self) -> bool:
        """Whether trio sleeps here, so that the pump may step fibers."""
        return self.run_queue is not None

    # -- which sockets are under the pump

    def add(self, sock: socket.socket) -> Source:
        """Puts a socket under the pump; it is closed by `Source.close`.

        Raises OSError where the kernel watches no more (epoll_ctl(2): ENOMEM, ENOSPC): then it is closed.
        """
        source = (TlsSource if isinstance(sock, TlsSocket) else Source)(self, sock)
        try:
            self.epoll.register(source.fileno, ARRIVALS)
        except OSError:
            sock.close()
            raise
        self._sources[source.fileno] = source
        return source

    def forget(self, source: Source) -> None:
        """Its socket is being closed, of which the kernel's side needs not be told."""
        if self._sources.get(source.fileno) is source:
            del self._sources[source.fileno]
        self.limited.discard(source)

    def limit(self, source: Source, limit_at_ns: int) -> None:
        """Has the present wait for `source` end at that time of the monotonic clock, or a little later."""
        source.limit_at_ns = limit_at_ns
        self.limited.add(source)
        self._next_sweep_ns = min(self._next_sweep_ns, limit_at_ns)

    def open(self, client: Source, on_gone: Callable[[], None]) -> Pair:
        """A pair for one exchange; `on_gone` is called, from the pump, when the client hangs up, perhaps again."""
        pair = client.of_client = Pair(self, client, on_gone)
        if client.is_ending or (client.says_goodbye and client.has_news):
            client.report_anew()
        return pair

    # -- serving

    def turn(self, timeout: float) -> bool:
        """Serves what comes until trio has to run, or for `timeout` seconds; 0: what is ready, once.

        Then goes on with the fibers that were woken by it. Answers whether trio's own descriptor may be ready, so that
        asking it pays; False also where it came back as one of trio's tasks can run, or as the time is over.
        """
        poll, clock, sources = self.epoll.poll, time.monotonic_ns, self._sources
        now = clock()
        wake_at = now + int(timeout * 1e9)
        while True:
            until = wake_at
            if self._next_sweep_ns < until and (self.limited or self.streaming or self.commented):
                until = self._next_sweep_ns
            events = poll((until - now) / 1e9 if until > now else 0, EVENTS_PER_TURN)
            now = clock()
            is_trios_turn = False
            for fd, flags in events:
                source = sources.get(fd)
                if source is None:
                    is_trios_turn = True  # its own descriptor, or one that left in this batch, which costs it a turn
                elif source.streams is None:
                    self._arrived(source, flags)
                else:
                    try:
                        self._serve(source.streams, source, flags, now)
                    except Exception as exc:  # a fault of ours ends this stream, not the others
                        say_fault(exc)
                        self._out.clear()
                        if source.streams is not None:
                            self._give_back(source.streams, Stop.FAULT)
            if now >= self._next_sweep_ns:
                self.sweep(now)
            if self.woken:
                self._resume()
                now = clock()
            if is_trios_turn or self.run_queue:
                return is_trios_turn
            if now >= wake_at:
                return False

    def _resume(self) -> None:
        """Goes on with the fibers that were woken; none of them wakes another before the next wait for events."""
        woken, self.woken = self.woken, []
        for fiber, error in woken:
            fiber.resume(error)
        woken.clear()
        del fiber, error  # whose traceback may hold this frame

    def _arrived(self, source: Source, flags: int) -> None:
        """Something came that the pump does not read itself, or there is room to write again."""
        if flags & ~select.EPOLLOUT:
            source.has_news = True
        if flags & ENDS:
            source.is_ending = True
        if source.of_client is not None and (flags & ENDS or source.says_goodbye):
            self._look_at_client(source.of_client, flags)
        source.wake()

    def sweep(self, now: int) -> None:
        """Ends every wait that has taken too long at `now` (ns of the monotonic clock), and every stream's silence.

        Then comments to every client that has heard nothing for too long.
        """
        late = []
        until = now + int(self.sweep_s * 1e9)
        for source in self.limited:
            if now > source.limit_at_ns:
                late.append(source)
            elif source.limit_at_ns < until:
                until = source.limit_at_ns
        self._next_sweep_ns = max(until, now + int(min(SWEEPS_APART_S, self.sweep_s) * 1e9))
        for source in late:
            source.streams = None  # the pump may have a turn before the task does
            source.wake(trio.TooSlowError())
        for pair in list(self.streaming):
            if pair.idle_limit_ns and now - pair.last_read_ns > pair.idle_limit_ns:
                self._give_back(pair, Stop.UPSTREAM_IDLE)
        for pair in list(self.commented):
            if now - max(pair.last_frame_ns, pair.last_comment_ns) >= pair.comment_every_ns:
                pair.last_comment_ns = now
                try:
                    self._comment(pair)
                except Exception as exc:  # a fault of ours, as above
                    say_fault(exc)
                    self.commented.discard(pair)
                    if pair.relay is not None:
                        self._give_back(pair, Stop.FAULT)

    def _comment(self, pair: Pair) -> None:
        if pair.relay is None or pair.is_beginning:
            # What has begun needs no other head; its exchange may not yet know that it has.
            if pair.on_quiet is not None and not pair.begun_ns and not pair.on_quiet():
                self._client_left(pair)
        elif (comment := pair.relay.comment) and (stop := self._flush(pair, [comment])):
            self._give_back(pair, stop)

    async def run_as_task(self) -> None:
        """The pump as an ordinary task, on a nested epoll: a turn of trio's scheduler for each wake-up."""
        while True:
            with trio.move_on_after(self.sweep_s):
                await trio.lowlevel.wait_readable(self.epoll.fileno())
            self.turn(0)

    def _serve(self, pair: Pair, upstream: Source, flags: int, now: int) -> None:
        """One read of one stream, passed on."""
        relay = pair.relay
        assert relay is not None
        if flags & ENDS:
            upstream.is_ending = True
        try:
            received = upstream.sock.recv_into(self._buffer)
        except BlockingIOError:
            return
        except OSError as exc:
            pair.reason = reason_of(exc)
            self._give_back(pair, Stop.SHORTAGE if exc.errno in SHORTAGES else Stop.UPSTREAM_RESET)
            return
        upstream.took(received, RECEIVE_BYTES)
        view = self._view[:received]
        data = bytes(view)
        if pair.is_beginning and pair.preface is not None and data and relay.passes_unread(data):
            self._pass_first(pair, upstream, data, view, now)
            return
        finder = relay.finder
        before = finder.frames
        out = self._out
        decoder = relay.decoder
        if data:
            relay.feed(data, view, out)
        else:
            decoder.at_close()
        if decoder.is_done:
            relay.finish(out)
        has_begun = pair.is_beginning and (len(out) > 0 or decoder.is_done)
        if has_begun and not self._send_or_hold(pair, out, now):
            return
        if frames := finder.frames - before:
            self.frames += frames
            if not has_begun:
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
            elif not data:
                stop = Stop.UPSTREAM_CLOSED
            elif decoder.error is not None:
                stop = Stop.UPSTREAM_MALFORMED
            else:
                if upstream.has_news:
                    upstream.report_anew()
                if has_begun:
                    upstream.wake()  # its exchange takes note of that, while more may come
                return
        self._give_back(pair, stop)

    def _pass_first(self, pair: Pair, upstream: Source, data: bytes, view: memoryview, now: int) -> None:
        """A first read of whole frames, as most are, goes out before anything is read in it: a client waits for that.

        To match a form that was not looked at for a while takes longer than all else up to the client.
        """
        relay, out = pair.relay, self._out
        assert relay is not None
        out.append(view)
        self._send_or_hold(pair, out, now)
        stop = self._flush(pair, out)
        sent_ns = time.monotonic_ns()
        out.clear()
        relay.feed(data, view, out)
        out.clear()
        self.frames += relay.finder.frames
        pair.last_read_ns = now
        if relay.meter.saw_content:
            pair.content_read_ns, pair.content_sent_ns = now, sent_ns
        if stop is not None:
            self._give_back(pair, stop)
            return
        if upstream.has_news:
            upstream.report_anew()
        upstream.wake()

    def _send_or_hold(self, pair: Pair, out: Pieces, now: int) -> bool:
        """The first frames of a stream are there. True: they go out, with their head; else its exchange has them."""
        preface = pair.preface
        if preface is None:
            pair.unsent = b"".join(out)
            out.clear()
            self._give_back(pair, Stop.HELD)
            return False
        out.insert(0, preface.at(now, time.monotonic_ns()))
        pair.preface = None
        pair.begun_ns = pair.last_frame_ns = now  # what goes out first may be less than a frame
        pair.is_beginning = False
        self.streaming.add(pair)
        return True

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
        except OSError as exc:
            return Stop.SHORTAGE if exc.errno in SHORTAGES else Stop.CLIENT_GONE
        pair.bytes_out += sent
        if sent == size:
            return None
        pair.unsent = b"".join(out)[sent:]
        return Stop.CLIENT_BLOCKED

    def _give_back(self, pair: Pair, stop: Stop) -> None:
        """Ends a stream, and wakes its exchange."""
        pair.relay = None
        pair.stop = stop
        if pair.upstream is not None:
            pair.upstream.streams = None
            pair.upstream.wake()

    def _look_at_client(self, pair: Pair, flags: int) -> None:
        """Has it hung up? A FIN is that, as nginx takes it, whatever the client may have sent before."""
        if not flags & ENDS:
            try:
                if pair.client.sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT):
                    return
            except BlockingIOError:
                return
            except OSError:
                pass
        self._client_left(pair)

    def _client_left(self, pair: Pair) -> None:
        pair.is_gone = True
        pair.on_gone()
