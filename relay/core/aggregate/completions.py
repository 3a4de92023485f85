"""Completions: pieces of ``text``, and lists of log probabilities side by side."""

from __future__ import annotations

from typing import Final

import msgspec

from relay.core.aggregate.choices import ChoicesAggregator, add_nulls
from relay.core.aggregate.parts import Items, Object, Schema, Text
from relay.core.framing import Buffer
from relay.core.loose import UNDECODABLE
from relay.core.request import Route

_LOGPROBS: Final[Schema] = {"tokens": Items, "token_logprobs": Items, "top_logprobs": Items, "text_offset": Items}
_CHOICE: Final[Schema] = {"text": Text, "logprobs": lambda: Object(_LOGPROBS), "token_ids": Items}

#: Of vLLM's ``CompletionResponseChoice`` (``entrypoints/openai/completion/protocol.py``).
_VLLM_CHOICE: Final = (
    "logprobs", "stop_reason", "token_ids", "prompt_logprobs", "prompt_token_ids", "routed_experts",
)  # fmt: skip


class _Request(msgspec.Struct, gc=False):
    return_token_ids: bool | None = None


_decode_request = msgspec.json.Decoder(_Request).decode


def wants_token_ids(request: Buffer) -> bool:
    """Whether a request asks for the ids of tokens."""
    try:
        return _decode_request(request).return_token_ids is True
    except UNDECODABLE:
        return False


class CompletionsAggregator(ChoicesAggregator):
    """The answer of `/v1/completions`."""

    __slots__ = ("_wants_token_ids",)

    route = Route.COMPLETIONS
    object_name = b'"text_completion"'
    choice_schema = _CHOICE
    vllm_nulls = ("service_tier", "system_fingerprint", "kv_transfer_params", "ec_transfer_params", "metrics")

    def __init__(self, max_bytes: int, *, wants_token_ids: bool = False) -> None:
        super().__init__(max_bytes)
        self._wants_token_ids = wants_token_ids

    def _choice(self, choice: Object, is_vllm: bool) -> dict[str, bytes]:
        members = choice.members()
        if is_vllm:
            if not self._wants_token_ids:
                members.pop("prompt_token_ids", None)  # the stream of an echo has them all the same
            add_nulls(members, _VLLM_CHOICE)
        return members
