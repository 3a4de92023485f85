"""Who goes next when there is no room for all: a queue that is fair among keys, and how long it takes.

Fair means that keys take turns, as in deficit round robin with requests of one size: a key with a thousand requests in
the queue delays a key with one by one request, not by a thousand (nginx and vLLM queue in order of arrival, and let the
busiest tenant set everybody's delay).
"""

from __future__ import annotations

from collections import OrderedDict, deque
from math import ceil
from typing import Final, Generic, TypeVar

K = TypeVar("K")
T = TypeVar("T")

#: Seconds over which departures are averaged: long enough to see some of an engine's requests end.
_RATE_WINDOW_S: Final = 30.0
#: What a client is told at least and at most: below a second is no rest, beyond a minute nobody plans.
_LEAST_RETRY_S: Final = 1
_MOST_RETRY_S: Final = 60


class FairQueue(Generic[K, T]):
    """Items that wait, by key. All operations are O(1) but for `remove`, which is linear in its key's items."""

    def __init__(self) -> None:
        self._waiting: OrderedDict[K, deque[T]] = OrderedDict()  # the key whose turn it is comes first
        self.count = 0  #: items that wait; no `__len__`, which would be a call, several times a request

    def __repr__(self) -> str:
        return f"<FairQueue {self.count} waiting, {len(self._waiting)} keys>"

    def push(self, key: K, item: T) -> None:
        """Puts an item behind those of its key."""
        self._waiting.setdefault(key, deque()).append(item)
        self.count += 1

    def peek(self) -> T:
        """The item whose turn it is. Raises StopIteration if there is none."""
        return next(iter(self._waiting.values()))[0]

    def pop(self) -> T:
        """Takes out the item whose turn it is; its key goes to the end of the round. Raises KeyError if it is empty."""
        key, items = self._waiting.popitem(last=False)
        item = items.popleft()
        self.count -= 1
        if items:
            self._waiting[key] = items
        return item

    def remove(self, key: K, item: T) -> None:
        """Takes out an item that will not wait any longer. Raises KeyError or ValueError if it is not there."""
        items = self._waiting[key]
        items.remove(item)
        self.count -= 1
        if not items:
            del self._waiting[key]


class DepartureRate:
    """How fast places become free, in the last seconds."""

    def __init__(self, now: float) -> None:
        self._departures: deque[float] = deque(maxlen=1024)
        self._since = now

    def depart(self, now: float) -> None:
        """A place has become free."""
        self._departures.append(now)

    def retry_after_s(self, waiting: int, now: float) -> int:
        """Whole seconds after which a place is likely to be free behind `waiting` others."""
        recent = self._departures
        while recent and recent[0] <= now - _RATE_WINDOW_S:
            recent.popleft()
        if not recent:
            return _MOST_RETRY_S if now - self._since >= _RATE_WINDOW_S else _LEAST_RETRY_S
        # Of a full window; a deque that is full tells of less.
        span = now - recent[0] if len(recent) == recent.maxlen else min(_RATE_WINDOW_S, max(now - self._since, 1.0))
        rate = len(recent) / max(span, 1e-3)
        return max(_LEAST_RETRY_S, min(_MOST_RETRY_S, ceil((waiting + 1) / rate)))
