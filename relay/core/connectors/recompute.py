"""A decoder of vllm-ascend that gave a request up (`vllm_ascend/core/recompute_scheduler.py`).

Short of memory, it drops a running request and ends its answer with ``finish_reason`` ``stop`` and ``stop_reason``
``recomputed``: an answer cut in the middle that looks like a whole one, meant for the proxy to send again with the text
so far appended to the prompt. That breaks chats, tool calls and reasoning (vllm-ascend#13466), and needs the token ids
to be right. So the relay says what it is: an error (`relay.errors.UpstreamRecomputed`), after which a client may ask
again.
"""

from __future__ import annotations

from typing import Final

import msgspec

from relay.core.framing import Buffer
from relay.core.loose import UNDECODABLE

#: In every event that can say so.
MARK: Final = b'"recomputed"'

_MARK: Final = "recomputed"


class _Choice(msgspec.Struct, gc=False):
    stop_reason: str | int | None = None


class _Delta(msgspec.Struct, gc=False):
    stop_sequence: str | None = None


class _Event(msgspec.Struct, gc=False):
    choices: list[_Choice] = []
    delta: _Delta | None = None
    stop_sequence: str | None = None


class _Stops(msgspec.Struct, gc=False):
    stop: str | list[str] | None = None
    stop_sequences: list[str] | None = None


_decode_event = msgspec.json.Decoder(_Event).decode
_decode_stops = msgspec.json.Decoder(_Stops).decode


def is_recomputed(event: Buffer, request: Buffer) -> bool:
    """Whether `event`, the JSON of a frame or of a whole answer, says that the decoder gave `request` up. Never raises.

    A client may itself have asked to stop at this word; then it has.
    """
    if MARK not in event:
        return False
    try:
        found = _decode_event(event)
        if not _says_so(found):
            return False
        stops = _decode_stops(request)
    except UNDECODABLE:
        return False
    asked = [stops.stop] if isinstance(stops.stop, str) else stops.stop or []
    return _MARK not in [*asked, *(stops.stop_sequences or [])]


def _says_so(event: _Event) -> bool:
    # Anthropic's Messages has it where vLLM's adapter puts a stop_reason that is a text.
    ends = [choice.stop_reason for choice in event.choices]
    return _MARK in [*ends, event.stop_sequence, event.delta and event.delta.stop_sequence]
