"""Usage and cost: asked for, hidden, told, and recorded, through the relay."""

from __future__ import annotations

import json
from decimal import Decimal
from typing import Any, Final

import msgspec
import pytest

from relay.config import Config, CostConfig, PriceConfig, StreamConfig
from relay.core import metrics
from relay.core.board import total
from relay_bench.engine import Engine
from tests.conftest import RunningRelay, running_relay
from tests.e2e.harness import (
    CHAT_PATH,
    PATHS,
    Client,
    ask,
    request,
    same,
    scripted,
)

ALWAYS: Final = StreamConfig(include_usage="always")
ASKED: Final = {"stream_options": {"include_usage": True}}
WHOLE_REQUEST: Final = {"stream": False}
#: One for each token: what is asked for has 6 of them.
PRICES: Final = {"ti*": PriceConfig(prompt=1e6, cached_prompt=0.5e6, completion=100e6)}
TELL: Final = CostConfig(in_usage=True)
OPENAI_STREAMS: Final = (CHAT_PATH, "/v1/completions")
COST_NAMES: Final = ("prompt_total_cost", "completion_total_cost", "total_cost")


def cost_metric(relay: RunningRelay) -> float:
    cells = total([relay.worker.service.tally.block]).get((metrics.COST.name,))
    return cells[0] if cells else 0.0


def usage_of(payload: bytes) -> dict[str, Any]:
    """The last usage object in an answer."""
    last = payload.rpartition(b'"usage":')[2]
    usage: dict[str, Any] = json.JSONDecoder().raw_decode(last.decode())[0]
    return usage


# -- asking


@pytest.mark.parametrize("rechunk", ["", "size:7", "frames:20", "bytes", "close"])
@pytest.mark.parametrize("path", OPENAI_STREAMS)
async def test_the_usage_frame_is_asked_for_and_hidden(engine: Engine, path: str, rechunk: str) -> None:
    direct = await ask(engine.port, request(path, ASKED, x_request_id="x"))
    *tokens, usage, done = direct.frames
    assert b'"choices":[],"usage":{' in usage
    async with running_relay(engine.url, stream=ALWAYS) as relay:
        answer = await ask(relay.port, request(path, x_request_id="x", sim_rechunk=rechunk))
        record = await relay.record()
    assert answer.end == "whole"
    assert same(answer.payload) == same(b"".join([*tokens, done]))
    assert json.loads(engine.last(path)["body"])["stream_options"] == {"include_usage": True}
    assert (record.usage, record.completion_tokens, record.frames) == ("engine", 6, len(tokens) + 1)


@pytest.mark.parametrize("path", OPENAI_STREAMS)
async def test_a_client_that_asked_keeps_the_frame(engine: Engine, path: str) -> None:
    direct = await ask(engine.port, request(path, ASKED, x_request_id="x"))
    async with running_relay(engine.url, stream=ALWAYS) as relay:
        answer = await ask(relay.port, request(path, ASKED, x_request_id="x"))
    assert b'"usage":{' in direct.payload
    assert same(answer.payload) == same(direct.payload)


@pytest.mark.parametrize("path", PATHS)
async def test_other_requests_are_not_touched(engine: Engine, path: str) -> None:
    async with running_relay(engine.url, stream=ALWAYS) as relay:
        data = request(path, WHOLE_REQUEST if path in OPENAI_STREAMS else {})
        await ask(relay.port, data)
        record = await relay.record()
    assert engine.last(path)["body"].encode() == data.partition(b"\r\n\r\n")[2]
    assert (record.usage, record.completion_tokens) == ("engine", 6)


async def test_as_asked_is_the_default(engine: Engine) -> None:
    async with running_relay(engine.url) as relay:
        await ask(relay.port, request())
        record = await relay.record()
    assert "stream_options" not in json.loads(engine.last(CHAT_PATH)["body"])
    assert (record.usage, record.completion_tokens, record.prompt_tokens) == ("estimated", 6, None)


# -- streams that were cut


@pytest.mark.parametrize(
    ("usage", "source", "prompt_known"), [("continuous", "engine", True), ("none", "estimated", False)]
)
@pytest.mark.parametrize("fault", ["die-after:4", "stall-after:4"])
async def test_a_cut_stream_tells_how_far_it_came(
    engine: Engine,
    fault: str,
    usage: str,
    source: str,
    prompt_known: bool,
) -> None:
    """Four frames: the role, and three tokens."""
    async with running_relay(engine.url, prices=PRICES) as relay:
        async with await Client.connect(relay.port) as client:
            await client.send(request(sim_fault=fault, sim_usage=usage))
            await client.frames(4)
            if fault.startswith("stall"):
                client.leave("close")
            record = await relay.record()
        assert cost_metric(relay) == record.cost
    assert record.outcome == ("CD" if fault.startswith("stall") else "UD")
    assert (record.usage, record.completion_tokens) == (source, 3)
    assert (record.prompt_tokens is not None) == prompt_known
    assert record.cost == (record.prompt_tokens or 0) + 300


