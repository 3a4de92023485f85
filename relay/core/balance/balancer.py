"""Seats, the loads they carry, and what all policies have in common.

The seats that may be picked stand in a row, with their scores beside it in a flat list of floats: the search for the
least is then one `min` in C, 9 µs for 1,000 seats, and it does not matter who has changed a score. (A heap, which would
have to hear of every change, is no faster to keep, and could not take in what other processes write.)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Collection
    from random import Random

#: Outstanding bytes of prompt that weigh as much as one more stream: about 1,000 tokens. Two things run out in an
#: engine, places in the batch (vLLM's `max_num_seqs`: 256) and KV cache (Qwen3-32B, at 256 KiB a token: some 280,000
#: tokens on two devices of 80 GB), so a place is worth about as much. Counting streams alone (nginx, HAProxy) piles
#: long prompts on one engine; counting bytes alone (vLLM-Ascend's proxy) puts any number of short ones there.
PROMPT_BYTES_PER_STREAM: Final = 4096

_NOWHERE: Final = -1


class Seat:
    """An upstream as policies see it. Only its balancer changes it."""

    __slots__ = ("is_available", "name", "others", "prompt_bytes", "slot", "streams", "weight")

    def __init__(self, name: str, weight: int = 1) -> None:
        if weight < 1:
            raise ValueError(f"weight {weight} of {name} is less than 1")
        self.name = name  #: its URL; affinities go by it, so it must be the same in all processes and after a restart
        self.weight = weight  #: its share, beside the other weights
        self.is_available = True  #: may be picked
        self.streams = 0  #: outstanding
        self.prompt_bytes = 0  #: of the outstanding ones
        self.others = 0.0  #: what other processes have outstanding there, in streams
        self.slot = _NOWHERE  #: its place in the balancer's row, if it stands there

    def __repr__(self) -> str:
        state = "" if self.is_available else " unavailable"
        return f"<Seat {self.name} weight={self.weight} streams={self.streams} prompt_bytes={self.prompt_bytes}{state}>"

    @property
    def load(self) -> float:
        """What this process has outstanding there, in streams."""
        return self.streams + self.prompt_bytes / PROMPT_BYTES_PER_STREAM

    @property
    def score(self) -> float:
        """What is outstanding, in streams, per weight."""
        # `load`, written out: this is asked for at each change, and a property is a call.
        return (self.streams + self.prompt_bytes / PROMPT_BYTES_PER_STREAM + self.others) / self.weight


class Load:
    """One request's part of what is outstanding at a seat. Given back once, however often told."""

    __slots__ = ("_balancer", "is_held", "prompt_bytes", "seat")

    def __init__(self, balancer: Balancer, seat: Seat, prompt_bytes: int) -> None:
        self._balancer = balancer
        self.seat = seat
        self.prompt_bytes = prompt_bytes
        self.is_held = True
        balancer._change_load(seat, 1, prompt_bytes)

    def release(self) -> None:
        """Gives it back; again: does nothing."""
        if self.is_held:
            self.is_held = False
            self._balancer._change_load(self.seat, -1, -self.prompt_bytes)


class Balancer(ABC):
    """Seats, of which one is picked per attempt. Nothing awaits: a pick and its `take` are one step to all tasks."""

    def __init__(self, rng: Random) -> None:
        self._rng = rng
        self._members: dict[str, Seat] = {}  # by name
        self._row: list[Seat] = []  # the members that are available, in no order
        self._scores: list[float] = []  # theirs, by slot

    def __repr__(self) -> str:
        return f"<{type(self).__name__} seats={len(self._members)} available={len(self._row)}>"

    def __len__(self) -> int:
        """Its members, whether available or not."""
        return len(self._members)

    def key_of(self, session: bytes | None, body: bytes | bytearray) -> bytes | None:
        """What this policy goes by in a request, for all of its attempts: None if by nothing.

        `session` is what the configuration calls one: a header, the body's ``user`` or the API key.
        """
        return None

    @abstractmethod
    def pick(self, key: bytes | None = None, tried: Collection[Seat] = ()) -> Seat | None:
        """The seat for an attempt: one that is available and not `tried`; None if there is none.

        Policies without affinity take no notice of `key`; those with one fall back on least outstanding without it.
        """

    def take(self, seat: Seat, prompt_bytes: int) -> Load:
        """Counts a request with a prompt of so many bytes as outstanding at `seat`, until the load is released."""
        return Load(self, seat, prompt_bytes)

    # -- who may be picked

    def add(self, seat: Seat) -> None:
        """A seat becomes a member. Raises ValueError if one of its name is."""
        if seat.name in self._members:
            raise ValueError(f"{seat.name} is there already")
        self._members[seat.name] = seat
        if seat.is_available:
            self._join(seat)

    def remove(self, seat: Seat) -> None:
        """A member is no longer picked; loads it carries are given back as ever. Raises KeyError if it is none."""
        if self._members.get(seat.name) is not seat:
            raise KeyError(seat.name)
        del self._members[seat.name]
        if seat.is_available:
            self._leave(seat)

    def set_available(self, seat: Seat, is_available: bool) -> None:
        """Whether the seat may be picked. Of one that was removed it is noted only."""
        if is_available != seat.is_available:
            seat.is_available = is_available
            if self._members.get(seat.name) is seat:
                (self._join if is_available else self._leave)(seat)

    def set_others(self, seat: Seat, load: float) -> None:
        """What other processes have outstanding at a seat, in streams: it counts as this one's own does."""
        if load != seat.others:
            seat.others = load
            if seat.slot != _NOWHERE:
                self._scores[seat.slot] = seat.score

    # -- what policies add to

    def _join(self, seat: Seat) -> None:
        seat.slot = len(self._row)
        self._row.append(seat)
        self._scores.append(seat.score)

    def _leave(self, seat: Seat) -> None:
        """The last of the row takes the place of the one that leaves."""
        last, score = self._row.pop(), self._scores.pop()
        if last is not seat:
            last.slot = seat.slot
            self._row[seat.slot] = last
            self._scores[seat.slot] = score
        seat.slot = _NOWHERE

    def _change_load(self, seat: Seat, streams: int, prompt_bytes: int) -> None:
        seat.streams += streams
        seat.prompt_bytes += prompt_bytes
        if seat.slot != _NOWHERE:
            self._scores[seat.slot] = seat.score

    def _in_row(self, tried: Collection[Seat]) -> set[Seat]:
        """Those of `tried` that a policy has to pass over by itself."""
        return {seat for seat in tried if seat.slot != _NOWHERE}
