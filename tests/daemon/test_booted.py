"""The units in a booted systemd: opt-in, `pytest -m systemd`, as root and with systemd-nspawn; half a minute."""

from __future__ import annotations

import json
import shutil
import sysconfig
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.daemon import container
from tests.daemon.container import Container

pytestmark = pytest.mark.systemd

ROOT = Path(__file__).parents[2]
PACKAGES = "opt/relay/lib/python{}/site-packages"
STREAMS = 220

#: A container may not raise limits above its own; what the daemon does not do yet is left out.
DROP_IN = """
[Service]
LimitNOFILE=10000
WatchdogSec=0
"""

CONFIGURATION = """
[[pool]]
name = "chat"
upstreams = ["http://127.0.0.1:8000"]
"""

#: Streams begun 10 ms apart; says how each ended.
CLIENTS = """
import collections, json, sys, trio

BODY = json.dumps({"model": "tiny", "stream": True, "max_tokens": 50, "messages": [{"role": "user", "content": "x"}]})
HEAD = "POST /v1/chat/completions HTTP/1.1\\r\\nHost: r\\r\\nConnection: close\\r\\n"
REQUEST = f"{HEAD}Content-Length: {len(BODY)}\\r\\n\\r\\n{BODY}".encode()
END = b"data: [DONE]\\n\\n"
ends = collections.Counter()

async def stream():
    try:
        answer = b""
        async with await trio.open_tcp_stream("127.0.0.1", 8080) as connection:
            await connection.send_all(REQUEST)
            async for data in connection:
                answer += data
        is_whole = answer.startswith(b"HTTP/1.1 200 ") and END in answer and answer.endswith(b"0\\r\\n\\r\\n")
        ends["whole" if is_whole else repr(answer[-300:])] += 1
    except OSError as error:
        ends[repr(error)] += 1

async def main():
    async with trio.open_nursery() as nursery:
        for _ in range(int(sys.argv[1])):
            nursery.start_soon(stream)
            await trio.sleep(0.01)

trio.run(main)
print(json.dumps(ends))
"""


@pytest.fixture(scope="module")
def booted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Container]:
    """A systemd with this relay installed as a service, and an engine to send requests to."""
    if "systemd" not in request.config.getoption("markexpr"):
        pytest.skip("opt-in: pytest -m systemd")
    if (reason := container.why_not()) is not None:
        pytest.skip(reason)
    machine = Container(tmp_path_factory.mktemp("container"))
    try:
        machine.mount()
        install_relay(machine.root)
        machine.boot()
        machine.sh(
            """
            systemd-run --quiet --unit=engine /opt/relay/bin/python3 -I -m relay_bench engine --port 8000 --step-ms 20
            until curl --silent --fail http://127.0.0.1:8000/health; do sleep 0.1; done
            systemctl enable --quiet --now relay.socket relay.service
            """
        )
        yield machine
    finally:
        machine.close()


def install_relay(root: Path) -> None:
    """What `pip install` and `relay install-systemd` do, without an index."""
    container.run("chroot", str(root), str(container.PYTHON), "-m", "venv", "--without-pip", "/opt/relay")
    packages = root / PACKAGES.format(sysconfig.get_python_version())
    shutil.copytree(sysconfig.get_path("purelib"), packages, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.pth"))
    for source, target in (("relay", "relay"), ("bench/relay_bench", "relay_bench"), ("systemd", "relay/systemd")):
        shutil.copytree(ROOT / source, packages / target, dirs_exist_ok=True)
    container.run("chroot", str(root), "/opt/relay/bin/python3", "-I", "-c", "from relay import install; "
                  "raise SystemExit(install.main('/', force=True))")  # fmt: skip
    drop_in = root / "etc/systemd/system/relay.service.d/container.conf"
    drop_in.parent.mkdir()
    drop_in.write_text(DROP_IN)
    (root / "etc/relay/relay.toml").write_text(CONFIGURATION)
    (root / "etc/credstore").mkdir(exist_ok=True)
    (root / "etc/credstore/relay.keys").write_text("alice:00\n")
    (root / "etc/credstore/relay.keys").chmod(0o600)
    (root / "opt/clients.py").write_text(textwrap.dedent(CLIENTS))


def main_pid(machine: Container) -> str:
    return machine.sh("systemctl show --property=MainPID --value relay").strip()


def inside_service(machine: Container, command: str) -> str:
    """Runs a command with the files that the service sees."""
    return machine.sh(f"nsenter --target={main_pid(machine)} --mount --wd=/ {command}")


def test_a_user_without_privileges(booted: Container) -> None:
    pid = main_pid(booted)
    status = dict(line.split(":\t", 1) for line in booted.sh(f"cat /proc/{pid}/status").splitlines() if ":\t" in line)
    (user,) = {*status["Uid"].split()}
    assert 61184 <= int(user) <= 65519  # systemd's range for DynamicUser=
    assert {status[name] for name in ("CapPrm", "CapEff", "CapBnd", "CapAmb")} == {"0" * 16}
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")


def test_secrets_are_copies_that_may_be_missing(booted: Container) -> None:
    listed = inside_service(booted, "ls -l /run/credentials/relay.service").splitlines()[1:]
    (line,) = listed
    assert line.startswith("-r--------")
    assert line.endswith(" keys")
    assert inside_service(booted, "cat /run/credentials/relay.service/keys") == "alice:00\n"


def test_the_journal_has_lines_and_records(booted: Container) -> None:
    booted.sh("curl --silent --fail http://127.0.0.1:8080/-/live; journalctl --sync")
    entries = list(map(json.loads, booted.sh("journalctl --unit=relay --output=json").splitlines()))
    mine = [entry for entry in entries if entry["SYSLOG_IDENTIFIER"] == "relay"]
    assert "relay: listening on http://127.0.0.1:8080" in [entry["MESSAGE"] for entry in mine]
    records = [entry["MESSAGE"] for entry in mine if entry["MESSAGE"].startswith("{")]
    assert json.loads(records[-1])["path"] == "/-/live"


def test_a_client_starts_what_was_stopped(booted: Container) -> None:
    booted.sh("systemctl stop relay.service 2> /dev/null")
    assert main_pid(booted) == "0"
    booted.sh("curl --silent --fail http://127.0.0.1:8080/-/live")
    assert main_pid(booted) != "0"


def test_restarts_under_load_lose_nothing(booted: Container) -> None:
    before = main_pid(booted)
    ends = booted.sh(
        f"""
        /opt/relay/bin/python3 -I /opt/clients.py {STREAMS} & clients=$!
        for turn in 1 2; do sleep 0.7; systemctl restart relay; done
        wait $clients
        """
    )
    assert json.loads(ends) == {"whole": STREAMS}
    assert main_pid(booted) != before
