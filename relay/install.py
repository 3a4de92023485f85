"""``relay install-systemd``: the units for the installation that runs this, and an example configuration.

The units are those of ``systemd/``, with the command that starts this installation in the place of ``/usr/bin/relay``:
its own Python, so that a virtual environment's packages are found, without the environment, the user's packages and the
working directory (``-I``), so that nothing else is.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Final, Literal

import relay

#: What stands for the command in the units as they are kept.
COMMAND: Final = "/usr/bin/relay"
UNITS: Final = ("relay.service", "relay@.service", "relay.socket", "relay-https.socket", "relay-admin.socket")
UNIT_DIRECTORY: Final = "etc/systemd/system"
EXAMPLE: Final = "etc/relay/relay.toml"

#: Directories that a service under ``ProtectHome=yes`` and ``PrivateTmp=yes`` cannot see.
_HIDDEN: Final = (Path("/home"), Path("/root"), Path("/run/user"), Path("/tmp"), Path("/var/tmp"))

_PLAIN_WORD = re.compile(r"[A-Za-z0-9_@:+.,/=-]+")

_DONE, _FAILED = 0, 1


class InstallError(Exception):
    """The units cannot be written, or would not work; the message says what to do."""


def main(prefix: str, force: bool) -> int:
    """Write units and example below `prefix` (``/``, or a root directory that is being built); the exit status.

    A file that is there and differs stays, unless `force`, and makes the status 1; a configuration always stays.
    """
    command = own_command()
    try:
        check_visible(Path(sys.executable), Path(relay.__file__))
        kept = install(Path(prefix), command, force=force)
    except InstallError as error:
        print(f"relay install-systemd: {error}", file=sys.stderr)
        return _FAILED
    if kept:
        print(f"relay install-systemd: {len(kept)} kept as they are; --force writes them anew", file=sys.stderr)
    print(
        "\nNow, as root, with your engines in /etc/relay/relay.toml:\n\n"
        f"    {shlex.join(command)} check --config /etc/relay/relay.toml\n"
        "    systemctl daemon-reload\n"
        "    systemctl enable --now relay.socket relay.service\n"
        "    systemctl status relay\n\n"
        "relay.socket takes the place of listen.addresses; without it, enable relay.service alone."
    )
    return _FAILED if kept else _DONE


def own_command() -> list[str]:
    """The command that starts this installation, whatever else is installed."""
    return [os.path.abspath(sys.executable), "-I", "-m", "relay"]


def check_visible(*paths: Path) -> None:
    """Raise `InstallError` where the service could not read what it consists of; links are followed."""
    for path in paths:
        for seen in (path.absolute(), path.resolve()):
            for directory in _HIDDEN:
                if seen.is_relative_to(directory):
                    raise InstallError(
                        f"{seen} is under {directory}, which the service cannot see (ProtectHome=, PrivateTmp=); "
                        "install relay elsewhere, with a Python that is elsewhere: "
                        "/usr/bin/python3 -m venv /opt/relay"
                    )


def install(root: Path, command: list[str], *, force: bool) -> list[Path]:
    """Write the files below `root`, saying so for each; those that differ and were kept. Raises `InstallError`."""
    source = units_directory()
    kept = []
    for name in UNITS:
        path = root / UNIT_DIRECTORY / name
        verdict = _put(path, unit_text((source / name).read_text(), command), force=force)
        print(f"{verdict:8} {path}")
        if verdict == "kept":
            kept.append(path)
    example = root / EXAMPLE
    verdict = "kept" if os.path.lexists(example) else _put(example, (source / "relay.toml").read_text(), force=False)
    print(f"{verdict:8} {example}")
    return kept


def units_directory() -> Path:
    """Where the units are: in the package as it is installed, beside it in a checkout."""
    package = Path(relay.__file__).parent
    for directory in (package / "systemd", package.parent / "systemd"):
        if (directory / UNITS[0]).is_file():
            return directory
    raise InstallError(f"the units are missing from this installation ({package}); install relay again")


def unit_text(text: str, command: list[str]) -> str:
    """A unit with its command replaced."""
    words = " ".join(map(quoted, command))
    return re.sub(rf"(?m)^(Exec\w+=){re.escape(COMMAND)}(?= )", lambda match: match[1] + words, text)


def quoted(word: str) -> str:
    """A word of a unit's command line, quoted and escaped where it has to be (systemd.service(5))."""
    if not word.isprintable() or "$" in word:
        raise InstallError(f"{word!r} cannot stand in a unit; install relay under another name")
    word = word.replace("%", "%%")
    if _PLAIN_WORD.fullmatch(word):
        return word
    return '"' + word.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _put(path: Path, text: str, *, force: bool) -> Literal["written", "same", "kept"]:
    """Make `path` hold `text`, unless it holds something else: that is kept, if not by `force`."""
    try:
        if os.path.lexists(path):
            # A link was put there on purpose: a masked unit is one to /dev/null.
            if not path.is_symlink() and path.read_text() == text:
                return "same"
            if not force:
                return "kept"
        path.parent.mkdir(parents=True, exist_ok=True)
        _replace(path, text)
    except OSError as error:
        raise InstallError(f"cannot write {path}: {error.strerror}; run it as root, or with --prefix DIR") from None
    return "written"


def _replace(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old one or the new one, whole."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        try:
            file.write(text)
            file.flush()
            os.chmod(file.name, 0o644)
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise
