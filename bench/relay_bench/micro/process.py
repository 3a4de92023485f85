"""What a frame, and a short request, cost the running relay: its CPU time from the kernel, divided by their number.

The engine and the relay run as child processes, as from their command lines; the client is one epoll loop in this
process that counts frames and keeps nothing. The relay has a core of its own where there are two, since only its own
time counts; engine and client share the other. With nginx at hand (``bench/nginx/nginx.conf``) each test is run for it
right after the relay, between the same engine and client, as figures drift from run to run and ratios hardly do; and
with openssl for a relay that speaks TLS with its clients.

A test opens its streams, waits until each has brought a frame, and then reads frame count and CPU time at both ends of
a window. Saturated, the core of engine and client is mostly full before the relay's is: the figure then is the cost of
reads that bring many frames, and how many depends on how those two share their core. The column of frames per second
says what came; paced figures are the steadier ones.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from relay_bench import processes
from relay_bench.crowd import PATIENCE_S, Crowd, MeasureError
from relay_bench.servers import Server, StartError, child, listening

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

#: Beside this package in a checkout; not part of a wheel.
NGINX_CONF: Final = Path(__file__).resolve().parents[2] / "nginx" / "nginx.conf"

#: Connections that send short requests, frames of each answer, bytes of each body.
SHORT_CONNECTIONS: Final = 4
SHORT_FRAMES: Final = 4
SHORT_BODY_BYTES: Final = 1024

#: A stream that outlasts its window.
_ENDLESS: Final = 10_000_000


class StreamTest(msgspec.Struct, frozen=True):
    """So many streams, a frame each `step_ms`; 0: as fast as the engine goes."""

    streams: int
    step_ms: float
    window_s: float

    @property
    def name(self) -> str:
        """As a table calls it."""
        noun = "stream" if self.streams == 1 else "streams"
        pace = f"a frame each {self.step_ms:g} ms" if self.step_ms else "saturated"
        return f"{self.streams:,} {noun}, {pace}"


#: 100 ms at 1,000 streams: at 20 the engine and the client could not keep up on one core.
TESTS: Final = (
    StreamTest(1, 20, 4),
    StreamTest(100, 20, 4),
    StreamTest(1000, 100, 4),
    StreamTest(1, 0, 2),
    StreamTest(100, 0, 3),
    StreamTest(1000, 0, 3),
)
_QUICK_TESTS: Final = (StreamTest(1, 10, 0.2), StreamTest(20, 0, 0.2))


class ProcessCost(msgspec.Struct, frozen=True, kw_only=True):
    """The cost of one test to one proxy."""

    test: str
    proxy: str
    unit: str  #: ``frame`` or ``request``
    count: int  #: units in the window
    per_s: float
    cpu_us: float  #: per unit


def measure(*, quick: bool = False, nginx: str = "nginx") -> list[ProcessCost]:
    """All tests, on the relay and, where there is one, on nginx. Raises `MeasureError`, `StartError`."""
    processes.raise_descriptor_limit()  # 1,000 streams, in the engine too, which inherits it
    requests = 40 if quick else 4000
    with cores() as (own, other), contextlib.ExitStack() as stack:
        behind = stack.enter_context(engine(own)).url
        proxies = {"relay": stack.enter_context(relay(behind, other))}
        if (openssl := shutil.which("openssl")) is not None:
            proxies["TLS"] = stack.enter_context(_relay_with_tls(behind, other, openssl))
        beside = None if quick or nginx == "off" else shutil.which(nginx)
        if beside is None and not quick and nginx not in ("off", "nginx"):
            raise MeasureError(f"--nginx: {nginx} is not a program")
        if beside is not None and not NGINX_CONF.exists():
            print("nginx is left out: bench/nginx/nginx.conf is in a checkout only", file=sys.stderr)
        elif beside is not None:
            proxies["nginx"] = stack.enter_context(_nginx(beside, behind, other))
        costs = []
        for test in _QUICK_TESTS if quick else TESTS:
            costs += [measure_streams(name, proxy, test) for name, proxy in proxies.items()]
        costs += [_measure_short(name, proxy, requests) for name, proxy in proxies.items()]
        return costs


def rows(costs: Sequence[ProcessCost]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """The table's names and its rows, a test each."""
    beside = dict.fromkeys(cost.proxy for cost in costs if cost.proxy != "relay")
    names = ("test", "CPU µs", "each/s", *(name for proxy in beside for name in (f"{proxy}: µs", "each/s", "ratio")))
    lines: dict[str, tuple[str, ...]] = {}
    relay_us = {cost.test: cost.cpu_us for cost in costs if cost.proxy == "relay"}
    for cost in costs:
        cells = [f"{cost.cpu_us:.1f}", f"{cost.per_s:,.0f}"]
        if cost.proxy != "relay":
            cells.append(f"{relay_us[cost.test] / cost.cpu_us:.2f}" if cost.cpu_us else "-")
        lines[cost.test] = (*lines.get(cost.test, (cost.test,)), *cells)
    return names, list(lines.values())


# -- the tests


def measure_streams(name: str, proxy: Server, test: StreamTest) -> ProcessCost:
    """What a frame costs a proxy in a test. Raises `MeasureError`."""
    request = _request(_ENDLESS, f"x-sim-step-ms: {test.step_ms:g}\r\n")
    with Crowd(name, proxy.address, test.streams, proxy.tls) as crowd:
        crowd.ask(request)
        crowd.run_until_all_began(PATIENCE_S)
        crowd.run_for(min(0.2, test.window_s))
        cpu, frames, began = proxy.cpu_ns(), crowd.frames, time.perf_counter()
        crowd.run_for(test.window_s)
        cpu, frames, took = proxy.cpu_ns() - cpu, crowd.frames - frames, time.perf_counter() - began
    if not frames:
        raise MeasureError(f"{name}: {test.name}: no frame came within {test.window_s:g} s")
    return ProcessCost(
        test=test.name, proxy=name, unit="frame", count=frames, per_s=round(frames / took, 1), cpu_us=_us(cpu, frames)
    )


