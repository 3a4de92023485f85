"""The admin side: readiness, and what the worker is doing. Plain h11, one answer per connection."""

from __future__ import annotations

import socket
import time
from typing import Final

import h11
import msgspec
import trio

from relay.net import sockets
from relay.net.service import Service, local_answer

#: How long an admin client may take altogether.
ADMIN_S: Final = 10.0


async def serve(listener: socket.socket, service: Service) -> None:
    """Answers admin requests until cancelled."""
    listener.setblocking(False)
    async with trio.open_nursery() as nursery:
        while True:
            await trio.lowlevel.wait_readable(listener)
            try:
                sock, _ = listener.accept()
            except OSError:
                await trio.sleep(0.1)
                continue
            sock.setblocking(False)
            nursery.start_soon(_answer, sock, service)


async def _answer(sock: socket.socket, service: Service) -> None:
    with sock, trio.move_on_after(ADMIN_S):
        try:
            connection = h11.Connection(h11.SERVER)
            while (event := connection.next_event()) is h11.NEED_DATA:
                connection.receive_data(await sockets.receive(sock))
            if isinstance(event, h11.Request):
                status, body = answer(service, event.method, event.target)
                fields = [
                    ("content-type", "application/json"),
                    ("content-length", str(len(body))),
                    ("connection", "close"),
                ]
                head = connection.send(h11.Response(status_code=status, headers=fields)) or b""
                await sockets.send_all(sock, head + (b"" if event.method == b"HEAD" else body))
        except (OSError, h11.ProtocolError):
            return


def answer(service: Service, method: bytes, target: bytes) -> tuple[int, bytes]:
    """Status and JSON body of an admin request."""
    path = target.partition(b"?")[0]
    if method not in (b"GET", b"HEAD"):
        return 405, b'{"error":"only GET here"}\n'
    local = local_answer(service, path)
    if local is not None:
        return local
    if path == b"/-/status":
        return 200, msgspec.json.encode(_status(service)) + b"\n"
    if path == b"/-/exchanges":
        return 200, msgspec.json.encode(_exchanges(service)) + b"\n"
    return 404, b'{"error":"unknown path; try /-/live, /-/ready, /-/status, /-/exchanges"}\n'


def _status(service: Service) -> dict[str, object]:
    pool = service.pool
    return {
        "state": "draining" if service.is_draining else "serving",
        "in_flight": len(service.active),
        "frames": service.pump.frames,
        "pools": [
            {
                "name": pool.name,
                "upstreams": [
                    {"url": upstream.config.url, "in_flight": upstream.outstanding, "idle": upstream.idle}
                    for upstream in pool.upstreams
                ],
            }
        ],
    }


def _exchanges(service: Service) -> list[dict[str, object]]:
    """In flight, oldest first."""
    now = time.monotonic()
    return [
        {
            "id": exchange.id,
            "client": exchange.client.peer,
            "path": exchange.request.path,
            "model": exchange.facts.model,
            "upstream": exchange.upstream and exchange.upstream.config.url,
            "phase": exchange.phase.name.lower(),
            "attempts": exchange.attempts,
            "age_ms": round((now - exchange.timeline.request_started) * 1000, 3),
        }
        for exchange in sorted(service.active, key=lambda exchange: exchange.timeline.request_started)
    ]
