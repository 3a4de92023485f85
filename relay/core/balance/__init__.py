"""Which upstream a request goes to: one policy per class, all of them behind `Balancer`.

What a pick costs, at most in steady state and in all policies, is small beside the request (figures:
``relay-bench micro balance``). Work is done where things change: when a seat joins or leaves, and when a load
is taken or given back. Where a change leaves work to the next pick, the policy's own docstring says how much.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from relay.core.balance.affinity import PrefixAffinity, SessionAffinity
from relay.core.balance.balancer import Balancer, Load, Seat
from relay.core.balance.chance import PowerOfTwo, WeightedRandom
from relay.core.balance.least import LeastOutstanding
from relay.core.balance.turns import RoundRobin

if TYPE_CHECKING:
    from collections.abc import Iterable
    from random import Random

__all__ = ["POLICIES", "Balancer", "Load", "Seat", "make_balancer"]

#: By the names of the configuration file.
POLICIES: Final[dict[str, type[Balancer]]] = {
    "least_outstanding": LeastOutstanding,
    "power_of_two": PowerOfTwo,
    "prefix_affinity": PrefixAffinity,
    "random": WeightedRandom,
    "round_robin": RoundRobin,
    "session_affinity": SessionAffinity,
}


def make_balancer(name: str, seats: Iterable[Seat], *, rng: Random) -> Balancer:
    """A balancer of the policy `name` over `seats`. Raises KeyError for a name not in `POLICIES`."""
    balancer = POLICIES[name](rng)
    for seat in seats:
        balancer.add(seat)
    return balancer
