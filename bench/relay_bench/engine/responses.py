"""``/v1/responses`` as vLLM answers it: named, numbered events; no ``[DONE]``; usage in the last one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import msgspec

from relay_bench.engine.script import Script, json_string
from relay_bench.engine.text import TOOL_ARGUMENTS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from relay_bench.engine.ask import Ask


class ResponsesScript(Script):
    """created, in_progress, one output item (a message or a function call) piece by piece, completed."""

    end_mark: ClassVar[bytes] = b"event: response.completed\n"

    def __init__(self, ask: Ask) -> None:
        super().__init__(ask)
        self._number = 0  # sequence_number of the next event
        suffix = ask.id.removeprefix("resp_")
        self._item_id = ("fc_" if ask.tool else "msg_") + suffix
        self._call_id = "chatcmpl-tool-" + suffix

    def steps(self) -> Iterator[list[bytes]]:
        """The frames of each step of the engine: see `Script`."""
        opening = [self._event("response.created", response=self._response("in_progress"))]
        opening.append(self._event("response.in_progress", response=self._response("in_progress")))
        opening.append(self._event("response.output_item.added", item=self._item("in_progress"), output_index=0))
        if not self.ask.tool:
            part: dict[str, Any] = {"annotations": [], "text": "", "type": "output_text", "logprobs": []}
            opening.append(self._item_event("response.content_part.added", part=part))
        last = self.ask.tokens - 1
        for position in range(last):
            yield [*opening, self._delta(position)]
            opening = []
        yield [*opening, *([self._delta(last)] if last >= 0 else []), *self._closing()]

    def content_frame(self, encoded: bytes) -> bytes:
        """A frame with this much text, as JSON has it: see `Script`."""
        number, self._number = self._number, self._number + 1
        return (
            b'event: response.output_text.delta\ndata: {"content_index":0,"delta":"%b","item_id":%b,"logprobs":[],'
            b'"output_index":0,"sequence_number":%d,"type":"response.output_text.delta"}\n\n'
        ) % (encoded, json_string(self._item_id), number)

    def error_frames(self) -> list[bytes]:
        """What a failed stream ends with: see `Script`."""
        fields = {"code": "server_error", "message": self.error, "param": None}
        return [self._event("error", **fields)]

    def _delta(self, position: int) -> bytes:
        if not self.ask.tool:
            return self.content_frame(self.token(position, 0))
        kind = "response.function_call_arguments.delta"
        return self._event(kind, delta=TOOL_ARGUMENTS[position], item_id=self._item_id, output_index=0)

    def _closing(self) -> list[bytes]:
        if self.ask.tool:
            kind = "response.function_call_arguments.done"
            done = self._event(
                kind, arguments=self.arguments, item_id=self._item_id, output_index=0, name=self.ask.tool
            )
            frames = [done]
        else:
            text = self.text(0)
            part: dict[str, Any] = {"annotations": [], "text": text, "type": "output_text", "logprobs": None}
            frames = [
                self._item_event("response.output_text.done", logprobs=[], text=text),
                self._item_event("response.content_part.done", part=part),
            ]
        frames.append(self._event("response.output_item.done", item=self._item("completed"), output_index=0))
        frames.append(self._event("response.completed", response=self._response(self._end_status())))
        return frames

    def _item_event(self, kind: str, **fields: Any) -> bytes:
        return self._event(kind, content_index=0, item_id=self._item_id, output_index=0, **fields)

    def _event(self, kind: str, **fields: Any) -> bytes:
        """One event; vLLM writes its fields in alphabetical order, but for a few that come last."""
        number, self._number = self._number, self._number + 1
        late = {key: fields.pop(key) for key in ("name",) if key in fields}
        ordered = dict(sorted({**fields, "sequence_number": number}.items()))
        data = msgspec.json.encode({**ordered, "type": kind, **late})
        return b"event: %b\ndata: %b\n\n" % (kind.encode(), data)

    def _end_status(self) -> str:
        return "incomplete" if self.ask.finish_reason == "length" else "completed"

    def _item(self, status: str) -> dict[str, Any]:
        is_done = status == "completed"
        if self.ask.tool:
            return {
                "arguments": self.arguments if is_done else "",
                "call_id": self._call_id,
                "name": self.ask.tool,
                "type": "function_call",
                "id": self._item_id,
                "async": None,
                "caller": None,
                "namespace": None,
                "status": status,
            }
        part: dict[str, Any] = {"annotations": [], "text": self.text(0), "type": "output_text", "logprobs": None}
        return {
            "id": self._item_id,
            "content": [part] if is_done else [],
            "role": "assistant",
            "status": status,
            "type": "message",
            "phase": None,
        }

    def _response(self, status: str) -> dict[str, Any]:
        ask, request = self.ask, self.ask.request
        is_done = status != "in_progress"
        return {
            "id": ask.id,
            "created_at": ask.created,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": request.get("instructions"),
            "metadata": request.get("metadata"),
            "model": ask.model,
            "object": "response",
            "output": [self._item("completed")] if is_done else [],
            "parallel_tool_calls": True,
            "temperature": float(request.get("temperature") or 0.0),
            "tool_choice": request.get("tool_choice") or "none",
            "tools": request.get("tools") or [],
            "top_p": 1.0,
            "background": False,
            "max_output_tokens": ask.max_tokens,
            "max_tool_calls": None,
            "previous_response_id": None,
            "prompt": None,
            "reasoning": None,
            "service_tier": "auto",
            "status": status,
            "text": None,
            "top_logprobs": None,
            "truncation": "disabled",
            "usage": self._usage() if is_done else None,
            "user": request.get("user"),
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "kv_transfer_params": ask.kv_params,
            "ec_transfer_params": None,
            "input_messages": None,
            "output_messages": None,
        }

    def _usage(self) -> dict[str, Any]:
        ask = self.ask
        output = ask.completion_tokens
        details = ask.usage.with_details
        return {
            "input_tokens": ask.prompt_tokens,
            "input_tokens_details": {
                "cached_tokens": ask.cached_tokens if details else 0,
                "cache_write_tokens": 0,
                "input_tokens_per_turn": [],
                "cached_tokens_per_turn": [],
            },
            "output_tokens": output,
            "output_tokens_details": {
                "reasoning_tokens": ask.reasoning,
                "tool_output_tokens": 0,
                "output_tokens_per_turn": [],
                "tool_output_tokens_per_turn": [],
            },
            "total_tokens": ask.prompt_tokens + output,
        }

    def body(self) -> bytes:
        """The whole answer, for who asked for no stream: see `Script`."""
        return msgspec.json.encode(self._response(self._end_status()))
