"""Who is in the fleet while it runs: probes, names that are resolved again and again, additions, removals, reloads.

Probes and lists of models come over httpx, each on a connection of its own: engines close idle ones after 5 s, and a
probe that fails for that reason would be a lie.
"""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Final

import httpx
import msgspec
import trio

from relay.address import UpstreamConfig
from relay.config import Config
from relay.config.endpoints import endpoint_of
from relay.core.health import next_probe_delay
from relay.core.loose import UNDECODABLE
from relay.net.fetch import fetch, reason_of, transport_of
from relay.net.fleet import Pool
from relay.net.group import Group
from relay.net.guard import Guard
from relay.net.notices import Priority, say
from relay.net.pool import Upstream
from relay.net.service import Service
from relay.net.tls import TlsError, client_context

#: Longest time for one probe, seconds; a shorter interval is its limit.
PROBE_S: Final = 5.0
#: How long the first round of probes may hold up readiness: an engine that does not answer is a reason to start.
FIRST_PROBES_S: Final = 3.0
#: How old an engine's list of models may become, seconds: adapters are loaded while it runs.
MODELS_S: Final = 30.0
#: How often a name is resolved, seconds: the cache time of Kubernetes' headless services (CoreDNS) is 5 s.
RESOLVE_S: Final = 5.0
#: Longest answer to a probe, and list of models, that is read.
_MOST_PROBE_BYTES: Final = 65536
#: Engines that come or go at once, and are named.
_MOST_TOLD: Final = 16
_MOST_MODELS_BYTES: Final = 4_194_304


class _Model(msgspec.Struct):
    id: str


class _Models(msgspec.Struct):
    data: list[msgspec.Raw]


_decode_models = msgspec.json.Decoder(_Models).decode
_decode_model = msgspec.json.Decoder(_Model).decode


class RosterError(Exception):
    """An engine cannot be added or removed; the message says why."""


