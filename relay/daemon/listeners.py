"""The listening sockets: the configured ones, or those that systemd passes in their place."""

from __future__ import annotations

import errno
import itertools
import os
import socket
import stat
from collections.abc import Collection, Iterable
from contextlib import suppress
from typing import Final

from relay.address import Address
from relay.config import Config
from relay.daemon import systemd
from relay.net.notices import Priority, say
from relay.net.tls import TlsListener

#: Clients waiting to be accepted; the kernel caps it at net.core.somaxconn.
BACKLOG: Final = 4096


class StartError(ValueError):
    """The daemon cannot begin, or listen where it should; the message says what to do."""


class _Own:
    """A socket that was opened here. A unix socket's file is removed with it, as nginx and HAProxy do."""

    def __init__(self, address: Address, kind: type[socket.socket]) -> None:
        self.address = address
        self.sock = _listen(address, kind)
        self._file = None if address.unix_path is None else _identity(address.unix_path)

    def remove_file(self) -> None:
        """Takes the file away, unless it is by now another process's.

        Before the socket is closed: else another could take it over in between, as one on which nobody listens.
        """
        path, self._file, was = self.address.unix_path, None, self._file
        if path is not None and was is not None:
            with suppress(OSError):
                if _identity(path) == was:
                    os.unlink(path)


class Listeners:
    """Sockets that clients connect to. Those passed by systemd stay whatever the configuration says.

    `kind` of what is opened here is that of the daemon's start: `TlsListener`, or a plain socket. `setting`: what says
    where that is.
    """

    def __init__(
        self,
        passed: Iterable[socket.socket] = (),
        kind: type[socket.socket] = socket.socket,
        setting: str = "listen.addresses, --listen",
    ) -> None:
        self._kind = kind
        self._setting = setting
        self._numbers = itertools.count()
        self._passed = {next(self._numbers): sock for sock in passed}
        self._own: dict[int, _Own] = {}

    def __repr__(self) -> str:
        return f"<Listeners {self.urls}>"

    @property
    def sockets(self) -> list[socket.socket]:
        """All of them."""
        return [*self.numbered.values()]

    @property
    def numbered(self) -> dict[int, socket.socket]:
        """All of them, each with a number that none had before it."""
        return self._passed | {number: own.sock for number, own in self._own.items()}

    @property
    def urls(self) -> list[str]:
        """Where each can be reached."""
        return [_url_of(sock) for sock in self.sockets]

    def change(self, addresses: Iterable[Address]) -> list[socket.socket]:
        """Listens at these from now on; answers the sockets of all others, for the caller to close.

        Raises StartError where one cannot be opened: then nothing has changed.
        """
        if self._passed:
            return []
        left, opened, kept = {**self._own}, [], {}
        for address in addresses:
            number = next((number for number, own in left.items() if own.address == address), None)
            if number is not None:
                kept[number] = left.pop(number)
                continue
            try:
                opened.append(_Own(address, self._kind))
            except OSError as exc:
                _close(opened)
                raise StartError(f"cannot listen on {address}: {exc.strerror} ({self._setting})") from None
        self._own = kept | {next(self._numbers): own for own in opened}
        for own in left.values():
            own.remove_file()
        return [own.sock for own in left.values()]

    def close(self) -> None:
        """Listens no more."""
        _close(self._own.values())
        for sock in self._passed.values():
            sock.close()


def open_listeners(config: Config) -> tuple[Listeners, Listeners]:
    """The clients' listeners, and the admin side's, of which there is one or none. Raises StartError."""
    passed, has_tls = systemd.passed_listeners(), config.listen.tls is not None
    if passed.https and not has_tls:
        raise StartError("systemd passes a socket named https; give listen.tls, or disable relay-https.socket")
    if passed.http and not passed.https and has_tls:
        say("relay: warning: listen.tls is of no use without a socket named https from systemd", Priority.WARNING)
    clients = Listeners(
        [socket.socket(fileno=fd) for fd in passed.http] + [TlsListener(fileno=fd) for fd in passed.https],
        TlsListener if has_tls else socket.socket,
    )
    admin = Listeners((socket.socket(fileno=fd) for fd in passed.admin), setting="admin.address, --admin")
    admin.change(() if config.admin.address is None else (config.admin.address,))
    try:
        clients.change(config.listen.addresses)
    except StartError:
        admin.close()
        raise
    return clients, admin


def announce(urls: Collection[str], before: Collection[str] = ()) -> None:
    """Says where clients can connect, and where they no longer can; nothing of where they could `before`, and can."""
    for url in urls:
        if url not in before:
            say(f"relay: listening on {url}")
    for url in before:
        if url not in urls:
            say(f"relay: no longer listening on {url}")


def announce_admin(urls: Collection[str], configured: Address | None) -> None:
    """Says where the admin side is, where nobody has chosen its port."""
    if configured is not None and configured.port == 0 and configured.unix_path is None:
        for url in urls:
            say(f"relay: admin side on {url}")


def _close(listeners: Iterable[_Own]) -> None:
    for own in listeners:
        own.remove_file()
        own.sock.close()


def _listen(address: Address, kind: type[socket.socket]) -> socket.socket:
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    sock = kind(socket.AF_UNIX if address.unix_path is not None else family, socket.SOCK_STREAM)
    try:
        if address.unix_path is not None:
            _bind_unix(sock, address.unix_path)
        else:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)  # as nginx: [::] is not also 0.0.0.0
            sock.bind((address.host, address.port))
        sock.listen(BACKLOG)
    except OSError:
        sock.close()
        raise
    return sock


def _bind_unix(sock: socket.socket, path: str) -> None:
    try:
        sock.bind(path)
    except OSError as exc:
        if exc.errno != errno.EADDRINUSE or not _is_abandoned(path):
            raise
        os.unlink(path)
        sock.bind(path)


def _is_abandoned(path: str) -> bool:
    """Whether a socket file is left over from a process that was killed: nobody listens on it any more."""
    if not stat.S_ISSOCK(os.lstat(path).st_mode):
        return False  # connecting to an ordinary file is refused as well
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            return True
        except OSError:
            return False
        return False


def _identity(path: str) -> tuple[int, int]:
    found = os.lstat(path)
    return found.st_dev, found.st_ino


def _url_of(listener: socket.socket) -> str:
    """Where a listener can be reached, with the port the kernel picked."""
    name = listener.getsockname()
    if listener.family == socket.AF_UNIX:
        return f"unix:{name}"
    return Address(name[0], name[1]).url_in("https" if isinstance(listener, TlsListener) else "http")
