"""Comments to a client whose socket takes less than it is given."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from relay.config import Config
from relay.core.frames import COMMENT_CHUNK
from relay.core.request import Route
from relay.net.reply import Reply


class Socket:
    """Takes as much as it has room for."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.taken = b""

    def send(self, data: bytes | memoryview) -> int:
        if not self.room:
            raise BlockingIOError
        size = min(self.room, len(data))
        self.taken += bytes(data[:size])
        self.room -= size
        return size


def reply_over(sock: Socket) -> Reply:
    service: Any = SimpleNamespace(config=Config(), is_draining=False)
    client: Any = SimpleNamespace(sock=sock, request_started=0.0)
    request: Any = SimpleNamespace(
        head=SimpleNamespace(version=b"1.1", is_keep_alive=True, method=b"POST", route=Route.CHAT)
    )
    return Reply(service, client, request, "id")


@pytest.mark.parametrize("room", [0, 1, 100, 210])
async def test_what_a_full_socket_left_of_a_comment_goes_out_before_anything_else(room: int) -> None:
    sock = Socket(room)
    reply = reply_over(sock)
    assert reply.comment()
    assert (reply.status, reply.is_early, reply.is_committed) == (200, True, False)
    assert len(sock.taken) == reply.bytes_out == room
    sock.room = 1000
    assert reply.comment()  # not another, in the middle of the first
    assert len(sock.taken) == room
    await reply.send(b"more")
    assert sock.taken.startswith(b"HTTP/1.1 200 OK\r\n")
    assert sock.taken.endswith(b"\r\n\r\n" + COMMENT_CHUNK + b"more")
    assert reply.bytes_out == len(sock.taken)
    assert reply.comment()
    assert sock.taken.endswith(b"more" + COMMENT_CHUNK)
