"""A real vLLM behind the real process, read with curl and the official SDKs. Needs ``RELAY_TEST_ENGINE``, its URL.

The engine is asked everything twice, directly and through the relay, at temperature 0: both must get the same.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, TypeVar

import pytest

from tests.core.captured import events_of, frames_of
from tests.e2e.children import Child, relay_child
from tests.e2e.harness import CHAT_PATH, PATHS

ENGINE: Final = os.environ.get("RELAY_TEST_ENGINE", "").rstrip("/")

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(not ENGINE, reason="RELAY_TEST_ENGINE names no engine"),
    pytest.mark.filterwarnings("default"),  # the SDKs' own
]

T = TypeVar("T")

#: How soon the engine is to be free again.
FREED_S: Final = 0.5
PATIENCE_S: Final = 20.0
MESSAGES: Final[list[Any]] = [{"role": "user", "content": "Hello 你好 🙂"}]
CHAT: Final[dict[str, Any]] = {"messages": MESSAGES, "max_tokens": 48, "temperature": 0}
BODIES: Final[dict[str, dict[str, Any]]] = {
    CHAT_PATH: {**CHAT, "stream_options": {"include_usage": True}},
    "/v1/completions": {"prompt": "Hello", "max_tokens": 48, "temperature": 0},
    "/v1/responses": {"input": "Hello", "max_output_tokens": 48, "temperature": 0},
    "/v1/messages": {"messages": MESSAGES, "max_tokens": 48, "temperature": 0},
}
#: More than an engine is done with before the test has looked, on a busy machine too.
LONG: Final = {"messages": MESSAGES, "max_tokens": 1900, "n": 16, "seed": 1, "ignore_eos": True}


def get(path: str) -> bytes:
    """What the engine itself says."""
    with urllib.request.urlopen(ENGINE + path, timeout=10) as answer:
        return bytes(answer.read())


def running() -> int:
    """How many requests the engine works on, or has waiting."""
    counts = re.findall(rb"^vllm:num_requests_(?:running|waiting)\{[^}]*\} ([0-9.]+)$", get("/metrics"), re.MULTILINE)
    assert counts
    return sum(int(float(count)) for count in counts)


def wait_until_busy(is_busy: bool) -> float:
    """Waits until the engine works, or until it does not; answers how long that took.

    The time is that of asking, as it was so then at the latest, but for the engine's time to answer.
    """
    began = time.monotonic()
    while True:
        asked = time.monotonic()
        assert asked - began < PATIENCE_S, f"{running()} are running"
        if bool(running()) == is_busy:
            return asked - began


@pytest.fixture(scope="module")
def model() -> str:
    return str(json.loads(get("/v1/models"))["data"][0]["id"])


@pytest.fixture
def relay(tmp_path: Path) -> Iterator[Child]:
    with relay_child(tmp_path, ENGINE, listen="127.0.0.1:0") as child:
        yield child


def both(relay: Child, call: Callable[[str], T]) -> tuple[T, T]:
    """The answers of the engine and of the relay."""
    return call(ENGINE), call(relay.address)


# -- curl


def curl(url: str, body: dict[str, Any], *options: str) -> list[str]:
    if shutil.which("curl") is None:
        pytest.skip("needs curl")
    return ["curl", "-sN", *options, "-H", "content-type: application/json", "-d", json.dumps(body), url]


def without_names(body: bytes) -> bytes:
    """Without what is another at each asking: ids, times, and how many frames the engine made of its text."""
    body = re.sub(
        rb'"(id|item_id|created|created_at|completed_at|sequence_number)":("[^"]*"|[0-9.]+)', rb'"\1":0', body
    )
    return re.sub(rb"\b(resp|msg|chatcmpl|cmpl|rs)[-_][0-9a-f-]+", b"-", body)


def text_of(events: list[dict[str, Any]]) -> str:
    """All that the deltas of a stream say, in any of the dialects."""
    text = ""
    for event in events:
        delta = event.get("delta", "")
        for piece in event.get("choices", [{"text": delta if isinstance(delta, str) else delta.get("text")}]):
            text += piece.get("text") or piece.get("delta", {}).get("content") or ""
    return text


@pytest.mark.parametrize("path", PATHS)
def test_curl_gets_every_frame(relay: Child, model: str, path: str) -> None:
    body = {"model": model, "stream": True, **BODIES[path]}

    def ask(base: str) -> bytes:
        return subprocess.run(curl(base + path, body), check=True, capture_output=True).stdout

    direct, through = both(relay, ask)
    # How the engine cuts its text into frames depends on the moment; what it says does not.
    assert text_of(events_of(through)) == text_of(events_of(direct)) != ""
    assert through.endswith(b"\n\n")
    assert frames_of(without_names(through))[-1] == frames_of(without_names(direct))[-1]
    relay.stop()
    (record,) = relay.records()
    assert (record["outcome"], record["error"]) == ("--", None)
    assert record["frames"] == len(frames_of(through)) > 10
    assert 0 < record["relay_ms"] < record["ttft_ms"] < record["total_ms"]
    if path == "/v1/completions":  # which nobody asked to tell
        assert record["usage"] == "estimated"
    else:
        assert (record["usage"], record["completion_tokens"]) == ("engine", 48)
    if path == CHAT_PATH:
        usage = events_of(through)[-1]["usage"]
        assert (usage["prompt_tokens"], usage["completion_tokens"]) == (record["prompt_tokens"], 48)


@pytest.mark.parametrize("path", PATHS)
def test_curl_gets_the_whole_answer(relay: Child, model: str, path: str) -> None:
    body = {"model": model, **BODIES[path]}
    body.pop("stream_options", None)

    def ask(base: str) -> bytes:
        return subprocess.run(curl(base + path, body), check=True, capture_output=True).stdout

    direct, through = both(relay, ask)
    assert without_names(through) == without_names(direct)


@pytest.mark.parametrize("path", [*PATHS, "/v1/nothing"])
def test_an_engines_refusal_passes(relay: Child, path: str) -> None:
    body = {"model": "nobody's", "stream": True, **BODIES.get(path, {})}

    def ask(base: str) -> tuple[bytes, bytes]:
        out = subprocess.run(curl(base + path, body, "-w", "\n%{http_code} %{content_type}"), capture_output=True)
        answer, _, status = out.stdout.rpartition(b"\n")
        return without_names(answer), status

    direct, through = both(relay, ask)
    assert through == direct
    assert through[1] == b"404 application/json"


# -- clients that leave


@pytest.mark.parametrize("stream", [True, False])
def test_an_engine_is_free_as_soon_as_its_client_is_killed(relay: Child, model: str, stream: bool) -> None:
    wait_until_busy(False)
    command = curl(relay.address + CHAT_PATH, {"model": model, "stream": stream, **LONG})
    with subprocess.Popen(command, stdout=subprocess.PIPE) as client:
        assert client.stdout is not None
        if stream:
            lines = [client.stdout.readline() for _ in range(10)]
            assert lines[0].startswith(b"data: {")
        wait_until_busy(True)
        client.kill()
        took_s = wait_until_busy(False)
    assert took_s < FREED_S
    relay.stop()
    (record,) = relay.records()
    assert record["outcome"] == ("CD" if stream else "CH")


def test_a_relay_that_is_stopped_frees_the_engine(model: str, tmp_path: Path) -> None:
    wait_until_busy(False)
    with relay_child(tmp_path, ENGINE, "--drain-s", "0.1", listen="127.0.0.1:0") as relay:
        command = curl(relay.address + CHAT_PATH, {"model": model, "stream": True, **LONG})
        with subprocess.Popen(command, stdout=subprocess.PIPE) as client:
            assert client.stdout is not None
            first = client.stdout.readline()
            relay.stop()
            rest = client.stdout.read()
        assert wait_until_busy(False) < FREED_S
    assert b'"draining"' in frames_of(first + rest)[-1]
    assert client.returncode == 18  # curl: a partial file


# -- the official SDKs


class TestOpenAI:
    """With 1.109 as with 3.54."""

    @pytest.fixture
    def openai(self) -> Any:
        return pytest.importorskip("openai")

    def test_chat(self, openai: Any, relay: Child, model: str) -> None:
        def ask(base: str) -> tuple[str, str]:
            with openai.OpenAI(base_url=f"{base}/v1", api_key="x", max_retries=0) as client:
                chunks = list(
                    client.chat.completions.create(
                        model=model, stream=True, stream_options={"include_usage": True}, **CHAT
                    )
                )
                whole = client.chat.completions.create(model=model, **CHAT)
            text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
            assert text == whole.choices[0].message.content
            assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
            return text, whole.choices[0].finish_reason

        direct, through = both(relay, ask)
        assert through == direct

    def test_completions(self, openai: Any, relay: Child, model: str) -> None:
        asked = {"model": model, **BODIES["/v1/completions"]}

        def ask(base: str) -> str:
            with openai.OpenAI(base_url=f"{base}/v1", api_key="x", max_retries=0) as client:
                text = "".join(chunk.choices[0].text for chunk in client.completions.create(stream=True, **asked))
                assert text == client.completions.create(**asked).choices[0].text
            return text

        direct, through = both(relay, ask)
        assert through == direct

    def test_responses(self, openai: Any, relay: Child, model: str) -> None:
        asked = {"model": model, **BODIES["/v1/responses"]}

        def ask(base: str) -> str:
            with openai.OpenAI(base_url=f"{base}/v1", api_key="x", max_retries=0) as client:
                *events, last = client.responses.create(stream=True, **asked)
                text: str = client.responses.create(**asked).output_text
            assert last.type in ("response.completed", "response.incomplete")
            assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == text
            return text

        direct, through = both(relay, ask)
        assert through == direct

    def test_async(self, openai: Any, relay: Child, model: str) -> None:
        async def ask(base: str) -> list[str]:
            async with openai.AsyncOpenAI(base_url=f"{base}/v1", api_key="x", max_retries=0) as client:
                return [await ask_of(client) for ask_of in (chat, completions, responses)]

        async def chat(client: Any) -> str:
            stream = await client.chat.completions.create(model=model, stream=True, **CHAT)
            text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
            whole = await client.chat.completions.create(model=model, **CHAT)
            assert text == whole.choices[0].message.content
            return text

        async def completions(client: Any) -> str:
            asked = {"model": model, **BODIES["/v1/completions"]}
            text = "".join(
                [chunk.choices[0].text async for chunk in await client.completions.create(stream=True, **asked)]
            )
            assert text == (await client.completions.create(**asked)).choices[0].text
            return text

        async def responses(client: Any) -> str:
            asked = {"model": model, **BODIES["/v1/responses"]}
            events = [event async for event in await client.responses.create(stream=True, **asked)]
            text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
            assert text == (await client.responses.create(**asked)).output_text
            return text

        direct, through = both(relay, lambda base: asyncio.run(ask(base)))
        assert through == direct
        assert all(through)

    def test_leaving_a_stream_frees_the_engine(self, openai: Any, relay: Child, model: str) -> None:
        with openai.OpenAI(base_url=f"{relay.address}/v1", api_key="x", max_retries=0) as client:
            asked = client.chat.completions.create(model=model, messages=MESSAGES, stream=True, extra_body=LONG)
            with asked as stream:
                for _ in range(5):
                    next(stream)
                wait_until_busy(True)
            assert wait_until_busy(False) < FREED_S

    def test_errors(self, openai: Any, relay: Child) -> None:
        with openai.OpenAI(base_url=f"{relay.address}/v1", api_key="x", max_retries=0) as client:
            with pytest.raises(openai.NotFoundError):
                client.chat.completions.create(model="nobody's", stream=True, **CHAT)


class TestAnthropic:
    @pytest.fixture
    def anthropic(self) -> Any:
        return pytest.importorskip("anthropic")

    def test_messages(self, anthropic: Any, relay: Child, model: str) -> None:
        asked = {"model": model, "messages": MESSAGES, "max_tokens": 48}

        def ask(base: str) -> tuple[str, int, str]:
            with anthropic.Anthropic(base_url=base, api_key="x", max_retries=0) as client:
                with client.messages.stream(extra_body={"temperature": 0}, **asked) as stream:
                    text = "".join(stream.text_stream)
                    final = stream.get_final_message()
                whole = client.messages.create(extra_body={"temperature": 0}, **asked)
            assert text == "".join(block.text for block in whole.content if block.type == "text")
            return text, final.usage.output_tokens, final.stop_reason

        direct, through = both(relay, ask)
        assert through == direct

    def test_async(self, anthropic: Any, relay: Child, model: str) -> None:
        asked = {"model": model, "messages": MESSAGES, "max_tokens": 48}

        async def ask(base: str) -> str:
            async with anthropic.AsyncAnthropic(base_url=base, api_key="x", max_retries=0) as client:
                async with client.messages.stream(extra_body={"temperature": 0}, **asked) as stream:
                    text = "".join([piece async for piece in stream.text_stream])
                whole = await client.messages.create(extra_body={"temperature": 0}, **asked)
            assert text == "".join(block.text for block in whole.content if block.type == "text")
            return text

        direct, through = both(relay, lambda base: asyncio.run(ask(base)))
        assert through == direct
