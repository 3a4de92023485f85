"""The usage object of the OpenAI dialects, and in which frames it stands."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:
    from collections.abc import Iterable

    from relay_bench.engine.ask import Ask

#: What ``x-sim-usage`` may name; several are separated by commas.
USAGE_WORDS = frozenset({"null-others", "on-last-choice", "force", "include", "continuous", "details", "none"})

#: The share of the prompt that ``details`` reports as cached, in sixteenths; any fixed number does.
_CACHED_SIXTEENTHS = 8


class UsagePlacement(msgspec.Struct, frozen=True):
    """Where a stream reports usage.

    vLLM's default is nowhere; ``stream_options.include_usage`` adds one event with ``choices: []`` at the end, and
    ``continuous_usage_stats`` a running count on every chunk. OpenAI puts ``usage: null`` on all others. Some engines
    put the numbers on the last choice chunk and send no extra event.
    """

    at_end: bool = False
    on_every_chunk: bool = False
    null_on_others: bool = False
    on_last_choice: bool = False
    #: cached_tokens and reasoning_tokens on the final report.
    with_details: bool = False

    @classmethod
    def of(cls, words: Iterable[str], *, include: bool, continuous: bool) -> UsagePlacement:
        """From the words of ``x-sim-usage`` and what ``stream_options`` asks."""
        words = frozenset(words)
        force = "force" in words
        on_last = "on-last-choice" in words
        wanted = include or force or bool(words & {"include", "null-others", "continuous"})
        at_end = wanted and not on_last and "none" not in words
        # without include_usage, vLLM ignores continuous_usage_stats
        every = at_end and (force or "continuous" in words or (include and continuous))
        return cls(at_end, every, "null-others" in words and at_end, on_last, "details" in words)


def usage_json(
    prompt: int, completion: int, *, cached: int = 0, reasoning: int = 0, with_details: bool = False
) -> bytes:
    """The object of chat and completions streams, in vLLM's order of fields."""
    numbers = b'{"prompt_tokens":%d,"total_tokens":%d,"completion_tokens":%d' % (
        prompt,
        prompt + completion,
        completion,
    )
    if not with_details:
        return numbers + b"}"
    return (
        numbers
        + b',"prompt_tokens_details":{"cached_tokens":%d},"completion_tokens_details":{"reasoning_tokens":%d}}'
        % (
            cached,
            reasoning,
        )
    )


def made_up_cached_tokens(prompt: int) -> int:
    """How many of `prompt` tokens an engine without a prefix cache says were in it."""
    return prompt * _CACHED_SIXTEENTHS // 16


def whole_usage(ask: Ask) -> dict[str, Any]:
    """The usage object of a non-streaming chat or completions answer, which is always there."""
    details = ask.usage.with_details
    return {
        "prompt_tokens": ask.prompt_tokens,
        "total_tokens": ask.prompt_tokens + ask.completion_tokens,
        "completion_tokens": ask.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": ask.cached_tokens} if details else None,
        "completion_tokens_details": {"reasoning_tokens": ask.reasoning * ask.choices} if details else None,
    }
