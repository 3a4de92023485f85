"""What nobody is to see: keys of clients behind the relay, keys of engines before it, either in what it writes."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest
import trio

from relay.address import Address
from relay.config import AuthConfig
from relay.core.auth import keys_line
from relay.daemon.exposure import exposures, warn_of
from relay.net.guard import Credentials, Guard
from tests.e2e.harness import ASKS, GOOD_ANSWER, ask, request
from tests.e2e.test_workers import configuration, two_workers

KNOWN, LIMITED, WRONG, UPSTREAM = b"sk-relay-known-1", b"sk-relay-limited-2", b"sk-relay-wrong-3", b"engine-secret-4"


class RecordingEngine:
    """Keeps every byte that reaches it; answers to each request with a short stream."""

    def __init__(self) -> None:
        self.seen = b""

    async def serve(self, stream: trio.SocketStream) -> None:
        async for data in stream:
            self.seen += data
            if data.endswith(b"}"):
                await stream.send_all(GOOD_ANSWER)


def keys_of_all(path: Path) -> tuple[str, ...]:
    """The lines of [auth], and the files they name."""
    (path / "keys").write_text(keys_line("known", KNOWN) + "\n" + keys_line("limited", LIMITED) + "\n")
    (path / "upstream").write_bytes(UPSTREAM + b"\n")
    return ("[auth]", f"keys_file = '{path / 'keys'}'", f"upstream_key_file = '{path / 'upstream'}'",
            "[auth.limits.limited]", "requests_per_minute = 1")  # fmt: skip


async def test_secrets_stay_where_they_belong(nursery: trio.Nursery, tmp_path: Path) -> None:
    engine = RecordingEngine()
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    nursery.start_soon(trio.serve_listeners, engine.serve, [listener])
    url = f"http://127.0.0.1:{listener.socket.getsockname()[1]}"
    lines = (f"upstreams = ['{url}']", "[health]", "interval_s = 0", *keys_of_all(tmp_path))
    path = configuration(tmp_path / "relay.toml", *lines)
    told = b""
    async with two_workers("--config", path) as relay:
        for route in ASKS:
            for secret in (KNOWN, LIMITED, WRONG):
                fields: list[dict[str, Any]] = [{"authorization": f"Bearer {secret.decode()}"}]
                if route == "/v1/messages":
                    fields.append({"x_api_key": secret.decode(), "authorization": f"Bearer {WRONG.decode()}"})
                for each in fields:
                    told += (await ask(relay.port, request(f"{route}?key=in-a-query-5", **each))).payload
        stalled = request(authorization=f"Bearer {KNOWN.decode()}", expect="nothing")
        told += (await ask(relay.port, stalled)).payload
        for admin in ("/metrics", "/-/status", "/-/exchanges"):
            found = await relay.admin("GET", admin)
            told += (found if isinstance(found, str) else json.dumps(found)).encode()
        await relay.admin("POST", "/-/reload", "")
        relay.process.process.terminate()
        assert await relay.process.ended() == 0
    written = relay.process.stdout + relay.process.stderr
    # What is looked for would be found: all of it was there to be told.
    assert engine.seen.count(b"authorization: Bearer " + UPSTREAM) >= len(ASKS)
    assert b'"key":"known"' in written
    assert b'"known"' in told
    assert b"rate_limit_exceeded" in told
    assert b"invalid_api_key" in told
    for secret in (KNOWN, LIMITED, WRONG):
        assert secret not in engine.seen
        assert secret not in told + written
    assert UPSTREAM not in told + written
    assert b"in-a-query-5" not in told + written


@pytest.mark.parametrize(
    ("address", "has_keys", "warning"),
    [
        ("127.0.0.1", True, ""),
        (
            "0.0.0.0",
            True,
            "keys and answers go in clear text; give listen.tls, or listen on loopback behind TLS\n",
        ),
        (
            "0.0.0.0",
            False,
            "anybody may use the engines; give listen.tls, or listen on loopback behind TLS, and set auth.",
        ),
        ("::", True, "keys and answers"),
        ("::1", False, ""),
    ],
)
def test_a_listener_in_public_is_told_of_in_one_line(
    address: str, has_keys: bool, warning: str, capsys: pytest.CaptureFixture[str]
) -> None:
    guard = Guard(AuthConfig(), Credentials({b"\0" * 32: "alice"} if has_keys else None))
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.create_server((address, 0), family=family) as listener:
        warn_of(exposures([listener], guard))
        told = capsys.readouterr().err
        assert warning in told
        assert told.count("\n") == bool(warning)
        assert not warning or f"{Address(address, listener.getsockname()[1])} can be reached from outside" in told
