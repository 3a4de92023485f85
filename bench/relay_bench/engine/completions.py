"""``/v1/completions`` as vLLM answers it: like chat, but text, no role chunk, and the finish reason in every chunk."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from relay_bench.engine.script import DONE, FINGERPRINT, Script, chunk_start, json_string, openai_error_frames
from relay_bench.engine.usage import usage_json, whole_usage

if TYPE_CHECKING:
    from collections.abc import Iterator

    from relay_bench.engine.ask import Ask


class CompletionsScript(Script):
    """Text chunks, the last with the finish reason, usage if asked, ``[DONE]``."""

    def __init__(self, ask: Ask) -> None:
        super().__init__(ask)
        self._start = chunk_start(ask, "text_completion")
        self._others = b',"usage":null' if ask.usage.null_on_others else b""

    def steps(self) -> Iterator[list[bytes]]:
        """The frames of each step of the engine: see `Script`."""
        choices, last = range(self.ask.choices), self.ask.tokens - 1
        for position in range(last):
            yield [self._chunk(self.token(position, c), c, b"null", self._usage(position + 1)) for c in choices]
        reason = json_string(self.ask.finish_reason)
        frames = []
        for choice in choices:
            text = self.token(last, choice) if last >= 0 else b""
            frames.append(self._chunk(text, choice, reason, self._tail(choice)))
        yield frames + self._closing()

    def content_frame(self, encoded: bytes) -> bytes:
        """A frame with this much text, as JSON has it: see `Script`."""
        return self._chunk(encoded, 0, b"null", self._others)

    def error_frames(self) -> list[bytes]:
        """What a failed stream ends with: see `Script`."""
        return openai_error_frames(self.error)

    def _chunk(self, text: bytes, choice: int, reason: bytes, tail: bytes) -> bytes:
        return (
            b'%b{"index":%d,"text":"%b","logprobs":null,"finish_reason":%b,"stop_reason":null,'
            b'"prompt_token_ids":null,"token_ids":null}]%b}\n\n'
        ) % (self._start, choice, text, reason, tail)

    def _usage(self, completed: int) -> bytes:
        if not self.ask.usage.on_every_chunk:
            return self._others
        return b',"usage":' + usage_json(self.ask.prompt_tokens, completed)

    def _tail(self, choice: int) -> bytes:
        ask = self.ask
        if ask.usage.at_end or choice < ask.choices - 1:
            return self._usage(max(ask.tokens, 1))
        usage = b',"usage":' + self._final_usage() if ask.usage.on_last_choice else b""
        return usage + b',"system_fingerprint":"%b"' % FINGERPRINT

    def _closing(self) -> list[bytes]:
        if not self.ask.usage.at_end:
            return [DONE]
        usage = b'%b],"usage":%b,"system_fingerprint":"%b"}\n\n' % (self._start, self._final_usage(), FINGERPRINT)
        return [usage, DONE]

    def _final_usage(self) -> bytes:
        ask = self.ask
        details = ask.usage.with_details
        return usage_json(ask.prompt_tokens, ask.completion_tokens, cached=ask.cached_tokens, with_details=details)

    def body(self) -> bytes:
        """The whole answer, for who asked for no stream: see `Script`."""
        ask = self.ask
        return msgspec.json.encode(
            {
                "id": ask.id,
                "object": "text_completion",
                "created": ask.created,
                "model": ask.model,
                "choices": [self._choice(choice) for choice in range(ask.choices)],
                "service_tier": None,
                "system_fingerprint": FINGERPRINT.decode(),
                "usage": whole_usage(ask),
                "kv_transfer_params": ask.kv_params,
                "ec_transfer_params": None,
                "metrics": None,
            }
        )

    def _choice(self, choice: int) -> dict[str, Any]:
        return {
            "index": choice,
            "text": self.text(choice),
            "logprobs": None,
            "finish_reason": self.ask.finish_reason,
            "stop_reason": None,
            "token_ids": None,
            "prompt_logprobs": None,
            "prompt_token_ids": None,
            "routed_experts": None,
        }
