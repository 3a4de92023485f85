"""Imports go in one direction, and no module is longer than a reader can hold in the head.

`cli → daemon → net.exchange → net.* → core.* → errors`: what is lower knows nothing of what is higher, and `core` knows
nothing of the world: no sockets, no clock, no trio. The source is read, not imported, so that imports inside functions
count as well.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]

#: Lines a module may have: about 400, and some room for a comment.
MAX_LINES = 420

#: What a plain install brings.
DEPENDENCIES = frozenset({"h11", "httpx", "msgspec", "outcome", "prometheus_client", "rich", "trio"})

#: What reaches for the world, or for its time.
IMPURE = frozenset({
    "anyio", "asyncio", "httpx", "logging", "multiprocessing", "select", "selectors", "signal", "socket", "ssl",
    "subprocess", "threading", "time", "trio",
})  # fmt: skip


class Room(NamedTuple):
    """Modules that may import the same: of ours what begins with a name in `ours`, of others not what is `without`."""

    ours: frozenset[str]
    others: frozenset[str] = DEPENDENCIES
    without: frozenset[str] = frozenset()


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


#: By the longest name that fits. A room's own modules are part of it only where they are named.
ROOMS = {
    "relay": Room(_names(""), others=_names("")),
    "relay.errors": Room(_names(""), others=_names(""), without=IMPURE),
    "relay.address": Room(_names(""), others=_names("msgspec"), without=IMPURE),
    "relay.config": Room(
        _names("relay.address relay.config relay.core.connectors"), others=_names("msgspec"), without=IMPURE
    ),
    "relay.core": Room(_names("relay.errors relay.core"), others=_names("h11 msgspec"), without=IMPURE),
    "relay.net": Room(_names("relay.errors relay.address relay.config relay.core relay.net")),
    "relay.daemon": Room(_names("relay.errors relay.address relay.config relay.core relay.net relay.daemon")),
    "relay.status": Room(_names("relay.core")),
    "relay.install": Room(_names("relay.core")),
    "relay.keys": Room(_names("relay.core")),
    "relay.demo": Room(_names("")),
    "relay.cli": Room(
        _names(
            "relay.address relay.config relay.daemon relay.demo relay.install relay.keys relay.net.guard relay.net.tls "
            "relay.status"
        )
    ),
    "relay.__main__": Room(_names("relay.cli")),
    "relay.hatch_build": Room(_names(""), others=frozenset({"hatchling"})),
    "relay_bench.micro.unmetered": Room(_names("relay.cli relay.core")),
    "relay_bench": Room(_names("relay.errors relay.core relay_bench")),
}

#: Anybody may ask for the version.
EVERYBODY = _names("relay")

#: What knows both sides is imported by who composes the daemon, and by nobody beside it.
NOT_FOR_NEIGHBOURS = {"relay.net.exchange": "relay.net"}


class Import(NamedTuple):
    """One module's import of another; `is_for_types` if it is in a TYPE_CHECKING block."""

    importer: str
    imported: str
    line: int
    is_for_types: bool = False


def modules_under(root: Path) -> dict[str, Path]:
    """Our modules by their names."""
    found = {}
    for top in (root / "relay", root / "bench" / "relay_bench"):
        for path in sorted(top.rglob("*.py")):
            parts = path.relative_to(top.parent).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports_of(module: str, path: Path, known: frozenset[str]) -> list[Import]:
    """All imports of a module's source, relative ones resolved; of `from package import name` the module, if it is."""
    tree = ast.parse(path.read_text(), str(path))
    for_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
        for statement in node.body
        for inner in ast.walk(statement)
    }
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found = []
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: package.count(".") + 2 - node.level]
                base = ".".join(filter(None, [*above, base]))
            inner_names = [f"{base}.{alias.name}" for alias in node.names]
            names = [name if name in known else base for name in inner_names]
        found += [Import(module, name, getattr(node, "lineno", 0), id(node) in for_types) for name in sorted({*names})]
    return found


def is_within(name: str, package: str) -> bool:
    """Whether a module is a package or in it."""
    return name == package or name.startswith(f"{package}.")


def room_of(module: str) -> Room:
    """The rules for a module."""
    fitting = [name for name in ROOMS if is_within(module, name)]
    name = max(fitting, key=len)
    if name == "relay" and module != "relay":
        raise LookupError(f"{module} belongs to no room; give it one in ROOMS")
    return ROOMS[name]


def is_allowed(found: Import) -> bool:
    """Whether an import goes in the right direction."""
    room = room_of(found.importer)
    top = found.imported.partition(".")[0]
    if top not in ("relay", "relay_bench"):
        return top not in room.without and (top in sys.stdlib_module_names or top in room.others)
    if found.imported in EVERYBODY:
        return True
    for private, package in NOT_FOR_NEIGHBOURS.items():
        # A type names what a neighbour is handed; it does not make it a part of the neighbour.
        is_neighbour = is_within(found.importer, package) and not is_within(found.importer, private)
        if is_within(found.imported, private) and is_neighbour and not found.is_for_types:
            return False
    return any(is_within(found.imported, name) for name in room.ours)


