"""The doctor, against an engine told to misbehave and small proxies that do what proxies do to streams."""

from __future__ import annotations

import argparse
import gzip
import json
from functools import partial
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
import trio
from rich.console import Console

from relay.core.request import Route
from relay_bench import cli
from relay_bench.doctor.command import rendered, strip
from relay_bench.doctor.findings import Visit, bunched_share, examine
from relay_bench.doctor.mends import MENDS
from relay_bench.doctor.observe import Observation, Patient, timed_frames
from relay_bench.engine import Engine, EngineConfig, serve_engine
from relay_bench.load.datasets import ENDPOINTS, Ask, Form
from relay_bench.load.run import LoadError, model_of
from relay_bench.load.target import resolve
from tests.bench.loading import engine_child

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

LIMIT_S = 20.0
TOKENS = 24
#: Pacing at which bunches are told from single frames with room to spare.
STEP_MS = 4.0


@pytest.fixture
async def engine(nursery: trio.Nursery) -> Engine:
    started: Engine = await nursery.start(serve_engine, EngineConfig(ttft_ms=10, step_ms=STEP_MS))
    return started


async def visit(
    url: str,
    *,
    fields: dict[str, str] | None = None,
    direct: str = "",
    silence_s: float = 0.0,
    route: Route = Route.CHAT,
    timeout_s: float = LIMIT_S,
) -> Visit:
    """What the command observes, less its flags."""
    body = Form(route=route, model="tiny").body(Ask(("count",), TOKENS)).body

    def patient(one: str) -> Patient:
        return Patient(resolve(one), route=route, path=ENDPOINTS[route], fields=named, timeout_s=timeout_s)

    named = {"content-type": "application/json"} | (fields or {})
    with trio.fail_after(LIMIT_S):
        through = patient(url)
        try:
            seen = Visit(stream=await through.ask(body))
            seen.again = seen.compressed = await through.ask(body, accept_encoding="gzip")
            if silence_s:
                seen.silence_s = silence_s
                seen.silent = await through.ask(body, x_sim_ttft_ms=str(silence_s * 1000))
        finally:
            through.close()
        if direct:
            beside = patient(direct)
            try:
                seen.direct = await beside.ask(body)
            finally:
                beside.close()
    return seen


def codes(seen: Visit) -> list[str]:
    return [finding.code for finding in examine(seen)[0]]


@pytest.mark.parametrize("route", ENDPOINTS)
async def test_a_healthy_path(engine: Engine, route: Route) -> None:
    seen = await visit(engine.url, route=route, silence_s=0.05)
    assert codes(seen) == []
    assert len(seen.stream.content_s) == TOKENS


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"x-sim-fault": "wrong-content-type"}, "content_type"),
        ({"x-sim-fault": "no-content-type"}, "content_type"),
        ({"x-sim-fault": "json-on-stream"}, "content_type"),
        ({"x-sim-fault": "no-done"}, "end_mark"),
        ({"x-sim-usage": "none"}, "usage"),
        ({"x-sim-rechunk": "length"}, "content_length"),
        ({"x-sim-rechunk": "frames:12"}, "buffering"),
        ({"x-sim-rechunk": "close"}, "keep_alive"),
        ({"connection": "close"}, "keep_alive"),
        ({"x-sim-fault": "close-idle"}, "keep_alive"),
        ({"x-sim-fault": "die-after:5"}, "cut"),
        ({"x-sim-fault": "rst-after:5"}, "cut"),
        ({"x-sim-fault": "bad-chunk:5"}, "framing"),
        ({"x-sim-fault": "error-frame:5"}, "error_frame"),
        ({"x-sim-fault": "stall-after:5"}, "stalled"),
        ({"x-sim-fault": "status:503"}, "http"),
    ],
)
async def test_each_fault_is_found_and_only_it(engine: Engine, fields: dict[str, str], code: str) -> None:
    timeout_s = 0.5 if code == "stalled" else LIMIT_S
    assert codes(await visit(engine.url, fields=fields, timeout_s=timeout_s)) == [code]


async def test_a_lying_content_type_does_not_hide_the_frames(engine: Engine) -> None:
    seen = await visit(engine.url, fields={"x-sim-fault": "wrong-content-type", "x-sim-rechunk": "frames:12"})
    assert codes(seen) == ["content_type", "buffering"]


def test_nobody_there() -> None:
    assert codes(Visit(stream=Observation(label="connect", error="refused"))) == ["connect"]


# -- proxies


