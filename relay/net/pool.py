"""An engine that may be used: its idle connections, dialling, and what the relay knows of it."""

from __future__ import annotations

import errno
import math
import os
import socket
import ssl
import time
from collections import deque
from typing import Final

import msgspec
import trio

from relay.address import UpstreamConfig
from relay.core.answer_head import KnownHeads
from relay.core.balance import Seat
from relay.core.board import Counter
from relay.core.connectors.base import Endpoint
from relay.core.health import Health
from relay.core.metrics import RESPONSE_CLASSES
from relay.errors import Phase, UpstreamTimeout, UpstreamUnreachable
from relay.net import sockets, tls
from relay.net.pump import Pump
from relay.net.shares import Permits, Shares
from relay.net.source import Source

#: How long until a unix socket whose backlog is full is tried again: unlike TCP, the kernel does not do so by itself.
RETRY_S: Final = 0.02
#: Idle connections kept per upstream at most; more are closed when they come back.
MOST_IDLE = 1024


class UpstreamConnection:
    """An open connection to an engine."""

    __slots__ = ("idle_since", "sock", "source", "upstream")

    def __init__(self, upstream: Upstream, sock: socket.socket) -> None:
        self.upstream = upstream
        self.sock = sock
        self.source: Source | None = None  #: under the pump; None: it has never been
        self.idle_since = 0.0

    def under(self, pump: Pump) -> Source:
        """Itself, as the pump sees it from now on. Raises OutOfResources."""
        if self.source is None:
            try:
                self.source = pump.add(self.sock)
            except OSError as exc:
                raise sockets.shortage(exc, Phase.CONNECT) or exc from None
        return self.source

    def is_silent(self) -> bool:
        """Whether it is open, as far as the kernel has told, and nothing is there to be read."""
        if self.source is not None and not self.source.has_news:
            return True
        try:
            self.sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False  # closed, or bytes nobody asked for

    def end_sending(self) -> None:
        """Hangs up in one direction, so that the engine stops, and what it has sent can still be read.

        TLS is not told: an engine that was would say goodbye too, instead of what it has to say.
        """
        socket.socket.shutdown(self.sock, socket.SHUT_WR)

    def close(self) -> None:
        """Closes at once: the engine sees its client gone and stops generating."""
        if self.source is not None:
            self.source.close()
        else:
            self.sock.close()