def violations(root: Path) -> list[str]:
    """Each wrong arrow and each module that is too long, as a line."""
    modules = modules_under(root)
    wrong = []
    for module, path in modules.items():
        wrong += [
            f"{path.relative_to(root)}:{found.line}: {module} imports {found.imported}"
            for found in imports_of(module, path, frozenset(modules))
            if not is_allowed(found)
        ]
        lines = len(path.read_text().splitlines())
        if lines > MAX_LINES:
            wrong.append(f"{path.relative_to(root)}: {lines} lines, more than {MAX_LINES}")
    return wrong


def test_every_arrow_goes_the_right_way() -> None:
    assert violations(ROOT) == []


def test_the_rooms_are_there() -> None:
    """A check that looks in the wrong place finds nothing wrong."""
    modules = modules_under(ROOT)
    assert {"relay", "relay.cli", "relay.core.sse", "relay.net.exchange", "relay.daemon.worker"} <= set(modules)
    assert any(name.startswith("relay_bench.engine.") for name in modules)
    found = imports_of("relay.cli", modules["relay.cli"], frozenset(modules))
    assert ("relay.cli", "relay.daemon.supervisor") in {(one.importer, one.imported) for one in found}


@pytest.mark.parametrize(
    ("path", "source", "imported"),
    [
        ("relay/core/sse.py", "import trio", "trio"),
        ("relay/core/sse.py", "import os, time", "time"),
        ("relay/core/sse.py", "from socket import socket", "socket"),
        ("relay/core/sse.py", "import logging.handlers", "logging.handlers"),
        ("relay/core/sse.py", "from relay.net import pump", "relay.net.pump"),
        ("relay/core/sse.py", "from relay import net", "relay.net"),
        ("relay/core/sse.py", "from relay.config import Config", "relay.config"),
        ("relay/core/sse.py", "def f():\n    import trio", "trio"),
        ("relay/core/sse.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import trio", "trio"),
        ("relay/core/connectors/nixl.py", "from ...net import pump", "relay.net.pump"),
        ("relay/core/connectors/__init__.py", "from ...net import pump", "relay.net.pump"),
        ("relay/errors.py", "import msgspec", "msgspec"),
        ("relay/errors.py", "from relay.core import sse", "relay.core.sse"),
        ("relay/config.py", "from relay.core import sse", "relay.core.sse"),
        ("relay/net/pump.py", "from relay.net.exchange import Exchange", "relay.net.exchange"),
        ("relay/net/pump.py", "from . import exchange", "relay.net.exchange"),
        ("relay/net/pump.py", "from relay.daemon import worker", "relay.daemon.worker"),
        ("relay/net/pump.py", "import requests", "requests"),
        ("relay/daemon/worker.py", "from relay.cli import main", "relay.cli"),
        ("relay/demo.py", "from relay.daemon import worker", "relay.daemon.worker"),
        ("relay/demo.py", "import relay_bench.engine", "relay_bench.engine"),
        ("relay/cli.py", "from relay.net import pump", "relay.net.pump"),
        ("bench/relay_bench/engine/server.py", "from relay.net import pump", "relay.net.pump"),
        ("bench/relay_bench/engine/server.py", "from relay.config import Config", "relay.config"),
    ],
)
def test_a_wrong_arrow_is_found(path: str, source: str, imported: str, tmp_path: Path) -> None:
    build(tmp_path, {path: source})
    (line,) = violations(tmp_path)
    assert line.startswith(f"{path}:")
    assert line.endswith(f" imports {imported}")


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("relay/core/sse.py", "import h11, msgspec, re\nfrom relay import errors\nfrom . import frames"),
        ("relay/net/exchange.py", "import trio\nfrom relay.net import pump\nfrom relay.config import Config"),
        ("relay/net/pump.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from . import exchange"),
        ("relay/daemon/worker.py", "from relay.net import exchange\nfrom relay.daemon import systemd"),
        ("relay/cli.py", "import relay\ndef f():\n    from relay.daemon import worker"),
        ("bench/relay_bench/engine/server.py", "from relay.core import sse\nfrom relay_bench.engine import server"),
    ],
)
def test_a_right_arrow_is_not_found(path: str, source: str, tmp_path: Path) -> None:
    build(tmp_path, {path: source})
    assert violations(tmp_path) == []


def test_a_module_that_is_too_long_is_found(tmp_path: Path) -> None:
    build(tmp_path, {"relay/errors.py": "x = 1\n" * MAX_LINES, "relay/config.py": "x = 1\n" * (MAX_LINES + 1)})
    assert violations(tmp_path) == [f"relay/config.py: {MAX_LINES + 1} lines, more than {MAX_LINES}"]


def test_a_module_without_a_room_is_found(tmp_path: Path) -> None:
    build(tmp_path, {"relay/util.py": "import os"})
    with pytest.raises(LookupError, match=r"relay\.util"):
        violations(tmp_path)


def build(root: Path, sources: dict[str, str]) -> None:
    """Lays out a small house: some empty modules, and those given."""
    for path in (
        *["relay/__init__.py", "relay/errors.py", "relay/config.py", "relay/cli.py", "relay/demo.py"],
        *["relay/core/__init__.py", "relay/core/sse.py", "relay/core/frames.py", "relay/core/connectors/__init__.py"],
        *["relay/net/__init__.py", "relay/net/pump.py", "relay/net/exchange.py"],
        *["relay/daemon/__init__.py", "relay/daemon/worker.py", "relay/daemon/systemd.py"],
        *["bench/relay_bench/__init__.py", "bench/relay_bench/engine/server.py"],
        *sources,
    ):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(sources.get(path, ""))
