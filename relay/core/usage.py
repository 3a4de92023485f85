"""How many tokens an exchange took, as the engine counts them, in one form for all dialects.

OpenAI's chat and completions say ``prompt_tokens`` and ``completion_tokens``, the Responses API and Anthropic's
Messages ``input_tokens`` and ``output_tokens``. The cached part of the prompt is inside the first three's prompt count
and beside the fourth's, which counts only what was neither read from the cache nor written to it. Here it is always
inside.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Final

import msgspec

from relay.core.loose import decode_or_none, first_known
from relay.core.metrics import TOKEN_KINDS

#: Most tokens believed; a usage object that says more, or less than none, counts as absent. Metrics are floats, which
#: are exact up to here.
MOST_TOKENS: Final = 1 << 53

_Count = Annotated[int, msgspec.Meta(ge=0, le=MOST_TOKENS)]


class Usage(msgspec.Struct, frozen=True, gc=False):
    """Tokens of one exchange; None: the engine did not say."""

    prompt_tokens: int | None = None  #: of the prompt, cached ones included
    cached_tokens: int | None = None  #: those of the prompt that came from the engine's prefix cache
    completion_tokens: int | None = None  #: generated, reasoning included
    reasoning_tokens: int | None = None
    total_tokens: int | None = None

    def by_kind(self) -> Iterator[tuple[str, int]]:
        """The counts that are known and not 0, each under its kind: of `relay.core.metrics.TOKEN_KINDS`."""
        counts = (self.prompt_tokens, self.cached_tokens, self.completion_tokens, self.reasoning_tokens)
        return ((kind, number) for kind, number in zip(TOKEN_KINDS, counts, strict=True) if number)


class _Details(msgspec.Struct, gc=False):
    cached_tokens: _Count | None = None
    reasoning_tokens: _Count | None = None


class WireUsage(msgspec.Struct, gc=False):
    """The usage object of all four dialects at once; their names do not collide."""

    prompt_tokens: _Count | None = None
    completion_tokens: _Count | None = None
    total_tokens: _Count | None = None
    prompt_tokens_details: _Details | None = None
    completion_tokens_details: _Details | None = None
    input_tokens: _Count | None = None
    output_tokens: _Count | None = None
    input_tokens_details: _Details | None = None
    output_tokens_details: _Details | None = None
    cache_read_input_tokens: _Count | None = None
    cache_creation_input_tokens: _Count | None = None


class _Answer(msgspec.Struct, gc=False):
    usage: WireUsage | None = None


_ANSWER: Final = msgspec.json.Decoder(_Answer)


def cached_tokens(answer: bytes) -> int | None:
    """How much of the prompt an engine had in its cache, as its whole JSON answer says; None: it does not."""
    if b'"cache' not in answer:  # as nearly always: vLLM says so only where it is asked to
        return None
    found = decode_or_none(_ANSWER, answer)
    if found is None or found.usage is None:
        return None
    return _cached(found.usage)


def updated(before: Usage | None, wire: WireUsage) -> Usage | None:
    """`before` with the engine's newest figures; what a later object leaves out (``message_delta`` may) stays."""
    old = before or Usage()
    prompt = wire.prompt_tokens
    if prompt is None and wire.input_tokens is not None:
        # vLLM follows Anthropic in this (vllm#40912); on Responses neither of the two cache fields exists.
        prompt = wire.input_tokens + (wire.cache_read_input_tokens or 0) + (wire.cache_creation_input_tokens or 0)
    prompt = first_known(prompt, old.prompt_tokens)
    completion = first_known(wire.completion_tokens, wire.output_tokens, old.completion_tokens)
    outputs = wire.completion_tokens_details or wire.output_tokens_details or _Details()
    total = wire.total_tokens
    if total is None and prompt is not None and completion is not None:
        total = prompt + completion
    if prompt is None and completion is None and total is None:
        return before
    return Usage(
        prompt,
        first_known(_cached(wire), old.cached_tokens),
        completion,
        first_known(outputs.reasoning_tokens, old.reasoning_tokens),
        total,
    )


def _cached(wire: WireUsage) -> int | None:
    details = wire.prompt_tokens_details or wire.input_tokens_details
    return first_known(details.cached_tokens if details else None, wire.cache_read_input_tokens)
