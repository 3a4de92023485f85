"""Split pools of built-in engines, which check each connector's handshake: the relay's requests pass, others do not."""

from __future__ import annotations

import errno
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, Final

import msgspec
import pytest
import trio

from relay.address import parse_upstream
from relay.config import PoolConfig
from relay.core.connectors import CONNECTORS
from relay_bench.engine import Engine, EngineConfig, serve_engine
from relay_bench.engine.handover import CONNECTORS as ENGINES_CONNECTORS
from relay_bench.processes import free_port
from tests.e2e.fleet import RunningFleet, running_fleet
from tests.e2e.harness import Answer, ask, until
from tests.e2e.secure import Authority, behind_tls

#: In a decode leg that is refused the engine waits no longer than this.
IMPATIENT: Final = 0.05


class Pair:
    """A prefiller and a decoder of one connector."""

    def __init__(self, prefiller: Engine, decoder: Engine) -> None:
        self.prefiller = prefiller
        self.decoder = decoder
        self.relay: RunningFleet

    def handles(self) -> tuple[int, int, int]:
        """Given, taken and held, by both."""
        both = [engine.ledger.handles.as_dict() for engine in (self.prefiller, self.decoder)]
        given, taken, held = (sum(one[f"handles_{name}"] for one in both) for name in ("given", "taken", "held"))
        return given, taken, held


async def engine_of(nursery: trio.Nursery, connector: str, role: str, **settings: Any) -> Engine:
    while True:
        kv_port = free_port() if connector in ("mooncake", "sglang", "p2p_nccl") else 0
        config = EngineConfig(connector=connector, role=role, kv_port=kv_port, **settings)
        try:
            engine: Engine = await nursery.start(serve_engine, config)
        except OSError as error:
            if not kv_port or error.errno != errno.EADDRINUSE:  # somebody has taken it meanwhile
                raise
        else:
            return engine


@asynccontextmanager
async def pair_of(connector: str, authority: Authority | None = None, **settings: Any) -> AsyncIterator[Pair]:
    """With an `authority`, both are behind TLS."""
    async with trio.open_nursery() as nursery, AsyncExitStack() as stack:
        pair = Pair(*[await engine_of(nursery, connector, role, **settings) for role in ("prefill", "decode")])
        tables: list[Any] = []
        for engine in (pair.prefiller, pair.decoder):
            where = {"kv_address": f"127.0.0.1:{engine.kv_port}", "bootstrap_port": engine.kv_port}
            where["bootstrap"] = f"http://127.0.0.1:{engine.kv_port}"
            upstream = parse_upstream(engine.url)
            if authority is not None:
                edge = await stack.enter_async_context(behind_tls(engine.url, authority.server()))
                upstream = edge.as_upstream(authority.path)
            tables.append(msgspec.structs.replace(upstream, **where))
        pool: dict[str, Any] = {"connector": connector, "prefill": (tables[0],), "decode": (tables[1],)}
        async with running_fleet(PoolConfig(**pool)) as pair.relay:
            yield pair
        nursery.cancel_scope.cancel()


