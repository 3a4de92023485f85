"""The doctor against real proxies, set as people set them: what it finds, and that the setting it names mends it."""

from __future__ import annotations

import contextlib
import json
from typing import TYPE_CHECKING

import msgspec
import pytest

from relay_bench import cli
from relay_bench.peers import definition, machine, running
from tests.bench.loading import engine_child

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

PEERS = definition.read_peers(definition.DEFINITIONS)
PLACES = definition.Places(definitions=definition.DEFINITIONS, venvs=definition.DEFINITIONS / ".venvs")

#: As uvicorn answers the HTTP/1.0 that nginx speaks by default: nginx then fills whole buffers before it sends.
CLOSE_DELIMITED = "proxy_http_version 1.1; proxy_set_header x-sim-rechunk close;"
GZIP = "access_log off; gzip on; gzip_types text/event-stream;"
SILENCE = ["--silence-s", "1.5"]

#: A proxy, what is changed in its configuration (the text must be there), flags, what the doctor finds, and a
#: setting that it names then.
CASES = [
    ("nginx", {}, [], "", ""),
    # it hands on each chunk that is complete, buffers or not, as long as the client keeps up
    ("nginx", {"proxy_buffering off;": ""}, [], "", ""),
    (
        "nginx",
        {"proxy_buffering off;": "", "proxy_http_version 1.1;": CLOSE_DELIMITED},
        [],
        "buffering",
        "proxy_buffering off",
    ),
    ("nginx", {"access_log off;": GZIP}, [], "", ""),  # without buffers each frame is flushed, which is remarked on
    ("nginx", {"access_log off;": GZIP, "proxy_buffering off;": ""}, [], "compression", "gzip off"),
    (
        "nginx",
        {"proxy_read_timeout 3600s;": "proxy_read_timeout 700ms;"},
        SILENCE,
        "idle_cut",
        "proxy_read_timeout",
    ),
    ("nginx", {"access_log off;": "access_log off; keepalive_timeout 0;"}, [], "keep_alive", "keepalive_timeout"),
    ("haproxy", {}, [], "", ""),
    ("haproxy", {"    option http-no-delay\n": ""}, [], "buffering", "option http-no-delay"),
    (
        "haproxy",
        {"default_backend": "http-response set-header content-type application/json\n    default_backend"},
        [],
        "content_type",
        "text/event-stream",
    ),
    ("haproxy", {"timeout server 1h": "timeout server 700ms"}, SILENCE, "idle_cut", "timeout server"),
    ("caddy", {}, [], "", ""),
    ("envoy", {}, [], "", ""),
    ("envoy", {"timeout: 0s, idle": "timeout: 0.7s, idle"}, SILENCE, "idle_cut", "timeout: 0s"),
]


@pytest.fixture(scope="module")
def engine() -> Iterator[str]:
    with engine_child("--ttft-ms", "10", "--step-ms", "6", "--keep-alive-s", "600") as url:
        yield url


@pytest.fixture
def before(engine: str, tmp_path: Path) -> Iterator[Callable[[str, dict[str, str]], str]]:
    """Starts a proxy before the engine: its URL."""
    stack = contextlib.ExitStack()

    def start(name: str, changes: dict[str, str]) -> str:
        peer = PEERS[name]
        ((file, text),) = peer.files.items()
        for old, new in changes.items():
            assert old in text
            text = text.replace(old, new)
        peer = msgspec.structs.replace(peer, files={file: text})
        address = engine.removeprefix("http://")
        try:
            server = running.peer_server(name, peer, PLACES, [address], tmp_path, machine.Cores())
            return stack.enter_context(server).url
        except definition.Absent as absent:
            pytest.skip(f"not installed: {absent}")

    with stack:
        yield start


@pytest.mark.parametrize(("name", "changes", "flags", "code", "mend"), CASES)
def test_what_is_found_and_what_mends_it(
    name: str,
    changes: dict[str, str],
    flags: list[str],
    code: str,
    mend: str,
    before: Callable[[str, dict[str, str]], str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    url = before(name, changes)
    status = cli.main(["doctor", url, "--output-len", "48", "--json", *flags])
    findings = json.loads(capsys.readouterr().out)["findings"]
    assert status == bool(code)
    assert [finding["code"] for finding in findings] == ([code] if code else [])
    assert not code or any(mend in line for line in findings[0]["mends"])
