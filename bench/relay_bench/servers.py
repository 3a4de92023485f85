"""Servers as child processes: started, listened to until they say where they listen, stopped with what they started."""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import select
import signal
import ssl
import subprocess
import time
from typing import TYPE_CHECKING, Final, TypeVar

from relay_bench import processes

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

#: Seconds for a server of ours to say where it listens; for a process to end when told to; for an answer.
START_S: Final = 20.0
_STOP_S: Final = 5.0
_ANSWER_S: Final = 20.0
#: What relay and engine say on standard error, whatever else they say before it.
_LISTENING: Final = re.compile(r"^relay\S*(?: \S+)?: listening on (\S+)\n", re.MULTILINE)


class StartError(Exception):
    """A server does not start, or does not serve; the message says what it said."""


def said_url(said: str) -> str:
    """Where a relay or an engine listens, by what it has said so far; empty: it has not said it yet."""
    found = _LISTENING.search(said)
    return found[1] if found else ""


class Server:
    """A child process that listens."""

    def __init__(self, name: str, process: subprocess.Popen[bytes], url: str) -> None:
        self.name = name
        self.url = url
        self.tls: ssl.SSLContext | None = None
        if url.startswith("https:"):
            self.tls = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            self.tls.check_hostname, self.tls.verify_mode = False, ssl.CERT_NONE
        host, _, port = url.partition("://")[2].rpartition(":")
        self.address = host, int(port)
        self._process = process

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name} {self.url}>"

    @property
    def has_ended(self) -> bool:
        """Whether the process is gone."""
        return self._process.poll() is not None

    def cpu_ns(self) -> int:
        """CPU time of the process, its threads and its descendants so far: nginx's work is done by a child."""
        return processes.cpu_ns(self._process.pid)

    def memory_bytes(self) -> int:
        """Of the process and its descendants."""
        return processes.memory_bytes(self._process.pid)

    def pin(self, cores: Iterable[int]) -> None:
        """Keeps the process and its descendants on some cores; on all, if none is named."""
        if wanted := set(cores):
            for pid in processes.family(self._process.pid):
                os.sched_setaffinity(pid, wanted)

    def ask(self, method: str, path: str, body: str | None = None) -> tuple[int, bytes]:
        """One request on a connection of its own: status and body. Raises `OSError`, `http.client.HTTPException`."""
        connection = http.client.HTTPConnection(*self.address, timeout=_ANSWER_S)
        try:
            connection.request(method, path, body, {"content-type": "application/json"})
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()


S = TypeVar("S", bound=Server)


@contextlib.contextmanager
def listening(name: str, command: list[str], kind: type[S]) -> Iterator[S]:
    """A relay or an engine, once it listens. Raises `StartError`."""
    with child(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        said, end = "", time.monotonic() + START_S
        while not (url := said_url(said)):
            ready, _, _ = select.select([process.stderr], [], [], max(end - time.monotonic(), 0))
            data = os.read(process.stderr.fileno(), 65536) if ready else b""
            if not data:
                raise StartError(f"the {name} did not start: {said.strip()}")
            said += data.decode("utf-8", "replace")
        yield kind(name, process, url)


@contextlib.contextmanager
def child(command: list[str], **options: object) -> Iterator[subprocess.Popen[bytes]]:
    """A process, ended behind the block with all it has started: politely, and after a while not."""
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True, **options)  # type: ignore[call-overload]
    try:
        yield process
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_STOP_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if process.stderr is not None:
            process.stderr.close()
