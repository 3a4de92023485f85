"""Answers: what reaches the client is one well-formed answer, a 502, or one that is plainly cut.

And whatever an engine did, the next request gets its own answer: over the same connection to the engine where that is
beyond doubt, over another one otherwise.
"""

from __future__ import annotations

import json

import pytest

from tests.conformance import llhttp
from tests.conformance.answers import BAD, BROKEN, GOOD, POISON, Bad, Broken, Good
from tests.conformance.peers import Engine, Tap, exchange
from tests.e2e.harness import until

#: What the relay adds to every head.
ADDED = (b"date: ", b"x-request-id: ", b"server-timing: ")


def _request(path: bytes = b"/p", method: bytes = b"GET", version: bytes = b"1.1") -> bytes:
    body = b'{"stream":true}' if path != b"/p" else b""
    return b"%b %b HTTP/%b\r\nHost: a\r\nContent-Length: %d\r\n\r\n%b" % (method, path, version, len(body), body)


async def _next_is_its_own(port: int) -> None:
    async with await Tap.connect(port) as client:
        answer = await client.ask(_request())
        assert (answer.status, answer.payload) == (200, b"second")


@pytest.mark.parametrize("row", GOOD, ids=lambda row: row.id)
async def test_good(row: Good) -> None:
    engine = Engine(row.data, row.then, late=row.late)
    async with exchange(engine) as (relay, client):
        answer = await client.ask(_request(b"/p", row.method, row.version))
        start, *fields = answer.head.removesuffix(b"\r\n\r\n").split(b"\r\n")
        closes = row.version == b"1.0"
        assert start == b"HTTP/1.1 %d %b" % (row.status, row.reason)
        assert [field for field in fields if not field.startswith(ADDED)] == [
            *row.fields,
            *([b"connection: close"] if closes else []),
        ]
        assert answer.payload == row.body
        assert answer.end == ("fin" if closes and not row.fields else "whole")
        assert [int(head.split(b" ")[1]) for head in answer.interim] == list(row.interim)
        for head in answer.interim:
            assert b"content-length" not in head
            assert b"transfer-encoding" not in head
        if row.method != b"HEAD":
            _assert_one(client.raw, row)
        await relay.record()
        await _next_is_its_own(relay.port)
    assert len(engine.received) == (1 if row.is_reused else 2)


def _assert_one(raw: bytes, row: Good) -> None:
    seen = llhttp.responses(raw)
    count = 1 + len(row.interim)
    is_whole = row.version == b"1.1" or bool(row.fields)
    assert (seen.error, seen.begun, seen.completed) == (None, count, count if is_whole else count - 1)
    assert seen.body == row.body


@pytest.mark.parametrize("row", BAD, ids=lambda row: row.id)
async def test_bad(row: Bad) -> None:
    engine = Engine(row.data, row.then, late=POISON)
    async with exchange(engine) as (relay, client):
        await client.send(_request(row.path))
        raw = await client.everything()
        seen = llhttp.responses(raw)
        assert seen.is_one, raw
        assert (seen.status, json.loads(seen.body)["error"]["code"]) == (502, row.code)
        assert (b"connection", b"close") in seen.headers
        await _next_is_its_own(relay.port)
    assert len(engine.received) == 2


@pytest.mark.parametrize("row", BROKEN, ids=lambda row: row.id)
async def test_broken(row: Broken) -> None:
    engine = Engine(row.data, row.then, late=POISON)
    async with exchange(engine) as (relay, client):
        await client.send(_request(row.path))
        raw = await client.everything()
        seen = llhttp.responses(raw)
        assert (seen.status, seen.begun, seen.completed, seen.error) == (200, 1, 0, None), raw
        if row.path == b"/p":
            assert seen.body == row.body
        else:
            assert seen.body.startswith(row.body)
            assert (
                json.loads(seen.body.removeprefix(row.body).removeprefix(b"data: "))["error"]["code"]
                == "upstream_error"
            )
        await until(lambda: not relay.worker.connections)
        await _next_is_its_own(relay.port)
    assert len(engine.received) == 2
