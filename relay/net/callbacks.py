"""Where decoders call back (ascend_layerwise): a listener of its own, for the pool's decoders and nobody else."""

from __future__ import annotations

import socket
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Final

import h11
import trio

from relay.address import Address, parse_address
from relay.core.connectors.base import CALLBACK_PATH
from relay.net import sockets

if TYPE_CHECKING:
    from relay.net.fleet import Pool
    from relay.net.service import Service

#: How long a decoder may take with its message.
CALLBACK_S: Final = 10.0
#: Calls that are read at once.
MOST_CALLS: Final = 256
#: Longest message: block ids of a long prompt.
MOST_BYTES: Final = 16_777_216


async def serve(service: Service, pool: Pool, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
    """Takes the calls of one pool's decoders until cancelled; started once the pool knows its address."""
    configured = pool.config.callback_address
    address = parse_address(configured) if configured else Address(_own_address(pool))
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setblocking(False)
        listener.bind((address.host, address.port))
        listener.listen()
        port = listener.getsockname()[1]
        pool.callback_url = f"{Address(address.host, port).url}{CALLBACK_PATH.decode('ascii')}"
        task_status.started()
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
                nursery.start_soon(_take_call, service, pool, sock, str(peer[0]))


def _own_address(pool: Pool) -> str:
    """The address by which this machine's packets leave for the first decoder."""
    decoder = pool.config.decode[0]
    if not decoder.host:
        return "127.0.0.1"
    family = socket.AF_INET6 if ":" in decoder.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((decoder.host, decoder.port))
        except OSError:
            return "127.0.0.1"
        return str(probe.getsockname()[0])


async def _take_call(service: Service, pool: Pool, sock: socket.socket, peer: str) -> None:
    with sock, trio.move_on_after(CALLBACK_S):
        try:
            connection = h11.Connection(h11.SERVER)
            status = await _take_message(service, pool, connection, sock, peer)
            response = h11.Response(status_code=status, headers=[("content-length", "0"), ("connection", "close")])
            await sockets.send_all(sock, connection.send(response) or b"")
        except (OSError, h11.ProtocolError):
            return
        except Exception as exc:  # a fault of ours: this call fails, the worker goes on
            print(f"relay: internal error: {exc!r}", file=sys.stderr, flush=True)
            sys.excepthook(type(exc), exc, exc.__traceback__)


async def _take_message(
    service: Service, pool: Pool, connection: h11.Connection, sock: socket.socket, peer: str
) -> int:
    """Reads one call, and passes its message on to whom it is for; answers its status."""
    target = b""
    body = bytearray()
    while not isinstance(event := connection.next_event(), h11.EndOfMessage):
        if event is h11.NEED_DATA:
            connection.receive_data(await sockets.receive(sock))
        elif isinstance(event, h11.Request):
            target = event.target.partition(b"?")[0]
            if not await _is_decoder(pool, peer):
                return 403
            if target != CALLBACK_PATH:
                return 404
        elif isinstance(event, h11.Data):
            body += event.data
            if len(body) > MOST_BYTES:
                return 413
        else:
            raise ConnectionResetError  # the decoder hung up
    key = pool.connector.callback_key(bytes(body))
    if key is not None and key in service.callbacks:
        service.callbacks[key](bytes(body))
    return 200  # also for nobody: the decoder takes no answer for a reason to call again


async def _is_decoder(pool: Pool, peer: str) -> bool:
    for upstream in pool.groups["decode"].upstreams.values():
        host = upstream.config.host or "127.0.0.1"  # behind a unix socket, a decoder is on this machine
        if host == peer:
            return True
        with suppress(OSError):
            if any(address[4][0] == peer for address in await trio.socket.getaddrinfo(host, None)):
                return True
    return False
