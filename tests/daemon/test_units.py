"""The units: what the daemon relies on is in them, and systemd's own judgement where there is one."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from relay import config, install

SOURCE = Path(__file__).parents[2] / "systemd"
SERVICES = ["relay.service", "relay@.service"]
SOCKETS = {"relay.socket": "http", "relay-https.socket": "https", "relay-admin.socket": "admin"}

ANALYZE = shutil.which("systemd-analyze")
needs_systemd = pytest.mark.skipif(ANALYZE is None, reason="needs systemd-analyze")

#: Tenths of systemd's points, from 0 (shut) to 10; reaching the network at all makes up 0.9 of them.
MOST_EXPOSED = 12


def settings(name: str) -> dict[str, list[str]]:
    """All values of each setting, the sections being distinct enough."""
    found: dict[str, list[str]] = {}
    for line in (SOURCE / name).read_text().splitlines():
        if line and not line.startswith(("#", "[")):
            key, _, value = line.partition("=")
            found.setdefault(key, []).append(value)
    return found


def seconds(value: str) -> float:
    return float(value.removesuffix("s"))


def test_every_unit_is_installed() -> None:
    units = {path.name for path in SOURCE.iterdir() if path.suffix in (".service", ".socket")}
    assert units == {*install.UNITS} == {*SERVICES, *SOCKETS}


@pytest.mark.parametrize("name", SERVICES)
def test_the_daemons_protocol(name: str) -> None:
    service = settings(name)
    assert service["Type"] == ["notify"]
    assert service["ExecReload"] == ["/bin/kill -HUP $MAINPID"]
    assert service["KillMode"] == ["mixed"]
    assert seconds(service["WatchdogSec"][0]) >= 5
    assert service["RestartPreventExitStatus"] == ["2"]  # a wrong configuration: relay.cli
    assert service["OOMPolicy"] == ["continue"]


@pytest.mark.parametrize("name", SERVICES)
def test_the_limits_have_room_for_the_configuration(name: str) -> None:
    service, example = settings(name), config.load(SOURCE / "relay.toml")
    assert seconds(service["TimeoutStopSec"][0]) >= 2 * (example.daemon.drain_s + example.daemon.ready_delay_s)
    assert int(service["LimitNOFILE"][0]) > 2 * example.limits.max_connections


@pytest.mark.parametrize("name", SERVICES)
def test_credentials_may_be_missing(name: str) -> None:
    """systemd looks for a name without a slash in /etc/credstore, and starts the service without what is not there."""
    credentials = dict(value.split(":") for value in settings(name)["LoadCredential"])
    assert {*credentials} == {"keys", "upstream_key", "tls.crt", "tls.key"}
    assert not [source for source in credentials.values() if "/" in source]


def test_an_instance_is_the_service_but_for_its_names() -> None:
    def body(name: str) -> str:
        return (SOURCE / name).read_text().partition("[Unit]")[2]

    text = body("relay.service")
    for pattern, replacement in (
        (r"(?m)^Description=relay", r"\g<0> %i"),
        (r"(?<=/etc/relay/)relay(?=\.toml)", "%i"),
        (r"(?<=/run/credentials/relay)(?=\.service)", "@%i"),
        (r"(?m)^(?:SyslogIdentifier|RuntimeDirectory)=relay$", r"\g<0>-%i"),
        (r"(?m)^LoadCredential=[a-z_.]+:relay", r"\g<0>-%i"),
    ):
        text, count = re.subn(pattern, replacement, text)
        assert count
    assert body("relay@.service") == text


@pytest.mark.parametrize(("name", "protocol"), SOCKETS.items())
def test_sockets_have_the_names_that_the_daemon_knows(name: str, protocol: str) -> None:
    socket = settings(name)
    assert socket["FileDescriptorName"] == [protocol]
    assert socket.get("Service", [name.replace(".socket", ".service")]) == ["relay.service"]
    assert "Accept" not in socket


def test_the_sockets_are_the_configurations_addresses() -> None:
    defaults = config.Config()
    assert settings("relay.socket")["ListenStream"] == [str(address) for address in defaults.listen.addresses]
    assert settings("relay-admin.socket")["ListenStream"] == [str(defaults.admin.address)]


# -- what systemd says


@pytest.fixture(params=["/usr/bin/env", "python"])
def installed(request: pytest.FixtureRequest, tmp_path: Path) -> list[str]:
    """The units with a command that is there: systemd looks for it."""
    command = Path(request.param)
    if request.param == "python":  # under a name that has to be quoted
        command = tmp_path / "100% my relay" / "python3"
        command.parent.mkdir()
        command.symlink_to(sys.executable)
    install.install(tmp_path, [str(command), "-I", "-m", "relay"], force=False)
    directory = tmp_path / install.UNIT_DIRECTORY
    shutil.copy(directory / "relay@.service", directory / "relay@chat.service")
    return [str(path) for path in sorted(directory.iterdir())]


@needs_systemd
def test_systemd_knows_every_setting(installed: list[str]) -> None:
    result = analyze("verify", "--man=no", "--recursive-errors=no", *installed)
    assert (result.returncode, result.stderr) == (0, "")


@needs_systemd
@pytest.mark.parametrize("name", ["relay.service", "relay@chat.service"])
def test_systemd_finds_the_service_well_shut(name: str, tmp_path: Path) -> None:
    shutil.copy(SOURCE / name.replace("chat", ""), tmp_path / name)
    result = analyze("security", "--offline=yes", f"--threshold={MOST_EXPOSED}", str(tmp_path / name))
    assert result.returncode == 0, result.stdout


def analyze(*arguments: str) -> subprocess.CompletedProcess[str]:
    assert ANALYZE is not None
    return subprocess.run([ANALYZE, *arguments], capture_output=True, text=True, timeout=60, check=False)
