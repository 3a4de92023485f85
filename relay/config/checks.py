"""Settings that are right each for itself and wrong together."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Final

from relay.address import parse_address
from relay.config.endpoints import endpoint_of
from relay.config.reading import Problem, shown

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence

    from relay.address import Address
    from relay.config.tables import Config, PoolConfig
    from relay.core.connectors.base import Role

_NO_UPSTREAM = "no upstream to send requests to; give --upstream http://HOST:PORT, or upstreams in a [[pool]]"
_SPLIT: Final[tuple[Role, ...]] = ("prefill", "decode")


def conflicts(config: Config, wrong: Collection[str] = ()) -> Iterator[Problem]:
    """Compare settings with each other; tables known to be `wrong` are left out, as they hold defaults by now."""
    if "pool" not in wrong:
        yield from _useless_pools(config)
        yield from _rival_pools(config)
    if "admin" not in wrong:
        yield from _exposed_admin(config)
    if "listen" not in wrong and "admin" not in wrong:
        yield from _colliding_addresses(config)
        yield from _loops(config)
    if "prices" not in wrong and "cost" not in wrong and config.cost.in_usage and not config.prices:
        yield Problem("cost.in_usage", 'there are no prices to tell; allowed: false, or a table [prices."MODEL"]')
    if "auth" not in wrong and config.auth.limits and not config.auth.keys_file:
        yield Problem("auth.limits", "there are no keys to limit; allowed: with auth.keys_file")
    if "limits" not in wrong and config.limits.max_buffered_bytes < config.limits.max_body_bytes:
        least = config.limits.max_body_bytes
        yield Problem("limits.max_buffered_bytes", f"has no room for max_body_bytes; allowed: {least} or more")


def doubts(config: Config) -> Iterator[Problem]:
    """What can hardly be meant, though a relay could work with it; of a configuration without `conflicts`."""
    for at, pool in enumerate(config.pools):
        if pool.connector == "p2p_nccl":
            yield from _shared_kv_sockets(pool, f"pool[{at}]")
        yield from _useless_settings(pool, f"pool[{at}]")
    if not config.auth.keys_file:
        if config.auth.routes != type(config.auth)().routes:
            yield Problem("auth.routes", "does nothing without auth.keys_file")
        for at, address in enumerate(config.listen.addresses):
            if not address.is_loopback:
                message = (
                    f"{address} can be reached from other machines, and nobody is asked for a key (auth.keys_file)"
                )
                yield Problem(f"listen.addresses[{at}]", message)
    timeouts = config.timeouts
    for name in ("queue_s", "connect_s", "prefill_s", "first_token_s", "between_tokens_s"):
        is_own = (limit_s := getattr(timeouts, name)) != getattr(type(timeouts)(), name)
        if is_own and 0 < timeouts.total_s <= limit_s:
            yield Problem(f"timeouts.{name}", f"{limit_s:g} is never reached, as total_s is {timeouts.total_s:g}")
    everything = next((pool.name for pool in config.pools if "*" in pool.models), None)
    for at, pool in enumerate(config.pools):
        if everything is not None and not pool.models:
            message = f'is for the models that no other pool names, and pool {everything} names all of them ("*")'
            yield Problem(f"pool[{at}]", f"is never reached: it {message}")
    for model, prices in config.prices.items():
        if prices.cached_prompt is not None and prices.cached_prompt > prices.prompt:
            yield Problem(f'prices."{model}".cached_prompt', "is dearer than prompt")


def _useless_settings(pool: PoolConfig, key: str) -> Iterator[Problem]:
    """Settings that nothing in the pool goes by."""
    usual = type(pool)()
    if pool.balance == "session_affinity" and pool.session_header.lower() == "content-length":
        yield Problem(f"{key}.session_header", "does nothing: Content-Length names no session")
    wanted_by = {
        "session_header": (pool.balance == "session_affinity", 'balance = "session_affinity"'),
        "callback_address": (pool.is_split and pool.connector == "ascend_layerwise", "ascend_layerwise"),
        **dict.fromkeys(("connector", "on_missing_kv", "drain_kv"), (pool.is_split, "a split pool")),
    }
    for name, (is_used, by) in wanted_by.items():
        if not is_used and getattr(pool, name) != getattr(usual, name):
            yield Problem(f"{key}.{name}", f"does nothing here; it is for {by}")


def _own_addresses(config: Config) -> list[tuple[str, Address]]:
    own = [(f"listen.addresses[{at}]", address) for at, address in enumerate(config.listen.addresses)]
    return own if config.admin.address is None else [*own, ("admin.address", config.admin.address)]


def _colliding_addresses(config: Config) -> Iterator[Problem]:
    for (first, address), (second, other) in itertools.combinations(_own_addresses(config), 2):
        if address.collides_with(other):
            yield Problem(second, f"{other} collides with {address} ({first}); allowed: an address of its own")


def _exposed_admin(config: Config) -> Iterator[Problem]:
    address = config.admin.address
    if address is not None and not address.is_loopback and not config.admin.allow_remote:
        message = f"{address} can be reached from other machines; allowed: loopback, or admin.allow_remote = true"
        yield Problem("admin.address", message)


def _useless_pools(config: Config) -> Iterator[Problem]:
    for at, pool in enumerate(config.pools):
        yield from _roles(pool, f"pool[{at}]")
        yield from _endpoints(pool, f"pool[{at}]")
        yield from _useless_trust(pool, f"pool[{at}]")
        yield from _repeated(pool.models, f"pool[{at}].models")
        every = (*pool.upstreams, *pool.decode)
        if pool.max_queue and not pool.max_in_flight and not all(one.max_in_flight for one in every):
            message = "nothing ever waits without a max_in_flight, of the pool or of all its upstreams"
            yield Problem(f"pool[{at}].max_queue", message)
    if not config.pools:
        yield Problem("pool[0].upstreams", _NO_UPSTREAM)


def _roles(pool: PoolConfig, key: str) -> Iterator[Problem]:
    """Engines that do everything, or both kinds of engines that share the work."""
    for name in ("upstreams", "prefill", "decode"):
        yield from _repeated([upstream.url for upstream in getattr(pool, name)], f"{key}.{name}")
    if pool.prefill or pool.decode:
        for name in ("prefill", "decode"):
            if not getattr(pool, name):
                yield Problem(f"{key}.{name}", "is empty; a split pool has at least one prefill and one decode engine")
        if pool.upstreams:
            yield Problem(f"{key}.upstreams", "stands beside prefill and decode; allowed: one or the other")
    elif not pool.upstreams:
        yield Problem(f"{key}.upstreams", _NO_UPSTREAM)


def _endpoints(pool: PoolConfig, key: str) -> Iterator[Problem]:
    """Engines that a split pool's connector cannot tell of each other."""
    for role in _SPLIT:
        for at, upstream in enumerate(getattr(pool, role)):
            try:
                endpoint_of(upstream.at("127.0.0.1") if upstream.is_dns else upstream, pool.connector, role)
            except ValueError as problem:
                yield Problem(f"{key}.{role}[{at}]", f"{upstream.url} {problem}")
    if pool.callback_address:
        try:
            if parse_address(pool.callback_address).is_wildcard:
                raise ValueError("is no address to call; allowed: HOST:PORT with the host that decoders reach")
        except ValueError as problem:
            yield Problem(f"{key}.callback_address", f"{shown(pool.callback_address)} {problem}")