class Roster:
    """Keeps a service's fleet as it should be. `run` it; the other methods may be called meanwhile."""

    def __init__(self, service: Service, on_change: Callable[[], None] = lambda: None) -> None:
        self._service = service
        self._on_change = on_change  #: who is in the fleet, and up, has changed
        self._rng = random.Random()
        self._watched: set[Upstream] = set()
        self._names: set[tuple[Pool, str, str]] = set()  # pool, role, and what is resolved for them
        self._unresolved: set[tuple[Pool, str, str]] = set()  # those of them not tried yet
        self._probed = trio.Event()
        self._other_rules = trio.Event()  # set, and made anew, whenever probing goes by others
        self._nursery: trio.Nursery | None = None
        self._transports: dict[tuple[str | None, str | None], httpx.AsyncHTTPTransport] = {}  # by unix path and CA

    def __repr__(self) -> str:
        return f"<Roster watched={len(self._watched)} names={len(self._names)}>"

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Watches the fleet until cancelled; started once the first probes are done, or have taken too long."""
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                self._look_around()
                with trio.move_on_after(FIRST_PROBES_S):
                    await self._probed.wait()
                task_status.started()
                await trio.sleep_forever()
        finally:
            self._nursery = None
            with trio.CancelScope(shield=True, deadline=trio.current_time() + 1):
                for transport in self._transports.values():
                    await transport.aclose()

    # -- who is in

    def add(self, pool: str, role: str, config: UpstreamConfig) -> None:
        """Puts an engine into a running pool. Raises RosterError."""
        if config.is_dns:
            raise RosterError("a name to resolve belongs into the configuration; give http(s)://HOST:PORT here")
        group = self._group(pool, role)
        if role != "serve":
            try:
                endpoint_of(config, self._pool(pool).config.connector, "prefill" if role == "prefill" else "decode")
            except ValueError as problem:
                raise RosterError(f"{config.url} {problem}") from None
        try:
            group.add(config)
        except ValueError:
            raise RosterError(f"{config.url} is in pool {pool} already") from None
        say(f"relay: pool {pool}: {config.url} put in")
        self._on_change()
        self._look_around()
        self._pool(pool).advance()

    def known(self, pool: str, role: str, config: UpstreamConfig) -> UpstreamConfig:
        """An engine with the weight and limits that the file gives it, if it does. Raises RosterError: unknown pool."""
        return self._configured(self._pool(pool), role, config.url) or config

    def remove(self, pool: str, role: str, url: str) -> None:
        """Takes an engine out of a running pool; what it is doing goes on to its end. Raises RosterError."""
        try:
            self._group(pool, role).remove(url)
        except KeyError:
            known = ", ".join(self._group(pool, role).upstreams) or "none"
            raise RosterError(f"{url} is not in pool {pool}; in it: {known}") from None
        left = len(self._group(pool, role).upstreams)
        priority = Priority.NOTICE if left else Priority.WARNING
        say(f"relay: pool {pool}: {url} taken out; {left or 'none'} left", priority)
        self._on_change()
        self._pool(pool).advance()  # who waits for the last one waits in vain

    def reconfigure(self, config: Config, guard: Guard) -> None:
        """Takes on another configuration; streams in flight go on under the old one."""
        if config.health != self._service.config.health:
            self._other_rules.set()
            self._other_rules = trio.Event()
        self._service.reconfigure(config, guard)
        self._transports = {}  # they keep no connections, but what they trusted
        before = {(pool.name, upstream.config.url) for pool, _, upstream in self._members()}
        self._service.fleet.reconfigure(config)
        after = {(pool.name, upstream.config.url) for pool, _, upstream in self._members()}
        _tell("in", after - before)
        _tell("out", before - after)
        self._on_change()
        self._look_around()

    def _pool(self, name: str) -> Pool:
        for pool in self._service.fleet.pools:
            if pool.name == name:
                return pool
        known = ", ".join(pool.name for pool in self._service.fleet.pools)
        raise RosterError(f"there is no pool {name}; there are: {known}")

    def _group(self, pool: str, role: str) -> Group:
        groups = self._pool(pool).groups
        if role not in groups:
            raise RosterError(f"pool {pool} has no role {role}; it has: {', '.join(groups)}")
        return groups[role]

    def _members(self) -> Iterator[tuple[Pool, Group, Upstream]]:
        for pool in self._service.fleet.pools:
            for group in pool.groups.values():
                for upstream in group.upstreams.values():
                    yield pool, group, upstream

    def _look_around(self) -> None:
        """Begins to watch what is new; what has left is no longer watched after its next probe."""
        if self._nursery is None:
            return
        for pool, group, upstream in self._members():
            if upstream not in self._watched:
                self._watched.add(upstream)
                self._nursery.start_soon(self._watch, pool, group, upstream)
        for pool in self._service.fleet.pools:
            for role in pool.groups:
                for config in pool.config.upstreams_of(role):
                    name = (pool, role, config.url)
                    if config.is_dns and name not in self._names:
                        self._names.add(name)
                        self._unresolved.add(name)
                        self._nursery.start_soon(self._follow, *name)
        self._note_probed()

    def _note_probed(self) -> None:
        is_probed = not self._service.config.health.interval_s or self._service.fleet.is_probed
        if is_probed and not self._unresolved:
            self._probed.set()

    # -- probes

    async def _watch(self, pool: Pool, group: Group, upstream: Upstream) -> None:
        while not upstream.is_leaving:
            rules = self._service.config.health
            if rules.interval_s:
                began = time.monotonic()
                is_well = await self._probe(upstream, rules.path, min(PROBE_S, max(1.0, rules.interval_s)))
                upstream.probe_s = time.monotonic() - began
                if rules != self._service.config.health:
                    continue  # they have changed meanwhile, and with them what it says
                was_up = upstream.health.is_up
                upstream.health.on_probe(is_well, time.monotonic())
                if was_up != upstream.health.is_up:
                    if upstream.health.is_up:
                        say(f"relay: {upstream.config.url} is up")
                    else:
                        say(f"relay: {upstream.config.url} is down: {upstream.last_error}", Priority.WARNING)
                    self._on_change()
                group.refresh(upstream)
                self._note_probed()
                if is_well and time.monotonic() - upstream.models_at > MODELS_S:
                    await self._ask_models(upstream)
            pool.advance()  # also because one that was ejected may be tried again by now
            if rules != self._service.config.health:
                continue
            with trio.move_on_after(next_probe_delay(rules.interval_s or PROBE_S, self._rng)):
                await self._other_rules.wait()
        self._watched.discard(upstream)

    async def _probe(self, upstream: Upstream, path: str, limit_s: float) -> bool:
        try:
            with trio.fail_after(limit_s):
                status, _ = await self._get(upstream, path, most_bytes=_MOST_PROBE_BYTES)
        except (httpx.HTTPError, httpx.InvalidURL, OSError, TlsError) as exc:
            upstream.note_error(f"probe: {reason_of(exc)}")
            return False
        except trio.TooSlowError:
            upstream.note_error(f"probe: no answer within {limit_s:g} s")
            return False
        is_well = 200 <= status <= 299
        if not is_well:
            upstream.note_error(f"probe: {path} answered {status}")
        return is_well

    async def _ask_models(self, upstream: Upstream) -> None:
        """Refreshes an engine's list of models; one that has none to show is asked again with the next probe."""
        with suppress(httpx.HTTPError, httpx.InvalidURL, OSError, TlsError, trio.TooSlowError, *UNDECODABLE):
            with trio.fail_after(PROBE_S):
                status, body = await self._get(upstream, "/v1/models", most_bytes=_MOST_MODELS_BYTES)
            if 200 <= status <= 299 and len(body) <= _MOST_MODELS_BYTES:
                before = upstream.models
                upstream.models = {_decode_model(entry).id: entry.copy() for entry in _decode_models(body).data}
                upstream.models_at = time.monotonic()
                if before is None or before.keys() != upstream.models.keys():  # the rest is times
                    self._on_change()

    async def _get(self, upstream: Upstream, path: str, *, most_bytes: int) -> tuple[int, bytes]:
        config = upstream.config
        way = config.unix_path, config.ca if config.is_tls else None
        transport = self._transports.get(way)
        if transport is None:
            context = client_context(config.ca) if config.is_tls else None
            transport = self._transports[way] = transport_of(config.unix_path, context)
        base = "http://localhost" if config.unix_path is not None else config.url
        return await fetch(
            transport,
            base + path,
            most_bytes=most_bytes,
            host=config.authority,
            server_name=config.verified_name if config.is_tls else None,
            connect_s=self._service.config.timeouts.connect_s,
        )

    # -- names

    async def _follow(self, pool: Pool, role: str, url: str) -> None:
        """Keeps an engine in the pool for each address of a name. While it does not resolve, those known stay."""
        mine: dict[str, UpstreamConfig] = {}  # by URL; one that an operator has taken out stays out
        seen = pool.config
        while (config := self._configured(pool, role, url)) is not None:
            try:
                found = await trio.socket.getaddrinfo(config.host, config.port, type=trio.socket.SOCK_STREAM)
            except OSError as exc:
                reason = f"does not resolve: {exc.strerror}"
                if pool.unresolved.get(url) != reason:
                    pool.unresolved[url] = reason
                    say(f"relay: {url} {reason}", Priority.WARNING)
            else:
                pool.unresolved.pop(url, None)
                wanted = [config.at(ip) for ip in {str(each[4][0]) for each in found}]
                if role in pool.groups:  # a reload may have taken it away meanwhile
                    if pool.config is not seen:  # whatever the group has lost by then is found anew
                        mine = {each: mine[each] for each in mine.keys() & pool.groups[role].upstreams.keys()}
                        seen = pool.config
                    before, mine = mine, _settle(pool.groups[role], mine, wanted)
                    if mine != before:
                        _tell("in", {(pool.name, each) for each in mine.keys() - before.keys()})
                        _tell("out", {(pool.name, each) for each in before.keys() - mine.keys()})
                        self._on_change()
            self._unresolved.discard((pool, role, url))
            self._look_around()
            pool.advance()
            await trio.sleep(next_probe_delay(RESOLVE_S, self._rng))
        self._names.discard((pool, role, url))
        pool.unresolved.pop(url, None)
        if role in pool.groups:
            _settle(pool.groups[role], mine, [])
            self._on_change()
            pool.advance()

    def _configured(self, pool: Pool, role: str, url: str) -> UpstreamConfig | None:
        """What the configuration says of an engine, or a name, by now."""
        if pool not in self._service.fleet.pools or role not in pool.groups:
            return None
        return next((each for each in pool.config.upstreams_of(role) if each.url == url), None)


def _tell(where: str, engines: set[tuple[str, str]]) -> None:
    """Which engines, by pool and URL, are `where` they were not."""
    for pool, urls in itertools.groupby(sorted(engines), key=lambda engine: engine[0]):
        names = [url for _, url in urls]
        rest = f" and {len(names) - _MOST_TOLD} more" if len(names) > _MOST_TOLD else ""
        say(f"relay: pool {pool}: {where}: {', '.join(names[:_MOST_TOLD])}{rest}")


def _settle(group: Group, before: dict[str, UpstreamConfig], wanted: list[UpstreamConfig]) -> dict[str, UpstreamConfig]:
    """Has in a group what a name resolves to now, in the place of what it did; answers what of it is the name's own."""
    now = {config.url: config for config in wanted}
    for url, config in before.items():
        upstream = group.upstreams.get(url)
        if now.get(url) != config and upstream is not None and upstream.is_resolved and upstream.config == config:
            group.remove(url)
    mine = {url: config for url, config in before.items() if now.get(url) == config}
    for url in now.keys() - mine.keys():
        with suppress(ValueError):  # it is configured by its address too, or another name's
            group.add(now[url]).is_resolved = True
            mine[url] = now[url]
    return mine
