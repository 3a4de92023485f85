"""What clients do under their keys, and how much of it they may: counts for each key, and its limits.

Limits hold over all workers. Requests at once are the places of an `eventfd` semaphore, as an engine's are. Requests in
a minute are a token bucket, which whoever keeps the limits fills (`relay.daemon.key_limits`) and all workers take from.
Its tokens are bytes in a pipe, as those of GNU make's jobserver are: a read takes one or fails, whichever worker asks,
and whoever fills it can see how many are left, so a worker that dies in between leaves nothing wrong.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from math import ceil
from typing import TYPE_CHECKING, Final

from relay.config import KeyLimitsConfig
from relay.core import metrics
from relay.core.board import Board
from relay.core.cost import Sum
from relay.errors import RateLimited
from relay.net.shares import Semaphore

if TYPE_CHECKING:
    from relay.core.cost import Cost
    from relay.core.usage import Usage

#: When whoever has too many requests at once is told to come again, seconds: one of them may end any moment.
RETRY_S: Final = 1


class Tokens:
    """Requests that may be made yet, as a worker sees them."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def __repr__(self) -> str:
        return f"<Tokens fd={self._fd}>"

    def take(self) -> bool:
        """Takes a token, if there is one; True also where nobody fills it any more, as the limit is gone."""
        try:
            os.read(self._fd, 1)
        except BlockingIOError:
            return False
        return True

    def __del__(self) -> None:
        os.close(self._fd)


class KeyUse:
    """One key in this worker."""

    def __init__(self, name: str, board: Board) -> None:
        self.name = name
        self.places: Semaphore | None = None  #: None: as many requests at once as may be
        self.tokens: Tokens | None = None  #: None: as many in a minute
        self._board = board
        self._requests = board.counter(metrics.KEY_REQUESTS, name)
        self._in_flight = board.gauge(metrics.KEY_IN_FLIGHT, name)
        self._cost: Sum | None = None

    def __repr__(self) -> str:
        return f"<KeyUse {self.name} places={self.places!r} tokens={self.tokens!r}>"

    def enter(self, limits: KeyLimitsConfig) -> Visit:
        """Lets a request in. Raises RateLimited, and nothing is taken."""
        places = self.places
        if places is not None and not places.take():
            self._count_refusal("max_in_flight")
            message = (
                f"key {self.name} has {limits.max_in_flight} requests under way, as many as it may (max_in_flight)"
            )
            raise RateLimited(f"{message}; try again when one has ended", retry_after_s=RETRY_S)
        if self.tokens is not None and not self.tokens.take():
            if places is not None:
                places.give_back()
            self._count_refusal("requests_per_minute")
            per_minute = limits.requests_per_minute
            message = f"key {self.name} has made its {per_minute} requests a minute (requests_per_minute); slow down"
            raise RateLimited(message, retry_after_s=ceil(60 / max(per_minute, 1)))
        self._in_flight.add()
        return Visit(self, places)

    def leave(self) -> None:
        """A request has ended; called by `Visit`."""
        self._in_flight.add(-1)
        self._requests.add()

    def spend(self, usage: Usage | None, cost: Cost | None) -> None:
        """Counts what a request took."""
        if usage is not None:
            for kind, number in usage.by_kind():
                self._board.counter(metrics.KEY_TOKENS, self.name, kind).add(number)
        if cost is not None:
            if self._cost is None:
                self._cost = Sum(self._board.counter(metrics.KEY_COST, self.name))
            self._cost.add(cost.total)

    def _count_refusal(self, limit: str) -> None:
        self._board.counter(metrics.KEY_REFUSALS, self.name, limit).add()


class Visit:
    """A request let in under a key. End it once."""

    __slots__ = ("_places", "_use")

    def __init__(self, use: KeyUse, places: Semaphore | None) -> None:
        self._use = use
        # Of which this request has one; the key may have got others since. None: it came when there was no limit, and
        # is not counted under one that the key gets meanwhile.
        self._places = places

    def end(self) -> None:
        """The request has ended."""
        self._use.leave()
        if self._places is not None:
            self._places.give_back()


class Keyring:
    """All keys that are in use."""

    def __init__(self, board: Board) -> None:
        self._board = board
        self._uses: dict[str, KeyUse] = {}

    def __repr__(self) -> str:
        return f"<Keyring {len(self._uses)}>"

    def of(self, name: str) -> KeyUse:
        """The key of this name."""
        use = self._uses.get(name)
        if use is None:
            use = self._uses[name] = KeyUse(name, self._board)
        return use

    def keep(self, names: Collection[str]) -> None:
        """Only these are left; what is under way under others goes on."""
        self._uses = {name: use for name, use in self._uses.items() if name in names}
