"""Old garbage: left alone while there is little of it, collected when there is much, or it is long ago."""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Iterator
from typing import Any

import pytest

from relay.daemon.garbage import LONGEST_S, SLACK_BYTES, Garbage

CIRCLES = 500


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    before = gc.get_threshold()
    yield
    gc.set_threshold(*before)
    gc.unfreeze()
    gc.collect()


def settled() -> Garbage:
    garbage = Garbage()
    garbage.settle()
    return garbage


class Circle:
    """Refers to itself."""

    def __init__(self) -> None:
        self.itself = self


def make_circles() -> None:
    """Leaves garbage behind that only a collection of the old finds."""
    circles: list[Any] = [Circle() for _ in range(CIRCLES)]
    gc.collect(1)  # they are old now
    circles.clear()


def old_circles() -> int:
    return sum(isinstance(each, Circle) for each in gc.get_objects(2))


def test_little_garbage_is_left_alone_and_much_is_collected() -> None:
    watched = settled()
    held, now = watched.resident_bytes(), time.monotonic()
    make_circles()
    watched.look(held + SLACK_BYTES, now)
    assert (watched.collections, old_circles()) == (0, CIRCLES)
    watched.look(3 * held + SLACK_BYTES, now)
    assert (watched.collections, old_circles()) == (1, 0)
    watched.look(5 * held + SLACK_BYTES, now)
    assert watched.collections == 1  # not twice what there was by then


def test_what_is_much_follows_what_there_is() -> None:
    watched = settled()
    held, now = watched.resident_bytes(), time.monotonic()
    watched.look(held // 2, now)
    watched.look(held + SLACK_BYTES // 2, now)
    assert watched.collections == 0
    watched.look(held + SLACK_BYTES + 1, now)
    assert watched.collections == 1


def test_garbage_does_not_grow_old() -> None:
    watched = settled()
    held, now = watched.resident_bytes(), time.monotonic()
    make_circles()
    watched.look(held, now + LONGEST_S - 1)
    assert (watched.collections, old_circles()) == (0, CIRCLES)
    watched.look(held, now + LONGEST_S + 1)
    assert (watched.collections, old_circles()) == (1, 0)
    watched.look(held, now + LONGEST_S + 2)
    assert watched.collections == 1


def test_what_a_process_holds() -> None:
    watched = settled()
    before = watched.resident_bytes()
    held = b"x" * (64 << 20)
    assert watched.resident_bytes() - before > len(held) * 0.9


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="the C library gives nothing back when asked")
def test_what_is_free_is_given_back() -> None:
    """Between blocks that are still in use, as after a time of many streams."""
    watched = settled()
    blocks = [bytearray(8 << 10) for _ in range(8 << 10)]
    del blocks[::2]
    before = watched.resident_bytes()
    watched.look(before, time.monotonic())
    assert before - watched.resident_bytes() < 4 << 20
    watched.look(before, time.monotonic() + LONGEST_S + 1)
    assert before - watched.resident_bytes() > 12 << 20  # of 32 MiB, whole pages
    assert all(len(block) == 8 << 10 for block in blocks)


def test_python_itself_leaves_the_old_alone() -> None:
    settled()
    make_circles()
    kept: list[list[Any]] = [[] for _ in range(2_000_000)]  # far more than a quarter of what there was
    assert kept
    assert old_circles() == CIRCLES
