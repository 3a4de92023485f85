"""What is read of a socket comes by way of one buffer, and is nobody else's."""

from __future__ import annotations

import socket

import pytest

from relay.net import sockets


async def test_what_is_read_onto_a_buffer_is_all_of_it_and_no_more() -> None:
    data = bytes(range(256)) * 300  # more than one read
    left, right = socket.socketpair()
    with left, right:
        left.setblocking(False)
        right.setblocking(False)
        buffer = bytearray(b"before")
        with pytest.raises(BlockingIOError):
            sockets.read_onto(buffer, right)
        for _ in range(2):
            left.sendall(data)
            sizes = [sockets.read_onto(buffer, right) for _ in range(2)]
            assert sizes == [sockets.READ_BYTES, len(data) - sockets.READ_BYTES]
        assert buffer == b"before" + 2 * data
        left.sendall(data)
        assert [await sockets.skip(right) for _ in range(2)] == sizes
        left.close()
        assert await sockets.skip(right) == 0
        assert sockets.read_onto(buffer, right) == 0
        assert len(buffer) == 6 + 2 * len(data)