def _shared_kv_sockets(pool: PoolConfig, key: str) -> Iterator[Problem]:
    known: dict[str, str] = {}
    for role in _SPLIT:
        for at, upstream in enumerate(getattr(pool, role)):
            if upstream.is_dns:
                continue
            address = endpoint_of(upstream, pool.connector, role).kv_address
            if first := known.get(address):
                yield Problem(
                    f"{key}.{role}[{at}]", f"has the KV sockets of {first}, {address}; give each its kv_address"
                )
            known.setdefault(address, f"{key}.{role}[{at}]")


def _useless_trust(pool: PoolConfig, key: str) -> Iterator[Problem]:
    for name in ("upstreams", "prefill", "decode"):
        for at, upstream in enumerate(getattr(pool, name)):
            for setting in ("ca", "server_name"):
                if getattr(upstream, setting) and not upstream.is_tls:
                    message = f"is of no use to {upstream.url}; allowed: with https://"
                    yield Problem(f"{key}.{name}[{at}].{setting}", message)


def _rival_pools(config: Config) -> Iterator[Problem]:
    """Pools between which a name or a model does not decide."""
    for (first, pool), (second, other) in itertools.combinations(enumerate(config.pools), 2):
        if pool.name == other.name:
            yield Problem(f"pool[{second}].name", f"{shown(pool.name)} is pool[{first}]'s too; allowed: another name")
        if not pool.models and not other.models:
            message = f"is empty, and pool[{first}]'s is; allowed: one pool for every model not claimed by another"
            yield Problem(f"pool[{second}].models", message)
        for model in other.models:
            if model in pool.models:
                yield Problem(f"pool[{second}].models", f"{shown(model)} is pool[{first}]'s too; allowed: one of both")


def _loops(config: Config) -> Iterator[Problem]:
    for at, pool in enumerate(config.pools):
        for name in ("upstreams", "prefill", "decode"):
            for index, upstream in enumerate(getattr(pool, name)):
                for key, address in _own_addresses(config):
                    if upstream.is_served_by(address):
                        message = f"{upstream.url} is this relay itself ({key}); allowed: an engine's URL"
                        yield Problem(f"pool[{at}].{name}[{index}]", message)


def _repeated(items: Sequence[str], key: str) -> Iterator[Problem]:
    for at, item in enumerate(items):
        if item in items[:at]:
            yield Problem(f"{key}[{at}]", f"{shown(item)} is there twice; allowed: once")
