"""Certificates, and engines behind TLS."""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime
from pathlib import Path

import msgspec
import trio
import trustme

from relay.address import UpstreamConfig, parse_upstream
from relay.config import TlsConfig


def told_of_goodbyes(context: ssl.SSLContext) -> ssl.SSLContext:
    """As Python has it since 3.11.3: an end without a goodbye is an error."""
    context.options &= ~getattr(ssl, "OP_IGNORE_UNEXPECTED_EOF", 0)
    return context


class Authority:
    """Vouches for servers, by files in a directory."""

    def __init__(self, directory: Path) -> None:
        self._ca = trustme.CA(key_type=trustme.KeyType.ECDSA)
        self._directory = directory
        self.path = str(directory / "ca.pem")  #: its own certificate
        self._ca.cert_pem.write_to_path(self.path)

    def issue(self, name: str = "localhost", *, expires: datetime | None = None) -> TlsConfig:
        """The files of a server's certificate; those issued before are overwritten."""
        issued = self._ca.issue_cert(name, not_after=expires, key_type=trustme.KeyType.ECDSA)
        files = TlsConfig(cert=str(self._directory / "server.pem"), key=str(self._directory / "server.key"))
        Path(files.cert).write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
        issued.private_key_pem.write_to_path(files.key)
        return files

    def become_another(self) -> None:
        """Puts the certificate of another, which vouches for nobody here, where its own was."""
        trustme.CA(key_type=trustme.KeyType.ECDSA).cert_pem.write_to_path(self.path)

    def spoil(self) -> None:
        """Puts nonsense where the certificate was."""
        (self._directory / "server.pem").write_text("nonsense")

    def server(self, name: str = "localhost", *, expires: datetime | None = None) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._ca.issue_cert(name, not_after=expires, key_type=trustme.KeyType.ECDSA).configure_cert(context)
        return told_of_goodbyes(context)

    def client(self) -> ssl.SSLContext:
        context = ssl.create_default_context()
        self._ca.configure_trust(context)
        return told_of_goodbyes(context)


class Edge:
    """Speaks TLS in front of an engine that does not, in records of at most `record_bytes`."""

    def __init__(self, engine: str, context: ssl.SSLContext) -> None:
        self.record_bytes = 16_384
        self.says_goodbye = True  #: when the engine has closed its connection
        self.stays = False  #: and leaves its own open
        self.connections = 0
        self.names: list[str | None] = []  #: that were asked for
        self.url = ""
        self._host, _, port = engine.removeprefix("http://").rpartition(":")
        self._port = int(port)
        self._context = context
        context.sni_callback = lambda _, name, __: self.names.append(name)

    async def serve(self, transport: trio.SocketStream) -> None:
        self.connections += 1
        secure = trio.SSLStream(transport, self._context, server_side=True)
        plain = await trio.open_tcp_stream(self._host, self._port)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._requests, secure, plain)
                async for data in plain:
                    for at in range(0, len(data), self.record_bytes):
                        await secure.send_all(data[at : at + self.record_bytes])
                nursery.cancel_scope.cancel()
            if self.says_goodbye:
                await (secure.unwrap() if self.stays else secure.aclose())
        except* (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        finally:
            transport.socket.close()
            plain.socket.close()

    async def _requests(self, secure: trio.SSLStream[trio.SocketStream], plain: trio.SocketStream) -> None:
        try:
            async for data in secure:
                await plain.send_all(data)
        finally:
            plain.socket.close()

    def as_upstream(self, ca: str, *, server_name: str = "") -> UpstreamConfig:
        return msgspec.structs.replace(parse_upstream(self.url), ca=ca, server_name=server_name)


@asynccontextmanager
async def behind_tls(engine: str, context: ssl.SSLContext) -> AsyncIterator[Edge]:
    """An `Edge` in front of the engine with this URL."""
    edge = Edge(engine, context)
    async with trio.open_nursery() as nursery:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        edge.url = f"https://localhost:{listeners[0].socket.getsockname()[1]}"
        await nursery.start(trio.serve_listeners, edge.serve, listeners)
        yield edge
        nursery.cancel_scope.cancel()
