"""The head of a stream, written while its first frame is still waited for.

The worst time to write a head is when the first token has come, after a rest that has left nothing of the relay in the
processor's caches. What is known before is written before; only the times of engine and relay are filled in then.
"""

from __future__ import annotations


class Preface:
    """What goes out before a stream's first frame. `at` tells it all."""

    __slots__ = ("_after", "_before", "_own_ns", "_since_ns")

    def __init__(self, before: bytes, after: bytes, *, since_ns: int, own_ns: int) -> None:
        """`before` and `after` go around ``engine;dur=…, relay;dur=…`` (`relay.core.timeline.server_timing`).

        The engine's time counts from `since_ns`; up to then the relay had taken `own_ns`.
        """
        self._before = before
        self._after = after
        self._since_ns = since_ns
        self._own_ns = own_ns

    def at(self, answered_ns: int, now_ns: int) -> bytes:
        """Where the first frame was there at `answered_ns`, and goes out at `now_ns`; all of one clock."""
        engine_us = max(0, answered_ns - self._since_ns) // 1000
        own_us = max(0, self._own_ns + now_ns - answered_ns) // 1000
        return b"%bengine;dur=%d.%03d, relay;dur=%d.%03d%b" % (
            self._before,
            engine_us // 1000,
            engine_us % 1000,
            own_us // 1000,
            own_us % 1000,
            self._after,
        )
