"""`relay install-systemd`: which files, with which command, and what is never overwritten."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest

import relay
from relay import config, install

COMMAND = ["/opt/relay/bin/python3", "-I", "-m", "relay"]
SERVICE = "etc/systemd/system/relay.service"

FILES = {
    "etc/relay/relay.toml",
    "etc/systemd/system/relay-admin.socket",
    "etc/systemd/system/relay-https.socket",
    "etc/systemd/system/relay.service",
    "etc/systemd/system/relay.socket",
    "etc/systemd/system/relay@.service",
}


def files_below(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*") if not path.is_dir()}


def test_every_file_is_written_for_everybody_to_read(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        assert install.install(tmp_path, COMMAND, force=False) == []
    finally:
        os.umask(before)
    assert files_below(tmp_path) == FILES
    assert {(tmp_path / name).stat().st_mode & 0o777 for name in FILES} == {0o644}


def test_the_command_is_put_in(tmp_path: Path) -> None:
    install.install(tmp_path, COMMAND, force=False)
    command = " ".join(COMMAND)
    for name, file in (("relay.service", "relay.toml"), ("relay@.service", "%i.toml")):
        text = (tmp_path / "etc/systemd/system" / name).read_text()
        assert f"\nExecStart={command} serve --config /etc/relay/{file}\n" in text
        assert install.COMMAND not in text.replace("/usr/bin/relay.\n", "")


def test_the_example_is_valid(tmp_path: Path) -> None:
    install.install(tmp_path, COMMAND, force=False)
    assert config.load(tmp_path / "etc/relay/relay.toml").pools[0].upstreams


def test_a_second_time_nothing_changes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    install.install(tmp_path, COMMAND, force=False)
    inodes = {name: (tmp_path / name).stat().st_ino for name in FILES}
    capsys.readouterr()
    assert install.install(tmp_path, COMMAND, force=False) == []
    assert {name: (tmp_path / name).stat().st_ino for name in FILES} == inodes
    expected = {f"{'kept' if name.endswith('.toml') else 'same':8} {tmp_path / name}" for name in FILES}
    assert {*capsys.readouterr().out.splitlines()} == expected


def test_what_differs_is_kept_and_told(tmp_path: Path) -> None:
    service = tmp_path / SERVICE
    service.parent.mkdir(parents=True)
    service.write_text("mine\n")
    assert install.install(tmp_path, COMMAND, force=False) == [service]
    assert service.read_text() == "mine\n"
    assert files_below(tmp_path) == FILES  # the others are there


def test_force_overwrites_units_and_no_configuration(tmp_path: Path) -> None:
    install.install(tmp_path, COMMAND, force=False)
    service, example = tmp_path / SERVICE, tmp_path / "etc/relay/relay.toml"
    wanted = service.read_text()
    service.write_text("mine\n")
    example.write_text("mine\n")
    assert install.install(tmp_path, COMMAND, force=True) == []
    assert service.read_text() == wanted
    assert example.read_text() == "mine\n"
    assert files_below(tmp_path) == FILES  # and nothing of the writing is left


def test_a_masked_unit_stays_masked(tmp_path: Path) -> None:
    service = tmp_path / SERVICE
    service.parent.mkdir(parents=True)
    service.symlink_to("/dev/null")
    assert install.install(tmp_path, COMMAND, force=False) == [service]
    assert service.is_symlink()
    assert install.install(tmp_path, COMMAND, force=True) == []
    assert service.read_text().startswith("# relay as a system service")


def test_what_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "etc").write_text("a file")
    with pytest.raises(install.InstallError, match=r"cannot write .*/relay\.service: Not a directory; run it as root"):
        install.install(tmp_path, COMMAND, force=False)


@pytest.mark.parametrize(
    ("word", "text"),
    [
        ("/opt/relay/bin/python3.11", "/opt/relay/bin/python3.11"),
        ("-I", "-I"),
        ("/opt/my relay/python3", '"/opt/my relay/python3"'),
        ("/opt/100%/python3", '"/opt/100%%/python3"'),
        ('/opt/a"b\\c', '"/opt/a\\"b\\\\c"'),
        ("/opt/é", '"/opt/é"'),
        (";", '";"'),
    ],
)
def test_words_of_a_command(word: str, text: str) -> None:
    assert install.quoted(word) == text
    assert install.unit_text("ExecStart=/usr/bin/relay serve\n", [word, "-m"]) == f"ExecStart={text} -m serve\n"


@pytest.mark.parametrize("word", ["/opt/$HOME/python3", "/opt/a\nb", "/opt/a\x1bb"])
def test_words_that_systemd_would_misread(word: str) -> None:
    with pytest.raises(install.InstallError, match="cannot stand in a unit"):
        install.quoted(word)


@pytest.mark.parametrize("path", ["/home/me/venv/bin/python", "/root/x", "/run/user/0/x", "/tmp/x", "/var/tmp/x"])
def test_what_the_sandbox_hides_is_refused(path: str) -> None:
    directory = path.rpartition("/")[0]
    with pytest.raises(install.InstallError, match=f"^{path} is under {directory[:4]}"):
        install.check_visible(Path("/usr/bin/env"), Path(path))


def test_links_are_followed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A virtual environment's Python is a link to one that may be in somebody's home."""
    hidden = tmp_path / "home"
    hidden.mkdir()
    (tmp_path / "python").symlink_to(hidden / "python3")
    (hidden / "python3").touch()
    monkeypatch.setattr(install, "_HIDDEN", (hidden,))
    install.check_visible(Path(sys.prefix))
    with pytest.raises(install.InstallError, match="python3 is under"):
        install.check_visible(tmp_path / "python")


def test_units_in_a_checkout_and_in_a_wheel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    checkout = Path(relay.__file__).parents[1] / "systemd"
    monkeypatch.setattr(relay, "__file__", str(tmp_path / "relay" / "__init__.py"))
    with pytest.raises(install.InstallError, match="the units are missing"):
        install.units_directory()
    for directory in (tmp_path / "systemd", tmp_path / "relay" / "systemd"):
        shutil.copytree(checkout, directory)
        assert install.units_directory() == directory


@pytest.fixture
def anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever the tests run, the service is taken to see it."""
    monkeypatch.setattr(install, "_HIDDEN", ())


@pytest.mark.usefixtures("anywhere")
def test_the_command_as_a_person_sees_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert install.main(str(tmp_path), force=False) == 0
    out, err = capsys.readouterr()
    assert f"{sys.executable} -I -m relay check --config /etc/relay/relay.toml" in out
    assert "systemctl enable --now relay.socket relay.service" in out
    assert err == ""
    assert f"ExecStart={install.quoted(sys.executable)} -I -m relay serve" in (tmp_path / SERVICE).read_text()

    (tmp_path / SERVICE).write_text("mine\n")
    assert install.main(str(tmp_path), force=False) == 1
    assert "1 kept as they are; --force" in capsys.readouterr().err
    assert install.main(str(tmp_path), force=True) == 0


def test_an_installation_that_cannot_work_is_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "executable", "/home/me/venv/bin/python")
    assert install.main(str(tmp_path), force=True) == 1
    assert capsys.readouterr().err.startswith("relay install-systemd: /home/me/venv/bin/python is under /home, which ")
    assert files_below(tmp_path) == set()
