"""Requests: what reaches the engine, byte for byte, is one well-formed request or nothing."""

from __future__ import annotations

import json

import pytest

from tests.conformance import llhttp
from tests.conformance.passed import PASSED, WAITING, Passed, Waiting
from tests.conformance.peers import OK, Engine, Forwarded, exchange
from tests.conformance.refused import GET, REFUSED, Refused
from tests.e2e.harness import until

FIRST = b"GET /first HTTP/1.1\r\nHost: a\r\n\r\n"
SMUGGLED = b"GET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n"
CODES = {413: "body_too_large", 431: "headers_too_large"}


@pytest.mark.parametrize("row", REFUSED, ids=lambda row: row.id)
async def test_refused(row: Refused) -> None:
    await _is_refused(row, b"")


@pytest.mark.parametrize("row", REFUSED[::7], ids=lambda row: row.id)
async def test_refused_behind_another_request(row: Refused) -> None:
    await _is_refused(row, FIRST)


async def _is_refused(row: Refused, before: bytes) -> None:
    engine = Engine(OK, others=OK)
    async with exchange(engine) as (relay, client):
        await client.send(before + row.data + SMUGGLED)
        if before:
            assert (await client.answer()).status == 200
        start = len(client.raw) - len(client._buffer)
        refusal = (await client.everything())[start:]
        seen = llhttp.responses(refusal)
        assert seen.is_one, refusal
        assert seen.status == row.status, seen.body
        assert (b"connection", b"close") in seen.headers
        assert json.loads(seen.body)["error"]["code"] == CODES.get(row.status, "bad_request")
        assert (await relay.record(2 if before else 1)).outcome == "RR"
    assert engine.requests() == ([Forwarded(b"GET /first").to(engine.authority)] if before else [])


@pytest.mark.parametrize("row", PASSED, ids=lambda row: row.id)
async def test_passed(row: Passed) -> None:
    engine = Engine(_ok(row.forwarded[0]), others=OK)
    expected = list(row.forwarded) if row.closes else [*row.forwarded, Forwarded(b"GET /p")]
    async with exchange(engine) as (_relay, client):
        await client.send(row.data + GET + b"\r\n")
        for request in expected:
            answer = await client.answer(is_head=request.method == b"HEAD")
            assert (answer.status, answer.end) == (200, "whole")
            assert answer.payload == (b"" if request.method == b"HEAD" else b"ok")
        assert (answer.headers.get("connection") == "close") == row.closes
        if row.closes:
            assert await client.is_closed()
    received = b"".join(engine.requests())
    assert received == b"".join(request.to(engine.authority) for request in expected)
    _assert_llhttp_agrees(received, len(expected))


@pytest.mark.parametrize("row", WAITING, ids=lambda row: row.id)
async def test_waiting(row: Waiting) -> None:
    engine = Engine(OK)
    async with exchange(engine) as (relay, client):
        await client.send(row.data)
        client.leave("fin")
        assert await client.everything() == b""
        await until(lambda: not relay.worker.connections)
    assert engine.requests() == []


def _ok(request: Forwarded) -> bytes:
    return OK.removesuffix(b"ok") if request.method == b"HEAD" else OK


def _assert_llhttp_agrees(received: bytes, count: int) -> None:
    seen = llhttp.requests(received)
    if seen.error is not None and ("method" in seen.error or "Preface" in seen.error):
        return  # it knows a list of methods, and no others
    assert (seen.error, seen.completed) == (None, count)
