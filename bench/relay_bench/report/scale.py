"""Axes: from values to places, and where the ticks are."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

import msgspec

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable


def milliseconds(ms: float) -> str:
    """A time for people, in the unit that fits it."""
    if ms < 1:
        return f"{ms * 1000:g} µs"
    return f"{ms:g} ms" if ms < 1000 else f"{ms / 1000:g} s"


def plain(value: float) -> str:
    """A number for people."""
    return f"{value:,g}"


def percent(share: float) -> str:
    """A share for people."""
    return f"{share * 100:g} %"


#: Values below are drawn here on a log scale: frames that came in one read have no gap at all.
LEAST_MS: Final = 0.001


class Scale(msgspec.Struct, frozen=True, kw_only=True):
    """Values from `low` to `high` on a line of length 1."""

    low: float
    high: float
    is_log: bool = False
    text: Callable[[float], str] = plain  #: of a tick

    def place(self, value: float) -> float:
        """Where a value is, 0 to 1; what is outside is at the end."""
        if self.is_log:
            at = math.log(max(value, self.low) / self.low) / math.log(self.high / self.low)
        else:
            at = (value - self.low) / (self.high - self.low)
        return min(max(at, 0.0), 1.0)

    def ticks(self, about: int = 6) -> list[float]:
        """Round values within the scale, near `about` of them."""
        if self.is_log:
            return self._log_ticks(about)
        step = _round_step((self.high - self.low) / about)
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [number * step for number in range(first, last + 1)]

    def _log_ticks(self, about: int) -> list[float]:
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        for factors in ((1, 2, 3, 4, 5, 6, 8), (1, 2, 5), (1, 3), (1,)):
            found = [factor * 10.0**decade for decade in decades for factor in factors]
            found = [float(f"{tick:.3g}") for tick in found if self.low * 0.999 <= tick <= self.high * 1.001]
            if len(found) <= about + 2:
                break
        return found if len(found) >= 2 else [float(f"{self.low:.3g}"), float(f"{self.high:.3g}")]


def linear(values: Iterable[float], *, from_zero: bool = True, text: Callable[[float], str] = plain) -> Scale:
    """A linear scale that holds all of `values`, which ends at a tick."""
    found = list(values) or [0.0, 1.0]
    low, high = min(found), max(found)
    if from_zero:
        low, high = min(low, 0.0), max(high, 0.0)
    if high - low <= 1e-12 * max(1.0, abs(low), abs(high)):  # one value, or as good as one
        low, high = low - 0.5, high + 0.5
    step = _round_step((high - low) / 6)
    return Scale(low=math.floor(low / step + 1e-9) * step, high=math.ceil(high / step - 1e-9) * step, text=text)


def logarithmic(values: Iterable[float], *, text: Callable[[float], str] = milliseconds) -> Scale:
    """A log scale that holds all of `values`, none of them below `LEAST_MS`."""
    found = [max(value, LEAST_MS) for value in values] or [1.0]
    low, high = min(found) * 0.95, max(found) * 1.05
    if high / low < 1.5:  # one value, or nearly: some room around it
        low, high = low / 1.3, high * 1.3
    return Scale(low=low, high=high, is_log=True, text=text)


def _round_step(step: float) -> float:
    """The least of 1, 2, 5 times a power of ten that is not below `step`."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= step * 0.999)
