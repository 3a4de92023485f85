"""Handles whose clients have left: a decoder takes what is held for them, and drops it.

A prefiller keeps a prompt's blocks until a decoder has read them, or a timer of minutes has run out, and while it keeps
them others wait (ai-dynamo/dynamo#13703: 55 s). So a client that leaves between the two legs still costs one short
decode. It is no load of any exchange and is not balanced; it is bounded in number and time, and nobody waits for it.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Final

import trio

from relay.core.connectors.base import HandOver, LegRequest, drain
from relay.errors import ExchangeError
from relay.net.whole import ask_whole

if TYPE_CHECKING:
    from relay.net.exchange import Exchange
    from relay.net.fleet import Pool
    from relay.net.pool import Upstream

#: Drains at once in a worker; beyond that, handles wait for the engine's timer.
MOST_DRAINS: Final = 64
#: Longest time for one, seconds.
DRAIN_S: Final = 10.0


class Drains:
    """Frees handles in the background of a worker."""

    def __init__(self) -> None:
        self.nursery: trio.Nursery | None = None  #: the worker's; None: there is none to run in
        self.running = 0
        self.done = 0
        self.failed = 0  #: or not begun

    def __repr__(self) -> str:
        return f"<Drains running={self.running} done={self.done} failed={self.failed}>"

    def start(self, exchange: Exchange, pool: Pool, hand_over: HandOver, planned: Upstream, *, is_bound: bool) -> None:
        """Has a decoder take a handle: the `planned` one where it `is_bound` to that, else any that is up."""
        decoder = planned if is_bound else _any_up(pool, planned)
        if self.nursery is None or self.running >= MOST_DRAINS or decoder is None:
            self._count(exchange, is_done=False)
            return
        try:
            sends = drain(hand_over.decode, exchange.route)
        except ValueError:
            self._count(exchange, is_done=False)
            return
        self.running += 1
        self.nursery.start_soon(self._run, exchange, decoder, sends)

    def _count(self, exchange: Exchange, *, is_done: bool) -> None:
        self.done += is_done
        self.failed += not is_done
        exchange.service.tally.drained(is_done=is_done)

    async def _run(self, exchange: Exchange, decoder: Upstream, sends: LegRequest) -> None:
        is_done = False
        try:
            with trio.move_on_after(DRAIN_S):
                answer = await ask_whole(exchange, decoder, sends)
                is_done = answer.status < 400
        except ExchangeError as failure:
            decoder.note_error(f"drain: {failure.settled().message}")
        finally:
            self.running -= 1
            self._count(exchange, is_done=is_done)


def _any_up(pool: Pool, planned: Upstream) -> Upstream | None:
    """A decoder; one that requests fail at only where there is no other, and the same for the one that was planned."""
    group = pool.groups.get("decode")  # a reload may have taken it away
    up = [upstream for upstream in group.upstreams.values() if upstream.health.is_up] if group else []
    closed = [upstream for upstream in up if not upstream.health.is_open]
    others = [upstream for upstream in closed if upstream is not planned]
    return random.choice(others or closed or up) if up else None
