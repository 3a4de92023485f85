"""What the engine's times and counts depend on: prompt length, prefix cache, places; and how it tells of them."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any, Final

import pytest
import trio
import trio.testing

from relay_bench.engine import Engine, EngineConfig, serve_engine
from relay_bench.engine.handover.handles import Handles

if TYPE_CHECKING:
    from tests.bench.conftest import Client

WORDS: Final = [f"w{number}" for number in range(64)]


def body_of(words: list[str], *, stream: bool = True) -> dict[str, Any]:
    messages = [{"role": "user", "content": " ".join(words)}]
    return {"messages": messages, "max_tokens": 2, "stream": stream, **(USAGE if stream else {})}


USAGE: Final = {"stream_options": {"include_usage": True}}


async def seconds(client: Client, words: list[str]) -> float:
    """How long an answer takes, on trio's test clock."""
    began = trio.current_time()
    async with await client.connect() as stream:
        await stream.send_all(client.request(body_of(words), connection="close"))
        while await stream.receive_some():
            pass
    return trio.current_time() - began


async def metrics(client: Client) -> dict[str, float]:
    page = (await client.ask(path="/metrics", method="GET")).body.decode()
    lines = [line.rpartition(" ") for line in page.splitlines() if not line.startswith("#")]
    return {re.sub(r'engine="0",model_name="tiny",?', "", name).replace("{}", ""): float(at) for name, _, at in lines}


class TestPrefill:
    @pytest.fixture
    def config(self) -> EngineConfig:
        return EngineConfig(ttft_ms=100, step_ms=50, prefill_tokens_per_s=64, prefix_cache_blocks=8)

    async def test_what_is_cached_takes_no_time(self, client: Client, autojump_clock: trio.testing.MockClock) -> None:
        assert await seconds(client, WORDS) == pytest.approx(1.0 + 0.1 + 0.05)
        # of 64 words 48 are found: the last block is computed, as its last token has to be
        assert await seconds(client, WORDS) == pytest.approx(0.25 + 0.1 + 0.05)
        assert await seconds(client, [*WORDS[:20], "another"]) == pytest.approx(5 / 64 + 0.1 + 0.05)


class TestCache:
    @pytest.fixture
    def config(self) -> EngineConfig:
        return EngineConfig(prefix_cache_blocks=5, prompt_tokens_details=True)

    async def cached(self, client: Client, words: list[str]) -> int:
        answer = await client.ask(body_of(words))
        (usage,) = [json.loads(frame[6:])["usage"] for frame in answer.frames if b'"choices":[]' in frame]
        assert usage["prompt_tokens"] == len(words)
        whole = (await client.ask(body_of(words, stream=False))).json()["usage"]
        assert whole["prompt_tokens_details"]["cached_tokens"] == (len(words) - 1) // 16 * 16
        return int(usage["prompt_tokens_details"]["cached_tokens"])

    async def test_blocks_are_found_until_others_push_them_out(self, client: Client) -> None:
        assert await self.cached(client, WORDS) == 0
        assert await self.cached(client, WORDS[:33]) == 32
        assert await self.cached(client, ["other", *WORDS[1:]]) == 0
        assert await self.cached(client, WORDS) == 16  # five blocks: the other four, and the one used last
        found = await metrics(client)
        assert found["vllm:prefix_cache_queries_total"] == found["vllm:prompt_tokens_total"] == 2 * (3 * 64 + 33)
        assert found["vllm:prefix_cache_hits_total"] == 32 + 16 + 3 * 48 + 32

    async def test_the_next_turn_finds_the_answer(self, client: Client) -> None:
        answer = (await client.ask({**body_of(WORDS[:15], stream=False), "max_tokens": 24})).json()
        said = answer["choices"][0]["message"]["content"].split()
        assert await self.cached(client, [*WORDS[:15], *said, "and"]) == (15 + len(said)) // 16 * 16 > 16


class TestMetrics:
    @pytest.fixture
    def config(self) -> EngineConfig:
        return EngineConfig(max_seqs=1, prefix_cache_blocks=10)

    async def test_they_are_vllms(self, client: Client) -> None:
        async with await client.connect() as running, await client.connect() as waiting:
            for stream in (running, waiting):
                await stream.send_all(client.request(body_of(WORDS), sim_fault="stall-after:2"))
            await client.until(lambda: client.states == ["running", "queued"])
            await client.read_until(running, b"\n\n", 2)
            found = await metrics(client)
        assert (found["vllm:num_requests_running"], found["vllm:num_requests_waiting"]) == (1, 1)
        assert found["vllm:kv_cache_usage_perc"] == pytest.approx(0.4)
        await client.until(lambda: client.states == ["aborted", "aborted"])
        assert (await client.stream()).is_whole
        found = await metrics(client)
        assert (found["vllm:num_requests_running"], found["vllm:kv_cache_usage_perc"]) == (0, 0)
        assert found["vllm:generation_tokens_total"] == 1 + 4
        assert found["vllm:time_to_first_token_seconds_count"] == 2
        assert found['vllm:time_to_first_token_seconds_bucket{le="+Inf"}'] == 2

    async def test_only_mooncake_has_a_bootstrap_server(self, client: Client, nursery: trio.Nursery) -> None:
        assert (await client.ask(path="/query", method="GET")).status == 404
        other: Engine = await nursery.start(serve_engine, EngineConfig(connector="mooncake"))
        async with await trio.open_tcp_stream(other.host, other.port) as stream:
            await stream.send_all(client.request(path="/query", method="GET", connection="close"))
            answer = await client.read_to_end(stream)
        assert answer.json()["0"]["engine_id"] == other.ledger.engine_id


@pytest.mark.parametrize("connector", ["p2p_nccl", "sglang"])
async def test_some_engines_must_know_their_role(connector: str) -> None:
    with pytest.raises(ValueError, match="needs --role prefill or --role decode"):
        await serve_engine(EngineConfig(connector=connector))


async def test_a_handle_is_had_once(nursery: trio.Nursery) -> None:
    handles, had = Handles(), []

    async def take() -> None:
        had.append(await handles.take_soon("h"))

    nursery.start_soon(take)
    nursery.start_soon(take)
    await trio.testing.wait_all_tasks_blocked()
    await handles.taker("h")
    assert had == []
    handles.give("h")
    await trio.testing.wait_all_tasks_blocked()
    assert sorted(had) == [False, True]
    assert not handles.take("h")
    assert handles.as_dict() == {"handles_given": 1, "handles_taken": 1, "handles_held": 0}