def body_of(**members: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": [{"role": "user", "content": "one two three"}], "max_tokens": 4, **members}


async def chat(port: int, body: dict[str, Any], request_id: str = "own", path: str = "/v1/chat/completions") -> Answer:
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\nx-request-id: {request_id}\r\ncontent-length: {len(data)}\r\n\r\n"
    return await ask(port, head.encode() + data)


def test_the_engine_has_them_all() -> None:
    assert set(CONNECTORS) == set(ENGINES_CONNECTORS)


# -- through the relay


@pytest.mark.parametrize("is_tls", [False, True], ids=["plain", "tls"])
@pytest.mark.parametrize("stream", [True, False], ids=["stream", "json"])
@pytest.mark.parametrize("connector", CONNECTORS)
async def test_the_relay_keeps_to_the_handshake(connector: str, stream: bool, is_tls: bool, tmp_path: Path) -> None:
    async with pair_of(connector, Authority(tmp_path) if is_tls else None) as pair:
        for number in range(3):
            got = await chat(pair.relay.port, body_of(stream=stream), f"own-{number}")
            assert (got.status, got.end) == (200, "whole")
            assert b'"error"' not in got.payload
        served = [engine.stats()["completed"] for engine in (pair.prefiller, pair.decoder)]
        await until(lambda: pair.handles() == ((3, 3, 0) if connector != "none" else (0, 0, 0)))
    assert served == [3, 3]


@pytest.mark.parametrize("connector", CONNECTORS)
async def test_the_other_routes_too(connector: str) -> None:
    prompt = {"model": "tiny", "prompt": "one two three", "max_tokens": 4, "stream": True}
    asked = [("/v1/completions", prompt), ("/v1/messages", body_of(stream=True))]
    if connector != "ascend_layerwise":  # decoded alone there
        asked.append(("/v1/responses", {"model": "tiny", "input": "one", "max_output_tokens": 4, "stream": True}))
    count = len(asked) if connector != "none" else 0
    async with pair_of(connector) as pair:
        for path, body in asked:
            got = await chat(pair.relay.port, body, "own" + path[-3:], path)
            assert (got.status, got.end) == (200, "whole")
            assert b'"error"' not in got.payload
        await until(lambda: pair.handles() == (count, count, 0))


async def test_a_prefiller_that_was_started_anew_is_found_out() -> None:
    """Its engine id is another; the relay asks the bootstrap server again once that has failed a request."""
    async with pair_of("mooncake") as pair:
        assert (await chat(pair.relay.port, body_of(), "a")).status == 200
        pair.prefiller.ledger.engine_id = "another"
        assert (await chat(pair.relay.port, body_of(), "b")).status == 500
        assert (await chat(pair.relay.port, body_of(), "c")).status == 200


# -- requests that no relay should send


def told(engine: Engine, **other: Any) -> dict[str, Any]:
    """A good pull handle's form."""
    usual = {"do_remote_prefill": True, "remote_engine_id": engine.ledger.engine_id, "remote_request_id": "h"}
    return {**usual, "remote_host": engine.host, "remote_port": engine.port, "remote_block_ids": [[1]], **other}


NO_HANDLE: Final[dict[str, dict[str, Any]]] = {
    "another request's": {"remote_request_id": "never"},
    "another prefiller's": {"remote_engine_id": "x"},
    "nobody there": {"remote_port": 1},
    "no blocks": {"remote_block_ids": []},
    "a member missing": {"remote_host": None},
}


@pytest.mark.parametrize("wrong", NO_HANDLE.values(), ids=NO_HANDLE)
async def test_a_decoder_fails_without_its_blocks(nursery: trio.Nursery, wrong: dict[str, Any]) -> None:
    prefiller, decoder = [await engine_of(nursery, "nixl", "both") for _ in range(2)]
    prefiller.ledger.handles.give("h")
    got = await chat(decoder.port, body_of(kv_transfer_params=told(prefiller, **wrong)))
    assert (got.status, got.error["message"]) == (500, "Internal server error")
    assert prefiller.ledger.handles.held == {"h"}
    good = body_of(kv_transfer_params=told(prefiller))
    assert (await chat(decoder.port, good)).status == 200
    assert (await chat(decoder.port, good)).status == 500  # it was used
    assert prefiller.ledger.handles.as_dict() == {"handles_given": 1, "handles_taken": 1, "handles_held": 0}


async def test_only_an_answer_cut_by_its_length_has_a_handle(nursery: trio.Nursery) -> None:
    engine = await engine_of(nursery, "nixl", "both")
    asks = {"do_remote_decode": True, "do_remote_prefill": False}
    unlimited = {key: value for key, value in body_of(kv_transfer_params=asks).items() if key != "max_tokens"}
    assert (await chat(engine.port, unlimited)).json()["kv_transfer_params"] is None
    assert (await chat(engine.port, body_of(kv_transfer_params=asks))).json()["kv_transfer_params"]
    assert engine.ledger.handles.given == 1


DIED: Final = "EngineCore encountered an issue. See stack trace (above) for the root cause."
NO_ROOM: Final = "Invalid request: Disaggregated request received without bootstrap room id"
ROOM: Final = {"bootstrap_host": "127.0.0.1", "bootstrap_port": 1, "bootstrap_room": 7}
PULL: Final = {"do_remote_prefill": True, "transfer_id": "t", "remote_engine_id": "e"}


@pytest.mark.parametrize(
    ("connector", "role", "members", "status", "message"),
    [
        ("mooncake", "prefill", {"kv_transfer_params": {"do_remote_decode": True}}, 500, DIED),
        ("mooncake", "decode", {"kv_transfer_params": PULL}, 500, "Internal server error"),
        ("mooncake", "decode", {"kv_transfer_params": PULL | {"remote_bootstrap_addr": "http://127.0.0.1:1"}}, 500,
         "Internal server error"),
        ("p2p_nccl", "prefill", {}, 500, DIED),
        ("p2p_nccl", "decode", {}, 500, DIED),
        ("ascend_layerwise", "decode", {"kv_transfer_params": {"do_remote_prefill": True}}, 500, DIED),
        ("ascend_layerwise", "decode",
         {"kv_transfer_params": {"do_remote_prefill": True, "metaserver": "http://127.0.0.1:1/"}}, 500,
         "Internal server error"),
        ("ascend_layerwise", "prefill", {"kv_transfer_params": {"do_remote_decode": True}}, 500, DIED),
        ("sglang", "prefill", {}, 400, NO_ROOM),
        ("sglang", "decode", {}, 400, NO_ROOM),
        ("sglang", "prefill", ROOM, 500, "Prefill bootstrap failed for request"),
        ("sglang", "decode", ROOM, 500, "Decode transfer failed for request"),
        ("none", "both", {"kv_transfer_params": PULL}, 200, ""),
    ],
)  # fmt: skip
async def test_a_wrong_handshake_has_the_engines_error(
    nursery: trio.Nursery, connector: str, role: str, members: dict[str, Any], status: int, message: str
) -> None:
    engine = await engine_of(nursery, connector, role, kv_patience_s=IMPATIENT)
    got = await chat(engine.port, body_of(**members))
    assert got.status == status
    if message:
        answer = got.json()
        assert answer.get("error", answer)["message"].startswith(message)


async def test_tensors_pushed_to_another_id_are_held_and_nobodys(nursery: trio.Nursery) -> None:
    prefiller, decoder = [
        await engine_of(nursery, "p2p_nccl", role, kv_patience_s=IMPATIENT) for role in ("prefill", "decode")
    ]
    pair = f"___prefill_addr_127.0.0.1:{prefiller.kv_port}___decode_addr_127.0.0.1:{decoder.kv_port}"
    assert (await chat(prefiller.port, body_of(), f"{pair}_1")).status == 200
    await until(lambda: len(decoder.ledger.handles.held) == 1)
    assert (await chat(decoder.port, body_of(), f"{pair}_2")).status == 500
    assert len(decoder.ledger.handles.held) == 1


async def test_a_client_that_leaves_a_waiting_engine_aborts(nursery: trio.Nursery) -> None:
    engine = await engine_of(nursery, "sglang", "prefill")
    stream = await trio.open_tcp_stream("127.0.0.1", engine.port)
    data = json.dumps(body_of(**ROOM)).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(data)}\r\n\r\n"
    await stream.send_all(head.encode() + data)
    await until(lambda: engine.stats()["queued"] == 1)
    await stream.aclose()
    await until(lambda: engine.stats()["aborted"] == 1)
    assert engine.stats()["queued"] == 0
