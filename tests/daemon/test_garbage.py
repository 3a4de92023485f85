"""Old garbage: left alone while there is little of it, collected when there is much."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest

from relay.daemon import garbage
from relay.daemon.garbage import Garbage

#: Of Python's blocks, that a circle of `make_circles` takes at least.
EACH = 2


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    before = gc.get_threshold()
    yield
    gc.set_threshold(*before)
    gc.unfreeze()
    gc.collect()


class Circle:
    """Refers to itself."""

    def __init__(self) -> None:
        self.itself = self


def make_circles(blocks: int) -> None:
    """Leaves garbage behind that only a collection of the old finds."""
    circles: list[Any] = [Circle() for _ in range(blocks // EACH)]
    gc.collect(1)  # they are old now
    circles.clear()


def old_circles() -> int:
    return sum(isinstance(each, Circle) for each in gc.get_objects(2))


def test_little_garbage_is_left_alone_and_much_is_collected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(garbage, "SLACK_BLOCKS", 1000)
    watched = Garbage()
    make_circles(100)
    watched.look()
    assert (watched.collections, old_circles()) == (0, 100 // EACH)
    make_circles(2 * watched._most_blocks)
    watched.look()
    assert (watched.collections, old_circles()) == (1, 0)


def test_what_is_too_much_follows_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(garbage, "SLACK_BLOCKS", 1000)
    held: list[Any] = [Circle() for _ in range(200_000)]
    watched = Garbage()
    most = watched._most_blocks
    for circle in held:
        del circle.itself
    held.clear()
    watched.look()
    assert watched.collections == 0
    make_circles(most - watched._most_blocks)  # fewer than would have been too many before
    make_circles(watched._most_blocks)
    watched.look()
    assert watched.collections == 1


def test_python_itself_leaves_the_old_alone() -> None:
    Garbage()
    make_circles(1000)
    kept: list[list[Any]] = [[] for _ in range(2_000_000)]  # far more than a quarter of what there was
    assert kept
    assert old_circles() == 1000 // EACH
