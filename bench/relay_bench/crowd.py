"""The client that only counts: many connections in one epoll loop, which counts frames and keeps nothing.

It measures CPU for `relay_bench.micro.process` and `relay_bench.peers`: as little Python per read as
possible, since it shares a core with the engine.
"""

from __future__ import annotations

import select
import socket
import ssl
import time
from typing import Final, Self

#: Seconds for a server to listen, for streams to begin, or for a batch of requests to end.
PATIENCE_S: Final = 30.0

_LAST_CHUNK: Final = b"\r\n0\r\n\r\n"
_KEPT: Final = len(_LAST_CHUNK)
_HEAD_OK: Final = b"HTTP/1.1 200"


class MeasureError(Exception):
    """Nothing can be measured; the message says why."""


class _Stream:
    """One connection: what of its last bytes matters for the next."""

    __slots__ = ("began", "sock", "tail")

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.began = False
        self.tail = b""


class Crowd:
    """Connections to one server, read by one epoll loop that counts frames (blank lines in the body) and answers."""

    def __init__(
        self, name: str, address: tuple[str, int], connections: int, tls: ssl.SSLContext | None = None
    ) -> None:
        self.frames = 0
        self.answers = 0
        self.began = 0
        self._name = name
        self._epoll = select.epoll()
        self._streams: dict[int, _Stream] = {}
        try:
            for _ in range(connections):
                sock = socket.create_connection(address, timeout=PATIENCE_S)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                if tls is not None:
                    sock = tls.wrap_socket(sock)
                self._streams[sock.fileno()] = _Stream(sock)
                self._epoll.register(sock.fileno(), select.EPOLLIN)
        except OSError as error:
            self.close()
            raise MeasureError(f"{name}: no connection: {error}") from error

    def __repr__(self) -> str:
        return f"<Crowd {len(self._streams)} connections, {self.frames} frames, {self.answers} answers>"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Hangs up on all."""
        for stream in self._streams.values():
            stream.sock.close()
        self._epoll.close()

    def ask(self, request: bytes) -> None:
        """Sends one request on each connection."""
        for stream in self._streams.values():
            stream.sock.sendall(request)

    def ask_in_turn(self, request: bytes, pause_s: float) -> None:
        """Sends one request on each connection, with so long a pause behind each, in which it reads."""
        for stream in self._streams.values():
            stream.sock.sendall(request)
            self.run_for(pause_s)

    def run_for(self, seconds: float, again: bytes = b"") -> None:
        """Reads for so long, sending `again` behind each answer; without it, none is to end."""
        end = time.perf_counter() + seconds
        while (left := end - time.perf_counter()) > 0:
            self._turn(left, again)

    def run_until_all_began(self, limit_s: float, again: bytes = b"") -> None:
        """Reads until each stream has brought its head, as a rule with a frame."""
        end = time.perf_counter() + limit_s
        while self.began < len(self._streams):
            if (left := end - time.perf_counter()) <= 0:
                raise MeasureError(f"{self._name}: {self.began} of {len(self._streams)} streams began")
            self._turn(left, again)

    def run_until_answers(self, answers: int, request: bytes) -> None:
        """Reads until there have been so many answers in all, sending `request` again behind each."""
        end = time.perf_counter() + PATIENCE_S + answers / 100
        while self.answers < answers:
            if (left := end - time.perf_counter()) <= 0:
                raise MeasureError(f"{self._name}: {self.answers} of {answers} answers came")
            self._turn(left, request)

    def _turn(self, timeout: float, again: bytes) -> None:
        for fileno, _ in self._epoll.poll(timeout):
            stream = self._streams[fileno]
            try:
                data = stream.sock.recv(262_144)
            except OSError as error:
                raise MeasureError(f"{self._name}: a stream broke: {error}") from error
            if not data:
                raise MeasureError(f"{self._name}: a stream ended early")
            if not stream.began:
                if not data.startswith(_HEAD_OK):
                    raise MeasureError(f"{self._name}: answered {data[:200]!r}")
                stream.began = True
                self.began += 1
            # A blank line, or the last chunk, may come in two reads.
            self.frames += data.count(b"\n\n") + (stream.tail[-1:] == b"\n" and data[:1] == b"\n")
            stream.tail = (data if len(data) >= _KEPT else stream.tail + data)[-_KEPT:]
            if stream.tail == _LAST_CHUNK:
                self.answers += 1
                if not again:
                    raise MeasureError(f"{self._name}: a stream ended early")
                stream.tail, stream.began = b"", False
                stream.sock.sendall(again)
