"""P2P NCCL: the prefiller pushes (vLLM `p2p/p2p_nccl_connector.py`, gone from vLLM 0.32).

Nothing is in the bodies. Both engines read each other's socket from the request id, and name the tensors by it, so both
legs carry one id of this form, and no client's: an id used twice would mix two requests' tensors. It may hold no colon
behind the addresses, as the engine takes the last ``:DIGITS`` for a port.

Several sequences are no obstacle: their ids are numbered alike on both sides. On the other side there is no decoding
alone: a decoder waits for tensors of every request, without a limit. The versions that append random characters to
request ids need ``VLLM_DISABLE_REQUEST_ID_RANDOMIZATION=1`` on both engines, or the two never meet.
"""

from __future__ import annotations

import re
from random import Random
from typing import Final

import msgspec

from relay.core.connectors.base import (
    Connector,
    Endpoint,
    HandOver,
    LegRequest,
    Plan,
    Role,
    Sequential,
    SplitRequest,
    host_and_port,
    unique,
)
from relay.core.document import Change, Document
from relay.core.prefill import one_token
from relay.core.request import Route

#: vLLM's ``kv_port``; a further rank listens one higher.
DEFAULT_KV_PORT: Final = 14579

_ADDRESS = re.compile(r"(?:[A-Za-z0-9.-]+|\[[0-9A-Fa-f:.]+\]):[0-9]{1,5}")


class P2pNccl(Connector):
    """vLLM's P2pNcclConnector."""

    name = "p2p_nccl"

    def complete(self, endpoint: Endpoint, role: Role) -> Endpoint:
        """Fills in where the engine's sockets listen, at their default port."""
        address = endpoint.kv_address
        if not address:
            if not endpoint.host:
                raise ValueError('has no host to find its KV sockets on; give kv_address = "HOST:PORT"')
            address = host_and_port(endpoint.host, DEFAULT_KV_PORT)
        if not _ADDRESS.fullmatch(address):
            # An underscore would end the address too early where an engine reads it from an id.
            raise ValueError(f'has a kv_address, "{address}", that no request id can carry; allowed: HOST:PORT')
        return msgspec.structs.replace(endpoint, kv_address=address)

    def _plan(self, request: SplitRequest, prefill: Endpoint, decode: Endpoint, rng: Random) -> Plan:
        pair = f"___prefill_addr_{prefill.kv_address}___decode_addr_{decode.kv_address}"
        id_ = f"{pair}_{unique(rng)}"
        named = _names(request.route, id_)
        document = Document(request.body)
        body = document.edit(named) if named else request.body
        ready = HandOver(LegRequest(body, id_), holds_kv=True)
        first = LegRequest(one_token(document, request.route, named), id_)
        return Sequential(first, lambda _: ready, binds_decoder=True)


def _names(route: Route, id_: str) -> dict[str, Change]:
    # The Responses API of vLLM takes its id from the body, and from nowhere else.
    return {"request_id": b'"%b"' % id_.encode()} if route is Route.RESPONSES else {}
