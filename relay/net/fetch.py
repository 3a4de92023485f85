"""A small answer of an engine's, for the relay itself: probes, lists of models, bootstrap servers.

Below httpx's client, which reads and unpacks a body of any size, follows where it is sent, and carries cookies from one
engine to another. Neither proxies nor certificates of the environment have a say in how an engine is reached, and each
connection serves once: engines close idle ones after 5 s.
"""

from __future__ import annotations

import errno
import os
import socket
import ssl

import httpx
import trio

from relay.net import tls


def transport_of(unix_path: str | None = None, context: ssl.SSLContext | None = None) -> httpx.AsyncHTTPTransport:
    """A way to engines: over TCP, with TLS if there is a `context`, or to a unix socket. To be closed by `aclose`."""
    limits = httpx.Limits(max_keepalive_connections=0)
    return httpx.AsyncHTTPTransport(verify=context or False, trust_env=False, uds=unix_path, limits=limits)


async def fetch(
    transport: httpx.AsyncHTTPTransport,
    url: str,
    *,
    most_bytes: int,
    host: str | None = None,
    server_name: str | None = None,
    connect_s: float = 0.0,
) -> tuple[int, bytes]:
    """Status and body of a GET; of a body over `most_bytes` only somewhat more than that. The caller limits its time.

    `host` is asked for in the place of the URL's, and `server_name` is to be on the certificate. `connect_s` limits
    connecting, and then the handshake. Raises httpx.HTTPError, httpx.InvalidURL or OSError.
    """
    fields = {"accept-encoding": "identity"}
    if host is not None:
        fields["host"] = host
    # Cancelled in a handshake, httpcore leaves the socket to the garbage collector; at its own limit it closes it.
    extensions: dict[str, object] = {"timeout": {"connect": connect_s or None}}
    if server_name is not None:
        extensions["sni_hostname"] = server_name
    request, answer = httpx.Request("GET", url, headers=fields, extensions=extensions), None
    try:
        answer = await transport.handle_async_request(request)
    except* trio.Cancelled:  # noqa: ASYNC103 - to connect takes a nursery, which makes a group of it; below, it is alone
        pass
    if answer is None:
        await trio.lowlevel.checkpoint_if_cancelled()
    assert answer is not None
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


def reason_of(error: Exception) -> str:
    """What `fetch` failed of, in the system's words or OpenSSL's; httpx and trio keep them to themselves."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLError | socket.gaierror):
            return tls.reason_of_server(cause)
        if isinstance(cause, OSError) and cause.errno is not None and cause.errno in errno.errorcode:
            return os.strerror(cause.errno)  # trio's text has the address, which whoever asks has told
        tried = cause.exceptions if isinstance(cause, BaseExceptionGroup) else ()  # an address each
        cause = tried[0] if tried else cause.__cause__ or cause.__context__
    return str(error) or type(error).__name__
