"""Clients that repeat a head, on one connection or several: each request is its own, whatever is known of another."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

import msgspec
import pytest
import trio

from relay.config import AuthConfig
from relay.core.auth import keys_line
from relay.net.guard import Guard
from tests.conformance.peers import OK, Engine, Tap, exchange

HEAD: Final = (
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: relay\r\nX-Tag: a\r\nConnection: X-Gone\r\nX-Gone: 1\r\n"
    b"Authorization: Bearer client\r\nContent-Length: "
)
STREAM: Final = (
    b"HTTP/1.1 200 OK\r\nX-Engine: 1\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
    b"8\r\ndata: 1\n\r\n2\r\n\n\n\r\n0\r\n\r\n"
)
_ID: Final = re.compile(rb"x-request-id: ([0-9a-f]{32})")


def with_body(body: bytes, head: bytes = HEAD) -> bytes:
    return head + b"%d\r\n\r\n%b" % (len(body), body)


def messages(received: bytes, number: int) -> list[tuple[list[bytes], bytes]]:
    """Of each request its lines and its body."""
    found = []
    for _ in range(number):
        head, _, received = received.partition(b"\r\n\r\n")
        *lines, length = head.split(b"\r\n")
        assert length.startswith(b"content-length: ")
        size = int(length.rpartition(b" ")[2])
        found.append((lines, received[:size]))
        received = received[size:]
    assert not received
    return found


async def test_only_id_and_length_differ() -> None:
    engine = Engine(OK)
    bodies = [b'{"model":"m"}', b'{"model":"m","n":1}', b"{}", b'{"model":"m"}']
    async with exchange(engine) as (_, client):
        for body in bodies:
            await client.send(with_body(body))
            assert (await client.answer()).status == 200
    (received,) = engine.received
    found = messages(received, len(bodies))
    assert [body for _, body in found] == bodies
    ids = {_ID.fullmatch(line)[1] for lines, _ in found for line in lines if _ID.fullmatch(line)}  # type: ignore[index]
    assert len(ids) == len(bodies)
    heads = {tuple(line for line in lines if not _ID.fullmatch(line)) for lines, _ in found}
    assert heads == {
        (
            b"POST /v1/chat/completions HTTP/1.1", b"host: " + engine.authority, b"x-tag: a",
            b"authorization: Bearer client", b"via: 1.1 relay", b"x-forwarded-for: 127.0.0.1",
            b"x-forwarded-proto: http", b"x-forwarded-host: relay", b"accept-encoding: identity",
        )
    }  # fmt: skip


async def test_ids_of_the_clients_own() -> None:
    """A head that is known but for its id: engine and client get that one, and a bad one is no one's."""
    engine = Engine(OK)
    ids = [b"one", b"two", b"", b"a" * 201, b"two", b"three"]
    told = []
    async with exchange(engine) as (_, client):
        for own in ids:
            await client.send(with_body(b"{}", HEAD.replace(b"X-Tag", b"X-Request-Id: %b\r\nX-Tag" % own)))
            told.append((await client.answer()).headers["x-request-id"].encode())
    (received,) = engine.received
    got = [re.findall(rb"\r\nx-request-id: ([^\r]*)", b"\r\n".join(lines)) for lines, _ in messages(received, len(ids))]
    assert [own for (own,) in got] == told
    made = [bool(re.fullmatch(rb"[0-9a-f]{32}", one)) for one in told]
    assert made == [False, False, True, True, False, False]
    assert [one for one in told if one in ids] == [b"one", b"two", b"two", b"three"]


async def test_traces_are_each_requests_own() -> None:
    engine = Engine(OK)
    traces = [b"00-1", b"00-2", b"00-2", b"", b"a b", b"00-3"]
    async with exchange(engine) as (_, client):
        for trace in traces:
            await client.send(with_body(b"{}", HEAD.replace(b"X-Tag: a", b"X-Tag: a\r\nTraceParent: " + trace)))
            assert (await client.answer()).status == 200
        await client.send(with_body(b"{}"))
        assert (await client.answer()).status == 200
    (received,) = engine.received
    heads = [b"\r\n".join(lines) for lines, _ in messages(received, len(traces) + 1)]
    assert [re.findall(rb"\r\ntraceparent: ([^\r]*)", head) for head in heads] == [*([one] for one in traces), []]


