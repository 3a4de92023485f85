"""What ``GET /-/status`` answers, and the rates and quantiles in it, made from two readings of the boards.

Times are milliseconds, rates per second, both over the last seconds rather than since the start; None: nothing to
measure in that time.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import accumulate
from operator import add, sub
from typing import Final

import msgspec
from msgspec.structs import replace

from relay.core import metrics
from relay.core.metrics import Family, HistogramFamily

#: All series of the boards by family name and label values, as `relay.core.board.total` answers them.
Series = Mapping[tuple[str, ...], Sequence[float]]


#: The state of a daemon that ends when what it has has ended, and of an engine that has been taken out of its pool.
DRAINING: Final = "draining"


class UpstreamStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One engine as the relay sees it."""

    url: str
    role: str = "serve"  #: of `relay.core.metrics.ROLES`
    state: str  #: a value of `relay.core.health.State`, or `DRAINING`
    weight: int = 1
    in_flight: int = 0
    max_in_flight: int = 0  #: most it may have; 0: no limit
    idle: int = 0  #: connections kept for later requests
    failures: int = 0  #: attempts that failed by its fault, since it was added
    server_errors: int = 0  #: its answers of 500 and more that were passed on, since then
    last_error: str | None = None
    last_error_age_s: float | None = None
    probe_ms: float | None = None  #: what its last probe took
    age_s: float = 0.0  #: since it was added


class Rates(msgspec.Struct, frozen=True, kw_only=True):
    """What a pool did in the last seconds."""

    requests_per_s: float = 0.0
    tokens_per_s: float = 0.0  #: generated ones
    ttft_p50_ms: float | None = None
    ttft_p99_ms: float | None = None
    gap_p50_ms: float | None = None
    gap_p99_ms: float | None = None


class PoolStatus(msgspec.Struct, frozen=True, kw_only=True):
    """Upstreams that serve the same models."""

    name: str
    models: tuple[str, ...] = ()  #: as configured; empty: every model no other pool claims
    policy: str
    in_flight: int = 0
    max_in_flight: int = 0  #: most it may have; 0: no limit
    queued: int = 0
    rates: Rates = Rates()
    unresolved: dict[str, str] = {}  #: names to be resolved that are not, by URL, and why
    upstreams: tuple[UpstreamStatus, ...] = ()


class KeyStatus(msgspec.Struct, frozen=True, kw_only=True):
    """What was done under a key, since the start."""

    name: str
    in_flight: int = 0  #: now
    requests: int = 0  #: that have ended
    refusals: int = 0  #: over a limit of the key
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    reasoning_tokens: int = 0
    cost: float = 0.0


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """The whole daemon."""

    version: str
    state: str  #: ready or draining
    uptime_s: float
    workers: int = 1
    in_flight: int = 0
    frames: int = 0  #: passed on since the start
    pools: tuple[PoolStatus, ...] = ()
    keys: tuple[KeyStatus, ...] = ()  #: those that were used or have limits, the busiest first


class ExchangeStatus(msgspec.Struct, frozen=True, kw_only=True):
    """An exchange in flight."""

    id: str
    client: str
    path: str
    model: str | None
    pool: str | None
    upstream: str | None
    phase: str  #: the name of a `relay.errors.Phase` in lower case
    attempts: int
    frames: int  #: passed on so far
    age_ms: float


def merged(whole: Status, parts: Sequence[Status]) -> Status:
    """A daemon's status: who is in it, as `whole` has it, with what each worker's own status says is done there."""
    every = [pool for part in parts for pool in part.pools]
    pools = (_merged_pool(pool, [part for part in every if part.name == pool.name]) for pool in whole.pools)
    return replace(
        whole,
        workers=len(parts),
        in_flight=sum(part.in_flight for part in parts),
        frames=sum(part.frames for part in parts),
        pools=tuple(pools),
    )


def _merged_pool(whole: PoolStatus, parts: Sequence[PoolStatus]) -> PoolStatus:
    staying: defaultdict[tuple[str, str], list[UpstreamStatus]] = defaultdict(list)
    leaving: defaultdict[tuple[str, str], list[UpstreamStatus]] = defaultdict(list)  # of these only workers know
    for part in parts:
        for each in part.upstreams:
            (leaving if each.state == DRAINING else staying)[each.role, each.url].append(each)
    members = (each for each in whole.upstreams if each.state != DRAINING)
    return replace(
        whole,
        in_flight=sum(part.in_flight for part in parts),
        queued=sum(part.queued for part in parts),
        upstreams=(
            *(_merged_upstream(each, staying[each.role, each.url]) for each in members),
            *(_merged_upstream(each[0], each) for each in leaving.values()),
        ),
    )


