"""A client's connection: non-blocking, plain or TLS, with the kernel's word on when bytes arrived.

Linux stamps each segment when its driver hands it over, if asked (SO_TIMESTAMPNS), and TCP's ``recvmsg`` passes on the
stamp of the last segment it took bytes from (since 4.13, as for SO_TIMESTAMPING). The stamps are of the wall clock; the
difference to that same clock, read when ``recvmsg`` has returned, is the client's own delay. The kernel switches stamps
on, for the whole machine, some milliseconds after the first socket asks for them; `stamps_held` asks early.
"""

from __future__ import annotations

import os
import socket
import ssl
import struct
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from relay_bench.load.target import Target

_READ_BYTES: Final = 1 << 16
_SO_TIMESTAMPNS: Final = 35  # asm-generic/socket.h; Python's socket module has no name for it
_ANCILLARY_BYTES: Final = socket.CMSG_SPACE(16)
_unpack_stamp = struct.Struct("@qq").unpack
_NS: Final = 1_000_000_000


def stamps_held() -> socket.socket:
    """A socket that does nothing but keep the kernel's stamps on; close it when they are no longer wanted."""
    holder = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with suppress(OSError):
        holder.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
    return holder


class Transport:
    """One connection being made or made. Methods raise `BlockingIOError` where they would wait, else `OSError`."""

    __slots__ = ("_stamped", "delay_ns", "is_connected", "requests", "sock")

    def __init__(self, target: Target) -> None:
        self.sock = socket.socket(target.family, socket.SOCK_STREAM)
        self.is_connected = False
        self.requests = 0  #: sent on it so far
        self.delay_ns = -1  #: of the last `receive`: from the kernel's stamp to its return; -1: not known
        self._stamped = False
        try:
            self.sock.setblocking(False)
            if target.family != socket.AF_UNIX:
                self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                with suppress(OSError):  # kernels of containers that emulate Linux may not know it
                    self.sock.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
                    self._stamped = True
            with suppress(BlockingIOError):
                self.sock.connect(target.address)
                self.is_connected = True
        except BaseException:
            self.sock.close()
            raise

    def fileno(self) -> int:
        """The socket's descriptor."""
        return self.sock.fileno()

    def finish_connect(self) -> None:
        """Goes on with connecting, once the socket is writable (or, under TLS, readable)."""
        error = self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if error:
            raise OSError(error, os.strerror(error))
        self.is_connected = True

    def send(self, data: memoryview) -> int:
        """Hands bytes to the kernel; how many."""
        return self.sock.send(data)

    def receive(self) -> bytes:
        """What there is, up to a limit; empty at the end."""
        if not self._stamped:
            return self.sock.recv(_READ_BYTES)
        data, ancillary, _, _ = self.sock.recvmsg(_READ_BYTES, _ANCILLARY_BYTES)
        if ancillary:
            seconds, ns = _unpack_stamp(ancillary[0][2])
            self.delay_ns = time.time_ns() - seconds * _NS - ns
        else:
            self.delay_ns = -1
        return data

    @property
    def has_more(self) -> bool:
        """Whether bytes wait that the kernel no longer knows of."""
        return False

    def close(self) -> None:
        """Closes at once."""
        self.sock.close()


class TlsTransport(Transport):
    """The same under TLS. There are no kernel stamps: what they would be of are records, not bytes."""

    __slots__ = ("_context", "_name")

    def __init__(self, target: Target, context: ssl.SSLContext) -> None:
        super().__init__(target)
        self._context: ssl.SSLContext | None = context
        self._name = target.tls_name
        self._stamped = False
        self.is_connected = False

    def finish_connect(self) -> None:
        """See `Transport.finish_connect`."""
        if self._context is not None:
            super().finish_connect()
            self.is_connected = False
            self.sock = self._context.wrap_socket(self.sock, server_hostname=self._name, do_handshake_on_connect=False)
            self._context = None
        assert isinstance(self.sock, ssl.SSLSocket)
        try:
            self.sock.do_handshake()
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise BlockingIOError from None
        self.is_connected = True

    def send(self, data: memoryview) -> int:
        """See `Transport.send`."""
        try:
            return self.sock.send(data)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise BlockingIOError from None

    def receive(self) -> bytes:
        """See `Transport.receive`."""
        try:
            return self.sock.recv(_READ_BYTES)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise BlockingIOError from None
        except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
            return b""

    @property
    def has_more(self) -> bool:
        """See `Transport.has_more`."""
        return isinstance(self.sock, ssl.SSLSocket) and self.sock.pending() > 0


def connect(target: Target, context: ssl.SSLContext | None) -> Transport:
    """Begins a connection; raises `OSError` where that fails at once."""
    if target.tls_name:
        return TlsTransport(target, context or ssl.create_default_context())
    return Transport(target)
