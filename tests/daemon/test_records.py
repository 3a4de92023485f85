"""Records on a pipe that nobody reads, or a disk that is full: nothing waits, no line is torn but the one it was in."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import pytest
import trio
import trio.testing

from relay.daemon.records import MAX_WAITING_BYTES, RecordWriter


async def test_lines_wait_for_a_slow_reader_and_arrive_whole() -> None:
    reading, writing = os.pipe()
    writer = RecordWriter(writing)
    dropped: list[int] = []
    writer.on_drop = dropped.append
    lines = [b"%06d %s\n" % (number, b"x" * 500) for number in range(1000)]  # far more than a pipe holds
    received = bytearray()
    async with trio.open_nursery() as nursery:
        for line in lines:
            writer.put(line)
        nursery.start_soon(writer.run)
        with trio.fail_after(10):
            while len(received) < sum(map(len, lines)):
                await trio.lowlevel.wait_readable(reading)
                received += os.read(reading, 4096)
        nursery.cancel_scope.cancel()
    assert bytes(received) == b"".join(lines)
    assert not dropped
    os.close(reading)
    os.close(writing)


def test_what_does_not_fit_is_dropped_and_counted() -> None:
    reading, writing = os.pipe()
    writer = RecordWriter(writing)
    dropped: list[int] = []
    writer.on_drop = dropped.append
    line = b"x" * 99_999 + b"\n"
    for _ in range(MAX_WAITING_BYTES // len(line) + 5):
        writer.put(line)
    assert sum(dropped) == 5
    os.close(reading)
    os.close(writing)


async def test_a_line_that_a_full_disk_cut_spoils_no_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The file may grow to so many bytes, and later to more, as a disk that somebody makes room on."""
    dropped: list[int] = []
    path = tmp_path / "records"
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    writer = RecordWriter(fd)
    writer.on_drop = dropped.append
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(writer.run)
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
            for number in range(3):
                writer.put(b"%d%b\n" % (number, b"x" * 398))  # the third ends in its middle
                await trio.testing.wait_all_tasks_blocked()
            writer.put(b"lost\n")
            await trio.testing.wait_all_tasks_blocked()
            assert (path.stat().st_size, sum(dropped)) == (1000, 2)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        writer.put(b"first\n")
        writer.put(b"second\n")
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    os.close(fd)
    lines = path.read_bytes().split(b"\n")
    assert [len(line) for line in lines[:3]] == [399, 399, 200]
    assert lines[3:] == [b"first", b"second", b""]
    assert sum(dropped) == 2
    assert capsys.readouterr().err == "relay: cannot write records to standard output: File too large; dropping them\n"


async def test_a_reader_that_has_gone_is_told_of_once(capsys: pytest.CaptureFixture[str]) -> None:
    reading, writing = os.pipe()
    writer = RecordWriter(writing)
    dropped: list[int] = []
    writer.on_drop = dropped.append
    os.close(reading)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(writer.run)
        for _ in range(3):
            writer.put(b"lost\n")
            await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    os.close(writing)
    assert dropped == [1, 1, 1]
    assert capsys.readouterr().err == "relay: cannot write records to standard output: Broken pipe; dropping them\n"
