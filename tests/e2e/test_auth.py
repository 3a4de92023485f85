"""Keys: who is let in, what engines see of it, and what strangers are told."""

from __future__ import annotations

from pathlib import Path

import pytest

from relay.config import AuthConfig
from relay.core.auth import keys_line
from relay_bench.engine import Engine
from tests.conftest import running_relay
from tests.e2e.harness import ask, request

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


@pytest.mark.parametrize("path", [b"/metrics", b"/v1/../metrics", b"/v1/%2e%2e/metrics", b"//v1/chat/completions"])
async def test_what_is_not_open_is_not_there(engine: Engine, auth: AuthConfig, path: bytes) -> None:
    message = with_field(b"GET %b HTTP/1.1\r\nHost: x\r\n\r\n" % path, b"Authorization", b"Bearer " + SECRET)
    async with running_relay(engine.url, auth=auth) as relay:
        assert (await ask(relay.port, message)).status == 404


async def test_load_balancers_need_no_key(engine: Engine, auth: AuthConfig) -> None:
    async with running_relay(engine.url, auth=auth) as relay:
        assert (await ask(relay.port, b"GET /-/ready HTTP/1.1\r\nHost: x\r\n\r\n")).status == 200
