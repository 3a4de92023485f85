"""A peer as its file describes it: how it is found, configured and started. Reads files, starts nothing.

``@name@`` stands for a value in commands and configurations: ``program``, ``file``, ``folder`` (of its configuration),
``definitions`` (of these files), ``port``, ``port2``, ``model``. ``engines.NAME`` describes one engine by ``url``,
``address``, ``host``, ``engine_port``, ``number``; ``@NAME@`` is then all of them: words of a command, or lines of a
file where it stands alone on its line.
"""

from __future__ import annotations

import re
import shutil
import sys
import tomllib
from pathlib import Path
from typing import Final

import msgspec

#: Beside this package in a checkout; not part of a wheel.
DEFINITIONS: Final = Path(__file__).resolve().parents[2] / "peers"

_ALONE: Final = re.compile(r"^([ \t]*)@(\w+)@$", re.MULTILINE)


class Absent(Exception):
    """A peer is not installed; the message says what to install."""


class Find(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where the program is: the first that is there of what was named, its own environment, ``PATH``."""

    venv: list[str] = []  #: globs within its environment
    path: str = ""
    python: bool = False  #: it is this very interpreter
    file: bool = False  #: it needs a script that only its user has


class Run(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How it is started."""

    command: list[str]
    engines: dict[str, list[str]] = {}  #: placeholder: the words for one engine
    env: dict[str, str] = {}
    version: list[str] = []  #: a command that says it
    package: str = ""  #: or the Python package whose version it is
    start_s: float = 30.0  #: to the first answer, at most


class Peer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One definition."""

    find: Find
    run: Run
    install: str
    notes: str
    language: str
    files: dict[str, str] = {}
    pip: list[str] = []  #: read by ``bench/peers/install``


class Places(msgspec.Struct, frozen=True):
    """Where to look for programs."""

    definitions: Path  #: the folder of these files
    venvs: Path  #: of environments by the peers' names
    programs: dict[str, Path] = {}  #: by name: a program, or an environment
    files: dict[str, Path] = {}  #: by name: a script


class Values(msgspec.Struct, frozen=True, kw_only=True):
    """What placeholders stand for."""

    program: str
    file: str
    folder: str
    definitions: str
    port: int
    port2: int
    model: str
    engines: list[str]  #: ``HOST:PORT``


def read_peers(folder: Path) -> dict[str, Peer]:
    """All definitions by name, the relay's first. Raises `ValueError` with the file's name."""
    found = {}
    for file in sorted(folder.glob("*.toml"), key=lambda file: (file.stem != "relay", file.stem)):
        try:
            found[file.stem] = msgspec.convert(tomllib.loads(file.read_text("utf-8")), Peer)
        except (ValueError, msgspec.ValidationError) as error:
            raise ValueError(f"{file}: {error}") from None
    if not found:
        raise ValueError(f"{folder}: no definitions of peers; in the clone: --definitions bench/peers")
    return found


def program_of(name: str, peer: Peer, places: Places) -> Path:
    """The program to start; raises `Absent`."""
    if peer.find.file and name not in places.files:
        raise Absent(f"{name}: {peer.install}")
    if peer.find.python:
        return places.programs.get(name, Path(sys.executable))
    named = places.programs.get(name)
    if named is not None and not named.is_dir():
        return named
    environment = named or places.venvs / name
    for pattern in peer.find.venv:
        if found := sorted(environment.glob(pattern)):
            return found[0]
    # Debian has servers where only root's PATH looks
    if peer.find.path and not named and (path := shutil.which(peer.find.path) or _sbin(peer.find.path)):
        return Path(path)
    raise Absent(f"{name}: {peer.install}")


def _sbin(name: str) -> str | None:
    return shutil.which(name, path="/usr/local/sbin:/usr/sbin:/sbin")


def filled(text: str, peer: Peer, values: Values) -> str:
    """A configuration with its placeholders replaced."""

    def lines(match: re.Match[str]) -> str:
        indent, name = match.groups()
        if name not in peer.run.engines:
            return match[0]
        return "\n".join(indent + " ".join(words) for words in _for_engines(name, peer, values))

    text = _ALONE.sub(lines, text)
    for name in peer.run.engines:
        text = text.replace(f"@{name}@", " ".join(word for words in _for_engines(name, peer, values) for word in words))
    return _replaced(text, values)


def words_of(words: list[str], peer: Peer, values: Values) -> list[str]:
    """A command with its placeholders replaced."""
    found: list[str] = []
    for word in words:
        name = word.strip("@")
        if word == f"@{name}@" and name in peer.run.engines:
            found += [one for engine in _for_engines(name, peer, values) for one in engine]
        else:
            found.append(_replaced(word, values))
    return found


def _for_engines(name: str, peer: Peer, values: Values) -> list[list[str]]:
    found = []
    for number, address in enumerate(values.engines):
        host, _, port = address.rpartition(":")
        own = {"url": f"http://{address}", "address": address, "host": host, "engine_port": port, "number": str(number)}
        words = list(peer.run.engines[name])
        for placeholder, value in own.items():
            words = [word.replace(f"@{placeholder}@", value) for word in words]
        found.append([_replaced(word, values) for word in words])
    return found


def _replaced(text: str, values: Values) -> str:
    for field in Values.__struct_fields__:
        if field != "engines":
            text = text.replace(f"@{field}@", str(getattr(values, field)))
    return text
