"""NIXL: the decoder pulls (vLLM `nixl/pull_scheduler.py`).

The prefiller keeps the prompt's blocks after its answer, and says in ``kv_transfer_params`` where they are. The decoder
gets the client's request and that object, in the very bytes it came in: what is in it is between the two engines, and
differs between their versions. The decoder reads the blocks and tells the prefiller, which frees them; without a
decoder they stay until a timer (30 s of lease; 480 s in older versions).

A handle is for one sequence, so what needs several, or would not read it, is decoded without prefill: see
`relay.core.prefill.obstacle`.
"""

from __future__ import annotations

from random import Random
from typing import Final

import msgspec

from relay.core.connectors.base import (
    KV_PARAMS,
    Connector,
    Endpoint,
    HandOver,
    LegRequest,
    Plan,
    Sequential,
    SplitRequest,
    alone,
)
from relay.core.document import Document
from relay.core.loose import UNDECODABLE
from relay.core.prefill import obstacle, one_token

#: As vLLM's and vllm-ascend's own proxies write it: versions differ in which of the nulls they insist on.
_ASK_FOR_HANDLE: Final = (
    b'{"do_remote_decode":true,"do_remote_prefill":false,'
    b'"remote_engine_id":null,"remote_block_ids":null,"remote_host":null,"remote_port":null}'
)


class _Answer(msgspec.Struct, gc=False):
    kv_transfer_params: msgspec.Raw = msgspec.Raw(b"null")


_decode_answer = msgspec.json.Decoder(_Answer).decode


class Nixl(Connector):
    """vLLM's NixlConnector, in pull mode."""

    name = "nixl"

    def _plan(self, request: SplitRequest, prefill: Endpoint, decode: Endpoint, rng: Random) -> Plan:
        document = Document(request.body)
        in_the_way = obstacle(document)
        if in_the_way is not None:
            return alone(request, in_the_way)

        def hand_over(answer: bytes) -> HandOver:
            handle = handle_of(answer)
            # None takes a client's own away, as `alone` does.
            decode = LegRequest(document.edit({KV_PARAMS: handle}), request.attempt_id)
            return HandOver(decode, is_missing=handle is None, holds_kv=handle is not None)

        body = one_token(document, request.route, {KV_PARAMS: _ASK_FOR_HANDLE})
        return Sequential(LegRequest(body, request.attempt_id), hand_over)


def handle_of(answer: bytes) -> bytes | None:
    """The handle in a prefiller's answer, in the bytes it came in; None: there is none. Never raises."""
    try:
        handle = bytes(_decode_answer(answer).kv_transfer_params)
    except UNDECODABLE:
        return None
    return handle if handle.startswith(b"{") and handle != b"{}" else None
