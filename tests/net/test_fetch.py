"""What the relay asks of engines for itself is bounded, whatever they answer."""

from __future__ import annotations

import socket
from pathlib import Path

import httpx
import pytest
import trio
import trio.testing

from relay.net.fetch import fetch, reason_of, transport_of


async def test_an_endless_answer_is_not_read_to_its_end(nursery: trio.Nursery) -> None:
    sent = 0

    async def endless(stream: trio.SocketStream) -> None:
        nonlocal sent
        async with stream:
            await stream.receive_some()
            await stream.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000000000\r\n\r\n")
            try:
                while True:
                    await stream.send_all(b"x" * 65536)
                    sent += 65536
            except trio.BrokenResourceError:
                return

    listeners = await nursery.start(trio.serve_tcp, endless, 0)
    port = listeners[0].socket.getsockname()[1]
    transport = transport_of()
    with trio.fail_after(10):
        status, body = await fetch(transport, f"http://127.0.0.1:{port}/", most_bytes=100_000)
    await transport.aclose()
    assert status == 200
    assert 100_000 < len(body) < 400_000
    nursery.cancel_scope.cancel()


async def test_a_redirect_is_not_followed(nursery: trio.Nursery) -> None:
    async def elsewhere(stream: trio.SocketStream) -> None:
        async with stream:
            asked = await stream.receive_some()
            assert b"host: engine.example" in bytes(asked).lower()
            await stream.send_all(b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n")

    listeners = await nursery.start(trio.serve_tcp, elsewhere, 0)
    port = listeners[0].socket.getsockname()[1]
    transport = transport_of()
    with trio.fail_after(10):
        assert await fetch(transport, f"http://127.0.0.1:{port}/", most_bytes=10, host="engine.example") == (302, b"")
    await transport.aclose()
    nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    ("url", "unix_path", "said"),
    [
        ("http://127.0.0.1:1/", None, "Connection refused"),
        ("http://localhost:1/", None, "Connection refused"),  # several addresses, perhaps
        ("http://localhost/", "nothing.sock", "No such file or directory"),
    ],
)
async def test_why_nobody_answers_is_in_the_systems_words(
    url: str, unix_path: str | None, said: str, tmp_path: Path
) -> None:
    transport = transport_of(unix_path and str(tmp_path / unix_path))
    with pytest.raises(httpx.HTTPError) as caught:
        await fetch(transport, url, most_bytes=10)
    await transport.aclose()
    assert reason_of(caught.value) == said


async def test_cancelled_while_it_connects_it_raises_what_others_raise(nursery: trio.Nursery) -> None:
    """And no group, which trio makes of it there, and which who ends an exchange would not know."""
    with socket.socket() as full, socket.socket() as filler:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        filler.connect(full.getsockname())
        url = f"http://127.0.0.1:{full.getsockname()[1]}/"

        async def cancel() -> None:
            await trio.testing.wait_all_tasks_blocked()
            scope.cancel()

        transport = transport_of()
        raised: BaseException | None = None
        with trio.CancelScope() as scope:
            nursery.start_soon(cancel)
            try:
                await fetch(transport, url, most_bytes=10)
            except BaseException as exc:
                raised = exc
                raise
        await transport.aclose()
    assert type(raised) is trio.Cancelled
