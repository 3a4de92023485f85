"""TLS on either side: connections that are used as plain sockets are, and the contexts they are made from.

OpenSSL works on the socket itself (`ssl.SSLSocket`, non-blocking) rather than in memory beside it (`ssl.SSLObject`, as
trio's `SSLStream` has it): so whoever waits for a descriptor, the pump above all, serves both kinds with the same code.
A read takes one record after the other until the socket is empty, as a plain read would, so that what arrives later is
reported; whatever else OpenSSL holds back is told by `TlsSocket.has_more`.
"""

from __future__ import annotations

import re
import socket
import ssl
from collections.abc import Iterable
from typing import Final, NamedTuple

from relay.config import Config, TlsConfig

#: The longest record's payload (RFC 8446 §5.1); a read with less room could leave some of it in OpenSSL.
RECORD_BYTES: Final = 16_384


class TlsError(ValueError):
    """Files of certificates or keys cannot be used; each of the `problems` says which, and why."""

    def __init__(self, *problems: str) -> None:
        super().__init__("; ".join(problems))
        self.problems = problems


class TlsListener(socket.socket):
    """A listening socket whose clients speak TLS."""


class TlsSocket(ssl.SSLSocket):
    """A connection whose methods block, fail and end as a non-blocking plain socket's do.

    Where OpenSSL wants to wait, `BlockingIOError`: for the socket to be readable after a read, writable after a write.
    (Reads that wait to write, and the reverse, are renegotiation's, which is off; TLS 1.3's changes of keys go out with
    the next write.) A write that could not be finished must be repeated with the same bytes, more may follow them.
    ``b""`` is the peer's close_notify; an end without it is an OSError, as whoever cuts a connection can forge it.
    """

    #: Whether the last read has left something that the kernel may not report again.
    has_more = False
    _ahead = b""  # what was peeked at
    _failure: OSError | None = None  # what the next read is to fail with

    def recv_into(self, buffer: bytearray, nbytes: int | None = None, flags: int = 0) -> int:  # type: ignore[override]
        """As `socket.recv_into`: what there is, up to the whole buffer, which has room for `RECORD_BYTES` at least."""
        view, size = memoryview(buffer), 0
        if self._ahead:
            size = len(self._ahead)
            view[:size] = self._ahead
            self._ahead = b""
        elif self._failure is not None:
            raise self._failure
        self.has_more = True
        try:
            while len(view) - size >= RECORD_BYTES:
                received = super().recv_into(view[size:])
                if not received:
                    break  # OpenSSL says so each time
                size += received
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            self.has_more = False
            if not size:
                raise BlockingIOError from None
        except OSError as error:
            self._failure = error
            if not size:
                raise
        return size

    def recv(self, buflen: int = RECORD_BYTES, flags: int = socket.MSG_PEEK) -> bytes:
        """A look at what comes next, as `socket.recv` with ``MSG_PEEK``; what reads takes `recv_into`."""
        assert flags & socket.MSG_PEEK
        if not self._ahead:
            buffer = bytearray(RECORD_BYTES)
            self._ahead = bytes(buffer[: self.recv_into(buffer)])
            self.has_more = True
        return self._ahead[:buflen]

    def close(self) -> None:
        """As `socket.close`; forgets its failure, which came through frames that hold the socket and its buffers."""
        self._failure = None
        super().close()

    def send(self, data: bytes | memoryview, flags: int = 0) -> int:  # type: ignore[override]
        """As `socket.send`."""
        try:
            return super().send(data, flags)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise BlockingIOError from None

    def sendmsg(self, buffers: Iterable[bytes | memoryview], *_: object) -> int:  # type: ignore[override]
        """As `socket.sendmsg`, without ancillary data."""
        return self.send(b"".join(buffers))


def wrap(context: ssl.SSLContext, sock: socket.socket, *, server_name: str | None = None) -> TlsSocket:
    """A connection over `sock`, which it takes over; `server_name`: of the server to verify, None: this is the server.

    The handshake comes next. Raises ConnectionAbortedError where the peer is gone: then it is closed.
    """
    try:
        sock.getpeername()  # `wrap_socket` would find it out too, and lose the descriptor
        wrapped = context.wrap_socket(
            sock,
            server_side=server_name is None,
            server_hostname=server_name,
            do_handshake_on_connect=False,
            suppress_ragged_eofs=False,
        )
    except OSError as error:
        sock.close()
        raise ConnectionAbortedError(error.errno, error.strerror) from None
    assert isinstance(wrapped, TlsSocket)
    return wrapped


#: What Python's module adds to OpenSSL's words.
_OF_THE_MODULE: Final = re.compile(r"^\[SSL\] | \(_ssl\.c:\d+\)$")


def has_left(error: OSError) -> bool:
    """Whether the peer ended the connection without a goodbye (before Python 3.11.3 that has no type of its own)."""
    reason = error.reason if isinstance(error, ssl.SSLError) else None
    return isinstance(error, ssl.SSLEOFError) or reason == "UNEXPECTED_EOF_WHILE_READING"


