"""Lines for people on standard error, which under systemd is the journal: what happens to the daemon as a whole.

What happens to one exchange is its record's (`relay.core.timeline`), on standard output. Standard error may be a file
on a full disk, or a pipe whose reader has gone or does not read: what cannot be said is lost, and who wanted to say it
goes on. A journal that stalls must not stall a stream.
"""

from __future__ import annotations

import os
import select
import sys
import traceback
from contextlib import suppress
from enum import IntEnum

_STDERR = 2


class Priority(IntEnum):
    """syslog(3)'s levels, as far as the relay has something to say."""

    ERROR = 3
    WARNING = 4
    NOTICE = 5
    INFO = 6


def say(text: str, priority: Priority = Priority.INFO) -> None:
    """Write `text` on standard error; to the journal, each line with its priority (sd-daemon(3))."""
    with suppress(OSError):
        mark = f"<{priority:d}>" if _goes_to_journal(_STDERR) else ""
        if not _has_room(_STDERR):
            return
        print("\n".join(mark + line for line in text.splitlines()), file=sys.stderr, flush=True)


def say_fault(exc: BaseException) -> None:
    """An exception that nobody expected: a fault of the relay's own, which has ended no more than one connection."""
    trace = "".join(traceback.format_exception(exc))
    say(f"relay: internal error: {exc!r}\n{trace}", Priority.ERROR)


def _has_room(fd: int) -> bool:
    """Whether a write of no more than PIPE_BUF bytes does not wait (poll(2), pipe(7))."""
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    return bool(poll.poll(0))


def _goes_to_journal(fd: int) -> bool:
    """Whether systemd has connected a descriptor to the journal, and nobody redirected it (``$JOURNAL_STREAM``)."""
    found = os.fstat(fd)
    return os.environ.get("JOURNAL_STREAM") == f"{found.st_dev}:{found.st_ino}"
