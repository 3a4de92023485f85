"""The configuration is read again while the relay runs, and no stream notices."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio

from relay import config as settings
from relay.cli import main
from relay.config import Config, LimitsConfig
from relay_bench.engine import Engine
from tests.e2e.children import Child, child
from tests.e2e.fleet import (
    ConfigFile,
    Scrape,
    assert_whole,
    config_of,
    engines_of,
    fakes,
    pool_of,
    running_fleet,
    streams,
)
from tests.e2e.harness import Answer, Client, ask, request, until

CHAT = request()


@pytest.fixture
def config_file(tmp_path: Path) -> ConfigFile:
    return ConfigFile(tmp_path / "relay.toml")


async def test_a_reload_takes_the_new_and_leaves_streams(
    engine: Engine, second_engine: Engine, config_file: ConfigFile
) -> None:
    config_file.pools(("chat", engine.url))
    async with (
        running_fleet(*config_file.load().pools, load_config=config_file.load) as relay,
        streams(relay, engine, 2) as clients,
    ):
        before = relay.upstreams[engine.url]
        config_file.pools(("chat", second_engine.url), ("other", engine.url))
        got = await relay.admin("POST", "/-/reload")
        assert (got.status, got.json()) == (200, {"reloaded": "yes"})
        assert (await ask(relay.port, CHAT)).status == 200
        assert (await ask(relay.port, request(body={"model": "other"}))).status == 404  # the engine's: it is not `tiny`
        records = [await relay.record(1), await relay.record(2)]
        assert [(record.pool, record.upstream) for record in records] == [
            ("chat", second_engine.url),
            ("other", engine.url),
        ]
        assert before.is_leaving
        await assert_whole(*clients)
        assert {record.outcome for record in relay.records} == {"--"}


async def test_an_exchange_that_fails_after_its_pool_became_a_split_one() -> None:
    configs: list[Config] = []
    async with fakes("a", "b") as (one, two):
        configs.append(config_of(pool_of(one.url, two.url)))
        async with (
            running_fleet(*configs[0].pools, load_config=lambda: configs[-1]) as relay,
            await Client.connect(relay.port) as client,
        ):
            for engine in (one, two):
                engine.hold()
                engine.answer, engine.then = b"", "fin"
            await client.send(CHAT)
            await until(lambda: len(one.asked) + len(two.asked) == 1)
            configs.append(config_of(settings.PoolConfig(prefill=engines_of([one.url]), decode=engines_of([two.url]))))
            assert (await relay.admin("POST", "/-/reload")).status == 200
            for engine in (one, two):
                engine.gate.set()
            got = await client.answer()
            assert (got.status, got.error["code"]) == (502, "upstream_disconnected")
            record = await relay.record()
            assert (record.outcome, record.attempts) == ("UH", 1)


async def test_what_the_file_still_says_stays_as_it_is(
    engine: Engine, config_file: ConfigFile, capsys: pytest.CaptureFixture[str]
) -> None:
    config_file.pools(("chat", engine.url))
    async with running_fleet(*config_file.load().pools, load_config=config_file.load) as relay:
        assert (await ask(relay.port, CHAT)).status == 200
        before = relay.upstreams[engine.url]
        await until(lambda: before.idle == 1)
        config_file.pools(("chat", engine.url), ("other", "http://127.0.0.1:9"), extra="[timeouts]\nconnect_s = 1\n")
        assert (await relay.admin("POST", "/-/reload")).status == 200
        assert "relay: reloaded\n" in capsys.readouterr().err
        assert relay.upstreams[engine.url] is before
        assert before.idle == 1
        assert (await ask(relay.port, CHAT)).status == 200
        assert engine.stats()["connections_accepted"] == 1


async def test_new_limits_hold_for_new_requests_and_connections(config_file: ConfigFile) -> None:
    async with fakes("a") as (engine,):
        config_file.pools(("chat", engine.url))
        async with running_fleet(*config_file.load().pools, load_config=config_file.load) as relay:
            assert (await ask(relay.port, CHAT)).status == 200
            extra = "[limits]\nmax_body_bytes = 10\n"
            config_file.pools(("chat", engine.url), extra=extra)
            assert (await relay.admin("POST", "/-/reload")).status == 200
            assert (await ask(relay.port, CHAT)).status == 413
            assert relay.worker.service.config.limits == LimitsConfig(max_body_bytes=10)


async def test_an_invalid_file_changes_nothing(
    engine: Engine, config_file: ConfigFile, capsys: pytest.CaptureFixture[str]
) -> None:
    config_file.pools(("chat", engine.url))
    async with (
        running_fleet(*config_file.load().pools, load_config=config_file.load) as relay,
        streams(relay, engine, 1) as clients,
    ):
        before, config = relay.upstreams[engine.url], relay.worker.service.config
        config_file.pools(("chat", "ftp://10.0.0.1"), extra="[timeouts]\nconnect_s = -1\n")
        got = await relay.admin("POST", "/-/reload")
        assert got.status == 400
        error = got.json()["error"]
        assert error.count(str(config_file.path)) == 2
        assert f"relay: not reloaded: {config_file.path}:" in capsys.readouterr().err
        assert ":timeouts.connect_s: -1 is not valid" in error
        assert ":pool[0].upstreams[0]: " in error
        config_file.path.unlink()
        assert "cannot be read: No such file" in (await relay.admin("POST", "/-/reload")).json()["error"]
        assert relay.upstreams == {engine.url: before}
        assert relay.worker.service.config is config
        assert (await ask(relay.port, CHAT)).status == 200
        await assert_whole(*clients)


async def test_without_a_file_there_is_nothing_to_reload() -> None:
    async with fakes("a") as (engine,), running_fleet(pool_of(engine.url)) as relay:
        got = await relay.admin("POST", "/-/reload")
        assert got.status == 400
        assert "started without --config" in got.json()["error"]


async def test_what_takes_a_restart_is_named_every_time(config_file: ConfigFile) -> None:
    async with fakes("a") as (engine,):
        config_file.pools(("chat", engine.url))
        async with running_fleet(*config_file.load().pools, load_config=config_file.load) as relay:
            config_file.pools(("chat", engine.url), extra="[admin]\naddress = 'off'\n[daemon]\nworkers = 3\n")
            for _ in range(2):
                got = await relay.admin("POST", "/-/reload")
                assert got.json() == {"reloaded": "yes, but a restart is needed for: admin.address, daemon.workers"}


async def test_reloads_end_and_begin_probing(config_file: ConfigFile) -> None:
    async with fakes("a") as (engine,):
        config_file.pools(("chat", engine.url))
        async with running_fleet(*config_file.load().pools, load_config=config_file.load) as relay:
            engine.health = 503
            text = config_file.path.read_text()
            config_file.path.write_text(text.replace("interval_s = 0", "interval_s = 0.02"))
            assert (await relay.admin("POST", "/-/reload")).status == 200
            await until(lambda: not relay.is_up(engine))
            config_file.path.write_text(text)
            assert (await relay.admin("POST", "/-/reload")).status == 200
            assert relay.is_up(engine)  # nobody says otherwise any more
            assert (await ask(relay.port, CHAT)).status == 200


async def test_a_probe_under_way_when_probing_ends_says_nothing(config_file: ConfigFile) -> None:
    """Its answer would stand for ever."""
    async with fakes("a") as (engine,):
        config_file.pools(("chat", engine.url))
        text = config_file.path.read_text()
        async with running_fleet(*config_file.load().pools, load_config=config_file.load) as relay:
            engine.health = 0  # it does not answer
            config_file.path.write_text(text.replace("interval_s = 0", "interval_s = 0.02\nfailures = 1"))
            assert (await relay.admin("POST", "/-/reload")).status == 200
            await until(lambda: bool(engine.probed))
            config_file.path.write_text(text.replace("interval_s = 0", "interval_s = 0\nfailures = 1"))
            assert (await relay.admin("POST", "/-/reload")).status == 200
            (upstream,) = relay.upstreams.values()
            await until(lambda: upstream.probe_s is not None)
            assert relay.is_up(engine)


async def test_gauges_of_what_has_left_are_gone(config_file: ConfigFile) -> None:
    async with fakes("a", "b") as (one, two):
        config_file.pools(("first", one.url), ("second", two.url))
        async with running_fleet(*config_file.load().pools, load_config=config_file.load) as relay:
            before = Scrape(await relay.admin("GET", "/metrics"))
            assert {each["pool"] for each in before.labels("relay_in_flight")} == {"first", "second"}
            config_file.pools(("first", two.url))
            assert (await relay.admin("POST", "/-/reload")).status == 200
            after = Scrape(await relay.admin("GET", "/metrics"))
            assert after.labels("relay_in_flight") == after.labels("relay_queue_depth") == [{"pool": "first"}]
            assert [each["upstream"] for each in after.labels("relay_upstream_healthy")] == [two.url]


# -- the process


def admin_of(directory: Path) -> Callable[[str, str], Any]:
    """Asks the admin side of a relay whose socket is ``admin`` in a directory."""

    async def call(method: str, path: str) -> Answer:
        async with Client(await trio.open_unix_socket(f"{directory}/admin")) as client:
            return await client.ask(f"{method} {path} HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n".encode())

    return call


async def test_sighup_reads_the_file_again(engine: Engine, second_engine: Engine, config_file: ConfigFile) -> None:
    config_file.pools(("chat", engine.url))
    directory = config_file.path.parent
    admin = admin_of(directory)

    def line(relay: Child) -> Any:
        return trio.to_thread.run_sync(relay.line)

    flags = ("--listen", "127.0.0.1:0", "--admin", f"unix:{directory}/admin", "--config", str(config_file.path))
    with child(directory, "relay", "serve", *flags) as relay:
        async with await Client.connect(relay.port) as client:
            await client.send(request(body={"max_tokens": 9}, sim_step_ms="60"))
            await client.frames(2)
            config_file.pools(("renamed", engine.url), ("other", second_engine.url))
            os.kill(relay.pid, signal.SIGHUP)
            assert [await line(relay) for _ in range(4)] == [
                f"relay: pool other: in: {second_engine.url}\n",
                f"relay: pool renamed: in: {engine.url}\n",
                f"relay: pool chat: out: {engine.url}\n",
                "relay: reloaded\n",
            ]
            pools = (await admin("GET", "/-/status")).json()["pools"]
            assert [pool["name"] for pool in pools] == ["renamed", "other"]
            assert pools[1]["upstreams"][0]["url"] == second_engine.url
            config_file.path.write_text("[[pool]]\nname = 1")
            os.kill(relay.pid, signal.SIGHUP)
            assert re.fullmatch(r"relay: not reloaded: .*relay\.toml:pool\[0\]\.name: .*\n", await line(relay))
            await assert_whole(client)
        assert [pool["name"] for pool in (await admin("GET", "/-/status")).json()["pools"]] == ["renamed", "other"]
        assert await trio.to_thread.run_sync(main, ["status", "--admin", f"unix:{directory}/admin"]) == 0
        assert relay.stop() == ""
