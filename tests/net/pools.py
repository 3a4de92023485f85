"""Pools without engines behind them, and what probes and requests would make of them."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from typing import Any

import msgspec

from relay.address import UpstreamConfig, parse_upstream
from relay.config import Config, PoolConfig
from relay.core.health import CONSECUTIVE_FAILURES, HealthRules
from relay.net.fleet import Pool
from relay.net.group import Ask, Group
from relay.net.place import Place
from relay.net.pool import Upstream

URLS = [f"http://10.0.0.{at}:8000" for at in range(1, 5)]
RULES = HealthRules()
ASK = Ask(("serve",), None, 100, b"me")
#: Beyond this no test waits.
PATIENCE_S = 5


def ask_of(tenant: bytes) -> Ask:
    return Ask(("serve",), None, 100, tenant)


def config_of(*pools: PoolConfig, **tables: Any) -> Config:
    return Config(pools=pools, **tables)


def upstreams(urls: Sequence[str], **own: Any) -> tuple[UpstreamConfig, ...]:
    return tuple(msgspec.structs.replace(parse_upstream(url), **own) for url in urls)


def pool_of(*urls: str, most: int = 0, **settings: Any) -> Pool:
    """A pool; `most` is what each engine takes."""
    pool = Pool(PoolConfig(**settings), RULES, random.Random(1))
    pool.reconfigure(PoolConfig(upstreams=upstreams(urls, max_in_flight=most), **settings), RULES)
    return pool


def group_of(pool: Pool) -> Group:
    return pool.groups["serve"]


def enter(pool: Pool, ask: Ask = ASK) -> Place:
    place = pool.enter_now(ask)
    assert place is not None
    return place


def engine_of(place: Place) -> Upstream:
    return place.upstreams["serve"]


def leave(place: Place) -> None:
    place.__exit__(None, None, None)


def take_down(pool: Pool, *ups: Upstream) -> None:
    """As the probes would."""
    for up in ups:
        for _ in range(RULES.failures):
            up.health.on_probe(False, time.monotonic())
        group_of(pool).refresh(up)
    pool.advance()


def bring_up(pool: Pool, *ups: Upstream) -> None:
    for up in ups:
        for _ in range(RULES.successes):
            up.health.on_probe(True, time.monotonic())
        group_of(pool).refresh(up)
    pool.advance()


def eject(pool: Pool, *ups: Upstream) -> None:
    """As requests would."""
    for up in ups:
        for _ in range(CONSECUTIVE_FAILURES):
            group_of(pool).begin(up).failed(time.monotonic())
        group_of(pool).refresh(up)


def assert_empty(pool: Pool, *left: Upstream) -> None:
    """Nothing is in it, nor on its engines or those that have `left`."""
    assert (pool.in_flight, pool.queued) == (0, 0)
    for up in (*pool.upstreams, *left):
        assert (up.outstanding, up.seat.prompt_bytes) == (0, 0)


async def enter_and_stay(pool: Pool, ask: Ask, order: list[bytes], places: list[Place]) -> None:
    places.append(await pool.enter(ask, 0))
    order.append(ask.tenant)
