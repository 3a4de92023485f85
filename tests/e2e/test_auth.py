"""Keys: who is let in, what engines see of it, and what strangers are told."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from relay.config import AuthConfig, KeyLimitsConfig, PriceConfig
from relay.core.auth import keys_line
from relay.core.board import read
from relay.core.status import KeyStatus, keys_of
from relay.net.guard import Guard
from relay_bench.engine import Engine
from tests.conftest import RunningRelay, running_relay
from tests.e2e.harness import CHAT_PATH, Client, ask, request, until

SECRET = b"sk-relay-test-0123456789"


@pytest.fixture
def auth(tmp_path: Path) -> AuthConfig:
    """One key, and one for the engines."""
    keys, upstream = tmp_path / "keys", tmp_path / "upstream"
    keys.write_text(keys_line("alice", SECRET) + "\n")
    upstream.write_text("engine-key\n")
    return AuthConfig(keys_file=str(keys), upstream_key_file=str(upstream))


def with_field(message: bytes, name: bytes, value: bytes) -> bytes:
    """A request with one more field."""
    line, _, rest = message.partition(b"\r\n")
    return line + b"\r\n" + name + b": " + value + b"\r\n" + rest


async def test_a_known_key_is_let_in_and_stays_here(engine: Engine, auth: AuthConfig) -> None:
    async with running_relay(engine.url, auth=auth) as relay:
        answer = await ask(relay.port, with_field(request(), b"Authorization", b"Bearer " + SECRET))
        assert answer.status == 200
        assert (await relay.record()).key == "alice"
    last = await ask(int(engine.url.rpartition(":")[2]), b"GET /sim/last HTTP/1.1\r\nHost: x\r\n\r\n")
    assert b"authorization: Bearer engine-key" in last.payload
    assert SECRET not in last.payload


@pytest.mark.parametrize("value", [None, b"Bearer wrong", b"Basic " + SECRET])
async def test_strangers_are_told_and_no_engine_is_asked(engine: Engine, auth: AuthConfig, value: bytes | None) -> None:
    message = request() if value is None else with_field(request(), b"Authorization", value)
    async with running_relay(engine.url, auth=auth) as relay:
        answer = await ask(relay.port, message)
        assert (answer.status, answer.error["code"]) == (401, "invalid_api_key")
        record = await relay.record()
        assert (record.outcome, record.status, record.upstream, record.path) == (
            "RR",
            401,
            None,
            "/v1/chat/completions",
        )
        assert SECRET.decode() not in record.encode().decode()
        assert record.total_ms is not None
        assert 0 < record.total_ms < 10_000


@pytest.mark.parametrize("path", [b"/metrics", b"/v1/../metrics", b"/v1/%2e%2e/metrics", b"//v1/chat/completions"])
async def test_what_is_not_open_is_not_there(engine: Engine, auth: AuthConfig, path: bytes) -> None:
    message = with_field(b"GET %b HTTP/1.1\r\nHost: x\r\n\r\n" % path, b"Authorization", b"Bearer " + SECRET)
    async with running_relay(engine.url, auth=auth) as relay:
        assert (await ask(relay.port, message)).status == 404


async def test_a_stranger_who_asks_for_the_head_gets_no_body(engine: Engine, auth: AuthConfig) -> None:
    async with running_relay(engine.url, auth=auth) as relay, await Client.connect(relay.port) as client:
        answer = await client.ask(request("/v1/models", method="HEAD"))
        assert (answer.status, int(answer.headers["content-length"]) > 0) == (401, True)
        assert await client.is_closed()


async def test_load_balancers_need_no_key(engine: Engine, auth: AuthConfig) -> None:
    async with running_relay(engine.url, auth=auth) as relay:
        assert (await ask(relay.port, b"GET /-/ready HTTP/1.1\r\nHost: x\r\n\r\n")).status == 200


# -- what was done under a key, and how much may be

BEARER = f"Bearer {SECRET.decode()}"
#: Goes on until its client leaves.
ENDLESS = request(authorization=BEARER, sim_fault="stall-after:2")


def limited(auth: AuthConfig, **limits: int) -> AuthConfig:
    """The same with a limit of everybody's."""
    return msgspec.structs.replace(auth, limits={"*": KeyLimitsConfig(**limits)})


def head_only(length: int, path: str = CHAT_PATH, **fields: str) -> bytes:
    """A request whose body does not come."""
    head = request(path, b"", **fields)
    return head.replace(b"content-length: 0", b"content-length: %d" % length)


def key_status(relay: RunningRelay) -> KeyStatus:
    (key,) = keys_of(read(relay.worker.service.tally.block))
    return key


