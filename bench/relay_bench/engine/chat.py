"""``/v1/chat/completions`` as vLLM answers it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from relay_bench.engine.script import DONE, FINGERPRINT, Script, chunk_start, json_string, openai_error_frames
from relay_bench.engine.text import TOOL_ARGUMENTS
from relay_bench.engine.usage import usage_json, whole_usage

if TYPE_CHECKING:
    from collections.abc import Iterator

    from relay_bench.engine.ask import Ask


class ChatScript(Script):
    """Role chunk, content or tool-call chunks, the chunk with the finish reason, usage if asked, ``[DONE]``."""

    def __init__(self, ask: Ask) -> None:
        super().__init__(ask)
        self._start = chunk_start(ask, "chat.completion.chunk")
        self._others = b',"usage":null' if ask.usage.null_on_others else b""

    def steps(self) -> Iterator[list[bytes]]:
        """The frames of each step of the engine: see `Script`."""
        return self._tool_steps() if self.ask.tool else self._text_steps()

    def _text_steps(self) -> Iterator[list[bytes]]:
        ask, choices = self.ask, range(self.ask.choices)
        opening = [self._role_chunk(choice) for choice in choices]
        last = ask.tokens - 1
        counts_usage = ask.usage.on_every_chunk
        for position in range(last):
            frames = [self._chunk(self._delta(position, c), c, position + 1, counts_usage) for c in choices]
            yield opening + frames
            opening = []
        # the last token and the finish reason share a chunk; an answer without tokens has an empty delta there
        finish = [self._finish_chunk(self._delta(last, c) if last >= 0 else b"{}", c) for c in choices]
        yield opening + finish + self._closing()

    def _tool_steps(self) -> Iterator[list[bytes]]:
        choices, counts_usage = range(self.ask.choices), self.ask.usage.on_every_chunk
        opening = [self._role_chunk(choice) for choice in choices]
        name = json_string(self.ask.tool)
        for choice in choices:
            call_id = json_string(f"chatcmpl-tool-{choice:016x}")
            delta = b'{"content":null,"tool_calls":[{"id":%b,"type":"function","index":0,"function":{"name":%b}}]}'
            opening.append(self._chunk(delta % (call_id, name), choice, 0, counts_usage))
        for position, piece in enumerate(TOOL_ARGUMENTS):
            delta = b'{"content":null,"tool_calls":[{"index":0,"function":{"arguments":%b}}]}' % json_string(piece)
            frames = opening + [self._chunk(delta, choice, position + 1, counts_usage) for choice in choices]
            opening = []
            if position == len(TOOL_ARGUMENTS) - 1:
                frames += [self._finish_chunk(b"{}", choice) for choice in choices] + self._closing()
            yield frames

    def content_frame(self, encoded: bytes) -> bytes:
        """A frame with this much text, as JSON has it: see `Script`."""
        return self._chunk(b'{"content":"%b"}' % encoded, 0, 0, False)

    def error_frames(self) -> list[bytes]:
        """What a failed stream ends with: see `Script`."""
        return openai_error_frames(self.error)

    def _delta(self, position: int, choice: int) -> bytes:
        if position < self.ask.reasoning:
            return b'{"reasoning":"%b"}' % self.token(position, choice)
        return b'{"content":"%b"}' % self.token(position, choice)

    def _chunk(self, delta: bytes, choice: int, completed: int, counts_usage: bool) -> bytes:
        usage = self._running_usage(completed) if counts_usage else self._others
        return b'%b{"index":%d,"delta":%b,"logprobs":null,"finish_reason":null,"token_ids":null}]%b}\n\n' % (
            self._start,
            choice,
            delta,
            usage,
        )

    def _role_chunk(self, choice: int) -> bytes:
        usage = self._running_usage(0) if self.ask.usage.on_every_chunk else self._others
        return (
            b'%b{"index":%d,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}]%b,'
            b'"prompt_token_ids":null,"prompt_text":null}\n\n'
        ) % (self._start, choice, usage)

    def _finish_chunk(self, delta: bytes, choice: int) -> bytes:
        ask = self.ask
        tail = self._running_usage(max(ask.tokens, 1)) if ask.usage.on_every_chunk else self._others
        if choice == ask.choices - 1 and not ask.usage.at_end:  # the last JSON chunk carries the fingerprint
            if ask.usage.on_last_choice:
                tail = b',"usage":' + self._final_usage()
            tail += b',"system_fingerprint":"%b"' % FINGERPRINT
        reason = json_string(ask.finish_reason)
        form = (
            b'%b{"index":%d,"delta":%b,"logprobs":null,"finish_reason":%b,"stop_reason":null,"token_ids":null}]%b}\n\n'
        )
        return form % (self._start, choice, delta, reason, tail)

    def _closing(self) -> list[bytes]:
        if not self.ask.usage.at_end:
            return [DONE]
        usage = b'%b],"usage":%b,"system_fingerprint":"%b"}\n\n' % (self._start, self._final_usage(), FINGERPRINT)
        return [usage, DONE]

    def _running_usage(self, completed: int) -> bytes:
        return b',"usage":' + usage_json(self.ask.prompt_tokens, completed)

    def _final_usage(self) -> bytes:
        ask = self.ask
        return usage_json(
            ask.prompt_tokens,
            ask.completion_tokens,
            cached=ask.cached_tokens,
            reasoning=ask.reasoning * ask.choices,
            with_details=ask.usage.with_details,
        )

    def body(self) -> bytes:
        """The whole answer, for who asked for no stream: see `Script`."""
        ask = self.ask
        return msgspec.json.encode(
            {
                "id": ask.id,
                "object": "chat.completion",
                "created": ask.created,
                "model": ask.model,
                "choices": [self._choice(choice) for choice in range(ask.choices)],
                "service_tier": None,
                "system_fingerprint": FINGERPRINT.decode(),
                "usage": whole_usage(ask),
                "prompt_logprobs": None,
                "prompt_token_ids": None,
                "prompt_text": None,
                "kv_transfer_params": ask.kv_params,
                "ec_transfer_params": None,
                "metrics": None,
            }
        )

    def _choice(self, choice: int) -> dict[str, Any]:
        ask = self.ask
        message: dict[str, Any] = {
            "role": "assistant",
            "content": "" if ask.tool else self.text(choice, ask.reasoning),
            "refusal": None,
            "annotations": None,
            "audio": None,
            "function_call": None,
        }
        if ask.tool:
            function = {"name": ask.tool, "arguments": self.arguments}
            message["tool_calls"] = [{"id": f"chatcmpl-tool-{choice:016x}", "type": "function", "function": function}]
        message["reasoning"] = self.text(choice, 0, ask.reasoning) if ask.reasoning else None
        return {
            "index": choice,
            "message": message,
            "logprobs": None,
            "finish_reason": ask.finish_reason,
            "stop_reason": None,
            "token_ids": None,
            "routed_experts": None,
        }
