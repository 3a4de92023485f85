"""Descriptors: how many there are, and having too few."""

from __future__ import annotations

import gc
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager


def descriptors() -> int:
    """How many this process has, one of them for looking."""
    gc.collect()  # other tests' are nobody's matter
    return len(os.listdir("/proc/self/fd"))


@contextmanager
def descriptors_left(number: int) -> Iterator[None]:
    """This process can open so many more, and closes what it has as ever."""
    gc.collect()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = [os.dup(0) for _ in range(number + 1)]  # the lowest that are free, in their order
    for fd in lowest:
        os.close(fd)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest[-1], hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