async def test_clients_of_other_addresses_with_the_same_head() -> None:
    """What is known of a head holds for all connections; whose it is does not."""
    engine = Engine(OK)
    async with exchange(engine) as (relay, first):
        stream = await trio.open_tcp_stream("127.0.0.1", relay.port, local_address="127.0.0.2")
        async with Tap(stream) as second:
            for client in (first, second, second, first):
                await client.send(with_body(b"{}"))
                assert (await client.answer()).status == 200
    (received,) = engine.received
    found = re.findall(rb"\r\nx-forwarded-for: ([^\r]*)", received)
    assert found == [b"127.0.0.1", b"127.0.0.2", b"127.0.0.2", b"127.0.0.1"]


@pytest.mark.parametrize(
    ("other", "seen", "unseen"),
    [
        (HEAD.replace(b"X-Tag: a", b"X-Tag: b"), b"\r\nx-tag: b", b"x-tag: a"),
        (HEAD.replace(b"Bearer client", b"Bearer other"), b"Bearer other", b"Bearer client"),
        (HEAD.replace(b"Connection: X-Gone\r\n", b""), b"\r\nx-gone: 1", b"\r\nconnection"),
        (HEAD.replace(b"Host: relay", b"Host: elsewhere"), b"x-forwarded-host: elsewhere", b"x-forwarded-host: relay"),
        (HEAD.replace(b"/v1/chat/completions", b"/v1/embeddings"), b"POST /v1/embeddings ", b"accept-encoding"),
        (HEAD.replace(b"X-Tag: a", b"X-Request-Id: own"), b"\r\nx-request-id: own\r\n", b"x-tag"),
    ],
    ids=["field", "credential", "nominated", "host", "target", "id"],
)
async def test_another_head_in_between(other: bytes, seen: bytes, unseen: bytes) -> None:
    engine = Engine(OK)
    async with exchange(engine) as (_, client):
        for head in (HEAD, HEAD, other, HEAD):
            await client.send(with_body(b"{}", head))
            assert (await client.answer()).status == 200
    (received,) = engine.received
    heads = [b"\r\n".join(lines) + b"\r\n" for lines, _ in messages(received, 4)]
    assert seen in heads[2]
    assert unseen not in heads[2]
    assert all(seen not in head for head in (heads[0], heads[1], heads[3]))
    assert len({_ID.sub(b"", head) for head in (heads[0], heads[1], heads[3])}) == 1


async def test_other_keys_hold_for_the_next_request(tmp_path: Path) -> None:
    def auth(number: int) -> AuthConfig:
        keys, upstream = tmp_path / f"keys{number}", tmp_path / f"upstream{number}"
        keys.write_text(keys_line("alice", b"client") + "\n")
        upstream.write_text(f"engine-{number}\n")
        return AuthConfig(keys_file=str(keys), upstream_key_file=str(upstream))

    engine = Engine(OK)
    async with exchange(engine) as (relay, client):
        config = relay.worker.service.config
        for number in (1, 2, 2):
            changed = msgspec.structs.replace(config, auth=auth(number))
            relay.worker.roster.reconfigure(changed, Guard.read(changed.auth))
            await client.send(with_body(b"{}"))
            assert (await client.answer()).status == 200
    (received,) = engine.received
    assert re.findall(rb"authorization: Bearer (\S+)", received) == [b"engine-1", b"engine-2", b"engine-2"]


async def test_streams_that_begin_alike_have_heads_of_their_own() -> None:
    engine = Engine(STREAM, others=STREAM)
    async with exchange(engine) as (_, client):
        for head in (HEAD, HEAD, HEAD.replace(b"X-Tag: a", b"X-Request-Id: own")):
            await client.send(with_body(b'{"stream":true}', head))
            answer = await client.answer()
            assert (answer.status, answer.end, answer.headers["x-engine"]) == (200, "whole", "1")
            assert answer.headers["x-accel-buffering"] == "no"
    heads = [part for part in client.raw.split(b"HTTP/1.1 200 OK\r\n") if part]
    ids = [re.findall(rb"x-request-id: (\S+)\r\n", head) for head in heads]
    assert len(ids) == len({one for (one,) in ids}) == 3
    assert ids[2] == [b"own"]


async def test_a_stream_for_a_client_that_takes_no_chunks() -> None:
    """The same head of the engine's, first for HTTP/1.1, then for 1.0."""
    engine = Engine(STREAM, others=STREAM)
    async with exchange(engine) as (_, client):
        await client.send(with_body(b'{"stream":true}'))
        assert "transfer-encoding" in (await client.answer()).headers
        await client.send(with_body(b'{"stream":true}', HEAD.replace(b"HTTP/1.1", b"HTTP/1.0")))
        answer = await client.answer()
        assert "transfer-encoding" not in answer.headers
        assert answer.headers["connection"] == "close"
