"""Where decoders call back: who may, for which worker, and what becomes of a call there is no room for."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from typing import Any

import pytest
import trio

from relay.address import parse_upstream
from relay.config import Config, PoolConfig
from relay.net.callbacks import Callbacks, url_of_worker
from relay.net.pump import Pump
from relay.net.service import Service
from tests.e2e.harness import Client, ask, request

KEY = "0" * 8 + "b" * 24


def config_of(*addresses: str, decoder: str = "127.0.0.1") -> Config:
    """A pool for each callback address; an empty one: its own."""
    engine = parse_upstream(f"http://{decoder}:9")
    pools = [
        PoolConfig(
            name=f"pool{at}",
            prefill=(engine,),
            decode=(engine,),
            connector="ascend_layerwise",
            callback_address=address,
        )
        for at, address in enumerate(addresses)
    ]
    return Config(pools=tuple(pools))


class Called:
    """Callbacks of a configuration, and what is passed on of them."""

    def __init__(self, config: Config, nursery: trio.Nursery) -> None:
        self.service = Service(config, Pump(), None)
        self.passed: list[tuple[int, str]] = []
        self.has_room = True
        self.callbacks = Callbacks(self.service, self._pass_on)
        self.callbacks.nursery = nursery

    def _pass_on(self, worker: int, key: str, message: bytes) -> bool:
        self.passed.append((worker, key))
        return self.has_room

    async def reload(self, config: Config) -> None:
        prepared = await self.callbacks.prepare(config)
        self.service.fleet.reconfigure(config)
        self.callbacks.take_on(prepared)

    @property
    def urls(self) -> list[str]:
        return [pool.callback_url for pool in self.service.fleet.pools]


def port_of(url: str) -> int:
    return int(url.removeprefix("http://").partition("/")[0].rpartition(":")[2])


def message(url: str, key: str = KEY) -> bytes:
    """What a decoder sends there."""
    path = url.removeprefix("http://").partition("/")[2]
    return request(f"/{path}", json.dumps({"request_id": f"chatcmpl-{key}-0"}).encode())


async def call(url: str, key: str = KEY) -> int:
    """A decoder's call; the status it gets."""
    return (await ask(port_of(url), message(url, key))).status


async def test_a_call_is_for_the_worker_of_its_url(nursery: trio.Nursery) -> None:
    called = Called(config_of(""), nursery)
    await called.reload(config_of(""))
    (url,) = called.urls
    assert [await call(each) for each in (url, url_of_worker(url, 7), f"{url}/x", f"{url}/12345")] == [
        200,
        200,
        404,
        404,
    ]
    assert [worker for worker, _ in called.passed] == [0, 7]
    nursery.cancel_scope.cancel()


async def test_a_call_there_is_no_room_for_gets_no_answer(nursery: trio.Nursery) -> None:
    """A decoder takes any answer for a success, and calls again where it got none."""
    called = Called(config_of(""), nursery)
    await called.reload(config_of(""))
    (url,) = called.urls
    called.has_room = False
    async with await Client.connect(port_of(url)) as decoder:
        await decoder.send(message(url))
        assert await decoder.is_closed()
    called.has_room = True
    assert await call(url) == 200
    nursery.cancel_scope.cancel()


async def test_only_decoders_may_call(nursery: trio.Nursery) -> None:
    called = Called(config_of("127.0.0.1:0", decoder="127.0.0.9"), nursery)
    await called.reload(config_of("127.0.0.1:0", decoder="127.0.0.9"))
    assert await call(called.urls[0]) == 403
    assert called.passed == []
    nursery.cancel_scope.cancel()


class Resolver(trio.abc.HostnameResolver):
    """Knows every name by one address, and does something else meanwhile."""

    def __init__(self, meanwhile: Callable[[], object]) -> None:
        self._meanwhile = meanwhile

    async def getaddrinfo(self, *_: Any, **__: Any) -> Any:
        self._meanwhile()
        return socket.getaddrinfo("127.0.0.9", None, 0, socket.SOCK_STREAM)

    async def getnameinfo(self, sockaddr: Any, flags: int) -> Any:
        raise NotImplementedError


async def test_decoders_may_come_while_their_names_are_resolved(nursery: trio.Nursery) -> None:
    config = config_of("127.0.0.1:0", decoder="decoder")
    called = Called(config, nursery)
    await called.reload(config)
    decoders = called.service.fleet.pools[0].groups["decode"]
    trio.socket.set_custom_hostname_resolver(Resolver(lambda: decoders.add(parse_upstream("http://127.0.0.8:9"))))
    assert await call(called.urls[0]) == 403
    nursery.cancel_scope.cancel()


async def test_a_decoder_known_by_its_address_waits_for_no_name(nursery: trio.Nursery) -> None:
    config = config_of("127.0.0.1:0", decoder="decoder")
    called = Called(config, nursery)
    await called.reload(config)
    called.service.fleet.pools[0].groups["decode"].add(parse_upstream("http://127.0.0.1:9"))
    asked: list[None] = []
    trio.socket.set_custom_hostname_resolver(Resolver(lambda: asked.append(None)))
    assert await call(called.urls[0]) == 200
    assert not asked
    nursery.cancel_scope.cancel()


async def test_a_reload_opens_what_is_new_and_keeps_what_stays(nursery: trio.Nursery) -> None:
    called = Called(config_of(), nursery)
    await called.reload(config_of())
    await called.reload(config_of("", ""))
    one, two = called.urls
    assert one == two  # of a listener's own address one is enough
    await called.reload(config_of("", "127.0.0.1:0"))
    assert called.urls[0] == one
    await called.reload(config_of("127.0.0.1:0"))
    assert await call(one) == 200  # decoders that were asked before know no better
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ValueError, match=f"^cannot listen on {address} for decoders: Address already in use$"):
            await called.reload(config_of(address))
    nursery.cancel_scope.cancel()