# -- money


async def test_prices_that_change_meanwhile_are_for_those_who_come(engine: Engine) -> None:
    """The client and the record are told the same."""
    async with running_relay(engine.url, prices=PRICES, cost=TELL) as relay:
        async with await Client.connect(relay.port) as client:
            await client.send(request(body=ASKED, sim_step_ms="20"))
            await client.frames(2)
            service = relay.worker.service
            dearer = {"ti*": PriceConfig(prompt=1e9, cached_prompt=1e9, completion=1e9)}
            service.reconfigure(msgspec.structs.replace(service.config, prices=dearer), service.guard)
            told = usage_of((await client.answer()).payload)
        assert told["total_cost"] == (await relay.record()).cost


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("is_stream", [True, False])
@pytest.mark.parametrize("is_forced", [True, False])
async def test_costs_in_record_metrics_and_usage(
    engine: Engine,
    path: str,
    is_stream: bool,
    is_forced: bool,
) -> None:
    body: dict[str, Any] = {} if is_stream else WHOLE_REQUEST
    if is_stream and path in OPENAI_STREAMS:
        body = ASKED
    data = request(path, body, x_request_id="x")
    direct = await ask(engine.port, data)
    stream = StreamConfig(force_stream=is_forced)
    async with running_relay(engine.url, prices=PRICES, cost=TELL, stream=stream) as relay:
        answer = await ask(relay.port, data)
        record = await relay.record()
        assert cost_metric(relay) == record.cost
    assert record.prompt_tokens is not None
    assert record.cost == record.prompt_tokens - Decimal(record.cached_tokens or 0) / 2 + 600
    assert b'"cost":%d' % record.cost in record.encode()
    told = usage_of(answer.payload)
    assert told["total_cost"] == record.cost
    costs = {name: told.pop(name) for name in COST_NAMES}
    assert costs["prompt_total_cost"] + costs["completion_total_cost"] == costs["total_cost"]
    assert told == usage_of(direct.payload)
    if is_stream or not is_forced:  # nothing else has changed, to the byte
        text = ",".join(f'"{name}":{costs[name]}' for name in COST_NAMES).encode()
        assert answer.payload.count(text) == 1
        assert same(answer.payload.replace(b"," + text, b"")) == same(direct.payload)


async def test_without_a_price_nothing_costs(engine: Engine) -> None:
    prices = {"other": PriceConfig(prompt=1.0)}
    async with running_relay(engine.url, prices=prices, cost=TELL) as relay:
        for body in (ASKED, WHOLE_REQUEST):
            answer = await ask(relay.port, request(body=body))
            assert b"cost" not in answer.payload
        assert [record.cost for record in relay.records] == [None, None]
        assert cost_metric(relay) == 0
    assert b'"cost":null' in relay.records[0].encode()


async def test_costs_stay_between_operator_and_record_by_default(engine: Engine) -> None:
    async with running_relay(engine.url, prices=PRICES) as relay:
        answer = await ask(relay.port, request(body=WHOLE_REQUEST))
        record = await relay.record()
    assert b"cost" not in answer.payload
    assert record.cost


async def test_sums_of_money_do_not_drift(engine: Engine) -> None:
    """A tenth is no float; ten of them are one."""
    prices = {"tiny": PriceConfig(completion=0.1e6)}
    async with running_relay(engine.url, prices=prices) as relay, await Client.connect(relay.port) as client:
        for _ in range(10):
            await client.ask(request(body={**WHOLE_REQUEST, "max_tokens": 1}))
        assert cost_metric(relay) == 1.0
        assert sum((record.cost or Decimal(0)) for record in relay.records) == 1


async def test_prices_of_a_reloaded_configuration(engine: Engine) -> None:
    async with running_relay(engine.url) as relay:
        service = relay.worker.service
        config = Config(pools=service.config.pools, prices=PRICES, health=service.config.health)
        relay.worker.roster.reconfigure(config, service.guard)
        await ask(relay.port, request(body=WHOLE_REQUEST))
        assert (await relay.record()).cost


