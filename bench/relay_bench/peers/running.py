"""Peers and engines as processes: started, watched until they answer, asked for their version, stopped."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from relay_bench import processes
from relay_bench.peers import machine
from relay_bench.peers.definition import Values, filled, program_of, words_of
from relay_bench.servers import Server, StartError, child, listening

if TYPE_CHECKING:
    from collections.abc import Iterator

    from relay_bench.peers.definition import Peer, Places
    from relay_bench.peers.machine import Cores

#: Seconds between two looks at a server being watched.
_LOOK_S: Final = 0.1
#: Seconds for a version.
_VERSION_S: Final = 20.0
#: Of what a process said before it failed.
_LAST_WORDS: Final = 400

MODEL: Final = "tiny"
_TRY: Final = json.dumps(
    {"model": MODEL, "stream": True, "max_tokens": 2, "messages": [{"role": "user", "content": "x"}]}
)


class EngineServer(Server):
    """A built-in engine."""

    def tell(self, **headers: str) -> None:
        """Sets ``x-sim-*`` headers for all requests; names without that prefix, with underscores."""
        named = {f"x-sim-{name.replace('_', '-')}": value for name, value in headers.items()}
        status, body = self.ask("POST", "/sim/defaults", json.dumps(named))
        if status != 200:
            raise StartError(f"the engine: {body.decode('utf-8', 'replace')}")

    def generating(self) -> int:
        """Requests in it."""
        counts = json.loads(self.ask("GET", "/sim/requests")[1])
        return int(counts["queued"] + counts["running"])


@contextlib.contextmanager
def engine(captures: Path) -> Iterator[EngineServer]:
    """A built-in engine that stamps its tokens and keeps idle connections: a close at the wrong moment is no figure."""
    words = ["--listen", "127.0.0.1:0", "--max-seqs", "100000", "--stamp", "--keep-alive-s", "3600"]
    command = [sys.executable, "-m", "relay_bench", "engine", *words, "--captures", str(captures)]
    with listening("direct", command, EngineServer) as server:
        yield server


@contextlib.contextmanager
def peer_server(
    name: str, peer: Peer, places: Places, engines: list[str], folder: Path, cores: Cores
) -> Iterator[Server]:
    """A peer before `engines`, once it serves. Raises `Absent` and `StartError`."""
    values = values_for(name, peer, places, engines, folder)
    for file, text in peer.files.items():
        (folder / file).write_text(filled(text, peer, values).lstrip())
    command = words_of(peer.run.command, peer, values)
    env = _environment({key: filled(value, peer, values) for key, value in peer.run.env.items()})
    log = folder / "output.log"
    with log.open("wb") as output, machine.kept_to(cores.proxy):
        started = contextlib.ExitStack()
        process = started.enter_context(child(command, stdout=output, stderr=subprocess.STDOUT, cwd=folder, env=env))
    with started:
        server = Server(name, process, f"http://127.0.0.1:{values.port}")
        _wait_until_it_serves(server, peer.run.start_s, log)
        yield server


def values_for(name: str, peer: Peer, places: Places, engines: list[str], folder: Path) -> Values:
    """What the placeholders stand for; raises `Absent`."""
    return Values(
        program=str(program_of(name, peer, places)),
        file=str(places.files.get(name, "")),
        folder=str(folder),
        definitions=str(places.definitions.resolve()),
        port=processes.free_port(),
        port2=processes.free_port(),
        model=MODEL,
        engines=engines,
    )


def version_of(name: str, peer: Peer, places: Places) -> str:
    """A peer's version as it says it itself, or as its package does; ``?`` where neither does. Raises `Absent`."""
    program = program_of(name, peer, places)
    command = [word.replace("@program@", str(program)) for word in peer.run.version]
    if peer.run.package:
        code = f"import importlib.metadata; print(importlib.metadata.version({peer.run.package!r}))"
        command = [str(program.with_name("python")), "-c", code]
    if not command:
        return "?"
    try:
        said = subprocess.run(command, capture_output=True, timeout=_VERSION_S, env=_environment({}), check=True)
    except (OSError, subprocess.SubprocessError):
        return "?"
    text = (said.stdout + said.stderr).decode("utf-8", "replace").replace(str(program), "")
    found = re.search(r"\d+\.\d+[\w.+-]*", text)
    if not found:
        return "?"
    return found[0] if peer.run.package in ("", name) else f"({peer.run.package} {found[0]})"


def _environment(more: dict[str, str]) -> dict[str, str]:
    """This one's, without the proxies it names: all that is asked here is on this machine."""
    kept = {key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy")}
    return kept | more


def _wait_until_it_serves(server: Server, limit_s: float, log: Path) -> None:
    """Until a streamed request is answered whole."""
    end = time.monotonic() + limit_s
    seen = "no answer"
    while time.monotonic() < end and not server.has_ended:
        try:
            status, body = server.ask("POST", "/v1/chat/completions", _TRY)
            if status == 200 and b"[DONE]" in body:
                return
            seen = f"{status} {body[:_LAST_WORDS].decode('utf-8', 'replace')}"
        except (OSError, http.client.HTTPException) as error:
            seen = str(error)
        time.sleep(_LOOK_S)
    words = log.read_bytes()[-_LAST_WORDS:].decode("utf-8", "replace").strip()
    what = "ended at once" if server.has_ended else f"does not serve after {limit_s:g} s ({seen})"
    raise StartError(f"{server.name} {what}: {words}")
