"""An engine gone bad: well by its probes, and a new misdeed for each request."""

from __future__ import annotations

import random
import re
import socket
from collections import defaultdict
from typing import Final

import trio

from relay_bench.drill.attempts import Work
from relay_bench.drill.hangups import RESET

_HEALTHY: Final = b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
_STREAM: Final = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
_ROLE: Final = b'data: {"choices":[{"index":0,"delta":{"role":"assistant","content":""}}]}\n\n'
#: Seconds of silence, longer than the relay's limits.
_STALL_S: Final = 30.0
_RECEIVE_BYTES: Final = 65536
_ID: Final = re.compile(rb"\r\nx-request-id: ([^\r]*)\r\n", re.IGNORECASE)

#: What it says before it closes; `None`: it says nothing, and stalls.
_MISDEEDS: Final[dict[str, bytes | None]] = {
    "closes": b"",
    "resets": b"",
    "stalls": None,
    "stalls in its head": b"HTTP/1.1 200 OK\r\ncontent-ty",
    "stalls in its stream": _STREAM + b"%x\r\n%b\r\n" % (len(_ROLE), _ROLE),
    "500": b"HTTP/1.1 500 Internal Server Error\r\ncontent-length: 4\r\nconnection: close\r\n\r\nno\r\n",
    "503": b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 4\r\nconnection: close\r\n\r\nno\r\n",
    "garbage": bytes(range(256)) * 8,
    "garbage in its head": b"HTTP/1.1 200 OK\r\nbad header\x00: \xff\r\n\r\n",
    "garbage in its framing": _STREAM + b"zz\r\n" + bytes(range(256)),
    "garbage behind a frame": _STREAM + b"%x\r\n%b\r\nzz\r\n" % (len(_ROLE), _ROLE),
}


class Rogue:
    """Listens on a free port; `serve` it in a nursery."""

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)
        self.log: defaultdict[str, list[Work]] = defaultdict(list)  #: of requests, by their id here: its misdeeds
        self.url = ""

    def __repr__(self) -> str:
        return f"<Rogue {self.url} {sum(map(len, self.log.values()))}>"

    async def serve(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serves until cancelled."""
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        self.url = f"http://127.0.0.1:{listeners[0].socket.getsockname()[1]}"
        task_status.started()
        await trio.serve_listeners(self._meet, listeners)

    async def _meet(self, stream: trio.SocketStream) -> None:
        try:
            async with stream:
                await self._misbehave(stream)
        except (OSError, trio.BrokenResourceError, trio.ClosedResourceError):
            pass

    async def _misbehave(self, stream: trio.SocketStream) -> None:
        head = bytearray()
        while b"\r\n\r\n" not in head:
            received = await stream.receive_some(_RECEIVE_BYTES)
            if not received:
                return
            head += received
        if head.startswith(b"GET "):
            await stream.send_all(_HEALTHY)
            return
        misdeed = self._rng.choice(tuple(_MISDEEDS))
        found = _ID.search(head)
        self.log[found[1].decode("latin-1") if found else ""].append(Work(self.url, misdeed))
        said = _MISDEEDS[misdeed]
        if said:
            await stream.send_all(said)
        if misdeed.startswith("stalls"):
            with trio.move_on_after(_STALL_S):
                while await stream.receive_some(_RECEIVE_BYTES):
                    pass
        elif misdeed == "resets":
            stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
