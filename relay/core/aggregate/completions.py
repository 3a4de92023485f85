"""Completions: pieces of ``text``, and lists of log probabilities side by side."""

from __future__ import annotations

from typing import Final

from relay.core.aggregate.choices import ChoicesAggregator, add_nulls
from relay.core.aggregate.parts import Items, Object, Schema, Text
from relay.core.request import Route

_LOGPROBS: Final[Schema] = {"tokens": Items, "token_logprobs": Items, "top_logprobs": Items, "text_offset": Items}
_CHOICE: Final[Schema] = {"text": Text, "logprobs": lambda: Object(_LOGPROBS), "token_ids": Items}

#: Of vLLM's ``CompletionResponseChoice`` (``entrypoints/openai/completion/protocol.py``).
_VLLM_CHOICE: Final = (
    "logprobs", "stop_reason", "token_ids", "prompt_logprobs", "prompt_token_ids", "routed_experts",
)  # fmt: skip


class CompletionsAggregator(ChoicesAggregator):
    """The answer of `/v1/completions`."""

    __slots__ = ()

    route = Route.COMPLETIONS
    object_name = b'"text_completion"'
    choice_schema = _CHOICE
    vllm_nulls = ("service_tier", "system_fingerprint", "kv_transfer_params", "ec_transfer_params", "metrics")

    def _choice(self, choice: Object, is_vllm: bool) -> dict[str, bytes]:
        members = choice.members()
        if is_vllm:
            add_nulls(members, _VLLM_CHOICE)
        return members