def _measure_short(name: str, proxy: Server, requests: int) -> ProcessCost:
    request = _request(SHORT_FRAMES - 2, "", SHORT_BODY_BYTES)  # a role frame before the tokens, [DONE] behind them
    with Crowd(name, proxy.address, SHORT_CONNECTIONS, proxy.tls) as crowd:
        crowd.ask(request)
        crowd.run_until_answers(max(requests // 10, SHORT_CONNECTIONS), request)
        cpu, answers, began = proxy.cpu_ns(), crowd.answers, time.perf_counter()
        crowd.run_until_answers(answers + requests, request)
        cpu, answers, took = proxy.cpu_ns() - cpu, crowd.answers - answers, time.perf_counter() - began
        if crowd.frames / crowd.answers > SHORT_FRAMES + 0.5:
            raise MeasureError(f"{name}: an answer of {crowd.frames / crowd.answers:.1f} frames, not {SHORT_FRAMES}")
    test = f"short requests, {SHORT_FRAMES} frames, {SHORT_CONNECTIONS} connections"
    return ProcessCost(
        test=test, proxy=name, unit="request", count=answers, per_s=round(answers / took, 1), cpu_us=_us(cpu, answers)
    )


def _us(cpu_ns: int, count: int) -> float:
    return round(cpu_ns / 1000 / count, 2)


def _request(tokens: int, fields: str, body_bytes: int = 0) -> bytes:
    begin = b'{"model":"tiny","stream":true,"max_tokens":%d,"messages":[{"role":"user","content":"' % tokens
    end = b'"}]}'
    body = begin + b"x" * max(body_bytes - len(begin) - len(end), 1) + end
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nhost: bench\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\n{fields}\r\n"
    )
    return head.encode("ascii") + body


# -- the servers


@contextlib.contextmanager
def engine(core: int | None) -> Iterator[Server]:
    """The built-in engine, on a core. Raises `StartError`."""
    command = [sys.executable, "-m", "relay_bench", "engine", "--listen", "127.0.0.1:0", "--max-seqs", "100000"]
    with _pinned("engine", command, core) as server:
        yield server


@contextlib.contextmanager
def relay(engine_url: str, core: int | None, *flags: str, program: str = "relay") -> Iterator[Server]:
    """A relay of one worker before an engine, on a core; `program` is the module that is run. Raises `StartError`."""
    command = [sys.executable, "-m", program, "serve", "--listen", "127.0.0.1:0", "--admin", "off"]
    command += ["--upstream", engine_url, "--log-format", "off", "--drain-s", "0", "--workers", "1"]
    command += flags
    with _pinned("relay", command, core) as server:
        yield server


@contextlib.contextmanager
def _relay_with_tls(engine_url: str, core: int | None, openssl: str) -> Iterator[Server]:
    """The same, speaking TLS with its clients, with a certificate that vouches for itself."""
    with tempfile.TemporaryDirectory(prefix="relay-bench-tls-") as folder:
        cert, key, conf = (Path(folder, name) for name in ("cert.pem", "key.pem", "relay.toml"))
        command = [openssl, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
        command += ["-subj", "/CN=localhost", "-out", str(cert), "-keyout", str(key)]
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
        conf.write_text(f'[listen]\ntls = {{ cert = "{cert}", key = "{key}" }}\n')
        with relay(engine_url, core, "--config", str(conf)) as server:
            yield server


@contextlib.contextmanager
def _pinned(name: str, command: list[str], core: int | None) -> Iterator[Server]:
    with listening(name, command, Server) as server:
        server.pin([] if core is None else [core])
        yield server


@contextlib.contextmanager
def _nginx(program: str, engine_url: str, core: int | None) -> Iterator[Server]:
    """nginx with its configuration's two addresses replaced."""
    with tempfile.TemporaryDirectory(prefix="relay-bench-nginx-") as folder:
        port = processes.free_port()
        text = NGINX_CONF.read_text().replace("127.0.0.1:9100", engine_url.removeprefix("http://"))
        conf = Path(folder, "nginx.conf")
        conf.write_text(text.replace("127.0.0.1:9201", f"127.0.0.1:{port}"))
        command = [program, "-p", folder, "-e", f"{folder}/nginx.err", "-c", str(conf)]
        with child(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            server = Server("nginx", process, f"http://127.0.0.1:{port}")
            end = time.perf_counter() + PATIENCE_S
            while True:
                with contextlib.suppress(OSError), socket.create_connection(server.address, timeout=1):
                    break
                if server.has_ended or time.perf_counter() > end:
                    raise StartError(f"nginx did not start: {Path(folder, 'nginx.err').read_text()}")
                time.sleep(0.05)
            server.pin([] if core is None else [core])
            yield server


# -- cores


@contextlib.contextmanager
def cores() -> Iterator[tuple[int | None, int | None]]:
    """A core for engine and client, to which this process is kept meanwhile, and one for the proxy measured."""
    before = os.sched_getaffinity(0)
    if len(before) < 2:
        yield None, None
        return
    own, other = sorted(before)[:2]
    os.sched_setaffinity(0, {own})
    try:
        yield own, other
    finally:
        os.sched_setaffinity(0, before)