@pytest.fixture
def proxied(nursery: trio.Nursery, engine: Engine) -> Callable[..., Awaitable[str]]:
    """Starts a proxy before the engine: `handle` gets the client's stream and one to the engine."""

    async def start(handle: Callable[[trio.SocketStream, trio.SocketStream], Awaitable[None]]) -> str:
        async def serve(client: trio.SocketStream) -> None:
            try:
                async with await trio.open_tcp_stream(engine.host, engine.port) as behind, trio.open_nursery() as up:
                    up.start_soon(pump, client, behind)
                    await handle(behind, client)
                    up.cancel_scope.cancel()
            except* (trio.BrokenResourceError, trio.ClosedResourceError):
                pass

        listeners = await nursery.start(partial(trio.serve_tcp, serve, 0, host="127.0.0.1"))
        return f"http://127.0.0.1:{listeners[0].socket.getsockname()[1]}"

    return start


async def pump(source: trio.SocketStream, sink: trio.SocketStream) -> None:
    async for data in source:
        await sink.send_all(data)


async def test_a_proxy_that_buffers(engine: Engine, proxied: Callable[..., Awaitable[str]]) -> None:
    """It waits for the end, as nginx does with proxy_buffering on and a short answer."""

    async def handle(behind: trio.SocketStream, client: trio.SocketStream) -> None:
        held = b""
        async for data in behind:
            held += data
            if held.endswith(b"\r\n0\r\n\r\n"):
                await client.send_all(held)
                held = b""

    url = await proxied(handle)
    seen = await visit(url, direct=engine.url)
    findings, _ = examine(seen)
    assert findings[0].code == "buffering"
    assert {finding.code for finding in findings} <= {"buffering", "late_first"}
    assert f"{TOKENS} frames came all at once" in findings[0].what
    assert "direct, in" in findings[0].what


async def test_a_proxy_that_compresses(proxied: Callable[..., Awaitable[str]]) -> None:
    """Whoever takes gzip gets it."""
    body = gzip.compress(b"data: [DONE]\n\n")
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-encoding: gzip\r\ncontent-length: %d\r\n\r\n"

    async def handle(behind: trio.SocketStream, client: trio.SocketStream) -> None:
        answers = 0
        async for data in behind:
            if answers == 0:
                await client.send_all(data)
                answers += data.endswith(b"\r\n0\r\n\r\n")
            elif answers == 1:
                await client.send_all(head % len(body) + body)
                answers += 1

    assert codes(await visit(await proxied(handle))) == ["compression"]


async def test_a_proxy_that_cuts_idle_streams(proxied: Callable[..., Awaitable[str]]) -> None:
    """Nothing from the engine for 0.4 s, and it hangs up: the short silences of a stream pass, a long one does not."""

    async def handle(behind: trio.SocketStream, client: trio.SocketStream) -> None:
        while True:
            with trio.move_on_after(0.4) as idle:
                data = await behind.receive_some()
                if not data:
                    return
            if idle.cancelled_caught:
                await client.aclose()
                return
            await client.send_all(data)

    seen = await visit(await proxied(handle), silence_s=0.8)
    findings, _ = examine(seen)
    assert [finding.code for finding in findings] == ["idle_cut"]
    assert "of silence" in findings[0].what


def test_a_gateway_timeout_is_an_idle_cut() -> None:
    good = Observation(status=200, headers={"content-type": "text/event-stream"}, may_reuse=True)
    silent = Observation(status=504, label="http_504", end_s=60.0)
    assert codes(Visit(stream=good, silent=silent, silence_s=90)) == ["idle_cut"]


def test_compression_that_is_flushed_is_only_remarked_on() -> None:
    stream = seen_with(paced(40, 0.01))
    packed = msgspec.structs.replace(stream, headers={"content-encoding": "br"}, read_s=paced(40, 0.01))
    findings, remarks = examine(Visit(stream=stream, compressed=packed))
    assert findings == []
    assert any("flushed frame by frame" in remark for remark in remarks)


# -- the pure parts