class Upstream:
    """An engine that may be used, in one role of one pool."""

    def __init__(self, config: UpstreamConfig, role: str, health: Health) -> None:
        self.config = config
        self.role = role  #: of `relay.core.metrics.ROLES`
        self.health = health
        self.authority = config.authority.encode("ascii")
        self.seat = Seat(config.url, config.weight)
        self.added_at = time.monotonic()
        self.is_resolved = False  #: found by its name, and not configured itself
        self.is_leaving = False  #: taken out: what it has goes on, nothing more comes
        self.before: list[Upstream] = []  #: those of its URL that were taken out, and still have something to do
        self.failures = 0  #: attempts that failed by its fault
        self.server_errors = 0  #: answers of 500 and more that were passed on
        self.responses: list[Counter | None] = [None] * len(RESPONSE_CLASSES)  #: by class, where there have been some
        self.last_error: str | None = None
        self.last_error_at = 0.0  #: when that was (monotonic clock)
        self.probe_s: float | None = None  #: what its last probe took
        self.models: dict[str, msgspec.Raw] | None = None  #: its own list, by id; None: never heard
        self.models_at = float("-inf")  #: when that was
        self.number = 0  #: its cell in what workers share
        self.shares: Shares | None = None  #: where its load is shown to other workers
        self.permits: Permits | None = None  #: its limit's places, where it is one over several workers
        self.endpoint: Endpoint | None = None  #: as its connector sees it; a prefiller's, with what had to be asked for
        self.lack_told_at = float("-inf")  #: when it was last said that a prefiller gives no handle (monotonic clock)
        self.heads = KnownHeads()  #: of its answers
        self._idle: deque[UpstreamConnection] = deque()

    def __repr__(self) -> str:
        return f"<Upstream {self.config.url} {self.role} outstanding={self.outstanding} idle={len(self._idle)}>"

    @property
    def outstanding(self) -> int:
        """Exchanges that hold a load on it."""
        return self.seat.streams

    @property
    def streams(self) -> int:
        """The same, with those of its predecessors."""
        streams = self.seat.streams
        for upstream in self.before:
            streams += upstream.seat.streams
        return streams

    @property
    def is_full(self) -> bool:
        """Whether it has as many exchanges as its configuration allows, with those of its predecessors."""
        if self.permits is not None:
            return self.permits.is_exhausted
        return 0 < self.config.max_in_flight <= self.streams

    def note_error(self, message: str, at: float | None = None) -> None:
        """Keeps what went wrong there last; `at`: when, if not now (monotonic clock)."""
        self.last_error = message
        self.last_error_at = time.monotonic() if at is None else at

    def show_load(self) -> None:
        """Lets other workers see what this one has there."""
        if self.shares is not None:
            load = self.seat.load
            for upstream in self.before:
                load += upstream.seat.load
            self.shares.set_load(self.number, load)

    @property
    def idle(self) -> int:
        """Connections waiting for an exchange."""
        return len(self._idle)

    def take_idle(self, max_idle_s: float) -> UpstreamConnection | None:
        """The idle connection used last, if one is still usable. The last used is the least likely to have expired."""
        expired = time.monotonic() - max_idle_s
        while self._idle:
            connection = self._idle.pop()
            if (not max_idle_s or connection.idle_since > expired) and connection.is_silent():
                return connection
            connection.close()
        return None

    def give_back(self, connection: UpstreamConnection) -> None:
        """Keeps a connection whose exchange ended cleanly, until `drop_expired`."""
        if self.is_leaving:
            connection.close()
            return
        connection.idle_since = time.monotonic()
        self._idle.append(connection)
        if len(self._idle) > MOST_IDLE:
            self._idle.popleft().close()

    def drop_expired(self, max_idle_s: float) -> None:
        """Closes what has been idle for `max_idle_s` (0: that may be any time), and what the engine has closed."""
        expired = time.monotonic() - max_idle_s if max_idle_s else -math.inf
        while self._idle and self._idle[0].idle_since <= expired:
            self._idle.popleft().close()
        for connection in [connection for connection in self._idle if not connection.is_silent()]:
            self._idle.remove(connection)
            connection.close()

    def close_idle(self) -> None:
        """Closes what is not in use."""
        while self._idle:
            self._idle.pop().close()

    async def dial(self, connect_s: float) -> UpstreamConnection:
        """A new connection within `connect_s` seconds (0: no limit).

        Raises UpstreamUnreachable, UpstreamTimeout where nobody answered, or OutOfResources.
        """
        try:
            with trio.fail_after(connect_s or float("inf")):
                sock = await self._connect()
                if self.config.is_tls:
                    sock = await self._secure(sock)
        except trio.TooSlowError:
            message = f"no connection to the engine within connect_s = {connect_s:g} s"
            raise UpstreamTimeout(message, phase=Phase.CONNECT) from None
        except (tls.TlsError, ssl.SSLError) as exc:
            reason = str(exc) if isinstance(exc, tls.TlsError) else tls.reason_of_server(exc)
            reason = reason.partition(", certificate is not valid for ")[0]  # who was asked for is not for clients
            raise UpstreamUnreachable(f"cannot connect to the engine: {reason}", phase=Phase.CONNECT) from None
        except OSError as exc:
            message = f"cannot connect to the engine: {exc.strerror or exc}"
            raise sockets.shortage(exc, Phase.CONNECT) or UpstreamUnreachable(message, phase=Phase.CONNECT) from None
        return UpstreamConnection(self, sock)

    async def _secure(self, sock: socket.socket) -> tls.TlsSocket:
        """TLS over a new connection; the engine has shown a certificate that is good. Raises OSError or TlsError."""
        try:
            sock = secure = tls.wrap(tls.client_context(self.config.ca), sock, server_name=self.config.verified_name)
            await sockets.shake_hands(secure)
        except BaseException:
            sock.close()
            raise
        return secure

    async def _connect(self) -> socket.socket:
        config = self.config
        if config.unix_path is not None:
            return await _connect_to(socket.AF_UNIX, config.unix_path)
        addresses = await trio.socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)
        failure: OSError | None = None
        for family, _, _, _, address in addresses:
            try:
                return await _connect_to(family, address)
            except OSError as exc:
                failure = exc
        try:
            raise failure or OSError("the name has no address")
        finally:
            del failure  # whose frames hold this one


async def _connect_to(family: int, address: object) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        sockets.set_no_delay(sock)
        while (error := sock.connect_ex(address)) == errno.EAGAIN:  # type: ignore[arg-type]  # noqa: ASYNC110
            await trio.sleep(RETRY_S)
        if error == errno.EINPROGRESS:
            await trio.lowlevel.wait_writable(sock)
            error = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if error:
            raise OSError(error, os.strerror(error))
    except BaseException:
        sock.close()
        raise
    return sock
