"""Lines for people, and for the journal."""

from __future__ import annotations

import os
import select

import pytest

from relay.net import notices
from relay.net.notices import Priority, say, say_fault


def journal_stream(fd: int) -> str:
    found = os.fstat(fd)
    return f"{found.st_dev}:{found.st_ino}"


def test_lines_for_the_journal_have_their_priority(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JOURNAL_STREAM", journal_stream(2))
    say("relay: listening")
    say("Traceback:\n  line 1\n\nError\n", Priority.ERROR)
    say("relay: slow", Priority.WARNING)
    assert capfd.readouterr().err == "<6>relay: listening\n<3>Traceback:\n<3>  line 1\n<3>\n<3>Error\n<4>relay: slow\n"


@pytest.mark.parametrize("stream", [None, "", "0:0", "stdout"])
def test_lines_for_people_have_none(
    stream: str | None, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Standard error may have been redirected while standard output still goes to the journal."""
    monkeypatch.delenv("JOURNAL_STREAM", raising=False)
    if stream is not None:
        monkeypatch.setenv("JOURNAL_STREAM", journal_stream(1) if stream == "stdout" else stream)
    say("relay: listening", Priority.WARNING)
    assert capfd.readouterr().err == "relay: listening\n"


def test_a_fault_is_an_error_with_its_trace(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JOURNAL_STREAM", journal_stream(2))
    try:
        raise ValueError("no")
    except ValueError as exc:
        say_fault(exc)
    lines = capfd.readouterr().err.splitlines()
    assert lines[0] == "<3>relay: internal error: ValueError('no')"
    assert lines[1] == "<3>Traceback (most recent call last):"
    assert all(line.startswith("<3>") for line in lines)


def test_a_reader_that_does_not_read_stops_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb") as reader, os.fdopen(writing, "w") as stderr:
        monkeypatch.setattr(notices, "_STDERR", stderr.fileno())
        monkeypatch.setattr("sys.stderr", stderr)
        said = 0
        while select.select([], [stderr], [], 0)[1]:
            say(f"{said:07}" + "x" * 1000)
            said += 1
        say("lost")
        os.read(reader.fileno(), 2 * select.PIPE_BUF)
        say("heard")
        stderr.close()
        lines = reader.read().splitlines()
    assert said > 1
    assert lines[-2][:7] == b"%07d" % (said - 1)
    assert lines[-1] == b"heard"
