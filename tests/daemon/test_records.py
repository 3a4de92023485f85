"""Records on a pipe that nobody reads: nothing waits, nothing is torn."""

from __future__ import annotations

import os

import trio

from relay.daemon.records import MAX_WAITING_BYTES, RecordWriter


async def test_lines_wait_for_a_slow_reader_and_arrive_whole() -> None:
    reading, writing = os.pipe()
    writer = RecordWriter(writing)
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
    assert writer.dropped == 0
    os.close(reading)
    os.close(writing)


def test_what_does_not_fit_is_dropped_and_counted() -> None:
    reading, writing = os.pipe()
    writer = RecordWriter(writing)
    line = b"x" * 99_999 + b"\n"
    for _ in range(MAX_WAITING_BYTES // len(line) + 5):
        writer.put(line)
    assert writer.dropped == 5
    os.close(reading)
    os.close(writing)