def _merged_upstream(whole: UpstreamStatus, parts: Sequence[UpstreamStatus]) -> UpstreamStatus:
    """Its worst state counts: where one worker's requests fail, the others' are about to. And the youngest error."""
    failed = [part for part in (whole, *parts) if part.last_error_age_s is not None]
    latest = min(failed, key=lambda part: part.last_error_age_s or 0.0, default=whole)
    return replace(
        whole,
        state=max((part.state for part in (whole, *parts)), key=_SEVERITY.index),
        in_flight=sum(part.in_flight for part in parts),
        idle=sum(part.idle for part in parts),
        failures=sum(part.failures for part in parts),
        server_errors=sum(part.server_errors for part in parts),
        last_error=latest.last_error,
        last_error_age_s=latest.last_error_age_s,
    )


#: Of an upstream's states the better before the worse.
_SEVERITY: Final = ("healthy", "half-open", "ejected", "unhealthy", DRAINING)


def rates(pool: str, before: Series, after: Series, elapsed_s: float) -> Rates:
    """What a pool did between two readings, `elapsed_s` seconds apart. Series that are only in `after` began at 0."""

    def gained(family: Family, **labels: str) -> list[float]:
        return _gained(family, {"pool": pool, **labels}, before, after)

    per_s = 1 / elapsed_s if elapsed_s > 0 else 0.0
    ttft, gaps = gained(metrics.FIRST_TOKEN), gained(metrics.INTER_FRAME)
    return Rates(
        requests_per_s=gained(metrics.REQUESTS)[0] * per_s,
        tokens_per_s=gained(metrics.TOKENS, kind="completion")[0] * per_s,
        ttft_p50_ms=_quantile_ms(metrics.FIRST_TOKEN, ttft, 0.5),
        ttft_p99_ms=_quantile_ms(metrics.FIRST_TOKEN, ttft, 0.99),
        gap_p50_ms=_quantile_ms(metrics.INTER_FRAME, gaps, 0.5),
        gap_p99_ms=_quantile_ms(metrics.INTER_FRAME, gaps, 0.99),
    )


def keys_of(series: Series) -> tuple[KeyStatus, ...]:
    """The keys in a reading, the busiest first. Many are one, named `metrics.OTHER`, where there are too many."""
    found: defaultdict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for (family, *labels), cells in series.items():
        if family in _FIELD_OF_KEY:
            found[labels[0]][_FIELD_OF_KEY[family]] += cells[0]
        elif family == metrics.KEY_TOKENS.name:
            found[labels[0]][f"{labels[1]}_tokens"] += cells[0]
    keys = (msgspec.convert({"name": name, **fields}, KeyStatus, strict=False) for name, fields in found.items())
    return tuple(sorted(keys, key=lambda key: (-key.in_flight, -key.requests, key.name)))


_FIELD_OF_KEY: Final = {
    metrics.KEY_IN_FLIGHT.name: "in_flight",
    metrics.KEY_REQUESTS.name: "requests",
    metrics.KEY_REFUSALS.name: "refusals",
    metrics.KEY_COST.name: "cost",
}


def _gained(family: Family, labels: Mapping[str, str], before: Series, after: Series) -> list[float]:
    """The sum of a family's series with these label values, less what they were before."""
    places = [(1 + family.labels.index(name), value) for name, value in labels.items()]
    gained = [0.0] * family.cells
    for key, cells in after.items():
        if key[0] == family.name and all(key[place] == value for place, value in places):
            gained = [*map(add, gained, map(sub, cells, before.get(key, [0.0] * len(cells))))]
    return gained


def _quantile_ms(family: HistogramFamily, cells: Sequence[float], q: float) -> float | None:
    """The `q` quantile of a histogram, evenly spread between two bounds, as PromQL's histogram_quantile has it."""
    counts = cells[:-1]
    total = sum(counts)
    if total <= 0:
        return None
    reached = [*accumulate(counts)]
    at = bisect_left(reached, q * total)
    if at >= len(family.bounds):
        return family.bounds[-1] * 1000
    low = family.bounds[at - 1] if at else 0.0
    inside = (q * total - (reached[at] - counts[at])) / counts[at]
    return (low + (family.bounds[at] - low) * inside) * 1000
