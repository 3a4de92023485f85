"""A real browser behind the relay: with `EventSource` and a `fetch` stream a page shows tokens as they come.

The engine sends a token only when the page has told its own server that all those before it are on it: were anything
between them held back, both would wait for ever. What the page tells is the text that it shows, read from it when a
frame has been drawn. It comes from another origin than the relay, so the engine's CORS answers, the preflight's too,
have to pass. It has loaded only when both streams have ended, and of that Chromium makes a picture (Debian: `apt-get
install chromium`).
"""

from __future__ import annotations

import re
import shutil
import subprocess
import zlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final
from urllib.parse import unquote

import pytest
import trio

from tests.conftest import not_here, running_relay
from tests.e2e.harness import until

TOKENS: Final = 5
#: A browser's start on a loaded machine.
BROWSER_S: Final = 30.0

PAGE: Final = """<!doctype html>
<p id=source></p><p id=fetch></p><img src=/ended hidden>
<script type=module>
const relay = 'http://127.0.0.1:%d/v1/chat/completions'
const tell = what => fetch('/seen/' + encodeURIComponent(what), {method: 'POST'})
const show = async (name, token) => {
  const place = document.getElementById(name)
  place.append(token)
  await new Promise(requestAnimationFrame)
  await tell(name + ': ' + place.innerText)
}
const source = new EventSource(relay)
source.onmessage = async e => {
  if (e.data == '[DONE]') source.close()
  await show('source', e.data)
  if (e.data == '[DONE]') stream()
}
const stream = async () => {
  const answer = await fetch(relay, {method: 'POST', headers: {'content-type': 'application/json'},
    body: '{"stream":true}'})
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader()
  for (let text = ''; ;) {
    const {value, done} = await reader.read()
    if (done) { tell('end'); break }
    text += value
    for (let at; (at = text.indexOf('\\n\\n')) >= 0; text = text.slice(at + 2)) await show('fetch', text.slice(6, at))
  }
}
</script>"""


def shown(name: str) -> list[str]:
    """What the page tells of one stream, token by token."""
    tokens = [*map(str, range(TOKENS)), "[DONE]"]
    return [f"{name}: {''.join(tokens[: number + 1])}" for number in range(len(tokens))]


class Site:
    """The page's own server, and the engine: what the one has heard lets the other go on."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.methods: list[str] = []  #: of the requests that the engine got
        self.relay_port = 0

    async def serve_page(self, stream: trio.SocketStream) -> None:
        async for method, target in requests(stream):
            if target.startswith("/seen/"):
                self.seen.append(unquote(target.removeprefix("/seen/")))
            if target == "/ended":
                await until(lambda: "end" in self.seen, BROWSER_S)
            body = PAGE % self.relay_port if (method, target) == ("GET", "/") else ""
            head = f"HTTP/1.1 200 OK\r\ncontent-type: text/html\r\ncontent-length: {len(body)}\r\n\r\n"
            await stream.send_all((head + body).encode())

    async def serve_engine(self, stream: trio.SocketStream) -> None:
        allowed = "access-control-allow-origin: *\r\naccess-control-allow-headers: content-type\r\n"
        async for method, _ in requests(stream):
            self.methods.append(method)
            if method == "OPTIONS":
                await stream.send_all(f"HTTP/1.1 200 OK\r\n{allowed}content-length: 0\r\n\r\n".encode())
                continue
            head = f"HTTP/1.1 200 OK\r\n{allowed}content-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
            await stream.send_all(head.encode())
            *texts, _ = shown("source" if method == "GET" else "fetch")
            for token, text in enumerate(texts):
                await stream.send_all(chunk(str(token)))
                await until(lambda text=text: text in self.seen, BROWSER_S)  # type: ignore[misc]
            await stream.send_all(chunk("[DONE]") + b"0\r\n\r\n")  # in one: the page closes its source at once


def chunk(token: str) -> bytes:
    frame = f"data: {token}\n\n".encode()
    return b"%x\r\n%b\r\n" % (len(frame), frame)


async def requests(stream: trio.SocketStream) -> AsyncIterator[tuple[str, str]]:
    """Method and target of each request of a connection; bodies are dropped."""
    buffer = b""
    while True:
        while b"\r\n\r\n" not in buffer:
            data = await stream.receive_some()
            if not data:
                return
            buffer += data
        head, _, buffer = buffer.partition(b"\r\n\r\n")
        length = re.search(rb"(?i)\r\ncontent-length: *(\d+)", head)
        size = int(length[1]) if length else 0
        while len(buffer) < size:
            buffer += await stream.receive_some()
        buffer = buffer[size:]
        method, target, _ = head.decode("latin-1").split(" ", 2)
        yield method, target


@pytest.fixture
def chromium() -> str:
    """Where it is."""
    return shutil.which("chromium") or not_here("chromium")


def colours(png: bytes) -> int:
    """How many values the bytes of a picture have, of which a blank page has four."""
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    data, at = b"", 8
    while at < len(png):
        size = int.from_bytes(png[at : at + 4], "big")
        if png[at + 4 : at + 8] == b"IDAT":
            data += png[at + 8 : at + 8 + size]
        at += 12 + size
    return len(set(zlib.decompress(data)))


async def test_a_page_shows_each_token_as_it_comes(chromium: str, tmp_path: Path, nursery: trio.Nursery) -> None:
    site = Site()
    ports = []
    for serve in site.serve_page, site.serve_engine:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, serve, listeners)
        ports.append(listeners[0].socket.getsockname()[1])
    async with running_relay(f"http://127.0.0.1:{ports[1]}") as relay:
        site.relay_port = relay.port
        picture = tmp_path / "page.png"
        flags = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", f"--user-data-dir={tmp_path}/user")
        command = [
            chromium,
            *flags,
            "--window-size=400,300",
            f"--screenshot={picture}",
            f"http://127.0.0.1:{ports[0]}/",
        ]
        process = await trio.lowlevel.open_process(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            await until(lambda: "end" in site.seen, BROWSER_S)
            with trio.fail_after(BROWSER_S):
                await process.wait()  # it ends by itself, behind the picture
        finally:
            if process.returncode is None:
                process.terminate()
            with trio.CancelScope(shield=True):
                await process.wait()
        assert [each for each in site.seen if each != "end"] == shown("source") + shown("fetch")
        assert site.methods == ["GET", "OPTIONS", "POST"]
        await relay.record(3)
        assert [record.outcome for record in relay.records] == ["--"] * 3
        assert colours(picture.read_bytes()) > 10
    nursery.cancel_scope.cancel()
