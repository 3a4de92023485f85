"""An exchange's part of a pool, from when it is let in until it has ended."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Self

from relay.core.balance import Load
from relay.net.group import Ask
from relay.net.pool import Upstream
from relay.net.shares import Permits

if TYPE_CHECKING:
    from relay.net.fleet import Pool


class Place:
    """An exchange's part of a pool: its slot, and the load it puts on an engine of each role. Given back once."""

    __slots__ = ("_loads", "_permits", "_pool", "upstreams")

    def __init__(self, pool: Pool, permits: Permits | None) -> None:
        self._pool = pool
        self._permits = permits  # the pool's, of which this place has one
        self._loads: dict[str, tuple[Upstream, Load, Permits | None]] = {}
        self.upstreams: dict[str, Upstream] = {}  #: the engine taken last, by role

    def __repr__(self) -> str:
        return f"<Place {self.upstreams!r}>"

    def take(self, role: str, ask: Ask, tried: Collection[Upstream] = ()) -> Upstream | None:
        """Picks an engine of a role whose load is not held, and counts the exchange; None where there is none."""
        group = self._pool.groups[role]
        upstream = group.pick(ask, tried)
        while upstream is not None and upstream.permits is not None and not upstream.permits.take():
            group.refresh(upstream)  # other workers have filled it
            upstream = group.pick(ask, tried)
        if upstream is not None:
            self._loads[role] = upstream, group.balancer.take(upstream.seat, ask.prompt_bytes), upstream.permits
            self.upstreams[role] = upstream
            upstream.show_load()
            if upstream.config.max_in_flight:
                group.refresh(upstream)
        return upstream

    def take_others(self, ask: Ask, tried: Mapping[str, Collection[Upstream]]) -> bool:
        """Takes engines for another attempt: none of those that failed, if others are left; False where none is."""
        for role in ask.roles:
            self.drop(role)
        if not self._pool.has_roles(ask):
            return False
        # Where the failed engine is the only one of its role, the other role's engine has to be another.
        stays = [role for role in tried if not self._pool.groups[role].has_other(tried[role])]
        for role in ask.roles:
            avoided = [] if role in stays else [*tried.get(role, ()), *([self.upstreams[role]] if stays else [])]
            if self.take(role, ask, avoided) is None:
                return False
        self._pool.advance()
        return True

    def release(self, role: str) -> None:
        """Gives back the load of one role, if it is held; the slot is kept."""
        self.drop(role)
        self._pool.advance()

    def drop(self, role: str) -> None:
        """The same, without handing on what has become free."""
        held = self._loads.pop(role, None)
        if held is not None:
            upstream, load, permits = held
            load.release()
            if permits is not None:
                permits.give_back()
            group = self._pool.groups.get(role)  # a reload may have taken it away
            if group is None:
                upstream.show_load()
            else:
                group.departed(upstream)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.leave()
        self.give_up()
        self._pool.advance()

    def give_up(self) -> None:
        """Gives back all it holds, without handing it on."""
        for role in list(self._loads):
            self.drop(role)
        if self._permits is not None:
            self._permits.give_back()
            self._permits = None
