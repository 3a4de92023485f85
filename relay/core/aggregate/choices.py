"""What chat completions and completions have in common: chunks with choices, then perhaps usage, then ``[DONE]``.

vLLM's body has a null for every field of its models that has no value; its chunks leave most of them out
(``exclude_unset``). Where a stream shows that it is vLLM's, by the ``prompt_token_ids`` of its first chunk, they are
put back. For other engines null is what came as null.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from typing import ClassVar, Final

from relay.core.aggregate.base import Aggregator
from relay.core.aggregate.failure import Truncated
from relay.core.aggregate.parts import (
    NULL,
    First,
    Indexed,
    Members,
    Object,
    Schema,
    decode_members,
    list_json,
    object_json,
)

#: Members of ``UsageInfo`` (vLLM's ``entrypoints/serve/engine/protocol.py``).
_VLLM_USAGE: Final = ("prompt_tokens_details", "completion_tokens_details")


class ChoicesAggregator(Aggregator):
    """Merges chunks of choices."""

    __slots__ = ("_body", "_choices")

    end_mark = "data: [DONE]"
    ends_with_done = True
    #: The ``object`` of a whole answer.
    object_name: ClassVar[bytes]
    choice_schema: ClassVar[Schema]
    #: Members of a whole answer that vLLM has always.
    vllm_nulls: ClassVar[tuple[str, ...]]

    def __init__(self, max_bytes: int) -> None:
        super().__init__(max_bytes)
        self._choices = choices = Indexed(self.choice_schema)
        self._body = Object({"id": First, "created": First, "model": First, "choices": lambda: choices})

    def _take(self, members: Members) -> int:
        return self._body.take_members(members)

    def _result(self) -> bytes:
        choices = list(self._choices.in_order())
        if not choices:
            raise Truncated("the engine's stream ended without a choice")
        if any(choice.member("finish_reason") == NULL for choice in choices):
            raise Truncated("the engine's stream ended before every choice had a finish_reason")
        is_vllm = "prompt_token_ids" in self._body.parts or "prompt_token_ids" in choices[0].parts
        body = self._body.members()
        body["object"] = self.object_name
        body["choices"] = list_json([object_json(self._choice(choice, is_vllm)) for choice in choices])
        if is_vllm:
            add_nulls(body, self.vllm_nulls)
            if "usage" in body:
                body["usage"] = _full_usage(body["usage"])
        return object_json(body)

    @abstractmethod
    def _choice(self, choice: Object, is_vllm: bool) -> dict[str, bytes]:
        """The members of one choice of the answer."""


def add_nulls(members: dict[str, bytes], names: Iterable[str]) -> None:
    """Makes members null that are not there."""
    for name in names:
        members.setdefault(name, NULL)


def _full_usage(usage: bytes) -> bytes:
    members = {name: bytes(raw) for name, raw in decode_members(usage).items()}
    add_nulls(members, _VLLM_USAGE)
    return object_json(members)
