"""What an answer says, step by step, before anything is known of its framing: the common part of the four dialects."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar, Final

import msgspec

from relay_bench.engine.text import TOOL_ARGUMENTS, encoded_word, stamp

if TYPE_CHECKING:
    from collections.abc import Iterator

    from relay_bench.engine.ask import Ask

#: What the recorded engine called itself.
FINGERPRINT: Final = b"vllm-0.32.0-c96de445"

#: What vLLM says in a stream when its engine process has died.
ENGINE_DIED: Final = "EngineCore encountered an issue. See stack trace (above) for the root cause."

#: The end mark of the OpenAI dialects.
DONE: Final = b"data: [DONE]\n\n"


class Script(ABC):
    """One answer in one dialect. A frame is the raw bytes of one event, its blank line included."""

    #: How the frame begins that ends a complete stream.
    end_mark: ClassVar[bytes] = DONE

    def __init__(self, ask: Ask) -> None:
        self.ask = ask

    @property
    def step_count(self) -> int:
        """How many steps there are; an answer without tokens has one, which ends it."""
        return max(self.ask.tokens, 1)

    @abstractmethod
    def steps(self) -> Iterator[list[bytes]]:
        """The frames of each decode step, in order; the last step holds what ends the stream, too."""

    @abstractmethod
    def body(self) -> bytes:
        """The non-streaming answer."""

    @abstractmethod
    def content_frame(self, encoded: bytes) -> bytes:
        """A frame of content; `encoded` stands inside a JSON string."""

    @abstractmethod
    def error_frames(self) -> list[bytes]:
        """What a stream ends with whose engine died under it, or has lost its KV cache."""

    def token(self, position: int, choice: int) -> bytes:
        """The token at `position`, as it stands inside a JSON string."""
        clock_us = self.ask.clock_us
        return encoded_word(position, choice) if clock_us is None else stamp(position, clock_us())

    def text(self, choice: int, start: int = 0, end: int | None = None) -> str:
        """The whole text of a choice, or of its tokens from `start` to before `end`."""
        positions = range(start, self.ask.tokens if end is None else end)
        return msgspec.json.decode(b'"' + b"".join(encoded_word(i, choice) for i in positions) + b'"', type=str)

    @property
    def error(self) -> str:
        """The message of `error_frames`."""
        return self.ask.error or ENGINE_DIED

    @property
    def arguments(self) -> str:
        """The arguments of the tool call."""
        return "".join(TOOL_ARGUMENTS)


def json_string(value: str) -> bytes:
    """`value` as a JSON string, quotes included."""
    return msgspec.json.encode(value)


def chunk_start(ask: Ask, kind: str) -> bytes:
    """How each chunk of a chat or completions stream begins, up to its choices."""
    return b'data: {"id":%b,"object":%b,"created":%d,"model":%b,"choices":[' % (
        json_string(ask.id),
        json_string(kind),
        ask.created,
        json_string(ask.model),
    )


def openai_error_frames(message: str) -> list[bytes]:
    """vLLM's error inside a stream: made by Python's json, hence the blanks after the colons; then the end mark."""
    error = b'{"error": {"message": %b, "type": "InternalServerError", "param": null, "code": 500}}'
    return [b"data: %b\n\n" % (error % json_string(message)), DONE]
