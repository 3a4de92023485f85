"""A small answer of an engine's, for the relay itself: probes, lists of models, bootstrap servers.

Below httpx's client, which reads and unpacks a body of any size, follows where it is sent, and carries cookies from one
engine to another. Neither proxies nor certificates of the environment have a say in how an engine is reached, and each
connection serves once: engines close idle ones after 5 s.
"""

from __future__ import annotations

import httpx
import trio


def transport_of(unix_path: str | None = None) -> httpx.AsyncHTTPTransport:
    """A way to engines: over TCP, or to one at a unix socket. To be closed by `aclose`."""
    limits = httpx.Limits(max_keepalive_connections=0)
    return httpx.AsyncHTTPTransport(verify=False, trust_env=False, uds=unix_path, limits=limits)


async def fetch(
    transport: httpx.AsyncHTTPTransport, url: str, *, most_bytes: int, host: str | None = None
) -> tuple[int, bytes]:
    """Status and body of a GET; of a body over `most_bytes` only somewhat more than that. The caller limits its time.

    `host` is asked for in the place of the URL's. Raises httpx.HTTPError, httpx.InvalidURL or OSError.
    """
    fields = {"accept-encoding": "identity"}
    if host is not None:
        fields["host"] = host
    answer = await transport.handle_async_request(httpx.Request("GET", url, headers=fields))
    body = bytearray()
    try:
        with trio.CancelScope() as reading:
            async for piece in answer.aiter_raw():
                body += piece
                if len(body) > most_bytes:
                    reading.cancel()
    finally:
        await answer.aclose()
    return answer.status_code, bytes(body)
