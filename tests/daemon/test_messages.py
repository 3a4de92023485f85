"""The channel between the processes where the kernel is short of something."""

from __future__ import annotations

import errno
import os
import socket
import sys
from collections.abc import Callable

import pytest
import trio
import trio.testing

from relay.daemon.key_limits import Bucket
from relay.daemon.limits import Limit
from relay.daemon.messages import Copy, Done, Semaphores
from tests.daemon.shortage import descriptors, descriptors_left
from tests.daemon.test_supervisor import channels


@pytest.mark.parametrize("number", [errno.ETOOMANYREFS, errno.ENOBUFS, errno.ENOMEM])
async def test_what_the_kernel_has_no_room_for_is_sent_later(
    number: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A worker that were given up for it would live on, in a slot that another gets."""
    send_fds = socket.send_fds
    errors = [OSError(number, "no room")] * 2

    def send_fds_later(sock: socket.socket, buffers: list[bytes], fds: list[int]) -> int:
        if errors:
            raise errors.pop()
        return send_fds(sock, buffers, fds)

    monkeypatch.setattr(socket, "send_fds", send_fds_later)
    async with channels() as (one, other):
        limit = Limit(3)
        one.send(Semaphores([7], are_gone=False), [limit])
        one.send(Done(1))
        with trio.fail_after(5):
            assert await other.receive() == Semaphores([7], are_gone=False)
            assert await other.receive() == Done(1)
        fd = other.fds.popleft()
        assert os.eventfd_read(fd) == 1
        os.close(fd)
    assert capsys.readouterr().err == "relay: cannot send between processes: no room; trying again\n"


async def test_a_worker_that_cannot_be_told_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else it would go on with what it was told before."""

    def send_fds(*_: object) -> int:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(socket, "send_fds", send_fds)
    async with channels() as (one, other):
        one.send(Semaphores([7], are_gone=False), [Limit(1)])
        with trio.fail_after(5):
            assert await one.receive() is None
            assert await other.receive() is None


@pytest.mark.parametrize("left", [0, 1, 2])
async def test_descriptors_that_there_is_no_room_for_end_the_channel(
    left: int, capsys: pytest.CaptureFixture[str]
) -> None:
    limits = [Limit(1) for _ in range(3)]
    async with channels() as (one, other):
        before = descriptors()
        one.send(Semaphores([1, 2, 3], are_gone=False), limits)
        await trio.testing.wait_all_tasks_blocked()
        with trio.fail_after(5):
            with descriptors_left(left):
                assert await other.receive() is None
            assert await other.receive() is None
            assert await one.receive() is None
        assert descriptors() == before
    told = "relay: too many open files to take what the control process passes on; draining\n"
    assert capsys.readouterr().err == told


@pytest.mark.parametrize(
    "make", [lambda: Copy(sys.stderr), lambda: Limit(1), lambda: Bucket(1, 0.0)], ids=["copy", "limit", "bucket"]
)
def test_what_could_not_be_opened_is_not_closed(make: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    faults: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", faults.append)
    with descriptors_left(0), pytest.raises(OSError, match="Too many open files"):
        make()
    assert faults == []
