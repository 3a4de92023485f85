"""An alarm that an epoll can wait for: epoll's own timeout counts in whole milliseconds, timerfd in nanoseconds.

Python has ``os.timerfd_create`` from 3.13 on; before, the same two calls go through the C library.
"""

from __future__ import annotations

import ctypes
import os
import sys
import time
from typing import Final

_NS: Final = 1_000_000_000
#: ``TFD_TIMER_ABSTIME``, ``TFD_NONBLOCK`` and ``TFD_CLOEXEC`` of linux/timerfd.h
_ABSTIME: Final = 1
_FLAGS: Final = os.O_NONBLOCK | os.O_CLOEXEC


class Alarm:
    """A descriptor that becomes readable at one instant of CLOCK_MONOTONIC."""

    def __init__(self) -> None:
        self._fd = _create()
        self._at_ns = 0

    def fileno(self) -> int:
        """The descriptor."""
        return self._fd

    def set(self, at_ns: int) -> None:
        """Rings at `at_ns`, at once if that is past; 0: never. An earlier setting is forgotten."""
        if at_ns != self._at_ns:
            self._at_ns = at_ns
            _set(self._fd, at_ns)

    def take(self) -> None:
        """Ends a ringing, so that the descriptor is no longer readable."""
        self._at_ns = 0
        _set(self._fd, 0)

    def close(self) -> None:
        """Gives the descriptor back."""
        os.close(self._fd)


if sys.version_info >= (3, 13):

    def _create() -> int:
        return os.timerfd_create(time.CLOCK_MONOTONIC, flags=_FLAGS)

    def _set(fd: int, at_ns: int) -> None:
        os.timerfd_settime_ns(fd, flags=_ABSTIME, initial=at_ns)

else:

    class _Spec(ctypes.Structure):
        """``struct itimerspec``: interval and first expiration, each in seconds and ns."""

        _fields_ = (
            ("every_s", ctypes.c_long),
            ("every_ns", ctypes.c_long),
            ("at_s", ctypes.c_long),
            ("at_ns", ctypes.c_long),
        )

    _libc: Final = ctypes.CDLL(None, use_errno=True)

    def _create() -> int:
        return _checked(_libc.timerfd_create(time.CLOCK_MONOTONIC, _FLAGS))

    def _set(fd: int, at_ns: int) -> None:
        spec = _Spec(0, 0, *divmod(at_ns, _NS))
        _checked(_libc.timerfd_settime(fd, _ABSTIME, ctypes.byref(spec), None))

    def _checked(result: int) -> int:
        if result < 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        return result
