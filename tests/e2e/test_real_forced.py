"""Forced streaming against a real vLLM: its own non-streaming answers, and the bodies made of its streams, are equal.

Opt-in, as `test_real_engine`. The one known difference is the engine's: where a *forced* tool call is cut short, by
``max_tokens`` or a stop string, its stream has the pieces of a call and its body the raw text.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import httpx
import pytest

from tests.e2e.children import Child, relay_child
from tests.e2e.test_real_engine import ENGINE, model

__all__ = ["model"]

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(not ENGINE, reason="RELAY_TEST_ENGINE names no engine"),
    pytest.mark.filterwarnings("default"),  # the SDKs' own
]

REQUESTS: Final = 200
LIMIT_S: Final = 120.0
TEXT: Final = "alpha beta épée 東京 🙂 naïve zebra quick brown fox jumps over lazy dog sum add weather"
#: What another asking would answer differently too.
NAMES: Final = frozenset({"id", "created", "created_at", "completed_at", "item_id", "request_id"})


def tool(name: str, **properties: str) -> dict[str, Any]:
    """A function to call, with its arguments' types."""
    schema = {"type": "object", "properties": {key: {"type": kind} for key, kind in properties.items()}}
    return {"type": "function", "function": {"name": name, "parameters": {**schema, "required": [*properties]}}}


TOOLS: Final = [tool("get_weather", city="string"), tool("add", a="integer", b="integer")]
ADD: Final = {"type": "function", "function": {"name": "add"}}


def generated(rng: random.Random, model: str) -> tuple[str, dict[str, Any]]:
    """A route, and a request for it."""

    def text() -> str:
        return " ".join(rng.choices(TEXT.split(), k=rng.randint(3, 30)))

    body: dict[str, Any] = {"model": model, "temperature": 0, "seed": rng.randrange(1000)}
    share = rng.random()
    if share < 0.08:
        return "/v1/responses", {**body, "input": text(), "max_output_tokens": rng.randint(1, 30)}
    body |= {"max_tokens": rng.randint(1, 40)}
    if share < 0.16:
        return "/v1/messages", {**body, "messages": [{"role": "user", "content": text()}]}
    if rng.random() < 0.3:
        body |= {"n": rng.randint(2, 3), "temperature": 0.8}
    if rng.random() < 0.3:
        body["stop"] = [rng.choice(["a", "e", "._", "\n"])]
    if share < 0.4:
        body["prompt"] = text() if rng.random() < 0.7 else [text(), text()]
        body |= {"logprobs": rng.randint(0, 3)} if rng.random() < 0.35 else {"echo": rng.random() < 0.3}
        return "/v1/completions", body
    body["messages"] = [{"role": "user", "content": text()}]
    if rng.random() < 0.35:
        body |= {"logprobs": True, "top_logprobs": rng.randint(0, 3)}
    if rng.random() < 0.15:
        body["return_token_ids"] = True
    if rng.random() < 0.35:
        body |= {"tools": TOOLS, "tool_choice": rng.choice(["auto", "required", "none", ADD])}
        body["max_tokens"] = rng.choice([20, 60, 120])
    return "/v1/chat/completions", body


def comparable(value: Any, name: str = "") -> Any:
    """Without names, and tool arguments as the values they are."""
    if isinstance(value, dict):
        return {key: comparable(inner, key) for key, inner in value.items() if key not in NAMES}
    if isinstance(value, list):
        return [comparable(inner) for inner in value]
    if name == "arguments" and isinstance(value, str):
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value


def is_cut_call(request: dict[str, Any], choice: dict[str, Any]) -> bool:
    """Whether a choice of a direct answer is a forced call that was cut: raw text."""
    is_forced = request.get("tool_choice") == "required" or isinstance(request.get("tool_choice"), dict)
    return is_forced and not choice["message"].get("tool_calls")


@pytest.fixture
def forced(tmp_path: Path) -> Iterator[Child]:
    with relay_child(tmp_path, ENGINE, "--force-stream", listen="127.0.0.1:0") as child:
        yield child


def test_generated_requests_get_equal_bodies(forced: Child, model: str) -> None:
    rng = random.Random(7)
    cut = 0
    with httpx.Client(timeout=LIMIT_S, trust_env=False) as client:
        for _ in range(REQUESTS):
            path, request = generated(rng, model)
            direct, made = (client.post(base + path, json=request) for base in (ENGINE, forced.address))
            assert made.status_code == direct.status_code, request
            expected, found = comparable(direct.json()), comparable(made.json())
            for index, choice in enumerate(expected.get("choices", ())):
                if "tools" in request and "message" in choice and is_cut_call(request, choice):
                    cut += 1
                    expected["choices"][index] = found["choices"][index] = None
            assert found == expected, request
    assert cut < REQUESTS / 4


def test_a_multi_turn_run_with_tools(forced: Child, model: str) -> None:
    """As an evaluation of function calling does it: not streaming, each call answered, turn after turn."""
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{forced.address}/v1", api_key="none", max_retries=0)
    messages: list[Any] = [{"role": "user", "content": "What is 2 + 3?"}]
    calls = 0
    for turn in range(6):
        answer = client.chat.completions.create(
            model=model, messages=messages, tools=TOOLS, tool_choice="auto" if turn % 2 else ADD, max_tokens=150,
            temperature=0,
        )  # fmt: skip
        message = answer.choices[0].message
        assert answer.usage.completion_tokens > 0
        messages.append(message.model_dump(exclude_none=True))
        for call in message.tool_calls or ():
            calls += 1
            assert call.function.name == "add"
            messages.append({"role": "tool", "tool_call_id": call.id, "content": "5"})
        messages.append({"role": "user", "content": f"And now, turn {turn}?"})
    assert calls >= 3
