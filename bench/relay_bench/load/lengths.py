"""Lengths of prompts and answers, drawn from a distribution written as one word."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    import random

#: What `parse_lengths` reads, for people.
SYNTAX = "N, uniform:LOW-HIGH, lognormal:MEDIAN,SIGMA or exponential:MEAN"


class Lengths(msgspec.Struct, frozen=True):
    """A distribution of lengths in tokens; what it draws is at least 1."""

    kind: str
    first: float
    second: float = 0.0

    def draw(self, rng: random.Random) -> int:
        """One length."""
        if self.kind == "uniform":
            return rng.randint(int(self.first), int(self.second))
        if self.kind == "lognormal":
            return max(1, round(rng.lognormvariate(math.log(self.first), self.second)))
        if self.kind == "exponential":
            return max(1, round(rng.expovariate(1 / self.first)))
        return int(self.first)

    def spread(self, ratio: float) -> Lengths:
        """vLLM's ``--random-range-ratio``: uniform from ``length·(1 - ratio)`` to ``length·(1 + ratio)``."""
        if not ratio or self.kind != "constant":
            return self
        return Lengths("uniform", max(1, math.floor(self.first * (1 - ratio))), math.ceil(self.first * (1 + ratio)))


def parse_lengths(text: str) -> Lengths:
    """A distribution from `SYNTAX`; raises `ValueError`."""
    kind, colon, arguments = text.partition(":")
    separator = "-" if kind == "uniform" else ","
    try:
        numbers = [float(number) for number in (arguments if colon else text).split(separator)]
    except ValueError:
        numbers = []
    wanted = {"uniform": 2, "lognormal": 2, "exponential": 1}.get(kind, 0) if colon else 1
    is_fit = len(numbers) == wanted > 0 and all(math.isfinite(number) for number in numbers)
    if not is_fit or numbers[0] < 1 or (kind == "uniform" and numbers[1] < numbers[0]) or numbers[-1] < 0:
        raise ValueError(f"{text!r} is no length; wanted {SYNTAX}")
    return Lengths(kind if colon else "constant", *numbers)
