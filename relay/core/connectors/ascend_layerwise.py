"""vllm-ascend layer by layer: the decoder is asked first (`kv_p2p/mooncake_layerwise_connector.py`).

The decoder makes room for the prompt, then POSTs where that is to the ``metaserver`` it was told of, the relay. Its
message becomes the prefiller's ``kv_transfer_params`` as it is, and the prefiller pushes each layer as it is computed.
Nothing is ever held for a decoder that does not come.

Both engines go by the same request id, as the prefiller reports "done" under its own. The relay's ids end in 32 random
digits, by which a callback finds its request, whatever the API put around them (``chatcmpl-…``, ``cmpl-…-0``); the
client's own id stands before them, for the engines' logs. The engine cuts 9 characters off its inner id, so its
VLLM_DISABLE_REQUEST_ID_RANDOMIZATION must not be set.

Several sequences would each call back, and the prefiller cannot be told of more than one: decoded without prefill.
"""

from __future__ import annotations

import re
from random import Random
from typing import Final

import msgspec

from relay.core.connectors.base import (
    KV_PARAMS,
    Connector,
    DecodeFirst,
    Endpoint,
    LegRequest,
    Plan,
    SplitRequest,
    alone,
    unique,
)
from relay.core.document import Document
from relay.core.loose import UNDECODABLE
from relay.core.prefill import obstacle, one_token
from relay.core.request import Route

_KEY: Final = re.compile(r"(?<![0-9a-f])[0-9a-f]{32}(?![0-9a-f])")
_encode = msgspec.json.Encoder().encode


class _Message(msgspec.Struct, gc=False):
    request_id: str


_decode_message = msgspec.json.Decoder(_Message).decode


class AscendLayerwise(Connector):
    """vllm-ascend's MooncakeLayerwiseConnector."""

    name = "ascend_layerwise"
    calls_back = True
    may_recompute = True

    def callback_key(self, message: bytes) -> str | None:
        """The random part of the id that the decoder names."""
        try:
            found = _KEY.findall(_decode_message(message).request_id)
        except UNDECODABLE:
            return None
        return found[-1] if found else None

    def _plan(self, request: SplitRequest, prefill: Endpoint, decode: Endpoint, rng: Random) -> Plan:
        # The Responses API of vLLM does not go by X-Request-Id: the two legs could not be the same request.
        document = Document(request.body)
        in_the_way = "route" if request.route is Route.RESPONSES else obstacle(document)
        if in_the_way is not None:
            return alone(request, in_the_way)
        key = unique(rng)
        id_ = f"{request.attempt_id}-{key}"
        room = {"do_remote_decode": False, "do_remote_prefill": True, "metaserver": request.callback_url}
        return DecodeFirst(
            decode=LegRequest(document.edit({KV_PARAMS: _encode(room)}), id_),
            key=key,
            prefill=lambda message: LegRequest(one_token(document, request.route, {KV_PARAMS: message}), id_),
        )
