"""Heads of answers that are known by their bytes: however they arrive, and whatever came before, they say the same."""

from __future__ import annotations

import random
import socket
from collections.abc import Sequence
from typing import Final

import pytest

from relay.address import parse_upstream
from relay.core.framing import BodyKind
from relay.core.health import Health, HealthRules
from relay.net import upstream as wire
from relay.net.pool import Upstream, UpstreamConnection

CONTINUE: Final = b"HTTP/1.1 100 Continue\r\n\r\n"
HINTS: Final = b"HTTP/1.1 103 Early Hints\r\nlink: </a>\r\n\r\n"
HEAD: Final = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n"


class Engine:
    """Sends one piece of its answer whenever it is waited for, so each comes with a read of its own."""

    def __init__(self) -> None:
        self.upstream = Upstream(parse_upstream("http://127.0.0.1:1"), "serve", Health(HealthRules(), random.Random(1)))
        self._pieces: list[bytes] = []
        self._sock: socket.socket

    async def wait_upstream(self, *, or_writable: bool = False) -> None:
        if self._pieces:
            self._sock.send(self._pieces.pop(0))
        else:
            self._sock.close()

    async def answer(self, *pieces: bytes, method: bytes = b"POST") -> wire.Answer:
        ours, self._sock = socket.socketpair()
        ours.setblocking(False)
        self._pieces = [*pieces]
        with ours, self._sock:
            connection = UpstreamConnection(self.upstream, ours)
            answer, _ = await wire.ask(self, connection, method, b"POST / HTTP/1.1\r\nhost: e\r\n\r\n", b"")
            return answer


def said(answer: wire.Answer) -> tuple[object, ...]:
    return answer.status, answer.fields, answer.kind, answer.is_reusable, answer.rest


@pytest.mark.parametrize("interim", [CONTINUE, HINTS, CONTINUE + HINTS, CONTINUE * 3], ids=["100", "103", "both", "3"])
async def test_an_interim_answer_is_not_taken_for_the_final_one_behind_it(interim: bytes) -> None:
    engine = Engine()
    for _ in range(3):
        answer = await engine.answer(interim, HEAD, b"{}")
        assert said(answer) == said(await Engine().answer(HEAD))
    refused = await engine.answer(interim, b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\n\r\n")
    assert refused.status == 503


def cuts(data: bytes) -> Sequence[tuple[bytes, ...]]:
    return [(data,), *((data[:at], data[at:]) for at in range(1, len(data)))]


@pytest.mark.parametrize("before", [b"", CONTINUE], ids=["alone", "after 100"])
async def test_wherever_reads_end(before: bytes) -> None:
    engine = Engine()
    for pieces in cuts(before + HEAD + b"{}"):
        answer = await engine.answer(*pieces)
        assert said(answer)[:-1] == said(await Engine().answer(HEAD))[:-1]
        assert b"{}".startswith(answer.rest)


async def test_one_head_answers_differently_to_other_methods() -> None:
    engine = Engine()
    for _ in range(2):
        assert (await engine.answer(HEAD, method=b"GET")).kind is BodyKind.LENGTH
        head = await engine.answer(HEAD, method=b"HEAD")
        assert (head.kind, head.is_reusable) == (BodyKind.NONE, False)