@pytest.mark.parametrize("framing", ["", "length,", "close,"])
async def test_a_long_json_body_beyond_the_limit_goes_on_unpriced(engine: Engine, framing: str) -> None:
    small = StreamConfig(max_answer_bytes=50)
    direct = await ask(engine.port, request(body=WHOLE_REQUEST, x_request_id="x"))
    async with running_relay(engine.url, prices=PRICES, cost=TELL, stream=small) as relay:
        data = request(body=WHOLE_REQUEST, x_request_id="x", sim_rechunk=f"{framing}writes:10")
        answer = await ask(relay.port, data)
        record = await relay.record()
    assert same(answer.payload) == same(direct.payload)
    assert record.cost


async def test_a_json_body_that_breaks_off_is_no_good_answer() -> None:
    cut = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n{"
    async with scripted((cut, "fin")) as engines:
        async with running_relay(engines.urls[0], prices=PRICES, cost=TELL) as relay:
            answer = await ask(relay.port, request(body=WHOLE_REQUEST))
            record = await relay.record()
    assert answer.end == "fin"
    assert record.outcome == "UD"


async def test_bytes_behind_a_json_body_end_the_engines_connection() -> None:
    body = b'{"usage":{"prompt_tokens":1,"completion_tokens":1}}'
    answer = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)
    async with scripted((answer + b"HTTP/1.1", "keep"), (answer, "keep"), (answer, "keep"), addresses=1) as engines:
        async with running_relay(engines.urls[0], prices=PRICES, cost=TELL) as relay:
            for _ in range(3):
                assert usage_of((await ask(relay.port, request(body=WHOLE_REQUEST))).payload)["total_cost"] == 101
    assert engines.connections == 2


async def test_errors_are_not_priced(engine: Engine) -> None:
    direct = await ask(engine.port, request(sim_fault="json-error"))
    async with running_relay(engine.url, prices=PRICES, cost=TELL) as relay:
        answer = await ask(relay.port, request(sim_fault="json-error"))
    assert (answer.status, answer.payload) == (direct.status, direct.payload)


# -- the Cocoon scenarios


@pytest.mark.parametrize("rechunk", ["", "bytes", "writes:1"])
async def test_cocoon_streams(engine: Engine, rechunk: str) -> None:
    """Costs come in, ``[DONE]`` stays verbatim, the last blank line is added, a frame of no JSON passes."""
    async with running_relay(engine.url, prices=PRICES, cost=TELL) as relay:
        for number, fault in enumerate(("non-json-frame:2", "no-final-blank"), 1):
            direct = await ask(engine.port, request(body=ASKED, sim_fault=fault, x_request_id="x"))
            data = request(body=ASKED, sim_fault=fault, sim_rechunk=rechunk, x_request_id="x")
            answer = await ask(relay.port, data)
            assert answer.end == "whole"
            assert answer.frames[-1] == b"data: [DONE]\n\n"
            expected = [frame.rstrip(b"\n") + b"\n\n" for frame in direct.frames]
            assert [same(frame) for frame in answer.frames[:-2]] == [same(frame) for frame in expected[:-2]]
            assert usage_of(answer.frames[-2])["total_cost"] == (await relay.record(number)).cost


async def test_usage_at_the_end_of_a_long_answer_counts() -> None:
    usage = b'{"prompt_tokens":7,"completion_tokens":3,"total_tokens":10,"prompt_tokens_details":{"cached_tokens":2}}'
    text = b'{"choices":[{"message":{"content":"%b \\"usage\\": {\\"completion_tokens\\": 9}"}}],"usage":%b,"kv":null}'
    body = text % (b"x" * 1_200_000, usage)
    head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body)
    async with scripted((head + body, "keep")) as engine, running_relay(engine.urls[0], prices=PRICES) as relay:
        assert (await ask(relay.port, request(CHAT_PATH, WHOLE_REQUEST))).payload == body
        record = await relay.record()
    assert (record.usage, record.prompt_tokens, record.cached_tokens, record.completion_tokens) == ("engine", 7, 2, 3)
    assert record.cost == pytest.approx(306)


async def test_what_cannot_be_counted_is_not_let_through_where_it_has_a_price(engine: Engine) -> None:
    members = b",".join(b'"%d":0' % number for number in range(5000))
    body = b'{"model":"tiny","stream":true,"messages":[],%b}' % members
    async with running_relay(engine.url, stream=ALWAYS, prices=PRICES) as relay:
        refused = await ask(relay.port, request(CHAT_PATH, body))
        assert (refused.status, refused.error["code"]) == (400, "invalid_json")
    async with running_relay(engine.url, stream=ALWAYS) as relay:
        await ask(relay.port, request(CHAT_PATH, body))
    assert len(engine.requests()) == 1