def paced(number: int, gap_s: float, *, batch: int = 1, start_s: float = 0.05) -> list[float]:
    return [start_s + at // batch * batch * gap_s for at in range(number)]


def seen_with(content_s: list[float], **fields: Any) -> Observation:
    usual: dict[str, Any] = {"status": 200, "headers": {"content-type": "text/event-stream"}, "has_usage": True}
    return Observation(content_s=content_s, frames=[(0.1, b"data: x\n\n")], saw_end=True, **(usual | fields))


def test_bunched_share() -> None:
    assert bunched_share(paced(40, 0.01)) == 0
    assert bunched_share(paced(40, 0.01, batch=8)) == pytest.approx(35 / 39)
    assert bunched_share([]) == 0


@pytest.mark.parametrize(
    ("content_s", "direct_s", "found"),
    [
        (paced(40, 0.01, batch=8), None, ["buffering"]),
        (paced(40, 0.01, batch=8), paced(40, 0.01), ["buffering"]),
        (paced(40, 0.01, batch=8), paced(40, 0.01, batch=8), []),  # the engine itself
        (paced(40, 0.01, batch=40), paced(40, 0.01, batch=2), ["buffering"]),
        (paced(40, 0.01), paced(40, 0.01), []),
        (paced(5, 0.01, batch=5), None, []),  # too few to tell
        (paced(40, 0.0, start_s=0.001), None, []),  # too fast to tell
        (paced(40, 0.01, start_s=0.4), paced(40, 0.01, start_s=0.1), ["late_first"]),
        (paced(40, 0.01, start_s=1.03), paced(40, 0.01, start_s=1.0), []),
    ],
)
def test_what_the_times_of_frames_say(content_s: list[float], direct_s: list[float] | None, found: list[str]) -> None:
    direct = None if direct_s is None else seen_with(direct_s)
    findings, remarks = examine(Visit(stream=seen_with(content_s), direct=direct))
    assert [finding.code for finding in findings] == found
    if len(content_s) == 5 or content_s[-1] < 0.05:
        assert any("to tell buffering" in remark for remark in remarks)


def test_frames_are_found_in_any_reads() -> None:
    frames = [b": hi\n\n", b"data: a\n\n", b"data: b\r\n\r\n", b"data: [DONE]\n\n"]
    body = b"".join(b"%x\r\n%b\r\n" % (len(frame), frame) for frame in frames) + b"0\r\n\r\n"
    raw = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n" + body
    headers = [(b"transfer-encoding", b"chunked")]
    for size in (1, 5, 17, len(raw)):
        reads = [(at, raw[at : at + size]) for at in range(0, len(raw), size)]
        assert [frame for _, frame in timed_frames(reads, headers, 200)] == frames


def test_every_finding_has_a_mend_and_is_drawn() -> None:
    seen = Visit(stream=seen_with(paced(40, 0.01, batch=8), headers={}), direct=seen_with(paced(40, 0.01)))
    findings, remarks = examine(seen)
    assert all(finding.mends for finding in findings)
    assert all(MENDS.values())
    console = Console(width=150)
    with console.capture() as capture:
        console.print(rendered("http://x", seen, findings, remarks))
    text = capture.get()
    assert "proxy_buffering off" in text
    assert "✗ buffering" in text
    assert "█" in text


def test_the_strip_shows_when_frames_came() -> None:
    assert strip([0.0, 0.99], 1.0, width=4) == "█··█"
    assert strip([1.0] * 3 + [0.0], 1.0, width=4) == "▃··█"
    assert strip([], 0.0, width=3) == "···"


# -- the command


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with engine_child("--ttft-ms", "5", "--step-ms", "10") as url:
        yield url


def test_the_command(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", url, "--direct", url, "--output-len", "16"]) == 0
    assert "nothing is wrong" in capsys.readouterr().out
    assert cli.main(["doctor", url, "--header", "x-sim-fault: no-done", "--json", "--output-len", "16"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert [finding["code"] for finding in report["findings"]] == ["end_mark"]
    assert report["findings"][0]["mends"]
    assert cli.main(["doctor", url, "--output-len", "0"]) == 2


@pytest.mark.parametrize(
    ("status", "wanted"), [(401, "--api-key"), (403, "--api-key"), (404, "--model"), (200, "--model")]
)
async def test_the_flag_that_a_server_without_a_model_to_tell_wants(
    status: int, wanted: str, nursery: trio.Nursery
) -> None:
    async def refuse(stream: trio.SocketStream) -> None:
        async with stream:
            assert await stream.receive_some()
            await stream.send_all(f"HTTP/1.1 {status} So\r\ncontent-length: 2\r\n\r\n{{}}".encode())

    (listener,) = await nursery.start(partial(trio.serve_tcp, refuse, 0, host="127.0.0.1"))
    target = resolve(f"http://127.0.0.1:{listener.socket.getsockname()[1]}")
    with trio.fail_after(LIMIT_S), pytest.raises(LoadError, match=rf"names no model \({status} {{}}\); use {wanted}$"):
        await model_of(argparse.Namespace(model="", dataset_name="random"), target, Route.CHAT, {})
    nursery.cancel_scope.cancel()
