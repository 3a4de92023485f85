"""``/v1/messages`` as vLLM answers it: Anthropic's named events; input usage first, output usage at the end."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Final

import msgspec

from relay_bench.engine.script import Script
from relay_bench.engine.text import TOOL_ARGUMENTS

if TYPE_CHECKING:
    from collections.abc import Iterator

#: chat's finish reasons in Anthropic's words.
_STOP_REASONS: Final = {"length": "max_tokens", "stop": "end_turn", "tool_calls": "tool_use"}


class MessagesScript(Script):
    """message_start, one content block piece by piece, message_delta with reason and usage, message_stop."""

    end_mark: ClassVar[bytes] = b"event: message_stop\n"

    def steps(self) -> Iterator[list[bytes]]:
        """The frames of each step of the engine: see `Script`."""
        message = self._message([], None, {"input_tokens": self.ask.prompt_tokens, "output_tokens": 0})
        opening = [_event("message_start", message=message)]
        opening.append(_event("content_block_start", content_block=self._block(whole=False), index=0))
        last = self.ask.tokens - 1
        for position in range(last):
            yield [*opening, self._delta(position)]
            opening = []
        yield [*opening, *([self._delta(last)] if last >= 0 else []), *self._closing()]

    def content_frame(self, encoded: bytes) -> bytes:
        """A frame with this much text, as JSON has it: see `Script`."""
        return (
            b"event: content_block_delta\n"
            b'data: {"type":"content_block_delta","delta":{"type":"text_delta","text":"%b"},"index":0}\n\n'
        ) % encoded

    def error_frames(self) -> list[bytes]:
        """What a failed stream ends with: see `Script`."""
        return [_event("error", error={"type": "internal_error", "message": self.error})]

    def _delta(self, position: int) -> bytes:
        if not self.ask.tool:
            return self.content_frame(self.token(position, 0))
        delta = {"type": "input_json_delta", "partial_json": TOOL_ARGUMENTS[position]}
        return _event("content_block_delta", delta=delta, index=0)

    def _closing(self) -> list[bytes]:
        delta: dict[str, Any] = {"stop_reason": self._stop_reason()}
        return [
            _event("content_block_stop", index=0),
            _event("message_delta", delta=delta, usage=self._usage()),
            _event("message_stop"),
        ]

    def _stop_reason(self) -> str:
        return _STOP_REASONS["tool_calls" if self.ask.tool else self.ask.finish_reason]

    def _usage(self) -> dict[str, int]:
        ask = self.ask
        usage = {"input_tokens": ask.prompt_tokens, "output_tokens": ask.completion_tokens}
        if ask.usage.with_details:
            usage["cache_read_input_tokens"] = ask.cached_tokens
        return usage

    def _block(self, *, whole: bool) -> dict[str, Any]:
        if self.ask.tool:
            arguments = msgspec.json.decode(self.arguments) if whole else {}
            return {"type": "tool_use", "id": "chatcmpl-tool-0", "name": self.ask.tool, "input": arguments}
        return {"type": "text", "text": self.text(0) if whole else ""}

    def _message(self, content: list[Any], stop_reason: str | None, usage: dict[str, int]) -> dict[str, Any]:
        return {
            "id": self.ask.id,
            "type": "message",
            "role": "assistant",
            "content": content,
            "model": self.ask.model,
            "stop_reason": stop_reason,
            "stop_sequence": None,
            "usage": usage,
        }

    def body(self) -> bytes:
        """The whole answer, for who asked for no stream: see `Script`."""
        message = self._message([self._block(whole=True)], self._stop_reason(), self._usage())
        if self.ask.kv_params is not None:  # vLLM leaves out what is null on this route
            message["kv_transfer_params"] = self.ask.kv_params
        return msgspec.json.encode(message)


def _event(kind: str, **fields: Any) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (kind.encode(), msgspec.json.encode({"type": kind, **fields}))
