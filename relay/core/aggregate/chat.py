"""Chat completions: ``delta`` pieces become one ``message`` per choice."""

from __future__ import annotations

from typing import Final

import msgspec

from relay.core.aggregate.choices import ChoicesAggregator, add_nulls
from relay.core.aggregate.parts import NULL, First, Indexed, Items, Object, Schema, Text, object_json
from relay.core.framing import Buffer
from relay.core.loose import UNDECODABLE
from relay.core.request import Route


class _Function(Object):
    """A call, whose arguments are a string in every whole answer, though none may have come."""

    __slots__ = ()

    def __init__(self) -> None:
        super().__init__({"name": First, "arguments": Text})

    def members(self) -> dict[str, bytes]:
        found = super().members()
        return found if found.get("arguments", NULL) != NULL else {**found, "arguments": b'""'}


_TOOL_CALL: Final[Schema] = {"id": First, "type": First, "function": _Function}
_DELTA: Final[Schema] = {
    "role": First,
    "content": Text,
    "refusal": Text,
    "reasoning": Text,  # vLLM
    "reasoning_content": Text,  # SGLang, DeepSeek, llama.cpp, older vLLM
    "tool_calls": lambda: Indexed(_TOOL_CALL),
    "function_call": _Function,
    "audio": lambda: Object({"id": First, "transcript": Text, "data": Text}),
    "annotations": Items,
}
_CHOICE: Final[Schema] = {
    "delta": lambda: Object(_DELTA),
    "logprobs": lambda: Object({"content": Items, "refusal": Items}),
    "token_ids": Items,
}

# vLLM's `ChatCompletionResponse` and what is in it (`entrypoints/openai/chat_completion/protocol.py`).
_VLLM_CHOICE: Final = ("logprobs", "stop_reason", "token_ids", "routed_experts")
_VLLM_MESSAGE: Final = ("refusal", "annotations", "audio", "function_call", "reasoning")

_INSTEAD_OF_CONTENT: Final = ("tool_calls", "function_call", "reasoning", "reasoning_content")
_NOTHING: Final = (NULL, b'""', b"[]")


class _Request(msgspec.Struct, gc=False):
    tool_choice: msgspec.Raw = msgspec.Raw(NULL)


_decode_request = msgspec.json.Decoder(_Request).decode


def forces_tool(request: Buffer) -> bool:
    """Whether a request names a tool that must be called, or demands that one is."""
    try:
        choice = bytes(_decode_request(request).tool_choice)
    except UNDECODABLE:
        return False
    return choice == b'"required"' or choice.startswith(b"{")


class ChatAggregator(ChoicesAggregator):
    """The answer of `/v1/chat/completions`."""

    __slots__ = ("_is_tool_forced",)

    route = Route.CHAT
    object_name = b'"chat.completion"'
    choice_schema = _CHOICE
    vllm_nulls = (
        "service_tier", "system_fingerprint", "prompt_logprobs", "prompt_token_ids", "prompt_text",
        "kv_transfer_params", "ec_transfer_params", "metrics",
    )  # fmt: skip

    def __init__(self, max_bytes: int, *, is_tool_forced: bool = False) -> None:
        super().__init__(max_bytes)
        self._is_tool_forced = is_tool_forced

    def _choice(self, choice: Object, is_vllm: bool) -> dict[str, bytes]:
        delta = choice.parts.get("delta")
        pieces = delta.members() if isinstance(delta, Object) else {}
        members = {name: part.json() for name, part in choice.parts.items() if part is not delta}
        members["message"] = object_json(self._message(pieces, is_vllm))
        if is_vllm:
            add_nulls(members, _VLLM_CHOICE)
        return members

    def _message(self, pieces: dict[str, bytes], is_vllm: bool) -> dict[str, bytes]:
        members = {"role": b'"assistant"', "content": NULL, **pieces}
        if is_vllm:
            add_nulls(members, _VLLM_MESSAGE)
        # The first chunk's "" announces the role. It is content where nothing else is, and in vLLM's answer to a forced
        # call (`content=content or ""` in its `chat_completion_full_generator`).
        is_content = members["content"] != b'""' or (is_vllm and self._is_tool_forced)
        if not is_content and any(members.get(name, NULL) not in _NOTHING for name in _INSTEAD_OF_CONTENT):
            members["content"] = NULL
        return members
