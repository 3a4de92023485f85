"""Where decoders call back (ascend_layerwise): listeners of their own, for the pools' decoders and nobody else.

A decoder is given a URL that ends in the number of the worker that waits for it, so that a daemon of several, whose
control process listens here, passes each call on to one of them alone.

A decoder takes any answer for success, whatever its status, and waits for a prefill that nobody is asked for. It calls
again only where it got none (vllm-ascend, mooncake_layerwise_connector.py, `_access_metaserver`). So a call that may be
taken the next time is closed without an answer, and one that never will be gets its status, for whoever debugs it.
"""

from __future__ import annotations

import math
import socket
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Final, NamedTuple, TypeAlias

import h11
import trio

from relay.address import Address, parse_address
from relay.config import Config, PoolConfig
from relay.core.connectors import connector_named
from relay.core.connectors.base import CALLBACK_PATH
from relay.net import sockets
from relay.net.notices import say_fault

if TYPE_CHECKING:
    from relay.net.fleet import Pool
    from relay.net.service import Service

#: How long a decoder may take with its message.
CALLBACK_S: Final = 10.0
#: Calls that are read at once.
MOST_CALLS: Final = 256
#: Longest message: block ids of a long prompt.
MOST_BYTES: Final = 16_777_216
#: How long a decoder's name may take to resolve.
RESOLVE_S: Final = 5.0
#: How long calls are still taken where a reload wants them elsewhere: decoders that were asked before know no better.
LAST_CALLS_S: Final = 60.0

#: Passes a message on to who waits for it: the worker's number (0: the only one), the key; False: there is no room.
PassOn: TypeAlias = Callable[[int, str, bytes], bool]


class ListenError(ValueError):
    """An address for decoders cannot be listened on; the message says why."""


