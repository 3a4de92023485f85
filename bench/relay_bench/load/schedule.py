"""When requests are to be sent: computed before the run, so that nothing the server does can move it.

Arrivals are made in operational time, in which one request is due per unit on average: gaps drawn from a gamma
distribution of mean 1, cumulated, and scaled so that the last of n is at n exactly (as vLLM's benchmark does: the rate
is met however the dice fall). A rate curve then maps operational time to seconds; with gaps of a Poisson process this
is the inhomogeneous Poisson process of that rate.
"""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Final, Protocol

import msgspec

if TYPE_CHECKING:
    import random
    from collections.abc import Iterable

NS: Final = 1_000_000_000


class Curve(Protocol):
    """A rate over the time of a run."""

    def count(self, seconds: float) -> float:
        """Requests due in a run of so many seconds."""
        ...

    def instants(self, positions: Iterable[float], total: int) -> list[float]:
        """Seconds at which the operational times `positions` are reached, in a run of `total` requests."""
        ...


class Constant(msgspec.Struct, frozen=True):
    """`rate` requests a second; infinite: all at once."""

    rate: float

    def count(self, seconds: float) -> float:
        """See `Curve.count`."""
        return self.rate * seconds

    def instants(self, positions: Iterable[float], total: int) -> list[float]:
        """See `Curve.instants`."""
        return [position / self.rate for position in positions]


class LinearRamp(msgspec.Struct, frozen=True):
    """From `start` to `end` requests a second, by as much each second."""

    start: float
    end: float

    def count(self, seconds: float) -> float:
        """See `Curve.count`."""
        return (self.start + self.end) / 2 * seconds

    def instants(self, positions: Iterable[float], total: int) -> list[float]:
        """See `Curve.instants`: solves ``start·t + slope·t²/2 = position`` in the form that has no cancellation."""
        seconds = 2 * total / (self.start + self.end)
        slope = (self.end - self.start) / seconds
        # the root of a falling ramp to 0 may be a rounding error below 0 at its very end
        return [
            2 * position / (self.start + math.sqrt(max(0.0, self.start**2 + 2 * slope * position)))
            for position in positions
        ]


class ExponentialRamp(msgspec.Struct, frozen=True):
    """From `start` to `end` requests a second, by the same factor each second."""

    start: float
    end: float

    def count(self, seconds: float) -> float:
        """See `Curve.count`."""
        return seconds * (self.end - self.start) / math.log(self.end / self.start)

    def instants(self, positions: Iterable[float], total: int) -> list[float]:
        """See `Curve.instants`."""
        growth = (self.end - self.start) / total  # of the rate, per request: the rate is linear in their number
        return [math.log1p(growth * position / self.start) / growth for position in positions]


def curve_of(*, rate: float, strategy: str = "", start: float = 0.0, end: float = 0.0) -> Curve:
    """The curve the flags describe; raises `ValueError`."""
    if not strategy:
        if not rate > 0:
            raise ValueError("--request-rate: wanted more than 0")
        return Constant(rate)
    if strategy not in ("linear", "exponential"):
        raise ValueError(f"--ramp-up-strategy: {strategy!r}; wanted linear or exponential")
    if not (math.isfinite(start) and math.isfinite(end)) or start < 0 or end < 0 or start + end <= 0:
        raise ValueError("--ramp-up-start-rps, --ramp-up-end-rps: wanted finite rates, at least one above 0")
    if start == end:
        return Constant(start)
    if strategy == "linear":
        return LinearRamp(start, end)
    if start <= 0 or end <= 0:
        raise ValueError("--ramp-up-strategy exponential: wanted rates above 0")
    return ExponentialRamp(start, end)


def positions(total: int, burstiness: float, rng: random.Random) -> list[float]:
    """Operational times of `total` arrivals, the last of them at `total`.

    `burstiness` is the gamma distribution's shape, as in vLLM: 1 is Poisson, below 1 burstier, infinite constant.
    """
    if math.isinf(burstiness):
        return [float(number) for number in range(1, total + 1)]
    found = []
    position = 0.0
    for _ in range(total):
        position += rng.gammavariate(burstiness, 1 / burstiness)
        found.append(position)
    # Shapes far below 1 draw gaps that round to nothing; all of them doing so is no schedule.
    scale = total / position if position > 0 else 0.0
    return [min(position * scale, float(total)) for position in found]


def arrivals(total: int, curve: Curve, *, burstiness: float, rng: random.Random) -> list[int]:
    """The planned instants of `total` requests: ns from the start of the run, in order."""
    if isinstance(curve, Constant) and math.isinf(curve.rate):
        return [0] * total
    return [round(seconds * NS) for seconds in curve.instants(positions(total, burstiness, rng), total)]


def number_within(curve: Curve, seconds: float) -> int:
    """How many requests a run of `seconds` takes; raises `ValueError` where there is no such number."""
    count = curve.count(seconds)
    if not math.isfinite(count):
        raise ValueError("--duration needs a finite rate or --max-concurrency")
    return max(1, math.floor(count + 1e-9))


class TraceEntry(msgspec.Struct, frozen=True):
    """A request of a trace: when, and how long where it says so."""

    at_ns: int
    input_len: int | None = None
    output_len: int | None = None


def read_trace(text: str) -> list[TraceEntry]:
    """A trace: on each line a number of seconds, or Mooncake's object with ``timestamp`` in milliseconds.

    Instants count from the first one. Raises `ValueError` with the line's number.
    """
    entries = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            entries.append(_trace_entry(json.loads(line)))
        except (ValueError, TypeError, KeyError) as error:
            message = f"line {number}: wanted seconds, or an object with `timestamp` in ms: {error}"
            raise ValueError(message) from None
    if not entries:
        raise ValueError("the trace is empty")
    entries.sort(key=lambda entry: entry.at_ns)
    first = entries[0].at_ns
    return [msgspec.structs.replace(entry, at_ns=entry.at_ns - first) for entry in entries]


def _trace_entry(value: object) -> TraceEntry:
    if isinstance(value, dict):
        at_ns = round(float(value["timestamp"]) * 1e6)
        return TraceEntry(at_ns, value.get("input_length"), value.get("output_length"))
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise TypeError(f"{value!r} is no time")
    return TraceEntry(round(value * NS))
