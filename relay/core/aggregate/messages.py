"""Anthropic's Messages: events that begin, extend and end content blocks, and a message around them."""

from __future__ import annotations

from contextlib import suppress
from typing import Final

import msgspec

from relay.core.aggregate.base import Aggregator
from relay.core.aggregate.failure import Truncated
from relay.core.aggregate.parts import (
    MOST_OBJECTS,
    NULL,
    Items,
    Members,
    Object,
    Schema,
    Text,
    decode_members,
    list_json,
    object_json,
)
from relay.core.loose import UNDECODABLE
from relay.core.request import Route

_MESSAGE: Final[Schema] = {"usage": lambda: Object({})}
#: Members of blocks by the names they have in deltas; ``partial_json`` becomes ``input``.
_BLOCK: Final[Schema] = {"text": Text, "thinking": Text, "partial_json": Text, "citations": Items}
#: An answer without a word has a block all the same: vLLM's ``messages_full_converter``, for clients that expect one.
_EMPTY_BLOCK: Final = b'{"type":"text","text":""}'
#: What vLLM's ids begin with, on this route too.
_VLLM_ID: Final = b'"chatcmpl-'

_decode_text = msgspec.json.Decoder(str).decode
_decode_json = msgspec.json.Decoder(msgspec.Raw).decode


class MessagesAggregator(Aggregator):
    """The answer of `/v1/messages`."""

    __slots__ = ("_blocks", "_message")

    route = Route.MESSAGES
    end_mark = "message_stop"

    def __init__(self, max_bytes: int) -> None:
        super().__init__(max_bytes)
        self._message = Object(_MESSAGE)
        self._blocks: dict[int, Object] = {}

    def _take(self, members: Members) -> int:
        match bytes(members.get("type", NULL)):
            case b'"content_block_delta"':
                return self._take_delta(members)
            case b'"content_block_start"':
                return self._block(members).take(members["content_block"])
            case b'"message_start"':
                return self._message.take(members["message"])
            case b'"message_delta"':
                others = {name: raw for name, raw in members.items() if name not in ("type", "delta")}
                return self._message.take(members["delta"]) + self._message.take_members(others)
            case b'"message_stop"':
                self.is_complete = True
        return 0

    def _take_delta(self, members: Members) -> int:
        delta = decode_members(members["delta"])
        kind = delta.pop("type", None)
        if kind is not None and bytes(kind) == b'"citations_delta"':
            delta = {"citations": msgspec.Raw(b"[%b]" % bytes(delta["citation"]))}
        return self._block(members).take_members(delta)

    def _block(self, members: Members) -> Object:
        index = int(bytes(members["index"]))
        if index not in self._blocks:
            if len(self._blocks) >= MOST_OBJECTS:
                raise ValueError(f"an answer of more than {MOST_OBJECTS} blocks")
            self._blocks[index] = Object(_BLOCK)
        return self._blocks[index]

    def _result(self) -> bytes:
        if self._message.member("stop_reason") == NULL:
            raise Truncated("the engine's stream ended without a stop_reason")
        blocks = [_block_json(self._blocks[key]) for key in sorted(self._blocks)]
        members = self._message.members()
        if members.get("id", b"").startswith(_VLLM_ID):
            members = {name: value for name, value in members.items() if value != NULL}
        return object_json({**members, "content": list_json(blocks or [_EMPTY_BLOCK])})


def _block_json(block: Object) -> bytes:
    members = block.members()
    if "partial_json" in members:
        text = _decode_text(members.pop("partial_json"))
        # Without arguments, or cut by the limit of tokens: what the block began with, an empty object.
        with suppress(*UNDECODABLE):
            members["input"] = bytes(_decode_json(text))
    return object_json(members)
