"""One client connection: requests in (h11), answers out, keep-alive, and the watch for a client that leaves.

h11 reads requests, a fresh instance for each, so that whatever answer a fault makes needs no agreement with its state
machine; answers are written as bytes. Sockets are the standard library's, non-blocking, since the decode loop writes to
them outside any task's turn.
"""

from __future__ import annotations

import socket
import struct
import sys
import time
from typing import TYPE_CHECKING, Final

import h11
import trio

from relay_bench.engine import routes
from relay_bench.engine.handover import meeting
from relay_bench.engine.ledger import State
from relay_bench.engine.plain import Refusal, json_answer, response_head
from relay_bench.engine.scheduler import Sequence
from relay_bench.engine.wire import Cut

if TYPE_CHECKING:
    from relay_bench.engine.config import EngineConfig
    from relay_bench.engine.handover import Part
    from relay_bench.engine.ledger import Ledger, RequestRecord
    from relay_bench.engine.scheduler import Scheduler

#: Bytes of a request head; h11's own limit is 16 KiB, uvicorn's 64.
_MAX_HEAD_BYTES: Final = 1 << 16
_RECEIVE_BYTES: Final = 1 << 16
#: Bytes of pipelined requests kept while an answer is under way.
_MAX_PIPELINED_BYTES: Final = 1 << 20
#: Seconds for which an early answer's connection still reads, so that a reset does not overtake the answer.
_LINGER_S: Final = 2.0


class _ClientLeft(Exception):
    """The connection has ended from the other side."""


