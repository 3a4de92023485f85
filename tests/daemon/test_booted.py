"""The units in a booted systemd: opt-in, `pytest -m systemd`, as root and with systemd-nspawn; a minute."""

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

#: A container may not raise limits above its own; the rest is for a stuck worker, and a long drain, to be seen soon.
DROP_IN = """
[Service]
LimitNOFILE=10000
WatchdogSec=4s
TimeoutStopSec=2s
"""

CONFIGURATION = """
[daemon]
workers = {workers}
[health]
interval_s = 1.0
[[pool]]
name = "chat"
upstreams = ["http://127.0.0.1:8000"]
"""

#: So many streams of so many tokens, begun 10 ms apart; says how each ended.
CLIENTS = """
import collections, json, sys, trio

MESSAGES = [{"role": "user", "content": "x"}]
BODY = json.dumps({"model": "tiny", "stream": True, "max_tokens": int(sys.argv[2]), "messages": MESSAGES})
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
    (root / "etc/relay/relay.toml").write_text(CONFIGURATION.format(workers=2))
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
    assert {entry["PRIORITY"] for entry in mine} == {"6"}
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
        /opt/relay/bin/python3 -I /opt/clients.py {STREAMS} 50 & clients=$!
        for turn in 1 2; do sleep 0.7; systemctl restart relay; done
        wait $clients
        """
    )
    assert json.loads(ends) == {"whole": STREAMS}
    assert main_pid(booted) != before


def test_reloads_under_load_break_nothing(booted: Container) -> None:
    """More workers, fewer workers, and a file that is wrong."""
    before = main_pid(booted)
    path = "/etc/relay/relay.toml"
    ends = booted.sh(
        f"""
        /opt/relay/bin/python3 -I /opt/clients.py {STREAMS} 50 & clients=$!
        for workers in 3 none 1 2; do
            sleep 0.6
            sed -i "s/^workers = .*/workers = $workers/" {path}
            systemctl reload relay
        done
        wait $clients
        """
    )
    assert json.loads(ends) == {"whole": STREAMS}
    assert main_pid(booted) == before
    entries = map(json.loads, booted.sh("journalctl --sync; journalctl --unit=relay --output=json").splitlines())
    told = [(entry["PRIORITY"], entry["MESSAGE"]) for entry in entries if "reloaded" in entry["MESSAGE"]]
    assert [(priority, message.partition(": ")[2][:12]) for priority, message in told] == [
        ("5", "reloaded"),
        ("3", "not reloaded"),
        ("5", "reloaded"),
        ("5", "reloaded"),
    ]


def test_a_drain_may_be_longer_than_systemd_would_wait(booted: Container) -> None:
    said = booted.sh(
        """
        /opt/relay/bin/python3 -I /opt/clients.py 2 300 & clients=$!
        sleep 1
        systemctl stop relay.service 2> /dev/null & stop=$!
        sleep 3
        systemctl show --property=StatusText --value relay
        wait $stop $clients
        systemctl show --property=Result --value relay
        """
    )
    status, *others = said.splitlines()
    assert (status, *sorted(others)) == ("draining, 2 streams left", "success", '{"whole": 2}')


def test_a_stuck_worker_is_noticed(booted: Container) -> None:
    booted.sh("curl --silent --fail http://127.0.0.1:8080/-/live")
    before = main_pid(booted)
    said = booted.sh(
        f"""
        forker=$(pgrep --parent {before})
        kill -STOP $(pgrep --parent $forker | head -n 1)
        until [ "$(systemctl show --property=NRestarts --value relay)" != 0 ]; do sleep 0.1; done
        until systemctl is-active --quiet relay; do sleep 0.1; done
        curl --silent --fail http://127.0.0.1:8080/-/live
        journalctl --sync; journalctl --unit=relay --output=cat | grep --fixed-strings "Watchdog timeout"
        """
    )
    assert said.startswith('{"status":"live"}\n')
    assert main_pid(booted) not in (before, "0")
