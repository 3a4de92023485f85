"""systemd's protocols, with real sockets in the place of systemd."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest

from relay.daemon import systemd
from relay.daemon.systemd import notify, passed_listeners

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


@pytest.fixture
def manager() -> Iterator[socket.socket]:
    """The datagram socket on which systemd listens."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.settimeout(5)
        yield receiver


@pytest.fixture(params=["path", "abstract"])
def address(request: pytest.FixtureRequest, manager: socket.socket, tmp_path: Path) -> str:
    """NOTIFY_SOCKET's value, in each form it can have."""
    if request.param == "path":
        path = str(tmp_path / "notify")
        manager.bind(path)
        return path
    manager.bind("")  # autobind: the kernel picks an abstract name
    name: bytes = manager.getsockname()
    return "@" + name[1:].decode()


def test_one_datagram_holds_all_lines(manager: socket.socket, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    notify("RELOADING=1", "MONOTONIC_USEC=17")
    notify("READY=1")
    assert manager.recv(1000) == b"RELOADING=1\nMONOTONIC_USEC=17"
    assert manager.recv(1000) == b"READY=1"


@pytest.mark.parametrize(
    "value", [None, "", "relative", "vsock:2:1", "/nowhere/notify", "@relay-test-nobody", "/" * 200]
)
def test_without_systemd_nothing_happens(value: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    if value is not None:
        monkeypatch.setenv("NOTIFY_SOCKET", value)
    notify("READY=1")


def test_a_full_queue_does_not_stop_the_daemon(
    manager: socket.socket, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
        other.setblocking(False)
        other.connect("\0" + address[1:] if address.startswith("@") else address)
        with suppress(BlockingIOError):
            while True:
                other.send(b"x" * 1000)
    notify("READY=1")


@pytest.mark.parametrize(
    ("call", "datagram"),
    [
        (lambda: systemd.ready("2 workers"), b"READY=1\nSTATUS=2 workers"),
        (lambda: systemd.stopping("draining"), b"STOPPING=1\nSTATUS=draining"),
        (lambda: systemd.stopping("a\nREADY=1\r\nb"), b"STOPPING=1\nSTATUS=a READY=1 b"),
        (lambda: systemd.draining(12, 12.5), b"EXTEND_TIMEOUT_USEC=12500000\nSTATUS=draining, 12 streams left"),
        (lambda: systemd.draining(1, 0.1 + 0.2), b"EXTEND_TIMEOUT_USEC=300000\nSTATUS=draining, 1 stream left"),
        (systemd.feed_watchdog, b"WATCHDOG=1"),
    ],
)
def test_states(
    call: Callable[[], None],
    datagram: bytes,
    manager: socket.socket,
    address: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    call()
    assert manager.recv(1000) == datagram


def test_a_reload_says_when(manager: socket.socket, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    before = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    systemd.reloading("reading relay.toml")
    after = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    state, when, status = manager.recv(1000).decode().split("\n")
    assert (state, status) == ("RELOADING=1", "STATUS=reading relay.toml")
    assert before <= int(when.removeprefix("MONOTONIC_USEC=")) <= after


@pytest.mark.parametrize(
    ("limit", "pid", "expected"),
    [
        ("10000000", "own", 10.0),
        ("1500000", None, 1.5),
        ("10000000", "1", None),
        ("10000000", "", None),
        ("0", "own", None),
        ("x", "own", None),
        ("-1", "own", None),
        (None, "own", None),
        (None, None, None),
    ],
)
def test_watchdog(limit: str | None, pid: str | None, expected: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    set_variables(monkeypatch, WATCHDOG_USEC=limit, WATCHDOG_PID=str(os.getpid()) if pid == "own" else pid)
    assert systemd.watchdog_s() == expected


def set_variables(monkeypatch: pytest.MonkeyPatch, **variables: str | None) -> None:
    for name, value in variables.items():
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)


def set_listen(monkeypatch: pytest.MonkeyPatch, pid: str | None, count: str | None) -> None:
    set_variables(monkeypatch, LISTEN_PID=pid, LISTEN_FDS=count, LISTEN_FDNAMES=None)


@pytest.mark.parametrize(
    ("pid", "count"),
    [(None, None), (None, "1"), ("own", None), ("1", "1"), ("", "1"), ("own", "0"), ("own", "-1"), ("own", "x")],
)
def test_no_sockets_for_this_process(pid: str | None, count: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    set_listen(monkeypatch, str(os.getpid()) if pid == "own" else pid, count)
    assert passed_listeners() == ([], [], [])
    assert not [name for name in os.environ if name.startswith("LISTEN_")]


#: A service as systemd starts one: its sockets are descriptors 3 and 4, and the environment speaks of its process.
SERVICE = """
import os, socket, sys
os.environ["LISTEN_PID"] = str(os.getpid())
at_hand = [os.dup(int(fd)) for fd in sys.argv[1:]]
for wanted, fd in enumerate(at_hand, start=3):
    os.dup2(fd, wanted)

from relay.daemon.systemd import passed_listeners

for fd, name in sorted((fd, name) for name, fds in passed_listeners()._asdict().items() for fd in fds):
    listener = socket.socket(fileno=fd)
    print(name, listener.getsockname()[1], listener.get_inheritable())
print(sum(passed_listeners(), []), [name for name in os.environ if name.startswith("LISTEN_")])
"""


@pytest.mark.parametrize(
    ("names", "shown"),
    [
        ("https:admin", ["https", "admin"]),
        ("http:https", ["http", "https"]),
        ("relay.socket:HTTPS", ["http", "http"]),
        ("https", ["https", "http"]),
        (None, ["http", "http"]),
    ],
)
def test_passed_sockets(names: str | None, shown: list[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as two:
        ports = [one.getsockname()[1], two.getsockname()[1]]
        environment = os.environ | {"LISTEN_FDS": "2"} | ({"LISTEN_FDNAMES": names} if names else {})
        fds = [one.fileno(), two.fileno()]
        result = subprocess.run(
            [sys.executable, "-c", SERVICE, *map(str, fds)],
            env=environment,
            pass_fds=fds,
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
    assert result.stderr == ""
    assert result.stdout.splitlines() == [
        f"{shown[0]} {ports[0]} False",
        f"{shown[1]} {ports[1]} False",
        "[] []",
    ]
