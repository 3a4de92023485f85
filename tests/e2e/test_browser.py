"""A real browser behind the relay: `EventSource` and a `fetch` stream show each token before the next one is made.

The engine sends a token only when the page has told its own server of the one before: were anything between them held
back, both would wait for ever. The page comes from another origin than the relay, so the engine's CORS answers, the
preflight's too, have to pass. Skipped where there is no Chromium (Debian: `apt-get install chromium`).
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final

import pytest
import trio

from tests.conftest import running_relay
from tests.e2e.harness import until

CHROMIUM: Final = shutil.which("chromium")
TOKENS: Final = 5
#: A browser's start on a loaded machine.
BROWSER_S: Final = 30.0

PAGE: Final = """<script type=module>
const relay = 'http://127.0.0.1:%d/v1/chat/completions'
const tell = what => fetch('/seen/' + encodeURIComponent(what), {method: 'POST'})
const source = new EventSource(relay)
source.onmessage = e => { tell('source-' + e.data); if (e.data == '[DONE]') { source.close(); stream() } }
const stream = async () => {
  const answer = await fetch(relay, {method: 'POST', headers: {'content-type': 'application/json'},
    body: '{"stream":true}'})
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader()
  for (let text = ''; ;) {
    const {value, done} = await reader.read()
    if (done) { tell('fetch-end'); break }
    text += value
    for (let at; (at = text.indexOf('\\n\\n')) >= 0; text = text.slice(at + 2)) tell('fetch-' + text.slice(6, at))
  }
}
</script>"""


class Site:
    """The page's own server, and the engine: what the one has heard lets the other go on."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.methods: list[str] = []  #: of the requests that the engine got
        self.relay_port = 0

    async def serve_page(self, stream: trio.SocketStream) -> None:
        async for method, target in requests(stream):
            if target.startswith("/seen/"):
                self.seen.append(target.removeprefix("/seen/"))
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
            name = "source" if method == "GET" else "fetch"
            head = f"HTTP/1.1 200 OK\r\n{allowed}content-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
            await stream.send_all(head.encode())
            for token in map(str, range(TOKENS)):
                await stream.send_all(chunk(token))
                seen = f"{name}-{token}"
                await until(lambda seen=seen: seen in self.seen, BROWSER_S)  # type: ignore[misc]
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


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
async def test_a_page_shows_each_token_as_it_comes(tmp_path: Path, nursery: trio.Nursery) -> None:
    site = Site()
    ports = []
    for serve in site.serve_page, site.serve_engine:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, serve, listeners)
        ports.append(listeners[0].socket.getsockname()[1])
    async with running_relay(f"http://127.0.0.1:{ports[1]}") as relay:
        site.relay_port = relay.port
        flags = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", f"--user-data-dir={tmp_path}")
        page = f"http://127.0.0.1:{ports[0]}/"
        process = await trio.lowlevel.open_process(
            [str(CHROMIUM), *flags, "--remote-debugging-port=0", page],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            await until(lambda: {"fetch-%5BDONE%5D", "fetch-end"} <= {*site.seen}, BROWSER_S)
        finally:
            process.terminate()
            with trio.CancelScope(shield=True):
                await process.wait()
        tokens = [*map(str, range(TOKENS)), "%5BDONE%5D"]
        # The end is told on a connection of its own right behind the last token, and may overtake it.
        seen = [each for each in site.seen if each != "fetch-end"]
        assert seen == [*(f"source-{each}" for each in tokens), *(f"fetch-{each}" for each in tokens)]
        assert site.methods == ["GET", "OPTIONS", "POST"]
        await relay.record(3)
        assert [record.outcome for record in relay.records] == ["--"] * 3
    nursery.cancel_scope.cancel()
