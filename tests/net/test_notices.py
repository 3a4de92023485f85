"""Lines for people, and for the journal."""

from __future__ import annotations

import os

import pytest

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