def reason_of(error: OSError) -> str:
    """Why a handshake failed, in OpenSSL's words: ``certificate verify failed: certificate has expired``."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"certificate verify failed: {error.verify_message}"
    if has_left(error):
        return "the connection was closed"
    reason = error.reason if isinstance(error, ssl.SSLError) else None
    return reason.lower().replace("_", " ") if reason else _OF_THE_MODULE.sub("", error.strerror or str(error))


def reason_of_server(error: OSError) -> str:
    """The same of a server that was called, with what to do where its answer was none of TLS's records."""
    reason = reason_of(error)
    if isinstance(error, ssl.SSLError) and error.reason == "WRONG_VERSION_NUMBER":
        return f"{reason}: it seems to speak plain HTTP (http:// in its URL)"
    return reason


# -- contexts


def server_context(config: TlsConfig) -> ssl.SSLContext:
    """What connections of clients are made from. Raises TlsError."""
    context = _context(ssl.PROTOCOL_TLS_SERVER)
    files = {"cert": config.cert, "key": config.key}
    unreadable = [_unreadable(f"listen.tls.{name}", path) for name, path in files.items()]
    if problems := [problem for problem in unreadable if problem]:
        raise TlsError(*problems)

    def refuse() -> str:  # else OpenSSL asks the terminal
        raise TlsError(f"listen.tls.key: {config.key} is encrypted; allowed: a key without a passphrase")

    try:
        context.load_cert_chain(config.cert, config.key, password=refuse)
    except ssl.SSLError as error:
        # Of another kind of key OpenSSL finds no certificate to compare it with.
        if error.reason in ("KEY_VALUES_MISMATCH", "NO_CERTIFICATE_ASSIGNED", "KEY_TYPE_MISMATCH"):
            raise TlsError(f"listen.tls.key: {config.key} is not the key of {config.cert}") from None
        message = f"listen.tls: {config.cert} and {config.key} are no certificate chain and key in PEM"
        raise TlsError(f"{message}: {reason_of(error)}") from None
    return context


def client_context(ca: str = "") -> ssl.SSLContext:
    """What connections to engines are made from: those that a certificate of the file `ca` vouches for; "": the system.

    Read once, until `take_on` has it from `read`. Raises TlsError.
    """
    if ca not in _trusted:
        _trusted[ca] = _client_context(ca, "ca")
    return _trusted[ca]


class Files(NamedTuple):
    """What all files of TLS hold that a configuration names."""

    server: ssl.SSLContext | None  #: the `server_context`, where listeners are to have one
    trusted: dict[str, ssl.SSLContext]  #: `client_context`, by file


def read(config: Config) -> Files:
    """Reads all files of TLS that `config` names, and changes nothing: see `take_on`.

    The system's own certificates are read once in the life of a process. Raises TlsError.
    """
    problems: list[str] = []
    contexts: dict[str, ssl.SSLContext] = {}
    for ca, setting in _used(config).items():
        try:
            contexts[ca] = _client_context(ca, setting) if ca else client_context()
        except TlsError as error:
            problems += error.problems
    server = None
    try:
        server = server_context(config.listen.tls) if config.listen.tls is not None else None
    except TlsError as error:
        problems += error.problems
    if problems:
        raise TlsError(*problems)
    return Files(server, contexts)


def take_on(files: Files) -> None:
    """From now on `client_context` gives what has been read."""
    _trusted.update(files.trusted)


_trusted: Final[dict[str, ssl.SSLContext]] = {}  # by file; for all pools, as the system's takes 10 ms to read


def _used(config: Config) -> dict[str, str]:
    """The files of certificates that vouch for engines, each with a setting that names it."""
    return {
        upstream.ca: f"pool[{at}].{name}[{index}].ca"
        for at, pool in enumerate(config.pools)
        for name in ("upstreams", "prefill", "decode")
        for index, upstream in enumerate(getattr(pool, name))
        if upstream.is_tls
    }


def _client_context(ca: str, setting: str) -> ssl.SSLContext:
    context = _context(ssl.PROTOCOL_TLS_CLIENT)
    if not ca:
        context.load_default_certs()
        return context
    if problem := _unreadable(setting, ca):
        raise TlsError(problem)
    try:
        context.load_verify_locations(ca)
    except ssl.SSLError as error:
        raise TlsError(f"{setting}: {ca} has no certificates in PEM: {reason_of(error)}") from None
    return context


def _context(protocol: int) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_2  # RFC 8996
    context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION
    # With it an end without a goodbye is one like any other; before Python 3.11.3 it is set (python/cpython#95494).
    context.options &= ~getattr(ssl, "OP_IGNORE_UNEXPECTED_EOF", 0)  # which is OpenSSL 3's
    context.set_alpn_protocols(["http/1.1"])
    context.sslsocket_class = TlsSocket
    return context


def _unreadable(name: str, path: str) -> str | None:
    """What is wrong with a file, if it cannot be read: OpenSSL's own errors do not say which it is."""
    try:
        with open(path, "rb"):
            return None
    except OSError as error:
        return f"{name}: {path}: cannot be read: {error.strerror}"