class _Listener:
    """One of them, accepting in a task of its own."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.scope = trio.CancelScope()
        self.retires_at = math.inf  #: of trio's clock: when the last of those who were told of it have called


class Prepared(NamedTuple):
    """What a configuration wants, opened as far as it was not there before."""

    wanted: dict[str, str]  #: by pool, the address as it is configured, or the machine's own with port 0
    opened: dict[str, socket.socket]  #: by address

    def close(self) -> None:
        """It is not wanted after all."""
        for sock in self.opened.values():
            sock.close()


class Callbacks:
    """All listeners for decoders, as the configuration wants them. Pools without an address of their own share one."""

    def __init__(self, service: Service, pass_on: PassOn) -> None:
        self._service = service
        self._pass_on = pass_on
        self._listeners: dict[str, _Listener] = {}
        self.nursery: trio.Nursery | None = None  #: where they are served

    def __repr__(self) -> str:
        return f"<Callbacks {list(self._listeners)}>"

    async def prepare(self, config: Config) -> Prepared:
        """Opens what `config` wants and is not there. Raises ListenError."""
        prepared = Prepared({}, {})
        for pool in config.pools:
            if pool.is_split and connector_named(pool.connector).calls_back:
                prepared.wanted[pool.name] = pool.callback_address or str(Address(await _own_address(pool)))
        for address in {*prepared.wanted.values()} - self._listeners.keys():
            try:
                prepared.opened[address] = _listen(parse_address(address))
            except OSError as exc:
                prepared.close()
                raise ListenError(f"cannot listen on {address} for decoders: {exc.strerror}") from None
        return prepared

    def take_on(self, prepared: Prepared) -> None:
        """Listens there from now on, and elsewhere only for those who were told so before."""
        assert self.nursery is not None
        for address, sock in prepared.opened.items():
            host, port = sock.getsockname()[:2]
            listener = _Listener(f"{Address(host, port).url}{CALLBACK_PATH.decode('ascii')}")
            self._listeners[address] = listener
            self.nursery.start_soon(self._serve, sock, listener.scope)
        for pool in self._service.fleet.pools:
            wanted = prepared.wanted.get(pool.name)
            pool.callback_url = "" if wanted is None else self._listeners[wanted].url
        for address, listener in self._listeners.items():
            if address in prepared.wanted.values():
                listener.retires_at = math.inf
            elif listener.retires_at == math.inf:
                listener.retires_at = trio.current_time() + LAST_CALLS_S
                self.nursery.start_soon(self._retire, address, listener, listener.retires_at)

    async def _retire(self, address: str, listener: _Listener, at: float) -> None:
        """Ends a listener at a time, if no reload in between has put that off."""
        await trio.sleep_until(at)
        if listener.retires_at == at:
            del self._listeners[address]
            listener.scope.cancel()

    async def _serve(self, listener: socket.socket, scope: trio.CancelScope) -> None:
        with listener, scope:
            async with trio.open_nursery() as nursery:
                while True:
                    await trio.lowlevel.wait_readable(listener)
                    try:
                        sock, peer = listener.accept()
                    except OSError:
                        await trio.sleep(0.1)
                        continue
                    if len(nursery.child_tasks) >= MOST_CALLS:
                        sock.close()  # the decoder calls again
                        continue
                    sock.setblocking(False)
                    nursery.start_soon(self._take_call, sock, str(peer[0]))

    async def _take_call(self, sock: socket.socket, peer: str) -> None:
        with sock, trio.move_on_after(CALLBACK_S):
            try:
                connection = h11.Connection(h11.SERVER)
                status = await self._take_message(connection, sock, peer)
                if status is None:
                    return
                response = h11.Response(status_code=status, headers=[("content-length", "0"), ("connection", "close")])
                await sockets.send_all(sock, connection.send(response) or b"")
            except (OSError, h11.ProtocolError):
                return
            except Exception as exc:  # a fault of ours: this call fails, the worker goes on
                say_fault(exc)

    async def _take_message(self, connection: h11.Connection, sock: socket.socket, peer: str) -> int | None:
        """Reads one call, passes its message on to whom it is for; answers its status, None: it is to come again."""
        worker: int | None = None
        body = bytearray()
        while not isinstance(event := connection.next_event(), h11.EndOfMessage):
            if event is h11.NEED_DATA:
                connection.receive_data(await sockets.receive(sock))
            elif isinstance(event, h11.Request):
                if not await self._is_decoder(peer):
                    return 403
                worker = _worker_of(event.target.partition(b"?")[0])
                if worker is None:
                    return 404
            elif isinstance(event, h11.Data):
                body += event.data
                if len(body) > MOST_BYTES:
                    return 413
            else:
                raise ConnectionResetError  # the decoder hung up
        message = bytes(body)
        keys = {pool.connector.callback_key(message) for pool in self._pools()} - {None}
        has_room = all(self._pass_on(worker or 0, key, message) for key in keys if key is not None)
        return 200 if has_room else None  # 200 also for nobody: calling again would not help

    def _pools(self) -> Iterator[Pool]:
        return (pool for pool in self._service.fleet.pools if pool.is_split and pool.connector.calls_back)

    async def _is_decoder(self, peer: str) -> bool:
        hosts = {
            upstream.config.host or "127.0.0.1"  # behind a unix socket, a decoder is on this machine
            for pool in self._pools()
            for upstream in pool.groups["decode"].upstreams.values()
        }
        if peer in hosts:
            return True
        for host in hosts:
            if peer in await _resolved(host, None):
                return True
        return False


def deliver(callbacks: Mapping[str, Callable[[bytes], None]]) -> PassOn:
    """Passes messages on within a daemon of one process."""

    def pass_on(_: int, key: str, message: bytes) -> bool:
        if key in callbacks:
            callbacks[key](message)
        return True

    return pass_on


def url_of_worker(url: str, worker: int) -> str:
    """Where decoders call a worker of several; "" where they do not."""
    return f"{url}/{worker}" if url else ""


def _worker_of(path: bytes) -> int | None:
    """Whom a path calls; None if it is no decoder's."""
    if path == CALLBACK_PATH:
        return 0
    prefix, _, number = path.rpartition(b"/")
    return int(number) if prefix == CALLBACK_PATH and number.isdigit() and len(number) < 5 else None


def _listen(address: Address) -> socket.socket:
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setblocking(False)
        listener.bind((address.host, address.port))
        listener.listen()
    except OSError:
        listener.close()
        raise
    return listener


async def _own_address(pool: PoolConfig) -> str:
    """The address by which this machine's packets leave for the first decoder."""
    decoder = pool.decode[0]
    for ip in await _resolved(decoder.host, decoder.port) if decoder.host else ():
        family = socket.AF_INET6 if ":" in ip else socket.AF_INET
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            try:
                probe.connect((ip, decoder.port))
            except OSError:
                continue
            return str(probe.getsockname()[0])
    return "127.0.0.1"


async def _resolved(host: str, port: int | None) -> list[str]:
    """A host's addresses; none if they are not to be had in time."""
    with trio.move_on_after(RESOLVE_S):
        try:
            return [str(each[4][0]) for each in await trio.socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
        except OSError:
            pass
    return []