class Connection:
    """The server's side of one accepted socket, until it closes."""

    def __init__(self, sock: socket.socket, config: EngineConfig, ledger: Ledger, scheduler: Scheduler) -> None:
        self._sock = sock
        self._config = config
        self._ledger = ledger
        self._scheduler = scheduler
        self._received = bytearray()  # of the request being read, and what came behind it

    async def serve(self) -> None:
        """Answer requests until either side is done; nothing but `Cancelled` leaves."""
        self._ledger.connections_open += 1
        try:
            is_first = True
            while await self._serve_one(is_first=is_first):
                is_first = False
        except (_ClientLeft, OSError):
            pass
        finally:
            self._ledger.connections_open -= 1
            trio.lowlevel.notify_closing(self._sock)
            self._sock.close()

    async def _serve_one(self, *, is_first: bool) -> bool:
        """One request and its answer; whether the connection goes on."""
        # uvicorn's limit runs between requests only: a fresh connection may stay silent
        limit_s = 0.0 if is_first else self._config.keep_alive_s
        with trio.move_on_after(limit_s) if limit_s > 0 else trio.CancelScope() as idle:
            if not self._received:
                await self._receive()
        if idle.cancelled_caught:
            return False
        try:
            request = await self._read_request()
        except h11.RemoteProtocolError:
            await self._refuse_http()
            return False
        if request is None:
            return False
        if request.path == "/sim/take":
            await self._send(await self._taken(request))
            return request.keep_alive
        if request.is_report:
            await self._send(routes.report(request, self._config, self._ledger))
            return request.keep_alive
        return await self._generate(request)

    # --- requests ---

    async def _receive(self) -> bytes:
        while True:
            try:
                data = self._sock.recv(_RECEIVE_BYTES)
            except BlockingIOError:
                await trio.lowlevel.wait_readable(self._sock)
                continue
            if not data:
                raise _ClientLeft
            self._received += data
            return data

    async def _read_request(self) -> routes.Request | None:
        """The next request, or none if a fault has answered it before its body was there."""
        parser = h11.Connection(h11.SERVER, max_incomplete_event_size=_MAX_HEAD_BYTES)
        parser.receive_data(bytes(self._received))
        request: routes.Request | None = None
        body = bytearray()
        while True:
            event = parser.next_event()
            if event is h11.NEED_DATA:
                if request is not None and parser.they_are_waiting_for_100_continue:
                    await self._send(b"HTTP/1.1 100 Continue\r\n\r\n")
                parser.receive_data(await self._receive())
            elif isinstance(event, h11.Request):
                request = routes.Request.of(event)
                if not request.is_report:
                    request.headers = self._ledger.defaults | request.headers
                if "early-answer" in request.headers.get("x-sim-fault", ""):
                    await self._answer_early(request)
                    return None
            elif isinstance(event, h11.Data):
                body += event.data
            elif isinstance(event, h11.EndOfMessage) and request is not None:
                break
            else:  # the client closed: _receive has said so before
                raise _ClientLeft
        request.body = bytes(body)
        if self._sock.family != socket.AF_UNIX:
            request.address = self._sock.getsockname()[:2]
        self._note(request, len(self._received) - len(parser.trailing_data[0]))
        return request

    def _note(self, request: routes.Request, size: int) -> None:
        """Keep the request's raw bytes, of which there are `size`, for ``/sim/last``; what is behind stays received."""
        head, blank, raw_body = bytes(self._received[:size]).partition(b"\r\n\r\n")
        del self._received[:size]
        if not request.path.startswith("/sim/"):
            self._ledger.keep_last(request.path, head + blank, request.body, raw_body)

    # --- answers ---

    async def _generate(self, request: routes.Request) -> bool:
        """Queue the request's sequence and wait for its end, or for the client's."""
        record = self._ledger.open_record(request.headers.get("x-request-id", ""), request.path, State.QUEUED)
        self._log(record)  # before any of its answer is sent, so that who has one knows that it is in the log
        try:
            return await self._answer(request, record)
        finally:
            self._log(record)

    def _log(self, record: RequestRecord) -> None:
        if self._config.log:
            print(f"relay-bench engine: {record}", file=sys.stderr, flush=True)

    async def _answer(self, request: routes.Request, record: RequestRecord) -> bool:
        now_s = int(time.time())
        try:
            reading = routes.read(request, self._config, self._ledger, now_s)
            is_lost = reading.part.needs_other and not await self._met(reading.part)
            work = routes.plan(reading, self._config, self._ledger, now_s, is_lost=is_lost)
        except Refusal as refusal:
            self._ledger.move(record, State.FAILED)
            await self._send(routes.refusal_answer(request, refusal, now_s))
            return request.keep_alive
        except _ClientLeft:
            self._ledger.move(record, State.ABORTED)
            raise
        sequence = Sequence(
            self._sock,
            work.steps,
            record,
            width=work.width,
            ttft_s=work.ttft_ms / 1000,
            step_s=work.step_ms / 1000,
            blocks=work.blocks,
            own_clock=work.own_clock,
        )
        try:
            self._scheduler.submit(sequence)
            await self._watch(sequence, reading.part.holds)
        finally:
            self._scheduler.abort(sequence)  # does nothing to one that has ended
        if sequence.record.state is State.COMPLETED:
            if self._ledger.cache is not None:
                self._ledger.cache.add(work.words)
            if reading.part.pushes is not None:
                with trio.move_on_after(self._config.kv_patience_s):
                    await meeting.push(reading.part.pushes)
        if sequence.cut is Cut.RST:
            self._reset()
        return sequence.cut is Cut.END and work.keep_alive

    async def _met(self, part: Part) -> bool:
        """Whether the request has had what it needs of another engine.

        Raises `_ClientLeft` like `_watch`, but a read that has begun goes on to its end, as in vLLM.
        """
        if not part.may_wait:
            return await self._meet(part)
        has_left = is_met = False

        async def watch() -> None:
            nonlocal has_left
            try:
                await self._hold_what_comes()
            except (_ClientLeft, OSError):
                has_left = True
                nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch)
            is_met = await self._meet(part)
            nursery.cancel_scope.cancel()
        if has_left:
            raise _ClientLeft
        return is_met

    async def _meet(self, part: Part) -> bool:
        with trio.move_on_after(self._config.kv_patience_s):
            return await meeting.begin(part, self._ledger.handles)
        return False

    async def _taken(self, request: routes.Request) -> bytes:
        """The answer to another engine that asks for a handle; ``wait``: for a while, if it is not there yet."""
        handles, handle = self._ledger.handles, request.argument("handle")
        is_had = False
        if request.argument("engine") in {"", self._ledger.engine_id}:
            if request.argument("wait"):
                with trio.move_on_after(self._config.kv_patience_s):
                    is_had = await handles.take_soon(handle)
            else:
                is_had = handles.take(handle)
        return json_answer(200 if is_had else 404, b"{}", int(time.time()), close=not request.keep_alive)

    async def _watch(self, sequence: Sequence, handle: str) -> None:
        """Until `sequence` has ended; raises `_ClientLeft` as soon as its client hangs up.

        What its answer has a `handle` for is held from its end on: before a decoder can have heard of it.
        """

        def end() -> None:
            if handle and sequence.record.state is State.COMPLETED:
                self._ledger.handles.give(handle)
            scope.cancel()

        with trio.CancelScope() as scope:
            sequence.on_end = end
            if not sequence.has_ended:
                await self._hold_what_comes()

    async def _hold_what_comes(self) -> None:
        """Receives pipelined requests, until cancelled; raises `_ClientLeft` as soon as the client hangs up."""
        while True:
            await self._receive()
            if len(self._received) > _MAX_PIPELINED_BYTES:
                raise _ClientLeft

    async def _answer_early(self, request: routes.Request) -> None:
        """Answer before the body has been read, and close.

        Closing with unread bytes makes the kernel send a reset, which can overtake the answer; ``early-answer:rst``
        wants just that, otherwise the rest is read and thrown away for a while.
        """
        now_s = int(time.time())
        refusal = Refusal(400, "The engine has seen enough of this request.", "BadRequestError")
        self._ledger.open_record(request.headers.get("x-request-id", ""), request.path, State.FAILED)
        request.keep_alive = False
        await self._send(routes.refusal_answer(request, refusal, now_s))
        if request.headers["x-sim-fault"].endswith(":rst"):
            return
        self._sock.shutdown(socket.SHUT_WR)
        with trio.move_on_after(_LINGER_S):
            while True:
                await self._receive()
                self._received.clear()

    async def _refuse_http(self) -> None:
        """What uvicorn says to bytes that are no HTTP."""
        body = b"Invalid HTTP request received."
        fields = (b"content-type: text/plain; charset=utf-8", b"content-length: %d" % len(body), b"connection: close")
        await self._send(response_head(400, int(time.time()), *fields) + body)

    async def _send(self, data: bytes) -> None:
        while data:
            try:
                data = data[self._sock.send(data) :]
            except BlockingIOError:
                await trio.lowlevel.wait_writable(self._sock)

    def _reset(self) -> None:
        """Make the coming close a reset."""
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
