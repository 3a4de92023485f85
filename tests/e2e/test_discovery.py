"""Engines found by a name, which is resolved again and again."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest
import trio

from relay import config as settings
from relay.address import parse_upstream
from tests.e2e.fleet import (
    FakeEngine,
    config_of,
    engines_of,
    pool_of,
    running_fleet,
    status_of,
)
from tests.e2e.harness import STREAM, Client, ask, request, until

CHAT = request()


class Resolver(trio.abc.HostnameResolver):
    """Answers for one name as the test says."""

    def __init__(self) -> None:
        self.addresses: list[str] | None = []  #: None: the name is not known
        self.asked = 0
        self.gate = trio.Event()  #: answers wait for it
        self.gate.set()

    async def getaddrinfo(self, host: Any, port: Any, family: int = 0, *_: Any, **__: Any) -> Any:
        await trio.lowlevel.checkpoint()
        if host not in ("engines", b"engines"):
            return socket.getaddrinfo(host, port, 0, socket.SOCK_STREAM)
        self.asked += 1
        await self.gate.wait()
        if self.addresses is None:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in self.addresses]
        return found * 2  # as it comes, of several protocols

    async def getnameinfo(self, sockaddr: Any, flags: int) -> Any:
        raise NotImplementedError


@pytest.fixture
async def resolver(monkeypatch: pytest.MonkeyPatch) -> Resolver:
    found = Resolver()
    monkeypatch.setattr("relay.net.roster.RESOLVE_S", 0.01)
    trio.socket.set_custom_hostname_resolver(found)  # for this run of trio
    return found


@asynccontextmanager
async def named_engines(number: int) -> AsyncIterator[tuple[str, list[FakeEngine]]]:
    """Engines on one port of several loopback addresses; the URL of the name that stands for them."""
    engines = [FakeEngine("m") for _ in range(number)]
    async with trio.open_nursery() as nursery:
        port = 0
        for at, engine in enumerate(engines, 1):
            (listener,) = await trio.open_tcp_listeners(port, host=f"127.0.0.{at}")
            port = listener.socket.getsockname()[1]
            engine.url = f"http://127.0.0.{at}:{port}"
            await nursery.start(trio.serve_listeners, engine.serve, [listener])
        yield f"dns+http://engines:{port}", engines
        nursery.cancel_scope.cancel()


async def test_a_name_is_followed(resolver: Resolver) -> None:
    async with named_engines(3) as (name, (one, two, three)):
        resolver.addresses = ["127.0.0.1", "127.0.0.2"]
        async with running_fleet(pool_of(name)) as relay:
            assert list(relay.upstreams) == [one.url, two.url] or list(relay.upstreams) == [two.url, one.url]
            for _ in range(4):
                assert (await ask(relay.port, CHAT)).status == 200
            assert (len(one.asked), len(two.asked)) == (2, 2)
            authority = name.removeprefix("dns+http://")
            assert f"\r\nhost: {authority}\r\n".encode() in one.asked[0].lower()

            before = relay.upstreams[two.url]
            resolver.addresses = ["127.0.0.2", "127.0.0.3"]
            await until(lambda: set(relay.upstreams) == {two.url, three.url})
            assert relay.upstreams[two.url] is before
            assert (await ask(relay.port, CHAT)).status == 200
            assert len(one.asked) == 2


async def test_an_engine_whose_address_is_gone_finishes_its_stream(resolver: Resolver) -> None:
    async with named_engines(2) as (name, (one, two)):
        resolver.addresses = ["127.0.0.1"]
        async with running_fleet(pool_of(name)) as relay, await Client.connect(relay.port) as client:
            leaving = relay.upstreams[one.url]
            one.hold()
            await client.send(CHAT)
            await until(lambda: len(one.asked) == 1)
            resolver.addresses = ["127.0.0.2"]
            await until(lambda: list(relay.upstreams) == [two.url])
            one.gate.set()
            assert (await client.answer()).payload == STREAM
            await until(lambda: leaving.outstanding == 0)


async def test_while_a_name_does_not_resolve_those_known_stay(
    resolver: Resolver, capsys: pytest.CaptureFixture[str]
) -> None:
    async with named_engines(1) as (name, (engine,)):
        resolver.addresses = ["127.0.0.1"]
        async with running_fleet(pool_of(name)) as relay:
            assert list(relay.upstreams) == [engine.url]
            resolver.addresses = None
            asked = resolver.asked
            await until(lambda: resolver.asked > asked + 2)
            assert (await ask(relay.port, CHAT)).status == 200
            said = capsys.readouterr().err
            assert said.count(f"relay: {name} does not resolve: Name or service not known") == 1  # though often asked
            (pool,) = (await status_of(relay)).pools
            assert pool.unresolved == {name: "does not resolve: Name or service not known"}
            resolver.addresses = ["127.0.0.1"]
            asked = resolver.asked
            await until(lambda: resolver.asked > asked + 1)
            assert not (await status_of(relay)).pools[0].unresolved


async def test_a_name_that_resolves_late(resolver: Resolver) -> None:
    async with named_engines(1) as (name, (engine,)):
        resolver.addresses = None
        async with running_fleet(pool_of(name)) as relay:
            refused = await ask(relay.port, CHAT)
            assert (refused.status, refused.error["code"]) == (503, "no_upstream")
            resolver.addresses = ["127.0.0.1"]
            await until(lambda: list(relay.upstreams) == [engine.url])
            assert (await ask(relay.port, CHAT)).status == 200


async def test_an_engine_that_is_configured_too_is_not_the_names_to_remove(resolver: Resolver) -> None:
    async with named_engines(2) as (name, (one, two)):
        resolver.addresses = ["127.0.0.1", "127.0.0.2"]
        async with running_fleet(pool_of(one.url, name)) as relay:
            assert set(relay.upstreams) == {one.url, two.url}
            configured = relay.upstreams[one.url]
            resolver.addresses = []
            await until(lambda: list(relay.upstreams) == [one.url])
            assert relay.upstreams[one.url] is configured
            assert not configured.is_leaving


async def test_one_taken_out_by_hand_stays_out_while_the_name_has_it(resolver: Resolver) -> None:
    async with named_engines(2) as (name, (one, two)):
        resolver.addresses = ["127.0.0.1", "127.0.0.2"]
        async with running_fleet(pool_of(name)) as relay:
            assert (await relay.admin("DELETE", "/-/upstreams", {"url": one.url})).status == 200
            asked = resolver.asked
            await until(lambda: resolver.asked > asked + 2)
            assert list(relay.upstreams) == [two.url]
            resolver.addresses = ["127.0.0.2"]
            asked = resolver.asked
            await until(lambda: resolver.asked > asked + 1)
            resolver.addresses = ["127.0.0.1", "127.0.0.2"]  # it has come back: this is another one
            await until(lambda: set(relay.upstreams) == {one.url, two.url})


async def test_reloads_and_names(resolver: Resolver) -> None:
    async with named_engines(2) as (name, (one, two)):
        resolver.addresses = ["127.0.0.1", "127.0.0.2"]
        configs = [config_of(pool_of(name))]
        async with running_fleet(*configs[0].pools, load_config=lambda: configs[-1]) as relay:
            before = dict(relay.upstreams)
            assert set(before) == {one.url, two.url}

            async def reload(*pools: settings.PoolConfig) -> None:
                configs.append(config_of(*pools))
                assert (await relay.admin("POST", "/-/reload")).status == 200

            async def rounds(number: int = 3) -> None:
                asked = resolver.asked
                await until(lambda: resolver.asked >= asked + number)

            await reload(pool_of(name, max_in_flight=9))
            assert relay.upstreams == before
            weighted = msgspec.structs.replace(parse_upstream(name), weight=3)
            await reload(settings.PoolConfig(upstreams=(weighted,)))
            await until(lambda: [up.config.weight for up in relay.upstreams.values()] == [3, 3])
            await reload(pool_of(one.url, name))  # the name's own engine becomes a configured one
            resolver.addresses = ["127.0.0.2"]
            await rounds()
            assert set(relay.upstreams) == {one.url, two.url}
            await reload(pool_of(one.url))  # and the name goes
            assert list(relay.upstreams) == [one.url]
            await until(lambda: "names=0" in repr(relay.worker.roster))
            assert list(relay.upstreams) == [one.url]
            await reload(pool_of(name, name="renamed"))
            await until(lambda: list(relay.upstreams) == [two.url])
            await reload(pool_of(name))  # at once another pool of a name that was there before
            await until(lambda: list(relay.upstreams) == [two.url])
            await rounds()
            assert (await ask(relay.port, CHAT)).status == 200


async def test_a_reload_takes_away_the_role_of_a_name_that_is_being_resolved(resolver: Resolver) -> None:
    async with named_engines(1) as (name, (engine,)):
        resolver.addresses = ["127.0.0.1"]
        url = engines_of([engine.url])
        split = settings.PoolConfig(prefill=url, decode=url, connector="none")
        async with running_fleet(pool_of(name), load_config=lambda: config_of(split)) as relay:
            resolver.gate = trio.Event()
            asked = resolver.asked
            await until(lambda: resolver.asked > asked)
            assert (await relay.admin("POST", "/-/reload")).status == 200
            resolver.gate.set()
            await until(lambda: "names=0" in repr(relay.worker.roster))
            assert (await ask(relay.port, CHAT)).status == 200


async def test_a_role_that_is_taken_away_and_back_before_its_name_is_looked_up_again(resolver: Resolver) -> None:
    async with named_engines(1) as (name, (engine,)):
        resolver.addresses = ["127.0.0.1"]
        url = engines_of([engine.url])
        split = settings.PoolConfig(prefill=url, decode=url, connector="none")
        configs = [config_of(split), config_of(pool_of(name))]
        async with running_fleet(pool_of(name), load_config=lambda: configs.pop(0)) as relay:
            resolver.gate = trio.Event()
            asked = resolver.asked
            await until(lambda: resolver.asked > asked)
            assert (await relay.admin("POST", "/-/reload")).status == 200
            assert (await relay.admin("POST", "/-/reload")).status == 200
            resolver.gate.set()
            await until(lambda: [up.config.url for up in relay.upstreams.values()] == [engine.url])
            assert (await ask(relay.port, CHAT)).status == 200


async def test_a_reload_puts_back_what_was_taken_out_by_hand(resolver: Resolver) -> None:
    async with named_engines(2) as (name, (one, two)):
        resolver.addresses = ["127.0.0.1", "127.0.0.2"]
        async with running_fleet(pool_of(name), load_config=lambda: config_of(pool_of(name))) as relay:
            assert (await relay.admin("DELETE", "/-/upstreams", {"url": one.url})).status == 200
            asked = resolver.asked
            await until(lambda: resolver.asked > asked + 2)
            assert list(relay.upstreams) == [two.url]
            assert (await relay.admin("POST", "/-/reload")).status == 200
            await until(lambda: set(relay.upstreams) == {one.url, two.url})