async def test_what_is_done_under_a_key_is_counted(engine: Engine, auth: AuthConfig) -> None:
    prices = {"*": PriceConfig(prompt=1e5, completion=1e6)}
    async with running_relay(engine.url, auth=auth, prices=prices) as relay:
        for path in ("/v1/chat/completions", "/v1/models"):
            method = "POST" if "chat" in path else "GET"
            body = {"stream_options": {"include_usage": True}}
            assert (await ask(relay.port, request(path, body, method=method, authorization=BEARER))).status == 200
        record = await relay.record(1)
        await relay.record(2)
        assert record.prompt_tokens
        assert record.completion_tokens
        async with await Client.connect(relay.port) as client:
            await client.send(ENDLESS)
            await client.frames(2)
            assert key_status(relay) == KeyStatus(
                name="alice",
                in_flight=1,
                requests=2,
                prompt_tokens=record.prompt_tokens,
                completion_tokens=record.completion_tokens,
                cost=record.prompt_tokens * 0.1 + record.completion_tokens,
            )
        await relay.record(3)
        assert (key_status(relay).in_flight, key_status(relay).requests) == (0, 3)


@pytest.mark.parametrize(
    ("path", "field", "kind"),
    [
        ("/v1/chat/completions", "authorization", "rate_limit_error"),
        ("/v1/messages", "x_api_key", "rate_limit_error"),
    ],
)
async def test_too_many_at_once_are_told_so_before_their_body_is_read(
    engine: Engine, auth: AuthConfig, path: str, field: str, kind: str
) -> None:
    fields = {field: SECRET.decode() if field == "x_api_key" else BEARER}
    async with running_relay(engine.url, auth=limited(auth, max_in_flight=1)) as relay:
        async with await Client.connect(relay.port) as client:
            await client.send(ENDLESS)
            await client.frames(2)
            refused = await ask(relay.port, head_only(1000, path, **fields))
        assert (refused.status, refused.headers["retry-after"]) == (429, "1")
        assert refused.error["type"] == kind
        assert "max_in_flight" in refused.error["message"]
        if path != "/v1/messages":
            assert refused.error["code"] == "rate_limit_exceeded"
        record = await relay.record(1)
        assert (record.key, record.status, record.outcome, record.path) == ("alice", 429, "RR", path)
        assert record.error
        assert "max_in_flight" in record.error
        await relay.record(2)
        assert (await ask(relay.port, request(authorization=BEARER))).status == 200
        await relay.record(3)
        assert (key_status(relay).refusals, key_status(relay).requests) == (1, 2)
    assert len(engine.requests()) == 2


async def test_too_many_in_a_minute(engine: Engine, auth: AuthConfig) -> None:
    async with running_relay(engine.url, auth=limited(auth, requests_per_minute=2)) as relay:
        answers = [await ask(relay.port, request(authorization=BEARER)) for _ in range(3)]
        assert [answer.status for answer in answers] == [200, 200, 429]
        assert answers[2].headers["retry-after"] == "30"
        assert "requests_per_minute" in answers[2].error["message"]
        # strangers, and load balancers, take nothing of it
        assert (await ask(relay.port, request(authorization="Bearer wrong"))).status == 401
        assert (await ask(relay.port, request("/-/live", method="GET"))).status == 200


async def test_a_request_that_never_gets_whole_holds_its_place_no_longer(engine: Engine, auth: AuthConfig) -> None:
    async with running_relay(engine.url, auth=limited(auth, max_in_flight=1)) as relay:
        async with await Client.connect(relay.port) as client:
            await client.send(head_only(1000, authorization=BEARER))
            await until(lambda: key_in_flight(relay) == 1)
        assert (await relay.record()).outcome == "CR"
        async with await Client.connect(relay.port) as client:
            refused = await client.ask(head_only(10**12, authorization=BEARER))
            assert refused.status == 413
            # the connection lingers, for what the client still sends; the place does not
            assert (await ask(relay.port, request(authorization=BEARER))).status == 200


def key_in_flight(relay: RunningRelay) -> int:
    return sum(key.in_flight for key in keys_of(read(relay.worker.service.tally.block)))


def reload_with(relay: RunningRelay, auth: AuthConfig, line: str) -> None:
    """The keys file has this line alone from now on."""
    Path(auth.keys_file).write_text(line + "\n")
    relay.worker.roster.reconfigure(relay.worker.service.config, Guard.read(auth))


async def test_a_key_that_is_taken_out_ends_with_the_request_under_way(engine: Engine, auth: AuthConfig) -> None:
    """Also on connections that were open before."""
    async with running_relay(engine.url, auth=auth) as relay, await Client.connect(relay.port) as client:
        slow = request(authorization=BEARER, body={"max_tokens": 10}, sim_step_ms="20")
        await client.send(slow)
        await client.frames(1)
        reload_with(relay, auth, keys_line("bob", b"another"))
        answer = await client.answer()
        assert (answer.status, answer.end) == (200, "whole")
        assert (await client.ask(slow)).status == 401


def test_a_keys_own_limits_come_before_those_of_patterns(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    names = ("alice", "team-a", "team-b-ci", "carol")
    path.write_text("".join(keys_line(name, name.encode()) + "\n" for name in names))
    limits = {
        "*": KeyLimitsConfig(max_in_flight=1),
        "team-*": KeyLimitsConfig(max_in_flight=2),
        "team-*-ci": KeyLimitsConfig(max_in_flight=3),
        "carol": KeyLimitsConfig(),
    }
    found = Guard.read(AuthConfig(keys_file=str(path), limits=limits)).limits
    assert {name: limit.max_in_flight for name, limit in found.items()} == {"alice": 1, "team-a": 2, "team-b-ci": 3}
